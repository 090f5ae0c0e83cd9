"Detectors, landmarks, pose, expression, gaze and tone against constructed cases"
import math
from dataclasses import replace
import cv2, numpy as np, pytest
from deidnb.core import AssetError, ConfigError, Face, package_dir
from deidnb.measure import utility as U


@pytest.fixture(scope='module')
def faces():
    from deidnb.faces.find import find_faces
    pics = [cv2.imread(str(p))[..., ::-1].copy() for p in sorted((package_dir()/'examples').glob('face_*.jpg'))[:4]]
    return [(p, find_faces(p)[0]) for p in pics]


@pytest.mark.parametrize('detector', U.DETECTORS)
@pytest.mark.parametrize('size,at', [((256, 256), (0, 0)), ((700, 500), (300, 120)), ((1500, 2200), (1200, 1900))])
def test_detectors_find_a_face_anywhere(detector, size, at, faces):
    hit = 0
    for p, f in faces:
        im = np.full((*size, 3), 120, np.uint8); y, x = min(at[0], size[0]-256), min(at[1], size[1]-256); im[y:y+256, x:x+256] = p
        g = replace(f, box=f.box + [x, y, x, y], points5=f.points5 + [x, y]); hit += U.detected(im, g, detector)
    assert hit >= 3
    assert not U.detected(np.full((300, 300, 3), 120, np.uint8), faces[0][1], detector)


@pytest.mark.parametrize('scale', [.3, .6, 2., 4.])
def test_mtcnn_over_sizes(scale, faces):
    p, f = faces[1]; q = cv2.resize(p, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    b = U.MTCNN(min_face=20 if scale < 1 else None).detect(q)
    assert len(b) and U.box_overlap(b[0, :4], f.box*scale)[0, 0] > .5 and (b[:, 4] > .7).all()


@pytest.mark.parametrize('shape', [(1, 1), (5, 300), (300, 5), (23, 23)])
def test_tiny_pictures(shape):
    im = np.zeros((*shape, 3), np.uint8); face = Face([0, 0, shape[1], shape[0]], np.zeros((5, 2)))
    for d in ('mtcnn', 'opencv'): assert not U.detected(im, face, d)


def test_window_and_back():
    g = np.random.default_rng(0); im = g.integers(0, 255, (900, 1200, 3), dtype=np.uint8)
    for _ in range(30):
        x, y, s = g.uniform(0, 1200), g.uniform(0, 900), g.uniform(10, 600)
        f = Face([x-s/2, y-s/2, x+s/2, y+s/2], np.zeros((5, 2)))
        w, at, k = U.face_window(im, f); assert w.size and max(w.shape) <= 3*128+4 and k <= 1
        assert abs(at[0] + w.shape[1]/2/k - np.clip([x-1.5*s, x+1.5*s], 0, 1200).mean()) < 2/k


def test_a_stub_detector_elsewhere_does_not_count():
    f = Face([100, 100, 200, 200], np.zeros((5, 2))); im = np.zeros((400, 400, 3), np.uint8)
    inside = lambda w: np.array([[*(np.array([110, 110, 190, 190]) - 0), 1.]])
    assert U.hits([[300, 300, 380, 380]], f).tolist() == [0] and U.hits([[110, 110, 190, 190]],
        f)[0] > .6 and len(U.hits([], f)) == 0
    assert not U.detected(im, f, lambda w: np.zeros((0, 5)))


def test_suppression_against_a_double_loop():
    g = np.random.default_rng(0); xy = g.uniform(0, 100, (60, 2))
    b = np.c_[xy, xy + g.uniform(5, 40, (60, 2))]; s = g.random(60); keep = []
    for i in np.argsort(-s):
        if all(U.box_overlap(b[i], b[j])[0, 0] <= .4 for j in keep): keep.append(i)
    assert U.suppress(b, s, .4) == keep


@pytest.mark.parametrize('dx,dy', [(1, 0), (0, 3), (3, 4)])
def test_nme_of_a_shift(dx, dy, faces):
    f = faces[0][1]; p = U.landmarks68(f); D = np.linalg.norm(p[36]-p[45]); g = replace(f, landmarks=f.landmarks + [dx, dy, 0])
    assert U.nme(f, g) == pytest.approx(math.hypot(dx, dy)/D, rel=1e-4) and U.pixel_distances(f,
        g)['px_landmarks'] == pytest.approx(math.hypot(dx, dy), rel=1e-4)


def test_nme_does_not_depend_on_scale(faces):
    f, g = (x[1] for x in faces[:2]); s = lambda h: replace(h, landmarks=h.landmarks*3)
    assert U.nme(s(f), s(g)) == pytest.approx(U.nme(f, g), rel=1e-5)


@pytest.mark.parametrize('seed', range(5))
def test_pose_error_is_a_metric_and_matches_the_axis_angle(seed):
    from scipy.spatial.transform import Rotation as R
    from deidnb.faces.find import matrix_pose
    a, b, c = np.random.default_rng(seed).uniform(-60, 60, (3, 3)); d = lambda x, y: U.pose_error(x, y)['pose']
    assert d(a, a) == pytest.approx(0, abs=1e-6) and d(a, b) == pytest.approx(d(b, a)) and d(a, c) <= d(a, b) + d(b, c) + 1e-9
    assert d(a, b) == pytest.approx(np.degrees(R.from_matrix(U.pose_matrix(a).T @ U.pose_matrix(b)).magnitude()), abs=1e-6)
    assert np.allclose(matrix_pose(U.pose_matrix(a)), a, atol=1e-3)


def test_angle_oracles():
    assert U.angle_between([1, 0, 0], [0, 1, 0]) == 90 and U.angle_between([1, 2, 3], [1, 2, 3]) == pytest.approx(0, abs=1e-9)
    assert U.angle_between([1, 0, 0], [1, 1e-9, 0]) == pytest.approx(math.degrees(1e-9))     # no clipping of the cosine


def test_gaze_follows_mirroring(faces):
    for _, f in faces:
        p = f.landmarks.astype(float).copy(); m = p.copy(); m[:, 0] = -m[:, 0]; swap = np.arange(478)
        for a, b in ((33, 263), (133, 362), (468, 473)): swap[a], swap[b] = b, a
        assert np.allclose(U.gaze(m[swap])*[-1, 1, 1], U.gaze(p), atol=1e-6)


def test_blink_scores_and_exp():
    a, b = np.zeros(52), np.full(52, .2)
    assert U.expression_error(a, b) == dict(exp=pytest.approx(.2), exp_rmse=pytest.approx(.2))


@pytest.mark.parametrize('gain', [.9, .6])
def test_tone_moves_with_the_light(gain, faces):
    p, f = faces[0]
    assert U.tone_difference(p, (p*gain).astype(np.uint8), f)['tone'] > U.tone_difference(p,
        (p*(gain+.08)).astype(np.uint8), f)['tone'] > 0


def test_tone_outside_the_picture():
    f = Face([500, 500, 600, 600], np.full((5, 2), 550.)); assert np.isnan(U.skin_tone(np.zeros((50, 50, 3), np.uint8), f)).all()


def test_utility_of_an_untouched_and_of_a_covered_face(faces):
    p, f = faces[0]; u = U.pair_utility(p, p.copy(), f, 'find')
    assert u['nme'] == u['exp'] == u['tone'] == 0 and all(u[f'det_{d}'] for d in U.DETECTORS)
    u = U.pair_utility(p, np.full_like(p, 90), f, 'find'); assert 'nme' not in u and not any(u[f'det_{d}'] for d in U.DETECTORS)


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match='mtcnn'): U.load_detector('mtccn')
    with pytest.raises(AssetError): U.Cascade(tmp_path/'no.xml')
    (tmp_path/'bad.xml').write_text('<?xml version="1.0"?><opencv_storage><a>1</a></opencv_storage>')
    with pytest.raises(AssetError, match='cascade'): U.Cascade(tmp_path/'bad.xml')
    (tmp_path/'junk.xml').write_text('junk')
    with pytest.raises(AssetError, match='cascade'): U.Cascade(tmp_path/'junk.xml')
