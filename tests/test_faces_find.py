"Finding faces: sizes, rotations, regions, threads, replay"
import json, subprocess, sys, threading, warnings
import cv2, numpy as np, pytest
from deidnb.core import ConfigError, Face, InputError, data_dir, package_dir
from deidnb.faces.find import BLENDSHAPES, FaceFinder, find_faces, iou, load_detections, matrix_pose, nms, save_detections
from deidnb.faces.io import read_image

@pytest.fixture(scope='module')
def faces(): return [read_image(p).rgb for p in sorted((package_dir()/'examples').glob('face_*.jpg'))]

@pytest.fixture(scope='module')
def finder(): return FaceFinder()

def scene(faces, sizes=(440, 260, 150, 90, 60, 40), size=(1000, 1000), seed=0, grey=None):
    "A 1-megapixel picture with example faces pasted at several sizes; returns it with the centres of the pasted pictures"
    g = np.random.default_rng(seed); h, w = size
    im = cv2.resize(g.integers(60, 190, (8, 8, 3)).astype(np.uint8), (w, h),
                    interpolation=cv2.INTER_CUBIC) if grey is None else np.full((h, w, 3), grey, np.uint8)
    centres, x, y, row = [], 20, 20, 0
    for i,s in enumerate(sizes):
        if x+s > w-20: x, y, row = 20, y+row+20, 0
        im[y:y+s, x:x+s] = cv2.resize(faces[i % len(faces)], (s, s), interpolation=cv2.INTER_AREA)
        centres.append((x+s/2, y+s/2, s)); x += s+20; row = max(row, s)
    return im, centres

def hits(found, centres): return sum(any(np.hypot(*((f.box[:2]+f.box[2:])/2 - c[:2])) < .25*c[2] for f in found) for c in centres)

@pytest.mark.parametrize('seed', [0, 1, 2])
def test_scene_of_many_sizes(faces, finder, seed):
    im, c = scene(np.roll(np.array(faces, dtype=object), seed, 0).astype(np.uint8), seed=seed)
    f = finder.find(im)
    assert hits(f, c) == len(c) == len(f)
    assert all(a.size >= b.size for a, b in zip(f, f[1:]))
    assert all(x.landmarks is not None and x.landmarks.shape == (478, 3) and x.blendshapes.shape == (52,) for x in f[:4])

@pytest.mark.parametrize('px,min_face,least', [(32, None, 12), (24, None, 9), (24, 16, 11), (20, 16, 10), (16, 16, 8)])
def test_small_faces_in_a_megapixel(faces, px, min_face, least):
    im, c = scene(faces, [int(px/.72)]*12, grey=110)
    assert hits(FaceFinder(min_face=min_face).detect(im), c) >= least

def test_small_faces_in_a_large_photo(faces, finder):
    im, c = scene(faces, [30]*12 + [700], size=(2400, 1600))
    assert hits(finder.detect(im), c) >= 11

@pytest.mark.parametrize('zoom', [1.5, 2.2, 3.2])
def test_face_that_fills_the_picture(faces, finder, zoom):
    n = 0
    for im in faces[:6]:
        s = int(256/zoom); f0 = finder.detect(im)[0]; c = ((f0.box[:2]+f0.box[2:])/2).astype(int)
        x, y = np.clip(c-s//2, 0, 256-s)
        n += len(finder.detect(cv2.resize(im[y:y+s, x:x+s], (900, 900), interpolation=cv2.INTER_CUBIC))) >= 1
    assert n == 6

@pytest.mark.parametrize('k', [1, 2, 3])
def test_quarter_turns_are_found_when_nothing_else_is(faces, finder, k):
    n = 0
    for im in faces[:4]:
        f = finder.find(np.ascontiguousarray(np.rot90(im, k))); n += len(f) == 1 and f[0].landmarks is not None
        if f and f[0].pose is not None: assert abs((f[0].pose[2] - (-90*k) + 180) % 360 - 180) < 25  # rot90 turns anticlockwise
    assert n >= 3

def test_mirror_flips_yaw_and_roll(faces, finder):
    for im in faces[:6]:
        a, b = finder.find(im)[0], finder.find(im[:, ::-1].copy())[0]
        assert np.abs(a.pose*[-1, 1, -1] - b.pose).max() < 5
        m = b.points5*[-1, 1] + [im.shape[1]-1, 0]; assert np.abs(m[[1, 0, 2, 4, 3]] - a.points5).max() < 10

@pytest.mark.parametrize('angle', [-25, 15])
def test_roll_follows_the_picture(faces, finder, angle):
    im = faces[3]; a = finder.find(im)[0]
    # clockwise by angle
    b = finder.find(cv2.warpAffine(im, cv2.getRotationMatrix2D((128, 128), -angle, 1.), (256, 256),
                                   borderMode=cv2.BORDER_REPLICATE))[0]
    assert abs(b.pose[2]-a.pose[2]-angle) < 5
    d = b.points5[1]-b.points5[0]; assert abs(np.degrees(np.arctan2(d[1], d[0])) - b.pose[2]) < 12

def test_pose_of_a_matrix_round_trips():
    for y,p,r in [(20,10,5), (-40,-15,30), (0,0,-90)]:
        Y, P, R = np.radians([y, p, r]); c, s = np.cos, np.sin
        Ry = [[c(Y),0,s(Y)],[0,1,0],[-s(Y),0,c(Y)]]; Rx = [[1,0,0],[0,c(P),s(P)],[0,-s(P),c(P)]]
        Rz = [[c(R),s(R),0],[-s(R),c(R),0],[0,0,1]]
        got = matrix_pose(np.array(Ry) @ Rx @ Rz)
        assert np.abs(np.array(got) - [y,p,r]).max() < 1e-3, (got, y, p, r)

def test_nothing_there(finder):
    g = np.random.default_rng(0)
    for im in (np.zeros((1,1,3), np.uint8), np.full((40,3000,3), 200, np.uint8),
               g.integers(0, 255, (300,400,3)).astype(np.uint8), np.zeros((600,800,3), np.uint8)):
        assert finder.find(im) == []

@pytest.mark.parametrize('shape', [(1,1), (2,500), (500,2), (7,7), (31,33), (12,20000)])
def test_odd_shapes_do_not_crash(finder, shape): assert isinstance(finder.find(np.full((*shape,3), 128, np.uint8)), list)

def test_regions(faces, finder):
    im, c = scene(faces, (300, 300, 200), grey=120)
    boxes = [(x-s/2, y-s/2, x+s/2, y+s/2) for x,y,s in c]
    assert len(finder.find(im, only=boxes[:1], mesh=False)) == 1 and len(finder.find(im, exclude=boxes[:1], mesh=False)) == 2
    assert finder.find(im, only=[], mesh=False) == [] and len(finder.find(im, max_faces=2, mesh=False)) == 2
    for bad in ([(1,2,3)], [(5,5,1,9)], [(0,0,np.nan,1)], 'x'):
        with pytest.raises(ConfigError): finder.find(im, only=bad)

def test_wrong_arrays(finder):
    for bad in (np.zeros((5,5)), np.zeros((5,5,3)), np.zeros((5,5,4), np.uint8)):
        with pytest.raises(InputError): finder.find(bad)
    with pytest.raises(ConfigError): FaceFinder(side=1)
    with pytest.raises(ConfigError): FaceFinder(thorough='always')

def test_a_failing_mesh_keeps_the_face(faces, monkeypatch):
    f = FaceFinder(); monkeypatch.setattr(FaceFinder, '_landmarker', lambda *a: 1/0)
    got = f.find(faces[0]); assert len(got) == 1 and got[0].landmarks is None

def test_threads_agree(faces):
    f, out = FaceFinder(), {}
    def job(i): out[i] = [x.landmarks for x in f.find(faces[i % 3])]
    ts = [threading.Thread(target=job, args=(i,)) for i in range(6)]; [t.start() for t in ts]; [t.join() for t in ts]
    assert len(out) == 6
    for i in range(3): assert np.abs(out[i][0]-out[i+3][0]).max() < 1e-3

def test_nms_and_iou():
    assert np.allclose(iou(np.array([0,0,2,2.]), np.array([[1,1,3,3.],[0,0,1,1],[5,5,6,6]])), [[1/7,.25],[.25,1],[0,0]])
    p = np.zeros((5,2)); a, b = Face([0,0,10,10], p+5, .9), Face([1,1,11,11], p+6, .8)
    assert nms([b, a]) == [a] and nms([]) == [] and len(nms([a, Face([8,8,18,18], p+13, .8)])) == 2
    assert len(set(BLENDSHAPES)) == 52

def test_detections_replay(tmp_path, faces, finder):
    f = finder.find(faces[0]); p = save_detections(tmp_path/'d.json', f, faces[0])
    with warnings.catch_warnings(): warnings.simplefilter('error'); g = load_detections(p, faces[0])
    assert np.abs(g[0].landmarks-f[0].landmarks).max() < 1e-2 and g[0].source == f[0].source
    other = faces[0].copy(); other[0,0] ^= 1
    with pytest.warns(UserWarning, match='has changed'): load_detections(p, other)
    with pytest.raises(InputError, match='this one is'): load_detections(p, faces[0][:-1])
    d = json.loads(p.read_text())
    def broken(**k): q = tmp_path/'b.json'; q.write_text(json.dumps({**d, **k})); return q
    for k in (dict(format='x'), dict(faces={}), dict(faces=[{}]), dict(faces=[{**d['faces'][0], 'box':[0,0,1]}]),
              dict(faces=[{**d['faces'][0], 'surprise':1}]),
              dict(faces=[{**d['faces'][0], 'box':[0,0,1,float('nan')]}]), dict(faces=['x'])):
        with pytest.raises(InputError): load_detections(broken(**k))
    (tmp_path/'b.json').write_bytes(b'\xff\xfe{')
    with pytest.raises(InputError): load_detections(tmp_path/'b.json')
    with pytest.raises(InputError): load_detections(tmp_path/'none.json')

def test_native_libraries_stay_silent():
    code = "from deidnb.faces.find import find_faces; from deidnb.faces.io import read_image; from deidnb.core import package_dir; print(len(find_faces(read_image(package_dir()/'examples'/'face_01.jpg').rgb)))"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.stdout.strip() == '1' and r.stderr == '', r.stderr

@pytest.mark.skipif(data_dir() is None or not (data_dir()/'lfw').is_dir(), reason='needs LFW under DEIDNB_DATA')
def test_lfw_sample(finder):
    files = sorted((data_dir()/'lfw').rglob('*.jpg'))
    files = [files[i] for i in np.random.default_rng(1).choice(len(files), 60, replace=False)]
    central = lambda f: f.box[0] < 125 < f.box[2] and f.box[1] < 125 < f.box[3]
    got = [next((f for f in finder.find(read_image(p).rgb) if central(f)), None) for p in files]
    assert sum(f is not None for f in got) == 60 and sum(f is not None and f.landmarks is not None for f in got) >= 58
