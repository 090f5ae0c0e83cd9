"""Fail closed, order, seeds, receipts, resume: what the pipeline promises whatever a generator, a gate or a disk does."""
import json, os
from pathlib import Path
import numpy as np, pytest
from deidnb.assets import example_faces
from deidnb.core import AssetError, ConfigError, Edit, Face, Guarantee, InputError, OutputError, sha256
from deidnb.faces.io import read_image, write_image
from deidnb.gate import Gate
from deidnb.methods import METHODS
from deidnb.pipeline import GREY, Deidentifier, cover, protect_file

FACES = example_faces(12)
BOX = Face([70,60,190,220], [[100,120],[160,120],[130,150],[105,185],[155,185]])

class Paint:
    "Covers the whole crop with one colour; a generator whose misbehaviour can be chosen"
    framing, guarantee = 'native', Guarantee('nothing', 'none')
    def __init__(self, how='well', colour=(250,0,0)): self.how, self.colour, self.calls = how, colour, []
    def __call__(self, crop, z=None, *, rng):
        self.calls.append(crop); r, g, _ = self.colour
        img, m = np.empty_like(crop.image), np.ones(crop.image.shape[:2], np.float32); img[:] = (r, g, 10*len(self.calls)-10)
        bad = dict(well=lambda: Edit(img, m), none=lambda: None, tuple=lambda: (img, m), unchanged=lambda: Edit(crop.image.copy(), m), faint=lambda: Edit(crop.image ^ np.uint8(0), m),
            hole=lambda: Edit(img, m*0), half=lambda: Edit(img, m*.5), nan_mask=lambda: Edit(img, m*np.nan), inf_mask=lambda: Edit(img, m*np.inf), negative=lambda: Edit(img, -m), two=lambda: Edit(img, m*2),
            small=lambda: Edit(img[::2, ::2], m[::2, ::2]), mask_shape=lambda: Edit(img, m[:-1]), grey=lambda: Edit(img[..., 0], m), floats=lambda: Edit(img/255., m), nan_image=lambda: Edit(np.full(img.shape, np.nan), m),
            memory=lambda: (_ for _ in ()).throw(MemoryError()), error=lambda: 1/0, recursion=lambda: self(crop, rng=rng), asset=lambda: (_ for _ in ()).throw(AssetError('gone')), stop=lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
        return bad[self.how]()

class Judge:
    "A recogniser with prepared answers, one per comparison with a result"
    name = 'judge'
    def __init__(self, answers=()): self.answers, self.seen = list(answers), 0
    def encode(self, pictures, faces, batch=16): return np.zeros((len(faces), 2), np.float32)
    def threshold(self, fpr=1e-3): return .5
    def score(self, a, b): self.seen += 1; return np.full(len(a), self.answers.pop(0) if self.answers else 0.)

def gate(*answers): return Gate([Judge(answers)], refind=False)

BAD = ['none','tuple','unchanged','faint','hole','half','nan_mask','inf_mask','negative','two','small','mask_shape','grey','floats','nan_image','memory','error','recursion']

def assert_covered(out, face): x0,y0,x1,y1 = face.box.astype(int); assert (out[max(y0,0):y1+1, max(x0,0):x1+1] == GREY).all()

@pytest.mark.parametrize('how', BAD)
def test_a_failing_generator_leaves_no_face(how):
    r = Deidentifier(Paint(how)).photo(FACES[0], [BOX])
    assert not r.ok and r.faces[0].outcome == r.receipt['outcome'] == 'fallback' and r.faces[0].why
    assert r.receipt['count'] == dict(protected=0, fallback=1, kept=0)
    assert_covered(r.image, BOX)

def test_a_good_generator_is_used():
    r = Deidentifier(Paint()).photo(FACES[0], [BOX])
    assert r.ok and (r.image[140, 130] == (250,0,0)).all()

@pytest.mark.parametrize('box', [[np.nan]*4, [0,0,0,0], [9,9,3,3], [np.inf,0,np.inf,5]])
def test_a_face_without_a_box_covers_everything(box):
    r = Deidentifier(Paint()).photo(FACES[0], [Face(box, BOX.points5)])
    assert r.faces[0].outcome == 'fallback' and (r.image == GREY).all()

@pytest.mark.parametrize('box', [[-50,-60,90,100], [200,200,400,390], [-20,-20,300,300], [100,100,101,101]])
def test_faces_over_the_edge(box):
    f = Face(box, np.mean(np.reshape(box, (2,2)), 0) + [[-9,-9],[9,-9],[0,0],[-7,9],[7,9]])
    for how in ('well','error'):
        r = Deidentifier(Paint(how)).photo(FACES[0], [f]); assert r.image.shape == FACES[0].shape
        x0,y0,x1,y1 = np.clip(f.box, 0, 256).astype(int)
        c = slice((3*y0+y1)//4, (y0+3*y1)//4+1), slice((3*x0+x1)//4, (x0+3*x1)//4+1)
        assert (r.image[c] != FACES[0][c]).any(-1).all()

@pytest.mark.parametrize('points', [np.full((5,2), np.nan), np.zeros((5,2)), np.full((5,2), 1e9)])
def test_the_cover_does_not_need_points(points): assert_covered(cover(FACES[0], Face(BOX.box, points)), BOX)

def test_pasting_that_fails(monkeypatch):
    import deidnb.faces.align as A
    monkeypatch.setattr(A, 'paste', lambda *a: (_ for _ in ()).throw(ValueError('singular')))
    assert_covered(Deidentifier(Paint()).photo(FACES[0], [BOX]).image, BOX)

def test_missing_models_and_ctrl_c_are_not_swallowed():
    with pytest.raises(AssetError): Deidentifier(Paint('asset')).photo(FACES[0], [BOX])
    with pytest.raises(KeyboardInterrupt): Deidentifier(Paint('stop')).photo(FACES[0], [BOX])

# --- the gate

class Stronger(Paint):
    def __init__(self, level=0, top=9): super().__init__(colour=(10*level,0,0)); self.level, self.top = level, top
    def escalate(self, level): return Stronger(level) if level <= self.top else None

def test_gate_escalates_until_it_passes():
    r = Deidentifier(Stronger(), gate=gate(.9, .8, .1)).photo(FACES[0], [BOX])
    assert r.ok and r.faces[0].attempts == 3 and r.image[140,130,0] == 20
    assert r.faces[0].scores == dict(judge=dict(score=.1, threshold=.5,
                                                passed=True)) and r.receipt['gate']['experts'] == ['judge']

@pytest.mark.parametrize('answers', [[.9]*99, [np.nan]*99, [.5]*99, [np.inf]*99])
def test_gate_that_never_passes_covers(answers):
    r = Deidentifier(Stronger(), gate=gate(*answers), attempts=4).photo(FACES[0], [BOX])
    assert r.faces[0].outcome == 'fallback' and r.faces[0].attempts == 4 and 'still recognised by judge' in r.faces[0].why
    assert_covered(r.image, BOX)

def test_escalation_that_ends_or_breaks():
    assert Deidentifier(Stronger(top=1), gate=gate(*[.9]*9)).photo(FACES[0], [BOX]).faces[0].attempts == 2
    class Breaks(Stronger):
        def escalate(self, level): raise RuntimeError('no more donors')
    r = Deidentifier(Breaks(), gate=gate(*[.9]*9)).photo(FACES[0], [BOX])
    assert r.faces[0].outcome == 'fallback' and 'no more donors' in r.faces[0].why

def test_the_gate_is_stricter_than_the_threshold():
    from deidnb.identity.experts import load_expert
    strict, g, loose = Gate(guard=0), Gate(), Gate(guard=1)
    for n in g.thresholds:
        assert g.wanted[n] == loose.thresholds[n] < g.thresholds[n] < strict.thresholds[n] == load_expert(n).threshold(1e-3)
        assert np.isclose(strict.thresholds[n] - g.thresholds[n], .3*(strict.thresholds[n] - g.wanted[n]))
    for kw in (dict(guard=-.1), dict(margin=2)):
        with pytest.raises(ConfigError, match=next(iter(kw))): Gate(**kw)

def test_a_generator_without_escalation_is_tried_once():
    g = Paint(); r = Deidentifier(g, gate=gate(.9, .1)).photo(FACES[0], [BOX])
    assert len(g.calls) == 1 and r.faces[0].outcome == 'fallback'

def test_a_broken_recogniser_covers():
    class Broken(Judge):
        def score(self, a, b): raise RuntimeError('bad model')
    r = Deidentifier(Paint(), gate=Gate([Broken()], refind=False)).photo(FACES[0], [BOX])
    assert r.faces[0].outcome == 'fallback' and 'bad model' in r.faces[0].why

def test_real_recognisers_tell_same_from_other():
    from deidnb.gate import shared_finder
    g = Gate(); f = shared_finder().find(FACES[0])[0]
    for n in ('sface','faceres'):
        same = Gate((n,)).check(FACES[0], FACES[0], f); assert not same.passed and same.scores[n]['score'] > .99
    other = g.check(FACES[0], cover(FACES[0], f), f); assert other.passed and set(other.scores) == {'sface','faceres'}
    assert set(g.check(FACES[0], FACES[0], f).scores) == {'sface'}   # the first that knows the person ends the check

def test_a_shifted_face_does_not_pass():
    "The same person moved by a few pixels: the crop at the old points is off, the face found again is not"
    from deidnb.gate import shared_finder
    f = shared_finder().find(FACES[1])[0]
    assert not Gate().check(FACES[1], np.roll(FACES[1], (24, 24), (0, 1)), f).passed

def test_recognised_after_compression(tmp_path):
    write_image(tmp_path/'a.jpg', FACES[0])
    d = Deidentifier(Paint(), gate=gate(.1, .9))  # passes in memory, recognised in the file
    rec = protect_file(d, tmp_path/'a.jpg', tmp_path/'b.jpg', faces=[BOX])
    assert rec['outcome'] == 'fallback' and 'after compression' in rec['receipt']['faces'][0]['why']
    assert np.abs(read_image(tmp_path/'b.jpg').rgb[80:200, 90:170].astype(int)
                  - GREY).max() < 12 and len(list(tmp_path.iterdir())) == 2

# --- several faces

PAIR = [Face([40,40,160,200], BOX.points5-[30,20]), Face([120,60,200,170], BOX.points5*.6+[80,30])]

@pytest.mark.parametrize('order', [PAIR, PAIR[::-1]])
def test_overlapping_faces_never_come_back(order):
    "A later crop holds nothing of what was hidden before"
    g = Paint(); r = Deidentifier(g).photo(FACES[0], order)
    assert [f.box[0] for f in r.faces] == [40,120]           # big to small
    late = g.calls[1]; hidden = (late.image == (250,0,0)).all(-1)
    x, y = late.matrix[:, 2]; assert hidden[int(60+y):int(170+y), int(125+x):int(155+x)].all()
    for f in PAIR:
        x0,y0,x1,y1 = f.box.astype(int); assert (r.image[y0:y1, x0:x1] != FACES[0][y0:y1, x0:x1]).any(-1).mean() > .99

def test_fallback_beside_a_protected_face_stays():
    class Second(Paint):
        def __call__(self, crop, z=None, *, rng):
            self.how = 'error' if self.calls else 'well'; return super().__call__(crop, rng=rng)
    r = Deidentifier(Second()).photo(FACES[0], PAIR)
    assert [f.outcome for f in r.faces] == ['protected','fallback']; assert_covered(r.image, PAIR[1])

def test_neighbours_are_checked_again():
    "Two faces pass; looked at again after the second paste, the first is recognised"
    r = Deidentifier(Paint(), gate=gate(.1, .1, .9)).photo(FACES[0], PAIR)
    assert [f.outcome for f in r.faces] == ['fallback','fallback']; assert_covered(r.image, PAIR[1])

@pytest.mark.parametrize('kw,want', [(dict(only=(0,0,110,256)), ['protected','kept']), (dict(exclude=(0,0,110,256)),
            ['kept','protected']), (dict(only=[(0,0,256,256)], exclude=[(0,0,256,256)]), ['kept','kept']),
                                     (dict(), ['protected']*2)])
def test_only_and_except(kw, want): assert [f.outcome for f in Deidentifier(Paint(), **kw).photo(FACES[0], PAIR).faces] == want

@pytest.mark.parametrize('bad', [(1,2,3), (5,5,1,9), 'x', [(0,0,np.nan,4)]])
def test_boxes_that_are_none(bad):
    with pytest.raises(ConfigError): Deidentifier('blur', only=bad)

# --- no face

def test_no_face(tmp_path):
    flat = np.full((90,120,3), 80, np.uint8); write_image(tmp_path/'a.png', flat)
    with pytest.raises(InputError, match='no face found'): protect_file(Deidentifier('blur'), tmp_path/'a.png', tmp_path/'b.png')
    assert not (tmp_path/'b.png').exists()
    for how in ('copy','blur-all'):
        assert protect_file(Deidentifier('blur', on_no_face=how), tmp_path/'a.png',
                            tmp_path/f'{how}.png')['outcome'] == 'no face found'
    stripes = np.tile(np.arange(256, dtype=np.uint8)[None, :, None] % 2 * 255, (256,1,3))
    assert (Deidentifier('blur', on_no_face='copy').photo(stripes).image == stripes).all() and Deidentifier('blur',
        on_no_face='blur-all').photo(stripes).image.std() < 5
    with pytest.raises(ConfigError): Deidentifier('blur', on_no_face='ignore')

# --- methods, seeds, receipts

ALONE = [n for n,m in METHODS.items() if not m.needs_set and not m.gate]

@pytest.mark.parametrize('method', ALONE)
@pytest.mark.parametrize('strength', [None,'light','strong'])
def test_every_method_protects(method, strength):
    r = Deidentifier(method, strength=strength, **{k: 'four random words here' for k in METHODS[method].needs},
                     **(dict(steps=8, length=4, resample=2) if method == 'repaint' else {})).photo(FACES[2])
    assert r.ok and r.faces[0].outcome == 'protected' and json.dumps(r.receipt) and r.receipt['guarantee']['text']

def test_seeds():
    with pytest.raises(ConfigError, match='simulate'): Deidentifier('noise', seed=3)
    make = lambda s, key='': Deidentifier('noise', seed=s, simulate=True).photo(FACES[3], key=key).image
    assert (make(3) == make(3)).all() and (make(3) != make(4)).any() and (make(3, 'a') != make(3, 'b')).any()
    free = [Deidentifier('noise').photo(FACES[3]) for _ in range(2)]
    assert (free[0].image != free[1].image).any() and 'seed' not in free[0].receipt

def test_receipt_says_what_and_nothing_of_whom():
    import hashlib
    d = Deidentifier('dp_pix', seed=1, simulate=True); r = d.photo(FACES[4]); t = json.loads(json.dumps(r.receipt))
    assert t['seed'] == 1 and t['simulated'] and t['guarantee']['epsilon'] is not None and t['method'] == 'dp_pix' and t['picture']['sha256'] == hashlib.sha256(r.image.tobytes()).hexdigest()
    assert hashlib.sha256(FACES[4].tobytes()).hexdigest() not in json.dumps(t)

@pytest.mark.parametrize('bad', [dict(method='blurr'), dict(method='blur', raduis=3), dict(method='blur', preset='x'),
                                 dict(method='blur', strength='huge'), dict(method='blur', min_score=2),
                                 dict(method='blur', radius='wide')])
def test_wrong_names_are_refused(bad):
    with pytest.raises(ConfigError): Deidentifier(**bad)

# --- folders

@pytest.fixture
def folder(tmp_path):
    (tmp_path/'in'/'sub').mkdir(parents=True)
    for i in range(5): write_image(tmp_path/'in'/('sub' if i > 2 else '')/f'{i}.png', FACES[i])
    return tmp_path

def shas(p): return {str(q.relative_to(p)): sha256(q) for q in sorted(p.rglob('*.png'))}

def test_processes_give_the_same_pictures(folder):
    d = Deidentifier('noise', seed=7, simulate=True)
    assert d.folder(folder/'in', folder/'a', progress=False)['exit_code'] == 0
    assert d.folder(folder/'in', folder/'b', progress=False, jobs=2)['done'] == 5
    assert shas(folder/'a') == shas(folder/'b') and len(shas(folder/'a')) == 5

def test_a_worker_that_dies_takes_only_its_item(folder):
    from deidnb.batch import run_jobs
    jobs = [dict(name=str(i), start=lambda: None, args=dict(path=folder/'in'/f'{i}.png', out=folder/'out'/f'{i}.png'))
            for i in range(3)]
    jobs[1]['args']['rel'] = Dies()
    out = {j['name']: r['status'] for j,r in run_jobs(Deidentifier('blur'), jobs, 2)}
    assert out == {'0': 'done', '1': 'failed', '2': 'done'}

class Dies:
    def __reduce__(self): return os._exit, (9,)

def test_interrupted_and_taken_up_again(folder):
    calls = []
    class Twice(Paint):
        def __call__(self, crop, z=None, *, rng):
            calls.append(1)
            if len(calls) == 3: raise KeyboardInterrupt
            return super().__call__(crop, rng=rng)
    d = Deidentifier(Twice())
    with pytest.raises(KeyboardInterrupt): d.folder(folder/'in', folder/'out', progress=False)
    assert len(shas(folder/'out')) == 2 and not list((folder/'out').rglob('.deidnb-*'))
    s = d.folder(folder/'in', folder/'out', progress=False)
    assert (s['skipped'], s['done'], s['failed']) == (2, 3, 0)

def test_changed_input_output_and_settings(folder):
    d = Deidentifier('blur'); go = lambda d=d, **k: d.folder(folder/'in', folder/'out', progress=False, **k)
    go(); before = shas(folder/'out')
    write_image(folder/'in'/'0.png', FACES[9], overwrite=True); (folder/'out'/'1.png').unlink()
    write_image(folder/'out'/'2.png', FACES[2], overwrite=True)
    s = go(); errors = ' '.join(f['error'] for f in s['failures'])
    assert (s['skipped'], s['done'], s['failed']) == (2, 1,
                                                      2) and 'another version of the input' in errors and 'changed since' in errors
    assert go(overwrite=True)['failed'] == 0 and shas(folder/'out').keys() == before.keys()
    assert go(Deidentifier('blur', radius=30))['failed'] == 5 and go(resume=False)['failed'] == 5

def test_two_runs_at_once(folder):
    from deidnb.batch import open_run
    lock, log = open_run(folder/'out')
    with pytest.raises(OutputError, match='another run'): Deidentifier('blur').folder(folder/'in', folder/'out', progress=False)
    lock.release()

def test_a_missing_model_stops_the_batch(folder):
    with pytest.raises(AssetError): Deidentifier(Paint('asset')).folder(folder/'in', folder/'out', progress=False)
    assert not shas(folder/'out')

@pytest.mark.parametrize('method', ['k_same_pixel','k_same_eigen','k_same_furthest'])
def test_sets(folder, method):
    d = Deidentifier(method, k=2, seed=1, simulate=True); s = d.folder(folder/'in', folder/'out', progress=False, jobs=2)
    assert s['done'] == 5 and s['protected'] == 5
    with pytest.raises(ConfigError): Deidentifier(method).photo(FACES[0])
    with pytest.raises(ConfigError, match='needs at least'):
        Deidentifier(method, k=50).folder(folder/'in', folder/'out2', progress=False)

def test_destination_inside_the_source(folder):
    d = Deidentifier('blur')
    assert d.folder(folder/'in', folder/'in'/'out', progress=False)['done'] == 5 and d.folder(folder/'in',
        folder/'in'/'out', progress=False)['skipped'] == 5
    for dst in (folder/'in', folder/'in'/'.', folder/'in'/'sub'/'..'):
        with pytest.raises(ConfigError): d.folder(folder/'in', dst, progress=False)
