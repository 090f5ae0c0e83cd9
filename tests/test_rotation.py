"Keyed rotations and sealed recovery: closed forms, an independent second derivation, grids of bad input, hostile capsules"
import hashlib, warnings
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from deidnb.core import AssetError, ConfigError, Guarantee, InputError, OutputError
from deidnb.identity import rotation as rot, sealed
from deidnb.identity.rotation import (BookRotation, FaceIsometry, FaceShape, Key, KeyStream, KeyedIsometry, PlaneRotation, WeakPassword, complex_structure, hkdf, level_angle, library_id, orthogonal_part,
    password_space, random_reference, reference, reference_cosine, reference_library, rotate, rotate_back, stretch, unit_rows)

def people(n=64, d=128, seed=0): return unit_rows(np.random.default_rng(seed).normal(size=(n, d)))
def cosines(a, b): return (np.asarray(a, float)*np.asarray(b, float)).sum(-1)
K, W = Key.draw(1), Key.draw(2)
LIB, USERS = reference_library()[1::3], reference_library()[::12][:500]
seeds, angles = st.integers(0, 2**31), st.floats(1, 179).filter(lambda t: abs(t-90) > 1)

# -- keys ---------------------------------------------------------------------------------------------------------------
def test_scrypt_published_vector():
    # RFC 7914, section 12: scrypt("pleaseletmein", "SodiumChloride", N=16384, r=8, p=1), first 32 bytes; the salt has 14 bytes, so it goes through the table by hand
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
    assert Scrypt(salt=b'SodiumChloride', length=32, n=16384, r=8,
                  p=1).derive(b'pleaseletmein').hex() == '7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2'
    assert stretch('pleaseletmein', bytes(16), 1) == hashlib.scrypt(b'pleaseletmein', salt=bytes(16), n=2**15, r=8, p=1,
        maxmem=2**26, dklen=32)

def test_hkdf_by_hand():
    import hmac
    prk = hmac.new(bytes(32), b'secret', 'sha256').digest()
    assert hkdf(b'secret', 'x') == hmac.new(prk, b'deidnb x\x01', 'sha256').digest() and hkdf(b'secret',
        'x') != hkdf(b'secret', 'y') != hkdf(b'secret', 'y', salt=b's')

def test_stream_is_fixed_for_ever():
    "Recorded from this code: a change here would make every protected picture irrecoverable"
    s = KeyStream(hkdf(bytes(32), 'recorded'))
    assert np.allclose(s.normal(4), [0.07504695258534963, 0.17238417843828352, -0.8866361818201635,
                                     -0.13772536414317949], atol=1e-9)
    key = Key('recorded', bytes(16), 1, warn=False)
    assert key.secret('recorded').hex()[:16] == '3a722b32e19acba4' and key.stream('recorded').choice(1000, 4) == [429,
        657, 485, 576]
    assert np.allclose(complex_structure(Key.draw(0).stream('isometry'), 128)[0, :4], [0, 0.22524505861405636,
            0.08931436669681611, -0.10987851701746465], atol=1e-9)

def test_stream_is_uniform():
    from scipy import stats
    s = KeyStream(bytes(range(32)))
    # fixed streams
    assert stats.kstest(s.uniform(50_000), 'uniform').pvalue > 1e-4 and stats.kstest(s.normal(50_001), 'norm').pvalue > 1e-4
    n = np.bincount([i for _ in range(3000) for i in s.choice(7, 3)], minlength=7); assert stats.chisquare(n).pvalue > 1e-4
    assert s.normal(3, 5).shape == (3, 5) and s.choice(1, 1) == [0]

def test_choice_rejects_what_would_bias_it(monkeypatch):
    s, words = KeyStream(bytes(32)), iter([2**64-1, 2**64-2, 5, 5, 6]) # 2^64 mod 7 = 2: the two highest words are not used
    monkeypatch.setattr(s, 'words', lambda n: np.array([next(words)], np.uint64)); assert s.choice(7, 2) == [5, 6]

def test_password_typed_on_another_keyboard():
    assert stretch('fin\u00e9', bytes(16), 1) == stretch('\ufb01ne\u0301', bytes(16), 1) != stretch('fine', bytes(16), 1)

def test_password_and_salt_and_version_all_matter():
    base = stretch('a password', bytes(16), 1)
    assert len({base, stretch('a passwore', bytes(16), 1), stretch('a password', b'\1' + bytes(15), 1),
                stretch('a password', bytes(16), 2)}) == 4
    assert stretch(b'a password', bytes(16), 1) == base

@pytest.mark.parametrize('bad, say', [('', 'password'), ('   ', 'password'), (b'', 'password'), (12345, 'password'),
                                      (None, 'password'), ('x'*2000, 'password')])
def test_bad_passwords(bad, say):
    with pytest.raises(ConfigError, match=say): Key(bad, bytes(16), 1)

@pytest.mark.parametrize('version', [0, 4, '1', None, True])
def test_unknown_key_version(version):
    with pytest.raises(ConfigError, match='key version'): Key('a password', bytes(16), version)

@pytest.mark.parametrize('salt', [b'', bytes(15), bytes(17), 'sixteen letters!', 7])
def test_bad_salt(salt):
    with pytest.raises(ConfigError, match='salt'): Key('a password', salt, 1)

def test_pin_warns_with_its_cost_and_a_phrase_does_not():
    with pytest.warns(WeakPassword, match='1e.06 passwords.*hours'): pin = Key('000000', bytes(16), 1)
    assert pin.seconds > 0
    with warnings.catch_warnings(): warnings.simplefilter('error'); Key('orbit velvet canyon thirteen', bytes(16), 1)
    assert password_space('123456') == 1e6 and password_space('aB3') == 62**3 and password_space('a b') == 59**3

def test_key_hides_its_secret():
    assert K._secret.hex() not in repr(K) + str(vars(Key)) and Key.draw(1)._secret == K._secret != W._secret
    assert K.secret('capsule', 64)[:32] not in (K.secret('reference'), K.secret('isometry'), K._secret)

# -- codes --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('bad, say', [(np.full(128, np.nan), 'NaN'), (np.full(128, np.inf), 'NaN'), (np.zeros(128), 'zero'), (np.ones(128), 'not 1'), (people(3, 64), 'dimension 64'),
    (np.ones((2, 2, 128)), 'shape'), (np.float64(1), 'shape'), ('face', 'numbers'), (np.r_[people(2), np.zeros((1, 128))], 'zero')])
@pytest.mark.parametrize('make', [lambda: BookRotation(K, 70), lambda: PlaneRotation(K, 70), lambda: KeyedIsometry(K,
            70), lambda: FaceIsometry(K, 70)])
def test_bad_codes_name_the_argument(make, bad, say):
    psi = make()
    with pytest.raises(InputError, match=f'z: .*{say}'): psi(bad)
    if say != 'not 1' or psi.unit:
        with pytest.raises(InputError, match=f'z_new: .*{say}'): psi.invert(bad)

@pytest.mark.parametrize('cls', [BookRotation, PlaneRotation, KeyedIsometry, FaceIsometry])
@pytest.mark.parametrize('kw, say', [(dict(theta=0), 'theta'), (dict(theta=180), '-z'), (dict(theta=-30), 'theta'), (dict(theta=np.nan), 'theta'), (dict(theta='70'), 'theta'), (dict(), 'theta'),
    (dict(theta=70, level=1), 'theta'), (dict(level=10), 'level'), (dict(level=np.nan), 'level')])
def test_bad_angles(cls, kw, say):
    with pytest.raises(ConfigError, match=say): cls(K, **kw)
    with pytest.raises(ConfigError, match='key'): cls('123456', 70)

def test_other_bad_arguments():
    for f, say in ((lambda: KeyedIsometry(K, 70, dim=127), 'dim'), (lambda: KeyedIsometry(K, 70, dim=0), 'dim'), (lambda: BookRotation(K, 70, toward='x'), 'toward'), (lambda: PlaneRotation(K, 70, orient='x'), 'orient'),
                   (lambda: reference(K, k=0), 'k'), (lambda: reference(K, people(5), k=6), 'k'), (lambda: reference(K, np.ones((5, 128))), 'library'), (lambda: KeyedIsometry(K, 70)(people(), rng=3), 'rng'),
                   (lambda: FaceShape(block=3), 'block'), (lambda: FaceShape(people(100)), 'library'), (lambda: FaceIsometry(K, 70, shape=people()), 'shape'), (lambda: BookRotation(K, 90), '90'), (lambda: PlaneRotation(K, 90, orient='reference'), '90'), (lambda: KeyedIsometry(K, 70, reversible=False).invert(people()), 'reversible')):
        with pytest.raises((ConfigError, InputError), match=say): f()

# -- equations ----------------------------------------------------------------------------------------------------------
def test_levels(): assert [level_angle(d) for d in (0, 1, 2, 3, 3.9, 4, 9)] == [70, 75, 80, 85, 89.5, 95, 120]

@settings(max_examples=60, deadline=None)
@given(seeds, angles, st.floats(.1, 20))
def test_printed_equations_invert_each_other(seed, theta, size):
    z, r = people(4, 16, seed), people(1, 16, seed+1)[0]*size; x = rotate(z, r, theta)
    # eq. 6.19 has a pole there
    A = cosines(z, r)[:, None]; t = np.deg2rad(theta); gap = np.abs(np.cos(t) - A*np.sin(t))
    ok = (gap > 1e-2)[:, 0]
    assert np.allclose(reference_cosine(x, r, theta), A, atol=1e-6*size**2) and np.allclose(rotate_back(x, r,
            theta)[ok], z[ok], atol=1e-4*size)
    assert np.allclose(cosines(z, orthogonal_part(z, r)), 0, atol=1e-12*size) and np.allclose(cosines(z, x), np.cos(t))

def test_printed_inverse_fails_on_unit_codes_and_variants_do_not():
    z, lib = USERS[:200], LIB
    back = lambda p: cosines(z, p.recovered(unit_rows(p(z))))
    assert back(BookRotation(K, 80, library=lib, reversible=False)).min() < .5
    for p in (PlaneRotation(K, 80, library=lib), KeyedIsometry(K, 80)): assert back(p).min() > .999

def test_recovery_at_90_degrees():
    z = people(200)
    for p in (PlaneRotation(K, 90, toward='key'), KeyedIsometry(K, 90)): assert cosines(z, p.invert(p(z))).min() > .999
    # a coin for the lost sign
    p = PlaneRotation(K, 90, orient='reference', reversible=False, toward='key')
    assert .3 < (cosines(z, p.recovered(p(z))) > .999).mean() < .7

@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(1, 179), st.sampled_from(['plane', 'isometry']), st.sampled_from([4, 32, 128]))
def test_variants_are_unit_at_theta_and_reversible(seed, theta, kind, d):
    z = people(8, d, seed); key = Key.draw(seed)
    p = PlaneRotation(key, theta, dim=d, toward='key', reversible=False) if kind == 'plane' else KeyedIsometry(key, theta, dim=d)
    x = p(z)
    assert x.dtype == np.float32 and np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6) and np.allclose(cosines(z, x),
        np.cos(np.deg2rad(theta)), atol=1e-6)
    got = cosines(z, p.recovered(x)); assert (got > .999).all() if kind == 'isometry' or d == 128 else (got > .999).mean() >= .5
    assert p(z[0]).shape == (d,) and np.allclose(p(z[0]), x[0], atol=1e-6)

def test_plane_rotation_by_another_route():
    "The same map as a product of two reflections in the plane of z and r"
    z = people(20); p = PlaneRotation(K, 50, toward='key'); r, q, t = p.reference, p.side, np.deg2rad(50)
    for a in z:
        e = a - (a @ r)*r; e /= np.linalg.norm(e); e = e if e @ q > 0 else -e
        u, v = r, np.cos(-t/2)*r + np.sin(-t/2)*e # reflect at u, then at v: a rotation by twice their angle
        b = a - 2*(a @ u)*u; assert np.allclose(p(a), b - 2*(b @ v)*v, atol=1e-6)

def test_isometry_algebra():
    for d in (2, 8, 64):
        J = complex_structure(KeyStream(bytes(32)), d); assert np.allclose(J @ J, -np.eye(d)) and np.allclose(J.T, -J)
    z = people(50); p = KeyedIsometry(K, 75); x = p(z)
    assert np.allclose(x @ x.T, z @ z.T, atol=1e-6)
    from scipy.linalg import expm
    assert np.allclose(p.matrix, expm(np.deg2rad(75)*p.J)) # an independent second derivation
    noise = unit_rows(x + .1*people(50, seed=9)); assert np.allclose(cosines(p.invert(noise), z), cosines(noise, x), atol=1e-6)

def test_isometry_is_uniform():
    "J z is uniform in the sphere orthogonal to z: its first free coordinate has the law of a uniform unit vector in d-1 dimensions"
    from scipy import stats
    d, z = 8, np.eye(8)[0]; y = np.array([complex_structure(Key.draw(i).stream('isometry'), d) @ z for i in range(2000)])
    assert np.abs(y[:, 0]).max() < 1e-12 and stats.kstest((y[:, 3]+1)/2, stats.beta((d-2)/2, (d-2)/2).cdf).pvalue > 1e-4

@pytest.mark.parametrize('theta', [30, 90, 120])
@pytest.mark.parametrize('block', [2, 14, 126])
def test_face_isometry_algebra(theta, block):
    from scipy.linalg import expm
    shape = FaceShape(LIB, block); p = FaceIsometry(K, theta, shape=shape); z = USERS[:100]; x = p(z)
    assert np.allclose(p.matrix, expm(np.deg2rad(theta)*p.J)) and np.allclose(p.matrix @ p.matrix.T,
        np.eye(128)) and np.allclose(p.J @ p.J, -shape.moving)
    f = 1 - cosines(z @ shape.moving, z); c = np.cos(np.deg2rad(theta))
    assert np.allclose(cosines(z, x), f + (1-f)*c, atol=1e-6) and np.allclose(cosines(z, p.flip(x)), f - (1-f)*c,
        atol=1e-6) and cosines(z, p.invert(x)).min() > .99999
    assert p.flipped_cosine == pytest.approx(np.mean(1 - cosines(LIB @ shape.moving, LIB))*(1-abs(c)) + abs(c), abs=1e-6)

def test_face_isometry_keeps_the_shape_of_faces_and_uniform_does_not():
    "Variance along the library's axes: kept in the first, levelled in the second"
    shape = FaceShape(LIB); axes = np.hstack(shape.blocks); spread = lambda x: (x @ axes).var(0)
    near = lambda x: np.median((x @ LIB.T).max(1))
    face, plain = FaceIsometry(K, 90, shape=shape)(USERS), KeyedIsometry(K, 90)(USERS); v = spread(USERS)
    assert np.corrcoef(v, spread(face))[0, 1] > .8 > .5 > abs(np.corrcoef(v, spread(plain))[0,
            1]) and near(face) > near(USERS) - .15 > near(plain) + .1
    wrong = FaceIsometry(W, 90, shape=shape).invert(face); strangers = (USERS @ LIB.T).ravel()
    assert near(wrong) > near(USERS) - .15 and abs(cosines(USERS, wrong).mean() - strangers.mean()) < .1

def test_library_id_tells_libraries_apart():
    lib = reference_library(); assert library_id() == library_id(lib.astype(np.float32)) and len(library_id()) == 16
    other = lib.copy(); other[7] = other[8]; assert library_id(other) != library_id() != library_id(lib[:-1])

def test_libraries_of_key_versions_are_fixed_for_ever():
    "Other people in these files would make every protected code irrecoverable"
    assert [library_id(reference_library(v)) for v in (1, 2, 3)] == ['025e6ccf32f5f7e9', '025e6ccf32f5f7e9',
        '2a867d7ab866fb4f'] and set(rot.LIBRARIES) == set(rot.KEY_VERSIONS) and rot.KEY_VERSION == max(rot.KEY_VERSIONS)
    with pytest.raises(ConfigError, match='key version'): reference_library(17)
    with pytest.raises(AssetError, match='come back'): rot._library('lds', 'people.seen_z', 'of somebody else')

@pytest.mark.parametrize('version', [1, 2, 3])
def test_a_key_brings_its_library(version, monkeypatch):
    monkeypatch.setattr(rot, 'stretch', lambda password, salt, version: bytes(32))
    key = Key('orbit velvet canyon thirteen', bytes(16), version); lib = reference_library(version)
    z = USERS[:20]
    for a, b in ((PlaneRotation(key, 80), PlaneRotation(key, 80, library=lib)),
                 (BookRotation(key, 80, reversible=False), BookRotation(key, 80, library=lib, reversible=False)),
                 (FaceIsometry(key, 80), FaceIsometry(key, 80, shape=FaceShape(lib)))):
        assert np.allclose(a(z), b(z),
                           atol=1e-6) and a.keep()['library'] == b.keep()['library'] == library_id(lib) and a.keep()['key_version'] == version

@pytest.mark.parametrize('psi', [BookRotation(K, 70, k=5), PlaneRotation(K, 80, orient='reference', centred=False,
            reversible=False), PlaneRotation(K, 80, toward='key'), KeyedIsometry(K, 75),
                                 FaceIsometry(K, 90, shape=FaceShape(LIB, 16))])
def test_what_is_kept_brings_the_same_map_back(psi):
    import json
    k = json.loads(json.dumps(psi.keep())); assert K._secret.hex() not in str(k)
    lib = {None: None, library_id(): reference_library(), library_id(LIB): LIB}[k.pop('library')]
    cls, theta = getattr(rot, k.pop('transform')), k.pop('theta')
    assert bytes.fromhex(k.pop('salt')) == K.salt and k.pop('key_version') == K.version
    more = dict(shape=FaceShape(lib, **k)) if cls is FaceIsometry else k | dict(library=lib) if 'toward' in k else k
    again = cls(K, theta, **more, reversible=False); assert np.allclose(again(USERS[:9]), psi(USERS[:9]), atol=1e-6)

def test_wrong_key_is_another_unit_identity():
    z = people(500)
    for theta in (60, 80, 105):
        p, q = KeyedIsometry(K, theta), KeyedIsometry(W, theta); w = q.invert(p(z)); c = np.cos(np.deg2rad(theta))
        assert np.allclose(np.linalg.norm(w, axis=1), 1, atol=1e-5) and abs(cosines(z, w).mean() - c*c) < .03

def test_minus_z_is_not_anonymous():
    # so it is refused at 180
    z = people(100); p = KeyedIsometry(K, 179.9)
    assert cosines(z, -p(z)).min() > .999 and p.flipped_cosine > .999
    assert KeyedIsometry(K, level=9).flipped_cosine == pytest.approx(.5)

def test_reference_is_nobody_of_the_library_and_keys_spread_once_centred():
    lib = reference_library()
    assert lib.shape[1] == 128 and not lib.flags.writeable and np.allclose(np.linalg.norm(lib, axis=1), 1)
    R = {c: np.stack([reference(Key.draw(i), centred=c) for i in range(60)]) for c in (False, True)}
    off = ~np.eye(60, dtype=bool)
    assert (R[False] @ lib.T).max() < .9 and (R[False] @ R[False].T)[off].mean() > .6 and abs((R[True]
            @ R[True].T)[off].mean()) < .05
    assert np.allclose(reference(K, k=1),
                       lib[K.stream('reference').choice(len(lib), 1)[0]]) and np.linalg.norm(random_reference(K,
            512)) == pytest.approx(1)

def test_other_dimensions_need_their_own_library():
    with pytest.raises(InputError, match='z: has dimension 1024'): PlaneRotation(K, 70)(people(2, 1024))
    p = PlaneRotation(K, 70, library=people(50, 1024)); assert p.dimension == 1024
    z = people(5, 1024, 3); assert cosines(z, p.invert(p(z))).min() > .999

@pytest.mark.parametrize('psi', [BookRotation(K, 70), PlaneRotation(K, 70), KeyedIsometry(K, 70), FaceIsometry(K, 70)])
def test_guarantee_is_honest(psi):
    g = psi.guarantee
    assert isinstance(g, Guarantee) and g.epsilon is None and 'pseudonym' in str(g) and 'not differential privacy' in g.because and len(g.excludes) >= 4
    assert psi(people(2), rng=1, simulate=True).shape == (2, 128)

def test_same_password_on_another_day():
    z = people(10); a = Key('orbit velvet canyon thirteen', bytes(16), 1)
    b = Key('orbit velvet canyon thirteen', bytes(16), 1)
    c = Key('orbit velvet canyon fourteen', bytes(16), 1)
    for cls in (BookRotation, PlaneRotation, KeyedIsometry, FaceIsometry):
        x = cls(a, level=1)(z)
        assert np.array_equal(x, cls(b, level=1)(z)) and cosines(z,
            cls(b, level=1).invert(x)).min() > .999 and cosines(z, cls(c, level=1).invert(x)).max() < .9

def test_identity_room_does_not_import_others():
    import ast, inspect
    for m in (rot, sealed):
        names = {getattr(n, 'module', '') or '' for n in ast.walk(ast.parse(inspect.getsource(m))) if isinstance(n,
                ast.ImportFrom)}
        assert not any('measure' in n or 'generate' in n for n in names)

# -- sealed recovery ----------------------------------------------------------------------------------------------------
PIC = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8); SAFE = np.full((40, 30, 3), 128, np.uint8)
@pytest.fixture(scope='module')
def key(): return Key('orbit velvet canyon thirteen', version=1)
@pytest.fixture(scope='module')
def capsule(key): return sealed.seal(PIC, SAFE, key, dict(box=[1, 2]))

def refuse(*a):
    with pytest.raises(InputError) as e: sealed.unseal(*a)
    assert e.value.__cause__ is None and e.value.__suppress_context__; return str(e.value)

def test_capsule_round_trip(key, capsule):
    for secret in ('orbit velvet canyon thirteen', key):
        rgb, notes = sealed.unseal(capsule, SAFE, secret); assert np.array_equal(rgb, PIC) and notes == dict(box=[1, 2])
    assert PIC[0, :3].tobytes() not in capsule and b'box' not in capsule

def test_every_refusal_is_the_same(key, capsule):
    other = Key('another password', key.salt, 1); swapped = sealed.seal(SAFE, PIC, key)
    flip = lambda i, b: capsule[:i] + bytes([capsule[i] ^ b]) + capsule[i+1:]
    said = {refuse(capsule, SAFE, other), refuse(capsule, SAFE, 'another password'), refuse(swapped, SAFE, key),
            refuse(capsule, PIC, key), refuse(b'', SAFE, key), refuse(b'junk'*100, SAFE, 'x y z')}
    said |= {refuse(flip(i, b), SAFE, key) for i in range(0, len(capsule), max(1, len(capsule)//80))
             for b in (1, 128)} | {refuse(capsule[:n], SAFE, key) for n in (1, 8, 9, 84, 85, 100, 101, 102,
            len(capsule)-1)}
    said |= {refuse(capsule + b'\0', SAFE, key), refuse(capsule[:85] + swapped[85:], SAFE, key),
             refuse(swapped[:85] + capsule[85:], SAFE, key)}
    assert len(said) == 1 and 'wrong password, another picture, or a damaged file' in said.pop()

@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_refused_alike(junk, magic):
    refuse((sealed.MAGIC if magic else b'') + junk, SAFE, K)

def test_hostile_header_cannot_choose_scrypt_costs(monkeypatch, capsule):
    asked = []
    def spy(password, salt, version): asked.append(rot.KEY_VERSIONS[version]); return bytes(32)
    monkeypatch.setattr(rot, 'stretch', spy)
    for v in range(256): refuse(capsule[:8] + bytes([v]) + b'\xff'*76 + capsule[85:], SAFE, 'a password')
    assert len(asked) == 256 and max(128*c['n']*c['r'] for c in asked) <= 2**28 # one scrypt each, never above 256 MiB

def test_large_files_are_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, 'CAPSULE_LIMIT', 1000); p = tmp_path/'big.sealed'; p.write_bytes(bytes(5000))
    assert len(sealed.read_capsule(p)) == 1001; refuse(p, SAFE, K)
    with pytest.raises(ConfigError, match='original'): sealed.seal(PIC, SAFE, Key('orbit velvet canyon thirteen', bytes(16), 1))

def test_domain_separation(key):
    "Neither the rotation's streams nor another capsule's key open a capsule"
    a, b = sealed.capsule_keys(key, bytes(16)), sealed.capsule_keys(key, b'\1' + bytes(15))
    every = [*a, *b, *(key.secret(l) for l in ('reference', 'side', 'isometry'))]
    assert len(set(every)) == len(every)

def test_a_capsule_commits_to_its_key(key):
    "Even a body that decrypts is refused when the commitment is of another key"
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    unique, nonce = bytes(16), bytes(12); secret, commit = sealed.capsule_keys(key, unique)
    body = (2).to_bytes(4, 'big') + b'{}' + sealed.png(PIC)
    for c, ok in ((commit, True), (bytes(32), False)):
        head = sealed.MAGIC + bytes([1]) + key.salt + unique + nonce + c
        cap = head + ChaCha20Poly1305(secret).encrypt(nonce, body, head + sealed.picture_digest(SAFE))
        if ok: assert np.array_equal(sealed.unseal(cap, SAFE, key)[0], PIC)
        else: refuse(cap, SAFE, key)

def test_sidecar_is_bound_to_the_file(tmp_path, key):
    p = tmp_path/'photo.png'; p.write_bytes(sealed.png(SAFE)); side = sealed.write_sidecar(PIC, p, key)
    assert side.name == 'photo.png.sealed'
    assert np.array_equal(sealed.unseal(side, p, key)[0], PIC) and np.array_equal(sealed.unseal(str(side), str(p),
            key)[0], PIC) and np.array_equal(sealed.unseal(side.read_bytes(), p.read_bytes(), key)[0], PIC)
    with pytest.raises(OutputError): sealed.write_sidecar(PIC, p, key)
    sealed.write_sidecar(PIC, p, key, overwrite=True); p.write_bytes(p.read_bytes() + b'\0'); refuse(side, p, key)

def test_bad_arguments_are_named(tmp_path, key, capsule):
    for f, say in ((lambda: sealed.unseal(capsule, SAFE, ''), 'password'), (lambda: sealed.unseal(capsule, SAFE, 123456), 'password'), (lambda: sealed.seal(PIC/255, SAFE, key), 'original'), (lambda: sealed.seal(PIC, SAFE/255, key), 'protected'),
                   (lambda: sealed.seal(PIC, SAFE, 'a password'), 'key'), (lambda: sealed.seal(PIC, SAFE, K), 'simulated'), (lambda: sealed.seal(PIC, SAFE, key, dict(a=object())), 'notes'), (lambda: sealed.seal(PIC[:0], SAFE, key), 'original')):
        with pytest.raises((ConfigError, InputError), match=say): f()
    for f in (lambda: sealed.unseal(tmp_path/'none.sealed', SAFE, key), lambda: sealed.unseal(capsule,
            tmp_path/'none.png', key), lambda: sealed.unseal(None, SAFE, key), lambda: sealed.unseal(capsule, None,
            key)):
        with pytest.raises(InputError, match='cannot be read'): f()
