"Donor code: the maps, the checks of what is asked, the cache, refinement"
import numpy as np, pytest, torch
from deidnb.assets import asset, load_manifest
from deidnb.core import ConfigError, InputError, Face, package_dir, sha256
from deidnb.faces.find import BLENDSHAPES
from deidnb.generate import donor_bank as B, donor_code as C
from deidnb.generate.preview import crop112, operator, ir_module
from deidnb.generate.nobody import sample_styles
from deidnb.identity.experts import unit

R = np.random.default_rng(5)
D = C.donor_code()
Z = unit(R.multivariate_normal(D.arrays['code_mean'], D.arrays['code_cov'], 6))

def test_file_is_small_and_in_the_manifest():
    path = package_dir()/'weights'/'donor_code.safetensors'; row = load_manifest('weights')['donor_code']
    assert path.stat().st_size <= 4*2**20 and row['sha256'] == sha256(path) and row['metrics'] and 'non-commercial' in row['licence']

def test_axes_are_white():
    assert np.allclose(D.white @ D.arrays['axes'], np.eye(512), atol=1e-2) and D.distance(D.arrays['mean']) < 1e-3
    assert .7 < np.mean([D.distance(w) for w in sample_styles(20, np.random.default_rng(3))]) < 1.4

@pytest.mark.parametrize('n', [1, 6])
def test_one_and_many_agree(n):
    w = C.code_to_style(Z[:n])
    assert w.shape == (n, 512) and w.dtype == np.float32 and np.allclose(w[0], C.code_to_style(Z[0]), atol=1e-4)

def test_length_of_the_code_does_not_matter(): assert np.allclose(C.code_to_style(7*Z[0]), C.code_to_style(Z[0]), atol=1e-4)

@pytest.mark.parametrize('name,size', [('pose', 2), ('tone', 3), ('age', 1), ('male', 1), ('expression', 52)])
def test_conditions(name, size):
    v = np.full(size, .4); s, m = D.conditions(**{name: v}); i = list(D.groups).index(name)
    assert m[i] == 1 and m.sum() == 1 and np.all(s[D.mask(m) == 0] == 0)
    assert not np.allclose(C.code_to_style(Z[0], **{name: v}), C.code_to_style(Z[0]))
    for bad in (np.zeros(size + 7 if name != 'tone' else 2), np.full(size, np.nan)):
        with pytest.raises(ConfigError, match=name): D.conditions(**{name: bad})

def test_readout_follows_the_conditions():
    read = lambda w: D.white @ (w - D.arrays['mean']) @ D.arrays['readout']
    a, b = (np.mean([read(C.code_to_style(z, pose=(y, 0))) for z in Z], 0) for y in (-20, 20)); assert b[0] - a[0] > 1
    a, b = (np.mean([read(C.code_to_style(z, tone=(L, 12, 14))) for z in Z], 0) for L in (45, 75))
    k = 2 + D.groups['expression']; assert b[k] - a[k] > 1

def test_different_codes_different_styles():
    w = C.code_to_style(Z); assert np.linalg.norm(w[:, None]-w, axis=-1)[~np.eye(6, dtype=bool)].min() > .5

@pytest.mark.parametrize('bad', [np.zeros(128), np.ones(127), np.full(128, np.inf)])
def test_codes_are_checked(bad):
    with pytest.raises(ConfigError, match='SFace codes'): C.code_to_style(bad)

@pytest.mark.parametrize('kw', [dict(steps=-1), dict(inner=0), dict(rate=0), dict(reach=9)])
def test_settings_are_checked(kw):
    with pytest.raises(ConfigError): C.donor_for_code(Z[0], **kw)

def test_refinement_helps_and_stays_near():
    start = C.Measured(C.code_to_style(Z[0])).cosine(Z[0]); picture, w, cosine = C.donor_for_code(Z[0], steps=1, inner=5)
    assert cosine > start + .02 and D.distance(w) <= .91 and picture.shape == (512, 512, 3)
    shuffled = D.arrays['mean'] + D.arrays['axes'] @ R.permutation(D.white @ (w - D.arrays['mean']))
    assert C.Measured(shuffled.astype(np.float32)).cosine(Z[0]) < cosine - .2   # a random face at the same distance does not do

def test_demand_and_its_cache(tmp_path, monkeypatch):
    [monkeypatch.setattr(m, 'cache_dir', lambda: tmp_path) for m in (C, B)]
    f = C.Measured(sample_styles(1, np.random.default_rng(8))[0]).face
    a = C.demand(Z[1], f, [65, 12, 15], steps=0)
    names = {p.name for p in (tmp_path/'donors').iterdir()}
    monkeypatch.setattr(C, '_search', lambda *_, **__: pytest.fail('searched twice'))
    b = C.demand(Z[1], f, [65, 12, 15], steps=0)
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) and len(names) == 2
    for p in (tmp_path/'donors').glob('*.jpg'): p.write_bytes(b'broken')
    assert np.abs(C.demand(Z[1], f, [65, 12, 15], steps=0)[0].astype(int) - a[0]).max() == 0   # rendered again
    with pytest.raises(InputError): C.demand(Z[1], Face((0, 0, 9, 9), np.zeros((5, 2))), [65, 12, 15])

def test_broken_cached_style_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(C, 'cache_dir', lambda: tmp_path); w = C._remembered(b'k', lambda: np.ones(512))
    next((tmp_path/'donors').iterdir()).write_bytes(b'x')
    assert np.array_equal(C._remembered(b'k', lambda: np.zeros(512)), np.zeros(512)) and w.sum() == 512

def test_crop112_is_the_template():
    from deidnb.faces.align import TEMPLATE5
    x = torch.zeros(1, 3, 112, 112); p = np.asarray(TEMPLATE5).round().astype(int); x[0, :, p[:, 1], p[:, 0]] = 1
    y = crop112(x, np.asarray(TEMPLATE5), 112); assert torch.allclose(x, y, atol=1e-3)

def test_operators():
    t = torch.arange(24.).reshape(2, 3, 4)
    assert torch.equal(operator('Gather', {}, [t, torch.tensor([2, 0]), torch.tensor(1)]),
                       t[:, [2, 0]]) and operator('Gather', {}, [t, torch.tensor(1), torch.tensor(0)]).shape == (3, 4)
    assert operator('Reshape', dict(special_zero='true'), [t, torch.tensor([0, -1])]).shape == (2, 12)
    assert torch.allclose(operator('MatMul', dict(transpose_b='true'), [t[0], t[1]]), t[0] @ t[1].T)
    assert [v.shape[2] for v in operator('VariadicSplit', {}, [t, torch.tensor(2), torch.tensor([1, 3])])] == [1, 3]
    with pytest.raises(ConfigError, match='0 layers'): ir_module(asset('face_generator', 'MappingNetwork.xml'), 'no such layer')
