"""The recipe of the Nobody model on invented people, and the facts the shipped model must keep."""
import numpy as np, pytest, yaml
from deidnb.core import ConfigError, package_dir, sha256, manifest_dir
from deidnb.faces.masks import REGIONS
from deidnb.morphable import albedo, build, mesh, shape
from deidnb.morphable.build import SEEN, VIEW, nobody_model
from deidnb.morphable.shape import FLIP, NAMES

@pytest.fixture(scope='module')
def m(): return nobody_model()

@pytest.fixture(scope='module')
def E(m): return (m.expression*m.exp_std[:, None, None]).astype(np.float64)

@pytest.fixture(scope='module')
def fine(m):
    _, f, uv = mesh.canonical_mesh(); P = m.mean[:478].astype(np.float64); P[468:, 2] -= mesh.RECESS
    return mesh.fine_mesh(P, f, uv)

def test_sizes_and_size_on_disk(m):
    assert len(m.mean) >= 5000 and m.identity.shape[0] == 80 and m.expression.shape[0] == 64 and m.albedo_basis.shape[0] == 80
    assert (m.id_std > 0).all() and (m.alb_std > 0).all() and (m.exp_std[1:] > 0).all() and m.exp_std[0] == 0
    assert (package_dir()/'weights'/'nobody_morphable.safetensors').stat().st_size <= 16 << 20

def test_row_is_of_this_file():
    row = next(r for r in yaml.safe_load((manifest_dir()/'weights.yaml').read_text()) if r['name'] == 'nobody_morphable')
    assert row['sha256'] == sha256(package_dir()/'weights'/'nobody_morphable.safetensors') and row['ships']

@pytest.mark.parametrize('k', ['identity', 'albedo_basis'])
def test_orthonormal(m, k):
    B = getattr(m, k).reshape(80, -1).astype(np.float64); assert np.abs(B @ B.T - np.eye(80)).max() < 5e-3

def test_residual_modes_are_orthogonal_to_the_names(E):
    R = E[52:, :478].reshape(12, -1); N = E[1:52, :478].reshape(51, -1)
    cos = R @ N.T/np.outer(np.linalg.norm(R, axis=1), np.linalg.norm(N, axis=1))
    assert np.abs(cos).max() < .02

def test_mean_face_frame(m):
    P = m.mean; l, r = P[REGIONS['left_eye']].mean(0), P[REGIONS['right_eye']].mean(0)
    assert np.abs(l + r)[[0, 1]].max() < .02 and abs(np.linalg.norm(l - r) - 1) < .03 and P[1, 2] < P[234, 2] and P[152,
        1] > P[10, 1]

def test_mirror(m, E):
    mirror = mesh.mirror_of(m.mean)
    assert np.abs(m.mean[mirror]*FLIP - m.mean).max() < 1e-3 and np.abs(m.albedo_mean[mirror] - m.albedo_mean).max() < 2e-3
    for n in NAMES:
        other = n[:-4] + 'Right' if n.endswith('Left') else n[:-5] + 'Left' if n.endswith('Right') else n
        a, b = E[NAMES.index(n)], E[NAMES.index(other)]; assert np.abs(a[mirror]*FLIP - b).max() <= .01*np.abs(b).max() + 1e-4, n

@pytest.mark.parametrize('names,i,j,low,high', [(('jawOpen',), 13, 14, .3, 2), (('eyeBlinkLeft',), 386, 374, -.5, -.05),
                                                (('eyeBlinkRight',), 159, 145, -.5, -.05),
                                                (('mouthSmileLeft', 'mouthSmileRight'), 61, 291, .05, 1),
                                                (('mouthPucker',), 61, 291, -1, -.05)])
def test_named_directions_move_what_they_say(m, E, names, i, j, low, high):
    gap = lambda P: np.linalg.norm(P[i] - P[j]); moved = m.mean + sum(E[NAMES.index(n)] for n in names)
    assert low < gap(moved) - gap(m.mean) < high

def test_one_sided_names_leave_the_other_side(m, E):
    for n in ('eyeBlinkLeft', 'browDownLeft', 'eyeSquintLeft'):
        # the person's left is on the right of the picture
        d = np.linalg.norm(E[NAMES.index(n)], axis=1); assert d[m.mean[:, 0] < -.25].max() < .1*d.max(), n

def test_named_directions_answer(m, E):
    P = m.mean[:478]; rest = shape.blendshapes_of(P)
    for n in ('jawOpen', 'mouthSmileLeft', 'mouthSmileRight', 'eyeBlinkLeft', 'eyeBlinkRight', 'browInnerUp',
              'mouthPucker', 'browDownLeft'):
        b = shape.blendshapes_of(P + E[NAMES.index(n), :478]) - rest; assert b[NAMES.index(n)] > .4, n

def test_leak(m):
    from deidnb.generate.donor_bank import donor_bank
    bank = donor_bank(); P = np.stack([bank.mesh(i) for i in range(80)]).astype(np.float64)
    modes = lambda B, s: (B*s[:, None, None])[:, :478].astype(np.float64)
    mean = m.mean[:478].astype(np.float64)
    E, I = modes(m.expression, m.exp_std), modes(m.identity, m.id_std)
    X = shape.align(P, mean, shape.stiff(E[:52])); spread = shape.blendshapes_of(X).std(0)
    use = spread > .02
    pooled = lambda r: np.sqrt((r[use]**2).sum()/(spread[use]**2).sum()); rng = np.random.default_rng
    a, b = shape.leak(X, mean, I, E, np.array(m.meta['beta_sd']), rng(0)); assert pooled(a) < .35 < 1 < pooled(b)
    mixed = I.copy()
    mixed[:10] += .5*E[[NAMES.index(n) for n in ('mouthSmileLeft', 'browDownLeft', 'eyeSquintLeft', 'mouthUpperUpLeft',
                                                 'eyeBlinkLeft', 'mouthSmileRight', 'browDownRight', 'eyeSquintRight',
                                                 'mouthUpperUpRight', 'eyeBlinkRight')]]
    # a model that does leak is caught
    worse, _ = shape.leak(X, mean, mixed, E, np.array(m.meta['beta_sd']), rng(0))
    assert pooled(worse) > 1.5*pooled(a)

def test_surface(fine):
    W = fine['weights']
    assert np.array_equal(W[:478], np.eye(478, dtype=np.float32)) and np.abs(W.sum(1)
        - 1).max() < 1e-4 and len(fine['uv']) == len(W)
    T = fine['triangles']; e = np.sort(np.concatenate([T[:, [0, 1]], T[:, [1, 2]], T[:, [2, 0]]]), 1)
    n = np.unique(e, axis=0, return_counts=True)[1]
    assert n.max() == 2 and np.isin(np.arange(len(W)), T).all()
    d = np.sort(T, 1); assert len(np.unique(d, axis=0)) == len(T)

def test_mouth_is_open_and_eyes_are_closed_surfaces(fine):
    T = fine['triangles']; e = np.sort(np.concatenate([T[:, [0, 1]], T[:, [1, 2]], T[:, [2, 0]]]), 1)
    u, n = np.unique(e, axis=0, return_counts=True); rim = np.unique(u[n == 1])
    assert np.isin(REGIONS['lips_inner'], rim).all() and not np.isin(range(468, 478), rim).any()

def test_shipped_triangles_are_those_of_the_recipe(m, fine):
    assert np.array_equal(fine['triangles'], m.triangles) and np.abs(fine['uv'] - m.uv).max() < 1e-3

@pytest.mark.parametrize('n', [1, 7])
def test_align_undoes_similarities(m, n):
    rng = np.random.default_rng(n); P = m.mean[:478].astype(np.float64)
    Q = np.linalg.qr(rng.normal(size=(n, 3, 3)))[0]; Q *= np.sign(np.linalg.det(Q))[:, None, None]
    X = rng.uniform(.1, 900, (n, 1, 1))*np.einsum('vc,nkc->nvk', P, Q) + rng.normal(size=(n, 1, 3))
    w = rng.uniform(0, 1, 478); assert np.abs(shape.align(X, P, w) - P).max() < 1e-6

def test_expression_without_pairs_is_the_prior(m, E):
    mirror = shape.mirror_of(m.mean[:478]); prior = shape.symmetric(E[:52, :478], mirror)
    got, _ = shape.fit_expression(np.zeros((2, 478, 3)), np.zeros((2, 52)), prior, np.ones((52, 478)), mirror)
    assert np.allclose(got, prior)

def test_light_level_is_a_convention():
    rng = np.random.default_rng(0); h = np.c_[np.full(500, .28), rng.normal(0, .3, (500, 8))]
    T = rng.uniform(.2, .4, (500, 3)); k = np.r_[[[3.]*3], rng.normal(0, .1, (8, 3))]
    on = np.ones(500)
    # half the picture's level, half the albedo
    a, b = (albedo.remove_light(s*T*(h @ k), T, h, on > 0, on)[0] for s in (1, .5))
    assert np.allclose(b, a/2, rtol=1e-3, atol=1e-4)

def invented(rng):
    base = nobody_model().mean[:478]*120 + [96, 90, 0]
    def observe(w):
        d = {k: np.zeros(s, np.uint8 if k == 'picture' else np.float32) for k, s in SEEN.items()}
        j = np.random.default_rng(int(abs(float(np.asarray(w)[:8].sum()))*1e5) % 2**32)
        return d | dict(found=np.float32(1), mesh=(base + j.normal(0, .6, (478, 3))).astype(np.float32), blendshapes=j.uniform(0, .2, 52).astype(np.float32) + np.float32(np.asarray(w)[:52]*.01), code=j.normal(size=128).astype(np.float32),
                        turn=np.zeros(2, np.float32), crop=np.float32([1, 0, 0]), picture=j.integers(60, 200, (VIEW, VIEW, 3)).astype(np.uint8))
    return observe

def test_recipe_resumes_and_repeats(tmp_path, monkeypatch):
    from deidnb.generate import nobody as nb; from deidnb.train import donors
    monkeypatch.setattr(nb, 'sample_styles', lambda n, rng, *a: rng.normal(size=(n, 512)).astype(np.float32))
    plain = donors.measure; work = invented(0); seen = []
    def fails(w):
        seen.append(1)
        if len(seen) > 40: raise KeyboardInterrupt
        return work(w)
    kw = dict(faces=12, pairs=8, albedo_faces=4, dark=0)
    monkeypatch.setattr(donors, 'measure', lambda W, f, n, work, progress, shapes: plain(W, f, n, fails, 4, False, shapes))
    monkeypatch.setattr(build, 'moves', lambda W, *a: np.repeat(W, 2, 0) + .01*np.arange(2*len(W))[:, None].astype(np.float32))
    build.make_model(tmp_path/'a.safetensors', seed=1, work=tmp_path/'w', progress=False, **kw)
    n = len(seen); assert n == 12 + 16
    build.make_model(tmp_path/'b.safetensors', seed=1, work=tmp_path/'w', progress=False, **kw)
    assert len(seen) == n and sha256(tmp_path/'a.safetensors') == sha256(tmp_path/'b.safetensors')
    with pytest.raises(KeyboardInterrupt):
        build.make_model(tmp_path/'c.safetensors', seed=2, work=tmp_path/'v', progress=False, **kw)
    del seen[:]
    build.make_model(tmp_path/'c.safetensors', seed=2, work=tmp_path/'v', progress=False, **kw)
    assert len(seen) < 28 and sha256(tmp_path/'c.safetensors') != sha256(tmp_path/'a.safetensors')
    with pytest.raises(ConfigError): build.make_model(tmp_path/'d.safetensors', seed=3, work=tmp_path/'v', progress=False, **kw)

@pytest.mark.parametrize('kw', [dict(out='x.npz'), dict(out='x.safetensors', preset='ful'), dict(out='x.safetensors',
            faces=2), dict(out='x.safetensors', people=9), ])
def test_bad_settings(tmp_path, kw):
    with pytest.raises(ConfigError): build.make_model(tmp_path/kw.pop('out'), work=tmp_path/'w', **kw)
