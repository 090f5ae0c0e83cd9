"The recipe of the donor bank: resuming, cleaning, steering, packing and its manifest row, with invented descriptions instead of renderings"
import numpy as np, pytest, yaml
from deidnb.core import ConfigError, package_dir, sha256
from deidnb.assets import load_manifest
from deidnb.generate.donor_bank import DonorBank, LOOK, donor_bank
from deidnb.train import donors as T, weights as R

CLEAN = dict(L=60, a=12, b=15, chin=0, moustache=0, fringe=.01, under=.02, bridge=6, side=1, hot=0, spread=10)

def invented(w, **change):
    "A description that depends on the style and on nothing else"
    g = np.random.default_rng(np.frombuffer(np.float32(w).tobytes(), np.uint32))
    mesh = donor_bank().mesh(0) + g.normal(0, 2, (478, 3))
    code = g.standard_normal(128)
    look = CLEAN | dict(L=60 + 5*w[0], bridge=6 + 3*w[1]) | {k: v for k, v in change.items() if k in LOOK}
    d = dict(found=1, mesh=mesh, blendshapes=g.random(52), turn=g.normal(0, 8, 2), look=[look[k] for k in LOOK],
             forehead=0, code=code/np.linalg.norm(code), inner=-code/np.linalg.norm(code), rim=g.normal(0, 10, (5, 3)),
             age=40 + 10*w[2], male=g.random())
    d |= {k: v for k, v in change.items() if k in d}
    return {k: np.asarray(d[k], np.float32).reshape(s) for k, s in T.SHAPES.items()}

@pytest.fixture
def styles(): return T.half(np.random.default_rng(0).standard_normal((50, 512)))

@pytest.fixture(autouse=True)
def no_generator(monkeypatch):
    monkeypatch.setattr(T, 'sample_styles', lambda n, rng: rng.standard_normal((n, 512)).astype(np.float32))

@pytest.mark.parametrize('stop', [1, 8, 9, 33, 50])
def test_resume_equals_one_go(styles, tmp_path, stop):
    whole, calls = T.measure(styles, tmp_path/'a', 'x', invented, each=8, progress=False), []
    def dies(w):
        calls.append(1)
        if len(calls) == stop: raise KeyboardInterrupt
        return invented(w)
    with pytest.raises(KeyboardInterrupt): T.measure(styles, tmp_path/'b', 'x', dies, each=8, progress=False)
    assert not [p for p in (tmp_path/'b').glob('*') if 'tmp' in p.name], 'no half shard stays behind'
    left = 50 - (stop-1)//8*8; calls = [0]*100
    both = T.measure(styles, tmp_path/'b', 'x', dies, each=8, progress=False)
    assert len(calls) - 100 == left and all(np.array_equal(whole[k], both[k]) for k in T.SHAPES)

def test_store_of_other_people(styles, tmp_path):
    T.measure(styles, tmp_path, 'x', invented, progress=False)
    with pytest.raises(ConfigError, match='other styles'): T.measure(styles + 1, tmp_path, 'x', invented, progress=False)

def test_interrupted_recipe_makes_the_same_bank(tmp_path):
    T.make_bank(tmp_path/'a.safetensors', 60, 30, 5, tmp_path/'wa', progress=False, describe=invented)
    for stop in (20, 45, 200):
        calls = []
        def dies(w):
            calls.append(1)
            if len(calls) == stop: raise KeyboardInterrupt
            return invented(w)
        try: row = T.make_bank(tmp_path/'b.safetensors', 60, 30, 5, tmp_path/'wb', progress=False, describe=dies)
        except KeyboardInterrupt: assert not (tmp_path/'b.safetensors').exists()
    assert sha256(tmp_path/'a.safetensors') == sha256(tmp_path/'b.safetensors')
    r = yaml.safe_load(row.read_text())[0]
    assert r['sha256'] == sha256(tmp_path/'b.safetensors') and r['size'] == (tmp_path/'b.safetensors').stat().st_size and '--seed 5' in r['command']
    b = DonorBank(tmp_path/'b.safetensors'); assert b.n == r['metrics']['donors'] > 20 and b.age.min() >= 15
    T.make_bank(tmp_path/'c.safetensors', 60, 30, 6, tmp_path/'wc', progress=False, describe=invented)
    assert sha256(tmp_path/'c.safetensors') != sha256(tmp_path/'b.safetensors'), 'another seed is another bank'

@pytest.mark.parametrize('change, why', [({}, ''), (dict(age=14.9), 'child'), (dict(age=15), ''), (dict(bridge=14), 'glasses'), (dict(fringe=.06), 'fringe'), (dict(under=.1), 'hair or hand'),
    (dict(hot=.01), 'highlights'), (dict(side=11), 'side light'), (dict(side=-11.1), 'side light'), (dict(spread=22), 'uneven skin'), (dict(forehead=-9.1), 'dark forehead'),
    (dict(found=0), 'no face'), (dict(spread=np.nan), 'uneven skin'), (dict(age=np.nan), 'child')])
def test_clean(change, why):
    assert T.clean(T.table([invented(np.zeros(512), **change)]))[0] == why

def test_clean_drops_pictures_without_a_face():
    t = T.table([T.describe(None, None), invented(np.zeros(512))]); assert list(T.clean(t)) == ['no face', '']
    assert list(T.clean(t | dict(glasses=np.array([-5., .5])))) == ['no face',
        'glasses'] and T.clean(t | dict(young=np.array([-5., 4.])))[1] == 'child'

def test_dark_skin_is_not_a_reason():
    assert all(T.clean(T.table([invented(np.zeros(512), L=L)]))[0] == '' for L in (15, 30, 45, 90))

def test_glasses_are_learnt_from_styles():
    g = np.random.default_rng(1); W = g.standard_normal((1500, 512)); d = g.standard_normal(512)
    d /= np.linalg.norm(d); on = W @ d > 1
    s = T.fit_glasses(W, np.where(on, 12, 6) + 3*g.standard_normal(1500))
    assert s[on].mean() > s[~on].mean() + .5 and ((s > 0) == on).mean() > .8
    noise = T.fit_glasses(g.standard_normal((1500, 512)), np.full(1500, 5.)); assert np.isneginf(noise).all()

def test_steering_raises_what_was_asked():
    g = np.random.default_rng(2); W = g.standard_normal((3000, 512)); t = T.table([invented(w) for w in W[:1200]])
    S = T.steer(W[1200:], W[:1200], t, np.random.default_rng(3), dict(L=(1, -10, -10))); d = S[:, 0] - W[1200:, 0]
    assert d.mean() < -1 and np.abs(d - d.mean()).max() < 1e-4, 'the tone is 5 w[0]'
    far = T.steer(W[1200:], W[:1200], t, np.random.default_rng(3), dict(L=(1, -1e6, -1e6)))
    assert np.linalg.norm(far - W[1200:], axis=1).max() < .7*np.linalg.norm(W, axis=1).mean(), 'no move leaves the faces'
    some = T.steer(W[1200:], W[:1200], t, np.random.default_rng(3), dict(L=(.45, -10, -8)))
    moved = (np.abs(some - W[1200:]).max(1) > 1e-4).mean()
    assert abs(moved - .45) < .06   # five standard deviations
    with pytest.raises(ConfigError, match='too few'): T.steer(W[:5], W[:3], T.table([T.describe(None, None)]*3), g)

@pytest.mark.parametrize('args', [dict(samples=1), dict(steered=-1), dict(seed=-1)])
def test_wrong_numbers(tmp_path, args):
    with pytest.raises(ConfigError): T.make_bank(tmp_path/'x.safetensors', progress=False, describe=invented, **args)
    assert T.main(['-o', str(tmp_path/'x.npz')]) == 2

def test_all_rejected(tmp_path):
    with pytest.raises(ConfigError, match='0 of 10 people are clean'):
        T.make_bank(tmp_path/'x.safetensors', 10, 0, 1, tmp_path/'w', progress=False, describe=lambda w: invented(w, age=5))
    assert not (tmp_path/'x.safetensors').exists() and not (tmp_path/'x.yaml').exists()

def test_rows_of_what_ships():
    for n, r in load_manifest('weights').items():
        f = package_dir()/'weights'/r['file'].rsplit('/')[-1]
        assert r['sha256'] == sha256(f) and r['size'] == f.stat().st_size, n
    r = load_manifest('weights')['donor_bank']
    assert r['metrics']['donors'] == donor_bank().n and r['licence'] and r['ships'] is True
    assert all(abs(sum(v) - 1) < .01 for k in ('drawn', 'bank') for v in r['metrics'][k].values())

def test_row_is_replaced_in_place(tmp_path):
    f, m = tmp_path/'a.safetensors', tmp_path/'weights.yaml'
    facts = dict(command='x', data='y', seed=1, hardware='z', metrics={}, licence='l', ships=False)
    m.write_text('# header\n[]\n'); f.write_bytes(b'1'); R.weights_row('a', f, m, **facts)
    m.write_text(m.read_text() + '- name: b\n  v: 1 # by hand\n'); f.write_bytes(b'22'); R.weights_row('a', f, m, **facts)
    rows = yaml.safe_load(m.read_text())
    assert [r['name'] for r in rows] == ['a', 'b'] and rows[0]['size'] == 2 and rows[0]['sha256'] == sha256(f)
    assert m.read_text().startswith('# header\n') and '# by hand' in m.read_text()
