"Faces over time, motion flow, drivers, measures over time, and the command line on videos."
import json, os, signal, subprocess, sys, threading, time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import cv2, numpy as np, pytest
from deidnb.assets import example_faces
from deidnb.core import ConfigError, Face, InputError, OutputError, rng
from deidnb.faces.align import umeyama
from deidnb.faces.find import BLENDSHAPES, FaceFinder
from deidnb.faces.masks import REGIONS, fill
from deidnb.video import drivers as D, flow as F, track as T
from deidnb.video.rendered import write_clip

pytest.importorskip('av')
FINDER = FaceFinder(); A, B = example_faces(2)
DATA = Path(os.environ['DEIDNB_DATA'])/'videos' if os.environ.get('DEIDNB_DATA') and (Path(os.environ['DEIDNB_DATA'])/'videos').is_dir() else None

def scene(n=16, who=((A, 10, 40, 1., 0.), (B, 200, 44, -.5, 0.)), size=(336, 192), side=112, away={}, shot=None):
    wall = np.full((size[1], size[0], 3), 118, np.uint8); wall[:, ::16] = 126; out = []
    for i in range(n):
        x = wall.copy() if shot is None or i < shot else wall//3
        for p, (img, x0, y0, vx, vy) in enumerate(who):
            if i in away.get(p, ()): continue
            M = np.float64([[side/256, 0, x0 + vx*i], [0, side/256, y0 + vy*i]])
            m = cv2.warpAffine(np.ones(img.shape[:2], np.float32), M, size)[..., None]
            x = np.where(m > .5, cv2.warpAffine(img, M, size, flags=cv2.INTER_AREA), x)
        out.append(x.astype(np.uint8))
    return out

def write(path, frames): return write_clip(path, frames, sound=False)

@pytest.fixture(scope='module')
def frames(): return scene()
@pytest.fixture(scope='module')
def tracks(frames, tmp_path_factory): return T.track(frames, tmp_path_factory.mktemp('t')/'found', FINDER, threads=1)
@pytest.fixture(scope='module')
def clip(frames, tmp_path_factory): return write(tmp_path_factory.mktemp('v')/'in.mp4', frames)

# --- tracks
def face(x=0., y=0., s=50., score=.9):
    return Face([x, y, x+s, y+s], np.float32([[x+15, y+20], [x+35, y+20], [x+25, y+30], [x+17, y+38], [x+33, y+38]]), score)
def codes(k): v = np.zeros(128, np.float32); v[k] = 1; return v

def run(steps, **kw): # [(faces, codes of each)] -> tracks
    now = {}; link = T.Linker(lambda x, f: now[id(f)], **kw); n = 0; blank = np.zeros((200, 300, 3), np.uint8)
    for i, s in enumerate(steps):
        fs = []
        for f, c in s: now[id(f)] = codes(c); fs.append(f)
        link.step(i, blank, fs, list(range(n, n+len(fs)))); n += len(fs)
    return link.finish(len(steps))

def test_a_face_keeps_its_track():
    t, = run([[(face(2*i), 0)] for i in range(20)]); assert sorted(t.seen) == list(range(20))

def test_weak_detections_count_only_where_a_sure_one_is():
    assert run([[(face(0, score=.4), 0)] for _ in range(5)]) == []
    t, = run([[(face(0, score=.4 if i != 3 else .8), 0)] for i in range(6)]); assert len(t.seen) == 6

def test_two_frames_are_a_face():
    t, = run([[], [(face(), 0)], [(face(1), 0)], []]); assert sorted(t.seen) == [1, 2]

@pytest.mark.parametrize('gap,n', [(5, 1), (40, 2)])
def test_gaps_are_bridged_for_a_second(gap, n): assert len(run([[(face(), 0)]] + [[]]*gap + [[(face(2), 0)]])) == n

def test_people_who_cross_are_told_apart_by_their_codes():
    steps = [[(face(5*i), 0), (face(100-5*i), 1)] for i in range(21)]; ts = run(steps); assert len(ts) == 2
    # numbers alternate: even is person 0
    for t in ts:
        first = 0 if np.mean(t.codes, 0)[0] > .5 else 1; assert all(k % 2 == first for k in t.seen.values())

@pytest.mark.parametrize('together', [False, True])
def test_who_returns_is_the_same_unless_both_are_there(together):
    a = T.Track(seen={0: 0, 5: 1}, codes=[codes(0)])
    b = T.Track(seen={(3 if together else 9): 2, 12: 3}, codes=[codes(0)])
    assert T.same_people([a, b], .4) == ([0, 1] if together else [0, 0])

def test_who_comes_in_from_the_side_is_known_by_the_better_view():
    a = T.Track(seen={i: i for i in range(20)}, codes=[codes(0)])
    b = T.Track(seen={30: 30, 33: 31}, codes=[codes(5), codes(0)])
    assert T.same_people([a, b], .4) == [0, 0]

def test_a_track_that_ended_before_a_cut_belongs_to_its_shot():
    link = T.Linker(lambda x, f: codes(0), bridge=2); blank = np.zeros((200, 300, 3), np.uint8)
    link.step(0, blank, [face()], [0])
    for i in range(1, 6): link.step(i, blank, [], [])
    link.cut(6); assert link.finish(9)[0].shot == (0, 6)

def test_nobody_is_drawn_over_somebody_else(tmp_path):
    found = T.Found(tmp_path/'f'); a, b = T.Track(shot=(0, 5)), T.Track(shot=(0, 5))
    for i in range(5): a.add(i, found.add(i, face(0)), face(0))
    for i in (0, 4): b.add(i, found.add(i, face(4)), face(4))
    t = T.Tracks(found, [a, b], [0, 1], 5); assert [s.person for s in t.faces(2)] == [0] and len(t.faces(0)) == 2

def test_people_are_numbered_by_appearance():
    ts = [T.Track(seen={9: 0, 30: 1}, codes=[codes(0)]), T.Track(seen={0: 2, 3: 3}, codes=[codes(1)])]
    assert T.same_people(ts, .4) == [1, 0]

@pytest.mark.parametrize('levels', [0, 8])
def test_cuts(levels):
    r = np.random.default_rng(0); c = T.Cuts()
    a, b = np.full((90, 160, 3), 60, np.uint8), np.full((90, 160, 3), 150, np.uint8)
    noisy = lambda x: np.clip(x + r.normal(0, levels, x.shape), 0, 255).astype(np.uint8)
    assert [i for i in range(30) if c(noisy(a if i < 17 else b))] == [17]

def test_nothing_is_carried_over_a_cut(tmp_path):
    x = scene(12, shot=6); t = T.track(x, tmp_path/'f', FINDER, threads=2)
    assert all(k.shot in ((0, 6), (6, 12)) for k in t.tracks) and len(t.people) == 2 and all(len(t.faces(i)) == 2
        for i in range(12))

def test_a_blink_of_the_detector_is_filled(tmp_path, frames):
    blind = type('Blind', (), dict(find=lambda s, x, **kw: [] if any(x is frames[i] for i in (5, 6, 7))
                                   else FINDER.find(x, **kw)))()
    t = T.track(frames, tmp_path/'f', blind, threads=1)
    true = T.track(frames, tmp_path/'g', FINDER, threads=1)
    assert [s.how for s in t.faces(6)] == ['between']*2 and all(np.abs(a.face.landmarks - b.face.landmarks).max() < 2.5
                                                                for a, b in zip(sorted(t.faces(6),
                key=lambda s: s.person), sorted(true.faces(6), key=lambda s: s.person)))

def test_long_gaps_are_covered(tmp_path, frames):
    lost = {id(x) for x in frames[3:15]}
    blind = type('Blind', (), dict(find=lambda s, x, **kw: [] if id(x) in lost else FINDER.find(x, **kw)))()
    t = T.track(frames, tmp_path/'f', blind, threads=1)
    assert [s.how for s in t.faces(9)] == ['lost']*2

def test_no_ghost_before_somebody_enters(tmp_path):
    t = T.track(scene(14, away={1: range(8)}), tmp_path/'f', FINDER, threads=1)
    assert all(len(t.faces(i)) == 1 for i in range(8)) and all(len(t.faces(i)) == 2 for i in range(8, 14))

def test_threads_do_not_change_the_result(tmp_path, frames):
    a, b = (T.track(frames, tmp_path/f'{k}', FINDER, threads=k) for k in (1, 2))
    assert all(np.array_equal(p.face.landmarks, q.face.landmarks) for i in range(len(frames)) for p,
               q in zip(a.faces(i), b.faces(i)))

def test_memory_holds_no_meshes(tracks):
    assert all(not hasattr(v, 'landmarks')
               for v in tracks.found.box) and tracks.found.path.stat().st_size == len(tracks.found)*T.RECORD.itemsize

@pytest.mark.parametrize('kw', [dict(weak=.7), dict(weak=0), dict(min_score=1.)])
def test_track_refuses(tmp_path, kw):
    with pytest.raises(ConfigError): T.track([], tmp_path/'f', FINDER, **kw)

def test_no_frames_no_faces(tmp_path):
    t = T.track([], tmp_path/'f', FINDER); assert t.n == 0 and t.people == [] and t.faces(0) == []

def test_one_euro_leaves_constants_and_straight_lines(): 
    x = np.full((20, 3), 5.)
    assert np.allclose(T.steady(x), 5) and np.abs(T.steady(np.arange(40.)[:, None]*2)[10:30, 0] - np.arange(10, 30)*2).max() < .2

# --- flow
@pytest.fixture(scope='module')
def still(): f = FINDER.find(A)[0]; return A, f
def shifted(f, d):
    g = lambda p: None if p is None else np.concatenate([p[..., :2] + d, p[..., 2:]], -1)
    return replace(f, box=f.box + np.tile(d, 2), points5=f.points5 + d, landmarks=g(f.landmarks))

@pytest.mark.parametrize('mode', F.MODES)
def test_a_still_face_stays(still, mode):
    x, f = still; r = np.uint8(255 - x); m = fill(x.shape[:2], f.landmarks[REGIONS['oval']])
    fl = F.MotionFlow(mode); fl.start(x, f, r, m)
    for _ in range(4): s = fl.step(x, f)
    inner = cv2.erode((s['mask'] > .99).astype(np.uint8), np.ones((9, 9))) > 0
    assert np.abs(s['image'] - (255. - s['own']))[inner].mean() < 2 and not s['due'] and s['error'] < 1

@pytest.mark.parametrize('mode', ['rlt', 'std'])
def test_a_shift_is_followed(still, mode):
    x, f = still; r = np.uint8(255 - x); m = fill(x.shape[:2], f.landmarks[REGIONS['oval']])
    fl = F.MotionFlow(mode); fl.start(x, f, r, m)
    for k in range(1, 6):
        d = np.float32([3*k, -2*k])
        y = cv2.warpAffine(x, np.float64([[1, 0, d[0]], [0, 1, d[1]]]), x.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
        s = fl.step(y, shifted(f, d))
    out = F.put_back(y, shifted(f, d), s, False)
    want = cv2.warpAffine(r, np.float64([[1, 0, d[0]], [0, 1, d[1]]]), x.shape[1::-1])
    zone = cv2.erode((fill(x.shape[:2], f.landmarks[REGIONS['oval']] + np.r_[d, 0]) > .5).astype(np.uint8), np.ones((9, 9))) > 0
    assert np.abs(out.astype(int) - want)[zone].mean() < 4

def test_a_hand_before_the_face_asks_for_a_keyframe(still):
    x, f = still; fl = F.MotionFlow(); fl.start(x, f, 255-x, np.ones(x.shape[:2], np.float32))
    y = x.copy(); y[int(f.box[1]):, :] = 20; assert fl.step(y, f)['due']

def test_a_turned_head_asks_for_a_keyframe(still):
    x, f = still; fl = F.MotionFlow(turn=10); fl.start(x, f, x, np.ones(x.shape[:2], np.float32))
    assert fl.step(x, replace(f, pose=f.pose + [15, 0, 0]))['due'] and not fl.step(x, f)['due']

def test_light_is_followed(still):
    x, f = still; fl = F.MotionFlow(); fl.start(x, f, x, np.ones(x.shape[:2], np.float32))
    y = np.uint8(x*.85); s = fl.step(y, f); inner = fill(s['mask'].shape, s['P'][REGIONS['oval']]) > .5
    assert np.abs(s['image'] - s['own'])[inner].mean() < 3

def test_flow_outside_the_mask_is_the_frame(still):
    x, f = still; m = fill(x.shape[:2], f.landmarks[REGIONS['oval']]); fl = F.MotionFlow()
    fl.start(x, f, 255-x, m); s = fl.step(x, f); out = F.put_back(x, f, s)
    assert np.array_equal(out[cv2.dilate(m, np.ones((9, 9))) == 0], x[cv2.dilate(m, np.ones((9, 9))) == 0])

def test_unknown_mode():
    with pytest.raises(ConfigError): F.MotionFlow('avd')

# --- people
@pytest.fixture(scope='module')
def swap(): return D.Deidentifier('donor_swap', seed=3, simulate=True, gate=False, finder=FINDER)
def decided(d, tracks, frames, noise): return D.people_of(d, tracks, dict(enumerate(frames)), noise)

def test_one_donor_for_all_frames(swap, tracks, frames):
    # nothing is drawn by lot any more
    p = decided(swap, tracks, frames, rng(0, True)); one = D.PerFrame(p, rng(0, True))
    assert len(p) == 2 and all(q.decision is not None for q in p)
    a, b = one(3, frames[3], tracks.faces(3))[0], D.PerFrame(p, rng(9, True))(3, frames[3], tracks.faces(3))[0]
    assert np.array_equal(a, b)

@pytest.mark.parametrize('method', ['blur', 'pixelate', 'mask'])
def test_pixel_methods_decide_nothing(method, tracks, frames):
    p = decided(D.Deidentifier(method, finder=FINDER), tracks, frames, rng(0, True))
    assert all(q.decision is None and q.generator is not None for q in p)

def test_a_generator_that_fails_covers(tracks, frames):
    class Broken:
        framing, needs_set, needs_mesh, crop_args = 'native', False, False, {}
        def __call__(self, crop, *, rng=None): raise RuntimeError('no')
    d = D.Deidentifier(Broken(), finder=FINDER); p = decided(d, tracks, frames, rng(0, True))
    y, whys = D.PerFrame(p, rng(0, True))(0, frames[0], tracks.faces(0)); assert all(whys)
    for s in tracks.faces(0): x0, y0, x1, y1 = s.face.box.astype(int); assert (y[(y0+y1)//2, (x0+x1)//2] == 127).all()

def test_who_is_still_recognised_is_covered_throughout(tracks, frames):
    class Same:
        framing, needs_set, needs_mesh, crop_args = 'native', False, False, {}
        def __call__(self, crop, *, rng=None):
            y = np.clip(crop.image.astype(int) + 3, 0, 255).astype(np.uint8)
            return D.check_edit.__globals__['Edit'](y, np.ones(y.shape[:2], np.float32))
    d = D.Deidentifier(Same(), gate=True, finder=FINDER); p = decided(d, tracks, frames, rng(0, True))
    assert all(q.doubt and 'recognised' in q.why for q in p)   # in doubt: every frame is looked at, and covered
    got = guarded(D.Watch(d, 5, p), frames[:6], frames, tracks)
    assert all(all(whys) and (y != x).any() for (y, whys), x in zip(got, frames))

def guarded(w, pictures, frames, tracks, start=0): # what `Watch` lets through, and why not
    at = [(i, y, tracks.faces(i)) for i, y in enumerate(pictures, start)]; none = lambda s: ['']*len(s)
    return [(y[2], y[4]) for y in w((i, None, frames[i], y, s, none(s), w.look(i, frames[i], y, s, none(s))) for i, y, s in at)]

class Knows: # a gate that recognises whoever was left as they were
    def __init__(self): self.asked = []
    def codes(self, x, f): return {}
    def check(self, source, result, f, codes):
        x0, y0, x1, y1 = np.clip(f.box, 0, None).astype(int); known = np.array_equal(source[y0:y1, x0:x1], result[y0:y1, x0:x1])
        self.asked.append(known); return D.Verdict({'demo': dict(score=1., threshold=.5, passed=not known)})

@pytest.mark.parametrize('bare', [set(), {4}, {2}, {7}, {3, 4, 5, 6}, set(range(10))])
def test_between_two_looks_nothing_slips_that_touches_an_alarm(tracks, frames, bare):
    d = SimpleNamespace(gate=Knows()); w = D.Watch(d, 4); out = [x if i in bare else 255-x for i, x in enumerate(frames[:10])]
    got = guarded(w, out, frames, tracks); hit = [i for i, (y, whys) in enumerate(got) if any(whys)]
    # looks at 0, 4, 8, and at 9, the last; what lies between two looks is looked at if one of them finds somebody
    want = {i for a, b in ((0, 4), (4, 8), (8, 9)) if {a, b} & bare for i in range(a, b+1)} & bare
    assert set(hit) == want
    assert all(np.array_equal(got[i][0], out[i]) for i in range(10) if i not in hit) and len(got) == 10

def test_who_is_in_doubt_is_looked_at_in_every_frame(tracks, frames):
    d = SimpleNamespace(gate=Knows()); people = [D.Person(n, None, doubt=n == 0) for n in tracks.people]
    w = D.Watch(d, 0, people); got = guarded(w, frames[:6], frames, tracks)
    assert all([bool(why) for why in whys] == [s.person == 0 for s in tracks.faces(i)] for i, (_, whys) in enumerate(got))

class Glances: # a gate with one recogniser that sees in each frame what it is told; notes what it was asked
    def __init__(self, clear): self.clear, self.asked = clear, []
    def codes(self, x, f): return {'demo': np.zeros((1, 2))}
    def check(self, source, result, f, codes, memo=None, glance=False):
        self.asked.append((len(codes["demo"]), glance)); return D.Verdict({'demo': dict(score=0., threshold=.5, passed=True)}, excess=-.1 if self.clear is True else .1, narrow=self.clear is None)

@pytest.mark.parametrize('clear,usual,every,i,wanted', [(True, True, 4, 4, [(3, True)]), (True, True, 4, 20, [(4, True)]), (False, True, 4, 4, [(3, True), (4, True)]),
                         (False, True, 4, 20, [(4, True)]), (None, True, 4, 4, [(3, True), (4, True), (4, False)]), (True, True, 1, 19, [(3, True)]),
                         (True, True, 1, 40, [(4, True)]), (True, True, 4, 5, []), (True, True, 4, 6, []), (True, False, 4, 6, [(4, True)]), (True, False, 4, 5, [])])
def test_a_glance_is_enough_if_it_is_clear(tracks, frames, clear, usual, every, i, wanted):
    # against 3 views of the person; also the face in this frame where that is not clear, where they never looked like this, and once in 20 frames
    g = Glances(clear); s = [x for x in tracks.faces(8) if x.person == tracks.people[0]]
    p = D.Person(tracks.people[0], None, views={'demo': np.zeros((3, 2))}, stances=D.stance(s[0].face)[None] + (0 if usual else 2)); w = D.Watch(SimpleNamespace(gate=g), every, [p])
    w.look(i, frames[8], frames[8], s, [""]); assert g.asked == wanted

def test_a_stance_is_unusual_in_a_blink_and_a_turn(tracks):
    s = tracks.faces(8)[0]; f = s.face; p = D.Person(s.person, None, stances=D.stance(f)[None])
    blink = f.blendshapes.copy(); blink[BLENDSHAPES.index('eyeBlinkLeft')] += .4
    turned, faint = (replace(f, pose=f.pose + np.float32([d, 0, 0])) for d in (13, 11))
    assert D.usual(p, f) and D.usual(p, faint) and D.usual(p, turned) is False and D.usual(p, replace(f, blendshapes=blink)) is False
    assert D.usual(p, replace(f, pose=None)) is False and D.usual(None, f) is None and D.usual(replace(p, stances=None), f) is None

class Says: # a gate whose verdicts are given: f recognised, n hardly not, e neither that nor clear, c clear
    def __init__(self, frames, says): self.says = {id(x): v for x, v in zip(frames, says)}
    def codes(self, x, f): return {}
    def check(self, source, result, f, codes):
        v = self.says[id(source)]
        return D.Verdict({'demo': dict(score=.3, threshold=.5, passed=v != 'f')}, excess=-.1 if v == 'c' else .1, narrow=v == 'n')

@pytest.mark.parametrize('every,says,doubt,covered', [(1, 'ccfecc', False, {2, 3}), (1, 'ccfccc', False, {2}), (1, 'eneeee', False, set()), (1, 'eecnc', True, {0, 1, 3}),
                         (5, 'ffffef', False, set(range(6))), (5, 'ffcffffffce', False, {0, 1, 3, 4, 5, 6, 7, 8, 10}), (5, 'efeeen', False, {1, 5}), (5, 'cccccc', True, set())])
def test_where_most_is_recognised_only_what_is_clear_is_shown(tracks, frames, every, says, doubt, covered):
    s = [x for x in tracks.faces(8) if x.person == tracks.people[0]]; w = D.Watch(SimpleNamespace(gate=Says(frames, says)), every, [D.Person(s[0].person, None, doubt=doubt)])
    got = list(w((i, None, x, x, s, [''], w.look(i, x, x, s, [''])) for i, x in enumerate(frames[:len(says)])))
    assert {i for i, (*_, whys) in enumerate(got) if whys[0]} == covered

def test_a_short_track_is_looked_at(tracks, frames):
    d = SimpleNamespace(gate=Knows()); w = D.Watch(d, 5); got = guarded(w, frames[1:4], frames, tracks, 1) # no multiple of 5
    assert all(all(whys) for _, whys in got)

def test_no_gate_no_looks(tracks, frames):
    w = D.Watch(SimpleNamespace(gate=None), 4); got = guarded(w, frames[:6], frames, tracks)
    assert all(y is x and not any(whys) for (y, whys), x in zip(got, frames))

def test_decisions_survive_a_crash(tmp_path, swap, tracks, frames):
    p = decided(swap, tracks, frames, rng(0, True)); D.keep_people(tmp_path/'p.npz', p)
    p[0].views, p[1].doubt, p[1].why = {'sface': np.ones((3, 2))}, True, 'still recognised'; D.keep_people(tmp_path/'p.npz', p)
    q = D.kept_people(tmp_path/'p.npz', swap)
    for a, b in zip(p, q, strict=True):
        assert (a.number, a.scores, a.attempts, a.why, a.doubt, a.views.keys()) == (b.number, b.scores, b.attempts, b.why, b.doubt, b.views.keys())
        assert np.array_equal(a.stances, b.stances) and a.stances is not None and all(np.array_equal(v, b.views[k]) for k, v in a.views.items())
    assert np.array_equal(D.PerFrame(p, None)(2, frames[2], tracks.faces(2))[0], D.PerFrame(q, None)(2, frames[2],
            tracks.faces(2))[0]) and D.kept_people(tmp_path/'none.npz', swap) is None

def test_every_thread_has_its_own_flow(): # it keeps pyramids: one for two threads breaks the heap
    from concurrent.futures import ThreadPoolExecutor
    wait = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool: assert len(set(map(id, pool.map(lambda _: (wait.wait(9), F.dis())[1], range(3))))) == 3

@pytest.mark.parametrize('driver', ['per_frame', 'flow'])
def test_frames_drawn_ahead_are_those_drawn_one_by_one(swap, tracks, frames, driver):
    p = decided(swap, tracks, frames, rng(0, True)); d = SimpleNamespace(gate=None, only=None, exclude=None, on_no_face='copy')
    one, many = (D.DRIVERS[driver](p, rng(0, True), finder=FINDER) for _ in range(2))
    alone = [one(i, x, tracks.faces(i))[0] for i, x in enumerate(frames)]
    got = list(D.in_stages(d, tracks, many, D.Watch(d), ((i, None, x) for i, x in enumerate(frames)), 3))
    assert [g[0] for g in got] == list(range(len(frames))) and all(np.array_equal(a, g[3]) for a, g in zip(alone, got))

def test_flow_draws_few_keyframes(swap, tracks, frames):
    f = D.Flow(decided(swap, tracks, frames, rng(0, True)), rng(0, True), finder=FINDER)
    outs = [f(i, x, tracks.faces(i)) for i, x in enumerate(frames)]
    keys = [c.keys for c in f.states.values()]
    assert max(keys) <= 3 and not any(w for _, ws in outs for w in ws) and all((y != x).any() for (y, _), x in zip(outs, frames))

# --- files
def test_a_video(tmp_path, clip, swap, frames):
    from deidnb.faces.video import read_video
    r = D.protect_video(swap, clip, tmp_path/'o.mp4')
    got = [x for *_, x in read_video(tmp_path/'o.mp4')]
    assert len(got) == len(frames) and r['outcome'] == 'protected' and len(r['people']) == 2 and r['covered'] == 0 and sorted(p.name
        for p in tmp_path.iterdir()) == ['o.mp4']
    for i in (0, 7, 15):
        for f in FINDER.find(frames[i]):
            x0, y0, x1, y1 = f.box.astype(int)
            assert np.abs(got[i][y0:y1, x0:x1].astype(int) - frames[i][y0:y1, x0:x1]).mean() > 4

def test_a_video_with_nobody(tmp_path):
    src = write(tmp_path/'wall.mp4', scene(5, who=()))
    with pytest.raises(InputError): D.protect_video(D.Deidentifier('blur', finder=FINDER), src, tmp_path/'o.mp4')
    assert not (tmp_path/'o.mp4').exists()
    assert D.protect_video(D.Deidentifier('blur', finder=FINDER, on_no_face='copy'), src,
                           tmp_path/'o.mp4')['outcome'] == 'no face found'

def test_one_frame(tmp_path, frames, swap):
    assert D.protect_video(swap, write(tmp_path/'one.mp4', frames[:1]), tmp_path/'o.mp4')['frames'] == 1

@pytest.mark.parametrize('kw,error', [(dict(driver='magic'), ConfigError), (dict(dst='in.txt'), ConfigError)])
def test_refusals(tmp_path, clip, swap, kw, error):
    dst = tmp_path/kw.pop('dst', 'o.mp4')
    with pytest.raises(error): D.protect_video(swap, clip, dst, **kw)

def test_sets_are_for_folders(tmp_path, clip):
    with pytest.raises(ConfigError): D.protect_video(D.Deidentifier('k_same_pixel'), clip, tmp_path/'o.mp4')

def test_frames_are_releases_where_nothing_is_decided_once(tmp_path, clip):
    r = D.protect_video(D.Deidentifier('dp_pix', seed=0, simulate=True, finder=FINDER), clip, tmp_path/'o.mp4')
    assert r['guarantee']['releases'] == 16 and r['guarantee']['epsilon'] > 10

def test_an_interrupted_run_goes_on(tmp_path, clip, swap, monkeypatch):
    from deidnb.faces import video_write as V
    whole = D.protect_video(swap, clip, tmp_path/'a.mp4'); init = V.VideoWriter.__init__
    monkeypatch.setattr(V.VideoWriter, '__init__', lambda s, *a, **k: init(s, *a, **dict(k, piece=4)))
    n = {}
    def stop(word, i, whole): 
        if word == 'drawing' and i == 10: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): D.protect_video(swap, clip, tmp_path/'b.mp4', progress=stop)
    assert not (tmp_path/'b.mp4').exists()
    r = D.protect_video(swap, clip, tmp_path/'b.mp4', progress=lambda w, i, k: n.setdefault(w, i))
    assert n['drawing'] == 9 and r['frames'] == 16 and [p['how']['found'] for p in r['people']] == [16,
        16] and [p['decided'] for p in r['people']]

# --- keys
PW = dict(password='seven words that nobody has ever used')
class Picky: # a gate that accepts nobody but who was made with certain salts
    def __init__(self, D_, good): self.of, self.good, self.thresholds = D_, good, {}
    def describe(self): return {}
    def codes(self, x, f): return {'demo': np.zeros((1, 2))}
    def check(self, source, result, f, codes, *a, glance=False):
        ok = self.good(len(self.of)); return D.Verdict({'demo': dict(score=0., threshold=.5, passed=ok)}, excess=-.1 if ok else 0.)

@pytest.mark.parametrize('enough', [1, 3])
def test_a_key_tries_other_salts_for_everybody(tracks, frames, monkeypatch, enough):
    from deidnb.generate.keyed import Keyed
    made = []; use = Keyed.use; monkeypatch.setattr(Keyed, 'use', lambda self, key: (made.append(key.salt.hex()), use(self, key))[1])
    d = D.Deidentifier('identity_mask', gate=False, finder=FINDER, **PW); d.gate = Picky(made, lambda n: n >= enough)
    p = D.people_of(d, tracks, dict(enumerate(frames)), rng(0, True))
    assert len(made) == enough and {q.info['salt'] for q in p} == {made[-1]} and all(q.attempts == enough and not q.doubt for q in p)

def test_somebody_without_a_mesh_is_no_reason_for_the_others_to_keep_a_salt(tracks, frames, monkeypatch):
    from deidnb.generate.keyed import Keyed
    made = []; use = Keyed.use; monkeypatch.setattr(Keyed, 'use', lambda self, key: (made.append(key.salt.hex()), use(self, key))[1])
    look = T.Tracks.look; monkeypatch.setattr(T.Tracks, 'look', lambda self, j, i: replace(look(self, j, i), **(dict(landmarks=None) if self.who[j] else {})))
    d = D.Deidentifier('identity_mask', gate=False, finder=FINDER, **PW); d.gate = Picky(made, lambda n: n >= 2)
    a, b = D.people_of(d, tracks, dict(enumerate(frames)), rng(0, True))
    assert len(made) == 2 and a.info['salt'] == made[-1] and not a.doubt and b.generator is None and 'mesh' in b.why

def test_a_chosen_salt_stays(tracks, frames):
    d = D.Deidentifier('identity_mask', gate=False, finder=FINDER, salt='11'*16, **PW); d.gate = Picky([], lambda n: False)
    p = D.people_of(d, tracks, dict(enumerate(frames)), rng(0, True))
    assert {q.info['salt'] for q in p} == {'11'*16} and all(q.doubt for q in p) and D.settings(d)['params']['salt'] == '11'*16

def test_an_interrupted_keyed_run_keeps_its_salt(tmp_path, frames, monkeypatch):
    from deidnb.faces import video_write as V
    clip = write(tmp_path/'in.mp4', [x[:, :150] for x in frames[:8]]); init = V.VideoWriter.__init__
    monkeypatch.setattr(V.VideoWriter, '__init__', lambda s, *a, **k: init(s, *a, **dict(k, piece=3)))
    new = lambda: D.Deidentifier('identity_mask', gate=False, finder=FINDER, **PW); first, n = new(), {}
    def stop(word, i, whole):
        if word == 'drawing' and i == 7: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): D.protect_video(first, clip, tmp_path/'b.mp4', progress=stop)
    r = D.protect_video(new(), clip, tmp_path/'b.mp4', progress=lambda w, i, k: n.setdefault(w, i))
    assert n['drawing'] == 7 and r['people'][0]['decided']['salt'] == first.generator.drawn['salt'] and 'salt' not in r['params']

    again = D.Deidentifier('identity_mask', gate=False, finder=FINDER, password='eight words that nobody has ever used, too')
    with pytest.raises(KeyboardInterrupt): D.protect_video(new(), clip, tmp_path/'c.mp4', progress=stop)
    with pytest.raises(ConfigError, match='password'): D.protect_video(again, clip, tmp_path/'c.mp4')
    assert D.protect_video(new(), clip, tmp_path/'c.mp4')['outcome'] == 'protected'

class Thin: # a gate that nobody escapes but narrowly, until they have been drawn so many times
    def __init__(self, last): self.last, self.n = last, 0
    def codes(self, x, f): return {'demo': np.zeros((1, 2))}
    def check(self, *a, **k):
        self.n += 1; clear = self.n >= self.last; return D.Verdict({'demo': dict(score=0., threshold=.5, passed=True)}, excess=.01, narrow=not clear)

@pytest.mark.parametrize('last,attempts', [(1, 5), (3, 5), (6, 6), (99, 6)])
def test_a_narrow_escape_is_taken_only_in_the_end(tracks, frames, last, attempts):
    d = D.Deidentifier('donor_swap', gate=False, seed=3, simulate=True, finder=FINDER, attempts=6); d.gate = Thin(last)
    n = tracks.people[0]; p = D.decide(d, n, T.mean_code(tracks.codes(n)), [(frames[8], s.face) for s in tracks.faces(8) if s.person == n], rng(0, True))
    assert (d.gate.n, p.narrow, p.why) == (attempts, last > 6, '')

def test_drivers_say_how_often_the_gate_looks():
    d = D.Deidentifier('donor_swap', finder=FINDER)
    assert [D.settings(d, k)['watch'] for k in ('per_frame', 'flow')] == [1, 5] and D.settings(d, 'per_frame', 9)['watch'] == 9

# --- the command line
def cli(*a, **env):
    from deidnb.cli import main
    old = dict(os.environ); os.environ.update(env)
    try: return main([str(x) for x in a])
    finally: os.environ.clear(); os.environ.update(old)

def test_deid_recover_audit(tmp_path, frames, capsys):
    one = write(tmp_path/'in.mp4', [x[:, :150] for x in frames[:8]])
    pw = dict(DEIDNB_PASSWORD='seven words that nobody has ever used')
    assert cli('deid', one, '-o', tmp_path/'out.mp4', '-m', 'identity_mask', '--no-gate', **pw) == 0
    r = json.loads((tmp_path/'out.mp4.receipt.json').read_text())
    assert r['driver'] == 'flow' and 'seven words' not in json.dumps(r) and r['people'][0]['decided']['level'] == 5
    assert cli('recover', tmp_path/'out.mp4', '-o', tmp_path/'back.mp4', **pw) == 0 and cli('audit', one,
        tmp_path/'out.mp4', '--every', '4', '-o', tmp_path/'t') in (0, 1) and (tmp_path/'t'/'audit.csv').is_file()
    assert cli('audit', one, one, '--every', '4') == 1 and 'leak' in capsys.readouterr().out
    assert cli('deid', one, '-o', tmp_path/'out.mp4', '-m', 'blur') == 5

def test_cli_refuses(tmp_path, frames):
    (tmp_path/'x.mp4').write_bytes(b'no video'); assert cli('deid', tmp_path/'x.mp4', '-o', tmp_path/'o.mp4') == 3
    one = write(tmp_path/'in.mp4', frames[:2]); two = write(tmp_path/'in2.mp4', frames[:3])
    assert cli('audit', one, two) == 3 and cli('deid', one, '-o', tmp_path/'o.wmv', '-m', 'blur') == 2 and cli('deid',
        one, '-o', tmp_path/'o.mp4', '-m', 'blur', '--metadata', 'keep') == 2

# --- measures
def test_flicker_and_freezing_are_seen(frames):
    from deidnb.measure import temporal as M
    x = [f[:, :150] for f in frames[:6]]; frozen = [x[0]]*6
    s = M.follow(x, frozen, experts=('sface',), finder=FINDER)
    assert np.mean([b for _, b in s.flicker]) == 0 and np.mean([b for _, b in s.warp]) > np.mean([a for a, _ in s.warp])

def test_source_against_itself_is_perfect(frames):
    from deidnb.measure import temporal as M
    x = [f[:, :150] for f in frames[:5]]
    t = M.summary(M.follow(x, x, experts=('sface',), finder=FINDER), 'same')
    assert t.get('same', 'sface to the source').value == pytest.approx(1, abs=1e-5) and t.get('same',
        'AKD').value == 0 and t.get('same', 'warp error').value == t.get('source', 'warp error').value

@pytest.mark.skipif(DATA is None, reason='needs the GRID clips in $DEIDNB_DATA/videos')
@pytest.mark.parametrize('method,kw',
                         [('donor_swap', {}), ('identity_mask',
                                               dict(password='seven words that nobody has ever used'))])
def test_real_clip(tmp_path, method, kw):
    from deidnb.faces.video import read_video
    from deidnb.measure import temporal as M
    src = DATA/'grid_bbaf2n.mpg'
    d = D.Deidentifier(method, seed=1, simulate=True, finder=FINDER, **kw) if not kw else D.Deidentifier(method,
        finder=FINDER, gate=False, **kw)
    r = D.protect_video(d, src, tmp_path/'o.mp4')
    x, y = ([v for *_, v in read_video(p)] for p in (src, tmp_path/'o.mp4'))
    assert len(x) == len(y) == 75 and len(r['people']) == 1
    a = M.audit_frames(x[::15], y[::15], finder=FINDER); assert a.ok and not a.missed

# --- folders
def both(tmp_path, clip, photo=True): # a folder with a video, one of another kind below, and a photo
    src = tmp_path/'in'; (src/'sub').mkdir(parents=True); (src/'a.mp4').write_bytes(clip.read_bytes())
    (src/'sub'/'b.mp4').write_bytes(clip.read_bytes()); (src/'.hidden.mp4').write_bytes(b'')
    if photo: cv2.imwrite(str(src/'p.png'), A[..., ::-1])
    return src

@pytest.mark.parametrize('photo', [True, False])
def test_a_folder_with_videos(tmp_path, clip, photo, capsys):
    from deidnb.cli import main
    src, out = both(tmp_path, clip, photo), tmp_path/'out'; go = ['deid', str(src), '-o', str(out), '-m', 'blur']
    assert main(go) == 0
    names = sorted(str(p.relative_to(out)) for p in out.rglob('*') if p.is_file() and '.deidnb' not in p.parts)
    assert names == ['a.mp4', 'a.mp4.receipt.json'] + ['p.png']*photo + ['sub/b.mp4', 'sub/b.mp4.receipt.json']
    before = (out/'a.mp4').read_bytes(); capsys.readouterr(); assert main(go) == 0
    assert 'done already' in capsys.readouterr().out and (out/'a.mp4').read_bytes() == before
    # other settings: nothing is overwritten
    assert main([*go[:-1], 'pixelate']) == 1 and (out/'a.mp4').read_bytes() == before

def test_a_broken_video_does_not_keep_the_others_from_it(tmp_path, clip, capsys):
    from deidnb.cli import main
    src, out = both(tmp_path, clip), tmp_path/'out'; (src/'a.mp4').write_bytes(clip.read_bytes()[:2000])
    (src/'c.avi').write_bytes(b'RIFF')
    assert main(['deid', str(src), '-o', str(out), '-m', 'blur', '--quiet']) == 1
    err = capsys.readouterr().err
    assert 'a.mp4' in err and 'c.avi' in err and (out/'sub'/'b.mp4').is_file() and (out/'p.png').is_file() and not (out/'a.mp4').exists()
    assert main(['deid', str(src), '-o', str(out), '-m', 'blur', '--receipt', 'r.json']) != 0

# --- batches
class Together: # a generator that draws several pictures at once
    framing, needs_set, needs_mesh, crop_args = 'native', False, False, {}
    def __init__(self): self.sizes = []
    def decide(self, crop, rng=None): return dict(k=7)
    def draw(self, crop, k): return self.draw_all([crop], k)[0]
    def draw_all(self, crops, k):
        from deidnb.core import Edit
        self.sizes.append(len(crops))
        return [Edit(np.full_like(c.image, 10*k), np.ones(c.image.shape[:2], np.float32)) for c in crops]

@pytest.mark.parametrize('batch,fails', [(1, False), (4, False), (5, False), (4, True)])
def test_frames_are_drawn_in_batches(tracks, frames, batch, fails):
    g = Together(); people = [D.Person(n, np.zeros(128, np.float32), g, dict(k=7)) for n in tracks.people]
    one = D.PerFrame(people, None, batch=1); alone = [one(i, x, tracks.faces(i)) for i, x in enumerate(frames)]; g.sizes.clear()
    if fails:
        whole = g.draw_all
        def some(crops, k):
            if len(crops) > 1: raise ValueError('too much at once')
            return whole(crops, k)
        g.draw_all = some
    d = SimpleNamespace(gate=None, only=None, exclude=None, on_no_face='copy')
    got = list(D.in_stages(d, tracks, D.PerFrame(people, None, batch=batch), D.Watch(d),
                           ((i, None, x) for i, x in enumerate(frames)), 2))
    assert [v[0] for v in got] == list(range(len(frames))) and all(np.array_equal(v[3], y) and list(v[5]) == list(w)
        for v, (y, w) in zip(got, alone))
    assert max(g.sizes) == (1 if fails else batch) and sum(g.sizes) == sum(len(tracks.faces(i)) for i in range(len(frames)))

# --- size and length
def test_4k(tmp_path):
    from deidnb.faces.video import read_video
    x = scene(2, who=((A, 1500, 600, 1., 0.),), size=(3840, 2160), side=700); src = write(tmp_path/'in.mp4', x)
    r = D.protect_video(D.Deidentifier('blur', finder=FINDER), src, tmp_path/'o.mp4')
    got = [y for *_, y in read_video(tmp_path/'o.mp4')]
    assert r['outcome'] == 'protected' and len(got) == 2 and got[0].shape == x[0].shape
    assert all(np.abs(a[600:1300, 1500:2200].astype(int) - b[600:1300, 1500:2200]).mean() > 2 for a, b in zip(x, got))

PEAK = """
import resource, sys
from deidnb.pipeline import Deidentifier
Deidentifier('blur').video(sys.argv[1], sys.argv[2]); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
@pytest.mark.skipif(sys.platform == 'win32', reason='no resource module')
def test_memory_does_not_grow_with_the_video(tmp_path):
    def peak(n):
        src = write(tmp_path/f'{n}.mp4', scene(n, who=((A, 10, 10, .05, 0.),), size=(160, 128), side=96))
        return int(subprocess.run([sys.executable, '-c', PEAK, src, tmp_path/f'{n}_o.mp4'], check=True,
                                  capture_output=True, text=True).stdout.split()[-1])
    assert peak(500) < 1.1*peak(50)

def test_a_summary_of_videos_in_which_no_face_is_left(frames):
    from deidnb.measure import temporal as M
    x = [f[:, :150] for f in frames[:3]]; s = M.follow(x, [np.full_like(v, 90) for v in x], experts=('sface',), finder=FINDER)
    t = M.summary(s); assert t.get('result', 'frames without a face').value == 3 and len(t) == 1
