"M_3D: what it says of renders with known coefficients and of pictures, in any frame; its weights; its recipe's bad inputs"
import numpy as np, pytest, torch
from deidnb.assets import example_faces, load_manifest
from deidnb.core import ConfigError, Face, InputError, package_dir, sha256
from deidnb.faces.find import find_faces
from deidnb.morphable import fit as F, regress as G
from deidnb.morphable.build import nobody_model
from deidnb.morphable.model import Coefficients
from deidnb.morphable.render import project, render
from deidnb.train import regress as T

@pytest.fixture(scope='module')
def faces(): return [(p, find_faces(p)[0]) for p in example_faces(6)]

def angle(a, b): return np.degrees(np.linalg.norm(F.rotation_vector(F.rotation_matrix(a[:3]) @ F.rotation_matrix(b[:3]).T)))

def test_row_and_file():
    row = load_manifest('weights')['m3d']; path = package_dir()/'weights'/'m3d.safetensors'
    assert sha256(path) == row['sha256'] and path.stat().st_size <= 8*2**20 and row['metrics']['points, %'] < 3

def test_points_expression_and_pose_of_pictures(faces):
    e, turn, b = [], [], []
    for p, f in faces:
        g, c = G.regress_faces(p, [Face(f.box, f.points5)])[0]
        e.append(np.linalg.norm((g.landmarks - f.landmarks)[:, :2], axis=1).mean()/np.linalg.norm(f.landmarks[33,
                    :2] - f.landmarks[263, :2]))
        turn.append(angle(c.pose, F.fit_face(p, f, colours=False).coefficients.pose))
        b.append(np.abs(g.blendshapes - f.blendshapes).mean())
    assert np.mean(e) < .02 and np.mean(turn) < 3 and np.mean(b) < .06

def test_known_coefficients():
    M = nobody_model(); r = np.random.default_rng(5); n = 40; c = M.sample(n, r, .1)
    pose = np.c_[r.normal(0, .12, (n, 2)), r.normal(0, .05, (n, 2)), r.normal(0, .1, n), np.full(n, -4)].astype(np.float32)
    c = c.replace(pose=pose); turn, alpha = [], []
    for i in range(n):
        t = c[i].torch()
        q = project(M.shape(t.alpha, t.beta)[None, M.landmarks], t.pose[None], (192, 192))[0][0].numpy()
        im = (255*render(M, c[i], (192, 192), background=.5)['image'][0].permute(1, 2, 0).numpy()).round().astype(np.uint8)
        p5 = np.stack([q[[33, 133]].mean(0), q[[362, 263]].mean(0), q[1], q[61], q[291]]).astype(np.float32)
        x = G.regress_faces(im, [Face(np.r_[q.min(0), q.max(0)], p5)])[0][1]
        turn.append(angle(x.pose, c.pose[i])); alpha.append(x.alpha)
    away = lambda a: np.linalg.norm(M.shape(np.float32(a)) - M.shape(c.alpha), axis=2).mean()
    # the width of the face; finer modes come back weakly
    assert np.mean(turn) < 6 and away(alpha) < .95*away(np.zeros((n, 80))) and np.corrcoef(np.array(alpha)[:, 0],
        c.alpha[:, 0])[0, 1] > .7

def test_a_batch_is_its_crops(faces):
    x = torch.rand(3, 3, 128, 128)*2 - 1; net = G.m3d(); a = net(x)
    for i in range(3):
        for k, v in net(x[i:i+1]).items(): assert torch.allclose(v[0], a[k][i], atol=1e-3), k

def test_gradients_reach_the_pixels_even_where_a_blendshape_is_zero():
    x = torch.zeros(1, 3, 128, 128, requires_grad=True); d = G.m3d()(x)
    zero = int(d['blendshapes'][0].argmin()); d['blendshapes'][0, zero].backward()
    assert x.grad.abs().sum().item() > 0 and 0 <= d["blendshapes"].min().item() and d["blendshapes"].max().item() <= 1
    x = torch.zeros(1, 3, 128, 128, requires_grad=True)
    G.coefficients(G.m3d()(x)).pose.sum().backward(); assert float(x.grad.abs().sum()) > 0

@pytest.mark.parametrize('seed', range(5))
def test_frames_come_back(seed):
    r = np.random.default_rng(seed)
    c = nobody_model().sample(1, r)[0].replace(pose=np.float32(r.normal(0, .2, 6)), gamma=r.normal(0, .3, 27).astype(np.float32))
    a, s = r.uniform(-3, 3), r.uniform(.3, 3)
    M = np.array([[s*np.cos(a), -s*np.sin(a), r.normal(0, 30)], [s*np.sin(a), s*np.cos(a), r.normal(0, 30)]])
    back = np.linalg.inv(np.vstack([M, [0, 0, 1]]))[:2]; there = G.move(c, M, (100, 160), (128, 128))
    again = G.move(there, back, (128, 128), (100, 160))
    assert np.allclose(again.pack(), c.pack(), atol=2e-3) and (s > .97 or not np.allclose(there.pose, c.pose, atol=1e-2))

def test_turned_light_is_the_light_of_turned_normals():
    r = np.random.default_rng(1); n = r.normal(size=(50, 3))
    n /= np.linalg.norm(n, axis=1, keepdims=True); g = r.normal(size=27).astype(np.float32)
    a = .7; Q = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    light = lambda g, n: F.harmonics(np.float32(n)) @ g.reshape(3, 9).T
    assert np.allclose(light(G.turn_light(g, a), n @ Q.T), light(g, n), atol=1e-4)

@pytest.mark.parametrize('bad', [torch.zeros(1, 3, 64, 64), torch.zeros(3, 128, 128), torch.zeros(1, 1, 128, 128),
                                 torch.zeros(1, 3, 128, 128, dtype=torch.int64)])
def test_wrong_crops(bad):
    with pytest.raises(InputError, match='M3D'): G.m3d()(bad)

def test_labels_move_with_the_picture(faces):
    (w, row), *_ = T.observe(faces[0][0]); r = np.random.default_rng(3)
    for _ in range(5):
        x, y, _ = T.augment(w, row, r, plain=1.); d = {k: torch.as_tensor(v)[None] for k, v in T.parts(y).items()}
        placed = T.placer(nobody_model())(Coefficients(**{k: d[k] for k in G.SIZES}))[0].numpy()
        q = T.parts(y)['points'].reshape(478, 3)[:, :2]; u = np.linalg.norm(q[33] - q[263])
        assert np.linalg.norm(placed - q,
                              axis=1)[:468].mean()/u < .02 and np.linalg.norm(G.m3d()(G.to_tensor([x]))['points'][0, :,
                :2].numpy() - q, axis=1).mean()/u < .04

def test_command_line_refuses(tmp_path, capsys):
    assert T.main(['-o', str(tmp_path/'a.pt'), '--quiet']) == 2 and 'safetensors' in capsys.readouterr().err
    (tmp_path/'b.safetensors').write_bytes(b''); assert T.main(['-o', str(tmp_path/'b.safetensors'), '--quiet']) == 2
    (tmp_path/'few').mkdir()
    assert T.main(['-o', str(tmp_path/'c.safetensors'), '--pictures', str(tmp_path/'few'), '--work', str(tmp_path/'w'),
                   '--quiet']) in (2, 3) and not (tmp_path/'c.safetensors').exists()
    with pytest.raises(ConfigError, match='preset'): T.train(tmp_path/'x', 'none')
