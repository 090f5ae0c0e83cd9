"What keys are worth: closed forms, attacks that must succeed, attacks that must not"
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from deidnb.core import ConfigError, InputError
from deidnb.identity.rotation import BookRotation, Key, KeyedIsometry, PlaneRotation, reference_library, unit_rows
from deidnb.measure import keys as mk

def people(n=200, d=128, seed=0): return unit_rows(np.random.default_rng(seed).normal(size=(n, d)))
LIB = reference_library()[1::3]; USERS = reference_library()[::12][:120]
T = mk.transforms(LIB)

def test_recovery_of_right_and_wrong_keys():
    z = people()
    for name, f in T.items():
        assert mk.recovery(f(Key.draw(0), 75), f(Key.draw(0), 75), z).min() > .999
        if name in ('plane', 'isometry'): assert abs(mk.recovery(f(Key.draw(0), 75), f(Key.draw(1), 75), z)).mean() < .3

@settings(max_examples=20, deadline=None)
@given(st.floats(.05, 1), st.integers(0, 10**6))
def test_noisy_has_the_cosine_it_says(kappa, seed):
    z = people(5, 16, seed); x = mk.noisy(z, kappa, seed)
    assert np.allclose((x*z).sum(1), kappa) and np.allclose(np.linalg.norm(x, axis=1), 1)

def test_isometry_returns_noise_unchanged_and_plane_amplifies_it():
    k = (1, .95, .8); assert np.allclose(mk.noise_curve(people(), T['isometry'], 80, k), k, atol=1e-6)
    plane = mk.noise_curve(people(), T['plane'], 80, k); assert plane[0] > .999 and plane[1] < .8 and plane[2] < .5

def test_level_table_against_closed_forms():
    t = mk.level_table(people(400), T['isometry'], pairs=2, levels=(0, 4, 9), threshold=.36)
    for s, deg in zip(t.subjects, (70, 95, 120)):
        c = np.cos(np.deg2rad(deg))
        assert t.get(s, 'protected').value == pytest.approx(c, abs=1e-5) and t.get(s,
            'either sign').value == pytest.approx(abs(c), abs=1e-5)
        assert t.get(s, 'right key, unit code').value > .9999 and abs(t.get(s, 'wrong key').value
            - c*c) < .03 and t.get(s, 'accepted, either sign').value == float(abs(c) >= .36)
        # normal approximation of c^2 + s^2 X
        sd = np.sin(np.deg2rad(deg))**2/np.sqrt(127)
        assert abs(t.get(s, 'wrong key 99.9 %').value - (c*c + 3.09*sd)) < 1.5*sd

def test_printed_table_shows_what_is_wrong_with_it():
    t = mk.level_table(USERS, T['as printed'], pairs=2, levels=(2, 9)); low, high = t.subjects
    assert t.get(low, 'right key, unit code').value < .5 and t.get(high, 'wrong key').value > .6 and t.get(low,
        'right key, exact, lowest').value > .999

@pytest.mark.parametrize('threshold', [.1, .2, .3])
def test_collision_formula_against_simulation(threshold):
    z = people(4); v = mk.keys_apart(z, T['isometry'], 75, keys=150, threshold=threshold)
    p = mk.isometry_collisions(75, threshold)
    # pairs of uniform vectors are pairwise independent: 6 sigma
    sd = np.sqrt(p*(1-p)/v.pairs); assert abs(v.rate - p) < 6*sd + .05*p
    assert v.lo <= v.rate <= v.hi and v.effective == pytest.approx(1/v.rate)

def test_keys_apart_extremes():
    same = lambda key, theta: KeyedIsometry(Key.draw(0), theta)
    v = mk.keys_apart(people(3), same, 80, keys=20)
    assert v.rate == 1 and v.packed == 1 and v.effective == 1
    v = mk.keys_apart(people(3), T['isometry'], 90, keys=20, threshold=.9)
    assert v.rate == 0 and v.packed == 20 and v.effective == np.inf and 0 < v.hi < 1 and 'apart' in str(v)
    assert mk.pack(np.eye(5, dtype=bool)) == 5 and mk.pack(np.ones((5, 5), bool)) == 1

def test_printed_references_make_all_keys_one_and_centring_helps():
    n = {k: mk.keys_apart(USERS[:5], T[k], 80, keys=60).packed for k in T}
    assert n['as printed'] < 3 < 20 < n['as printed, centred'] <= 60 and n['isometry'] > 55

def test_near_angle_is_a_cosine():
    off = (0, 10, 40)
    for k in ('plane', 'isometry'): assert np.allclose(mk.near_angle(people(), T[k], 75, off), np.cos(np.deg2rad(off)), atol=1e-5)

def test_near_password_gives_nothing_and_near_reference_does():
    out = mk.near_password(people(), T['isometry'], 80, 'orbit velvet canyon', ('orbit velvet canyom', 'orbit velvet Canyon'))
    v = list(out.values()); assert v[0] > .999 and max(map(abs, v[1:])) < .3
    r = mk.near_reference(USERS, LIB, 80, draws=8); assert r[10] > .999 and r[9] > r[0] + .05 and len(r) == 11

def test_brute_force_is_arithmetic_and_scrypt_is_measured():
    t = mk.brute_force(.36, .05, {'PIN': 1e6})
    assert t.get('PIN', 'core hours').value == pytest.approx(100) and t.get('PIN', 'euros').value == pytest.approx(5)
    assert mk.scrypt_seconds(2, 2) > 1.5*mk.scrypt_seconds(1, 2) > 0
    with pytest.raises(ConfigError, match='seconds'): mk.brute_force(float('nan'))

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(20, 160).filter(lambda t: abs(t-90) > 1))
def test_one_pair_gives_the_printed_reference_away(seed, theta):
    z = people(1, 64, seed)
    f = BookRotation(Key.draw(seed), theta, dim=64, toward='key', reversible=False)
    got = mk.reference_from_one_pair(z, f.turn(z))
    assert np.abs(got @ f.reference).max() > .999

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(20, 160))
def test_two_pairs_give_the_plane_away(seed, theta):
    z = people(2, 64, seed)
    f = PlaneRotation(Key.draw(seed), theta, dim=64, toward='key', reversible=False)
    assert abs(mk.reference_from_pairs(z, f.turn(z)) @ f.reference) > .999

def test_procrustes_matches_scipy_and_needs_d_pairs_or_half_of_them():
    from scipy.linalg import orthogonal_procrustes
    d, z = 32, people(40, 32); f = KeyedIsometry(Key.draw(3), 70, dim=d); x = f.turn(z)
    assert np.allclose(mk.procrustes(z, x), orthogonal_procrustes(z, x)[0].T) and np.allclose(mk.procrustes(z, x), f.matrix)
    new = people(50, d, 9); hit = lambda k, name: (mk.undo(z[:k], x[:k], f.turn(new))[name][0]*new).sum(1).mean()
    assert hit(16, 'Procrustes, doubled') > .9999 and hit(16, 'Procrustes') < .9 and hit(32,
        'Procrustes') > .9999 and hit(8, 'Procrustes, doubled') < .9

def test_known_pairs_curve():
    z = people(); out = mk.known_pairs(z, T['plane'], 80, ks=(1, 2, 8), keys=2)
    assert out['planes meet'][1] > .999 > out['planes meet'][0] and out['Procrustes'].max() < .7
    assert mk.known_pairs(z, T['isometry'], 80, ks=(64,), keys=1)['Procrustes, doubled'][0] > .999
    noisy = mk.known_pairs(z, T['isometry'], 80, ks=(128,), keys=1, kappa=.8)['Procrustes, doubled'][0]; assert .3 < noisy < .999
    with pytest.raises(ConfigError, match='z: '): mk.known_pairs(z[:10], T['plane'], 80, ks=(20,))

def test_likeness_to_library():
    near, mean = mk.likeness_to_library(USERS, LIB)
    assert near.shape == mean.shape == (len(USERS),) and np.median(near) > np.median(mk.likeness_to_library(people(), LIB)[0])

@pytest.mark.parametrize('bad', [np.full((2, 128), np.nan), np.zeros((2, 128)), np.ones((2, 128))])
def test_bad_codes(bad):
    for f in (lambda: mk.recovery(T['isometry'](Key.draw(0), 70), T['isometry'](Key.draw(1), 70), bad),
              lambda: mk.keys_apart(bad, T['isometry'], 70, 5), lambda: mk.level_table(bad, T['isometry']),
              lambda: mk.noise_curve(bad, T['isometry'], 70)):
        with pytest.raises(InputError, match='z: '): f()
    with pytest.raises(ConfigError, match='kappa'): mk.noisy(people(2), 1.5)
