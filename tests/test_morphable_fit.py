"Fitting: what was put into a render comes out of it again; what cannot be fitted says so"
import numpy as np, pytest
from deidnb.assets import example_faces
from deidnb.core import Face, InputError
from deidnb.faces.find import find_faces
from deidnb.morphable import fit as F
from deidnb.morphable.build import nobody_model
from deidnb.morphable.render import project, render

@pytest.fixture(scope='module')
def model(): return nobody_model()
@pytest.fixture(scope='module')
def faces():
    pics = example_faces(4); return [(p, find_faces(p)[0]) for p in pics]

def people(model, n, seed, expression=.15):
    r = np.random.default_rng(seed); c = model.sample(n, r, expression)
    pose = np.c_[r.normal(0, .15, (n, 3)), r.normal(0, .3, (n, 2)), r.normal(0, 1.5, n)]
    return c.replace(pose=pose.astype(np.float32), gamma=r.normal(0, .15, (n, 27)).astype(np.float32))

def points(model, c, hw=(256, 256)): # landmarks with depth in pixels, as the finder gives them
    t = c.torch(); q, z = project(model.shape(t.alpha, t.beta)[:, model.landmarks], t.pose, hw); z = z.numpy()
    return np.concatenate([q.numpy(), ((z - z.mean(1, keepdims=True))*F.FOCAL*hw[1]/z.mean(1, keepdims=True))[..., None]], 2)

def test_points_give_the_pose_back(model):
    c = people(model, 20, 0)
    for i, p in enumerate(points(model, c)):
        a, b, R, t = F.solve_points(model, p, (256, 256)); X = model.shape(a, b)[model.landmarks] @ R.T + t
        turn = np.degrees(np.linalg.norm(F.rotation_vector(R @ F.rotation_matrix(c.pose[i, :3]).T)))
        off = np.linalg.norm(F.camera(X, 256, 256)[0] - p[:, :2], axis=1).mean()
        assert turn < 4 and off < .01*np.linalg.norm(p[33, :2] - p[263, :2])

def test_identity_is_recovered_better_than_guessed(model):
    c = people(model, 20, 1); found = np.stack([F.solve_points(model, p, (256, 256))[0] for p in points(model, c)]); k = 20
    e = np.linalg.norm((found - c.alpha)[:, :k], axis=1).mean(); assert e < .6*np.linalg.norm(c.alpha[:, :k], axis=1).mean()
    assert np.mean([np.corrcoef(a[:k], b[:k])[0, 1] for a, b in zip(found, c.alpha)]) > .7

def test_light_comes_back(model):
    c = people(model, 6, 2).replace(delta=np.zeros(80, np.float32)); o = render(model, c, (192, 192))
    for i in range(6):
        rgb = (255*o['image'][i].permute(1, 2, 0).numpy()).round().astype(np.uint8)
        R = F.rotation_matrix(c.pose[i, :3]); t = c.pose[i, 3:] + [0, 0, F.DISTANCE]
        col, n, v = F.vertex_colours(model, rgb, c.alpha[i], c.beta[i], R, t); g, d, e = F.solve_light(model, col, n, v)
        seen = v > .5; light = lambda g: .8 + F.harmonics(n) @ g.reshape(3, 9).T
        assert np.abs(model.albedo(d)*light(g) - model.albedo_mean*light(c.gamma[i]))[seen].mean() < .03 and e[seen].mean() < .03

def test_size_of_the_picture_does_not_matter(model, faces):
    p, f = faces[0]; a = F.solve_points(model, f.landmarks, (256, 256), f.blendshapes)
    q = (f.landmarks + [.5, .5, 0])*2 - [.5, .5, 0]
    b = F.solve_points(model, q, (512, 512), f.blendshapes)
    assert np.abs(a[0] - b[0]).max() < .02 and np.linalg.norm(F.rotation_vector(a[2] @ b[2].T)) < .002
    # only the perspective changes
    moved = F.solve_points(model, f.landmarks + [30, -20, 0], (256, 256), f.blendshapes)
    assert np.corrcoef(a[0], moved[0])[0, 1] > .9

def test_a_profile_and_a_cover_are_doubted(model):
    assert 'turned' in F.doubts(F.rotation_matrix([0, 1.2, 0]), .01, 0) and 'off' in F.doubts(np.eye(3), .1,
        0) and 'covers' in F.doubts(np.eye(3), .01, .5) and F.doubts(np.eye(3), .01, 0) == ''

@pytest.mark.parametrize('bad', [np.zeros((1, 1, 3), np.uint8), np.full((80, 80, 3), 200, np.uint8),
                                 np.full((9, 9, 3), np.nan), np.zeros((5,)), None])
def test_no_face_no_fit(bad):
    with pytest.raises(InputError): F.fit_face(bad)

def test_landmarks_must_be_finite(faces):
    from dataclasses import replace
    p, f = faces[0]; m = f.landmarks.copy(); m[3] = np.nan
    with pytest.raises(InputError): F.fit_face(p, replace(f, landmarks=m))

def test_real_points_are_explained(faces):
    for p, f in faces:
        x = F.fit_face(p, f)
        assert x.nme < .005 and x.reliable and x.coefficients.pack().shape == (261,) and np.isfinite(x.coefficients.pack()).all()

def test_grey_photo(faces):
    p, f = faces[1]; g = np.repeat(p.mean(2).astype(np.uint8)[..., None], 3, 2)
    x = F.fit_face(g, f); assert x.reliable and x.nme < .005

def test_a_profile_is_flagged(faces):
    "The same mesh, turned by 70 degrees about the vertical axis"
    from dataclasses import replace
    p, f = faces[0]; c = f.landmarks.mean(0); R = F.rotation_matrix([0, np.radians(70), 0])
    x = F.fit_face(p, replace(f, landmarks=((f.landmarks - c) @ R.T + c).astype(np.float32)), colours=False)
    assert not x.reliable and 'turned' in x.why

@pytest.mark.parametrize('part', ['lower half', 'left half'])
def test_a_covered_face_is_flagged(faces, part):
    for p, f in faces:
        q = p.copy()
        lo, mid, hi = f.landmarks.min(0)[:2].astype(int), f.landmarks[4, :2].astype(int), f.landmarks.max(0)[:2].astype(int)+1
        q[mid[1]:hi[1], lo[0]:hi[0]] = (20, 60, 200) if part == 'lower half' else q[mid[1]:hi[1], lo[0]:hi[0]]
        if part == 'left half': q[lo[1]:hi[1], lo[0]:mid[0]] = (20, 60, 200)
        x = F.fit_face(q, f); assert not x.reliable and 'covers' in x.why

@pytest.mark.parametrize('bad', [np.zeros((64, 64, 3), np.float64) - 5, np.zeros((64, 64, 3), complex), 'a.jpg',
                                 np.zeros((64, 64, 7), np.uint8)])
def test_wrong_kind_of_picture(bad, faces):
    with pytest.raises(InputError): F.fit_face(bad, faces[0][1])
