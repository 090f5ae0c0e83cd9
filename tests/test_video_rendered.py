"Rendered clips: what they say is true, and what measures them agrees"
import numpy as np, pytest
from deidnb.core import ConfigError, OutputError
from deidnb.faces.find import BLENDSHAPES, FaceFinder
from deidnb.identity.experts import load_expert
from deidnb.video import rendered as R
from deidnb.video.track import track

FINDER = FaceFinder()
centre = lambda b: (b[:2] + b[2:])/2

def measured(x, box): # the face nearest to a true box, or None
    near = min(FINDER.find(x), key=lambda f: np.linalg.norm(centre(f.box) - centre(box)), default=None)
    return near if near is not None and near.landmarks is not None and np.linalg.norm(centre(near.box)
        - centre(box)) < .3*near.size else None

@pytest.fixture(scope='module')
def clip(): return R.talking(50, seed=1, who=0)
@pytest.fixture(scope='module')
def faces(clip): return [measured(x, clip[1].box[i, 0]) for i, x in enumerate(clip[0])]
@pytest.fixture(scope='module')
def two(): return R.two_people(56, seed=0, cut=46)

# --- the same again
def test_the_seed_decides():
    R.puppet.cache_clear(); a, s = R.talking(3, seed=5); R.puppet.cache_clear()
    np.random.seed(1); b, t = R.talking(3, seed=5); c, u = R.talking(3, seed=6)
    assert all(map(np.array_equal, a, b)) and np.array_equal(s.landmarks, t.landmarks) and np.array_equal(s.curves,
        t.curves) and s.cast == t.cast
    assert not np.array_equal(s.pose, u.pose) and a[0].dtype == np.uint8 and a[0].shape == (200, 240, 3)

def test_a_clip_does_not_depend_on_others():
    a, _ = R.talking(2, seed=0, who=1); R.talking(2, seed=0, who=2); b, _ = R.talking(2, seed=0, who=1)
    assert all(map(np.array_equal, a, b))

# --- what was put in is what is there
def test_every_frame_has_a_sure_face_with_a_mesh(faces): # .94 measured
    assert None not in faces and min(f.score for f in faces) >= .6

def test_landmarks(clip, faces): # mean distance over the distance of the outer eye corners: .009 measured, .013 in the worst frame
    e = [np.linalg.norm(f.landmarks[:, :2] - P[:, :2], axis=1).mean()/np.linalg.norm(P[33, :2] - P[263, :2]) for f,
         P in zip(faces, clip[1].landmarks[:, 0])]
    assert np.mean(e) < .015 and max(e) < .03

@pytest.mark.parametrize('k', ['eyeBlinkLeft', 'eyeBlinkRight', 'jawOpen'])
def test_expressions_agree(clip, faces, k):
    assert np.corrcoef([f.blendshapes[BLENDSHAPES.index(k)] for f in faces], clip[1].curve(k))[0, 1] >= .9

def test_poses_agree(clip, faces):
    p, q = np.stack([f.pose for f in faces]), clip[1].pose[:, 0]
    assert np.corrcoef(p[:, 0], q[:, 0])[0, 1] > .9 and np.corrcoef(p[:, 1], q[:, 1])[0, 1] > .8 and np.abs(p[:, [0, 2]]
        - q[:, [0, 2]]).max() < 6

@pytest.mark.parametrize('who', [1, 2])
def test_everybody_of_the_cast_blinks_and_speaks(who):
    x, t = R.talking(40, seed=who, who=who, blink=3); f = [measured(a, b) for a, b in zip(x, t.box[:, 0])]; assert None not in f
    for k, least in (('eyeBlinkLeft', .9), ('eyeBlinkRight', .9), ('jawOpen', .9)):
        assert np.corrcoef([a.blendshapes[BLENDSHAPES.index(k)] for a in f], t.curve(k))[0, 1] > least, k

def test_eyes_open_and_close_in_the_mesh(clip): # distance of the lids over the width of the eye, closed against open
    P = clip[1].landmarks[:, 0, :, :2]
    gap = np.linalg.norm(P[:, 159] - P[:, 145], axis=1)/np.linalg.norm(P[:, 33] - P[:, 133], axis=1)
    b = clip[1].curve('eyeBlinkLeft'); assert gap[b == 1].max() < .5*gap[b == 0].min()

def test_turned_by_what_was_asked(): # exact: rotations about one axis, of a head that looks straight ahead
    p = R.Puppet(None, None, np.eye(3), None, None, None)
    for k in range(3): assert np.allclose(R.pose_of(R.turned(p, *(np.eye(3)[k]*11))), np.eye(3)[k]*11, atol=1e-4)

@pytest.mark.parametrize('fps', [12, 25, 50])
def test_blinks(fps):
    for seed in range(20):
        b = R.blinks(4*fps, fps, np.random.default_rng(seed), 4)
        runs = np.flatnonzero(np.diff(np.r_[0, b == 1, 0]))
        assert len(runs) == 8 and set(runs[1::2] - runs[::2]) <= {2, 3} and b.max() == 1

def test_curves_stay_in_range():
    for seed in range(10):
        c, t = R.behaviour(60, 25, np.random.default_rng(seed), 3, .5, (9, 4, 3))
        assert c.min() >= 0 and c.max() <= 1 and c[:, 2].max() <= .5 and (np.abs(t) <= (9, 4,
                3)).all() and np.abs(np.diff(t, axis=0)).max() < 3

# --- two people
def test_two_identities(two):
    x, t = two; s = load_expert('sface')
    z = [np.concatenate([s.encode([x[i]], [f]) for i in (0, 5, 44, 50) for f in [measured(x[i], t.box[i, p])]]) for p in (0, 1)]
    assert min((c @ c.T).min() for c in z) > .6 and (z[0] @ z[1].T).max() < s.threshold(1e-3)

def test_boxes_and_visibility(two):
    x, t = two; h, w = x[0].shape[:2]
    assert t.visible[:, 0].min() > .95 and t.visible[:, 1].max() == 1 and (t.visible[:, 1] == 0).sum() >= 5
    for i in range(len(x)):
        b = t.box[i, 1]; inside = b[0] >= 0 and b[2] <= w; assert (t.visible[i, 1] < 1) or inside
        assert t.visible[i, 1] == 0 or b[0] < w
        if t.visible[i, 1] == 0: assert b[0] > w - 3
    assert np.allclose(t.box[..., :2], t.landmarks[..., :2].min(2)) and np.allclose(t.box[..., 2:], t.landmarks[..., :2].max(2))

def test_behind_somebody(): 
    x, t = R.two_people(20, seed=0, leave='behind'); away = t.visible[:, 1] < .05
    assert away.any() and not away[0] and not away[-1] and t.visible[:, 0].min() == 1
    i = int(np.flatnonzero(away)[0]); assert len(FINDER.find(x[i])) == 1

def test_followed_through_absence_and_cut(two, tmp_path):
    x, t = two; T = track(x, tmp_path/'found', FINDER, threads=1); assert len(T.people) == 2; who = [set(), set()]
    for i in range(T.n):
        for p in np.flatnonzero(t.visible[i] > .8):
            f = [s for s in T.faces(i) if s.how == 'found' and np.linalg.norm(centre(s.face.box) - centre(t.box[i,
                            p])) < .3*s.face.size]
            assert len(f) == 1, (i, p); who[p].add(f[0].person)
    assert all(len(s) == 1 for s in who) and who[0] != who[1] and all(max(k.seen) < 46 or min(k.seen) >= 46 for k in T.tracks)

def test_a_cut_just_after_somebody_returned(tmp_path):
    x, t = R.two_people(60, seed=0, cut=40)
    assert len(track(x, tmp_path/'found', FINDER, threads=1).people) == 2

# --- misuse, files
@pytest.mark.parametrize('f', [lambda: R.talking(0), lambda: R.talking(2, (80, 60)), lambda: R.two_people(10),
                               lambda: R.two_people(30, leave='up'), lambda: R.two_people(30, cut=30),
                               lambda: R.two_people(30, who=(1, 1))])
def test_misuse(f):
    with pytest.raises(ConfigError): f()

def test_a_file(clip, tmp_path):
    pytest.importorskip('av')
    from deidnb.faces.video import probe, read_video
    x = clip[0][:26]; p = R.write_clip(tmp_path/'a.mp4', x, 25); i = probe(p)
    y = [a for _, _, a in read_video(i)]
    assert len(y) == 26 and len(i.audio) == 1 and abs(i.seconds - 1.04) < .05 and np.mean([np.abs(a.astype(int)
                - b).mean() for a, b in zip(x, y)]) < 2.5
    assert not probe(R.write_clip(tmp_path/'b.mp4', x, 25, sound=False)).audio
    with pytest.raises(OutputError): R.write_clip(p, x)
    with pytest.raises(ConfigError): R.write_clip(tmp_path/'c.avi', x)
