"The first-order motion model: exact affine motions, published checkpoints, its training, and its place in the flow."
import cv2, numpy as np, pytest
from types import SimpleNamespace
from deidnb.assets import example_faces
from deidnb.core import ConfigError, InputError
from deidnb.faces.align import warp
from deidnb.faces.find import find_faces
from deidnb.generate.donor_mesh import face_shape
from deidnb.generate.fusion import crop_matrix, move_mesh

torch = pytest.importorskip('torch')
from deidnb.train import motion as T
from deidnb.video import flow as F, fomm as M
TINY = dict(size=64, points=4, kp=dict(width=4, most=16, blocks=3, scale=.5, pad=3), motion=dict(width=4, most=16,
        blocks=3, scale=.5))

@pytest.fixture(scope='module')
def store():
    x = example_faces(3); f = [find_faces(v, max_faces=1)[0] for v in x]; m = [crop_matrix(g.points5, g.landmarks) for g in f]
    return dict(crop=np.stack([warp(v, k, (128, 128)) for v, k in zip(x, m)]), blendshapes=np.stack([g.blendshapes for g in f]),
                mesh=np.stack([move_mesh(k, g.landmarks) for g, k in zip(f, m)]))

def net(seed=0, **kw): torch.manual_seed(seed); return M.MotionModel(**TINY | kw).eval()

# --- network
@pytest.mark.parametrize('seed', range(4))
def test_keypoints_that_move_together_give_one_affine_map(seed):
    g = torch.Generator().manual_seed(seed); at = torch.rand(2, 4, 2, generator=g) - .5
    A = torch.eye(2) + .2*torch.randn(2, 2, generator=g); t = .1*torch.randn(2, generator=g)
    J = torch.eye(2) + .1*torch.randn(2, 4, 2, 2, generator=g)
    got = net().dense_motion_network.motions(dict(value=at @ A.T + t, jacobian=A @ J), dict(value=at, jacobian=J), 8, 8)
    z = M.coordinates(8, 8, at); want = (z @ A.T + t).expand(2, 4, 8, 8, 2)
    assert torch.allclose(got[:, 0], z.expand(2, 8, 8, 2)) and torch.allclose(got[:, 1:], want, atol=1e-5)

def test_the_same_picture_twice_does_not_move():
    x = torch.rand(2, 3, 64, 64); o = net()(x, x)
    z = M.coordinates(*o['map'].shape[1:3], x); assert torch.allclose(o['map'], z.expand_as(o['map']), atol=1e-4)
    assert torch.allclose(o['mask'].sum(1), torch.ones(1)) and 0 <= o['occlusion'].min() and o['occlusion'].max() <= 1

def test_a_keypoint_is_the_mean_under_its_heat():
    k = M.Keypoints(1, 4, 16, 2, 1, pad=3); k.predictor = torch.nn.Identity(); k.jacobian = torch.nn.Conv2d(1, 4, 1)
    heat = torch.full((1, 1, 9, 9), -50.); heat[0, 0, 2, 6] = 50; k.kp = torch.nn.Identity()
    assert torch.allclose(k(heat)['value'], torch.tensor([[[.5, -.5]]]), atol=1e-5)

# --- files
def published(net, path, drop=None, wrong=False):
    s = net.state_dict(); k = 'dense_motion_network.'
    d = dict(kp_detector={n[len('kp_detector.'):]: v for n, v in s.items() if n.startswith('kp_detector.')},
             generator={n: v for n, v in s.items() if n.startswith(k)} | {'first.conv.weight': torch.zeros(2)}, epoch=99)
    if drop: del d['generator'][drop]
    if wrong: d['kp_detector']['kp.weight'] = torch.zeros(3, 3)
    torch.save(d, path); return path

@pytest.fixture(scope='module')
def big(): return M.MotionModel(**M.PRESETS['fomm']).eval()

def test_published_checkpoints_are_read(tmp_path, big):
    got = M.load_motion(published(big, tmp_path/'vox-cpk.pth.tar')); assert got.config == big.config
    assert all(torch.equal(a, b) for a, b in zip(got.state_dict().values(), big.state_dict().values()))
    o = got(torch.rand(1, 3, 256, 256), torch.rand(1, 3, 256, 256)); assert o['map'].shape == (1, 64, 64, 2)

@pytest.mark.parametrize('kw,words', [(dict(drop='dense_motion_network.mask.weight'), 'lacks 1'),
                                      (dict(wrong=True), 'other sizes')])
def test_other_checkpoints_are_refused(tmp_path, big, kw, words):
    with pytest.raises(InputError, match=words): M.load_motion(published(big, tmp_path/'x.pth.tar', **kw))

def test_bad_files(tmp_path):
    for name in ('a.tar', 'a.safetensors'):
        (tmp_path/name).write_bytes(b'nothing'); pytest.raises(InputError, M.load_motion, tmp_path/name)
    torch.save(dict(a=1), tmp_path/'b.tar'); pytest.raises(InputError, M.load_motion, tmp_path/'b.tar')
    pytest.raises(InputError, M.load_motion, tmp_path/'none.safetensors')

def test_our_files_come_back(tmp_path):
    a = net(); M.save_motion(a, tmp_path/'m.safetensors'); b = M.load_motion(tmp_path/'m.safetensors')
    assert b.config == a.config and all(torch.allclose(x.float(), y.float(), atol=1e-3) for x,
                                        y in zip(a.state_dict().values(), b.state_dict().values()))

# --- training
def test_a_pair_knows_its_map(store):
    rng, shape = np.random.default_rng(0), face_shape()
    for i in range(3):
        e = T.pair(store, i, shape, rng); back = cv2.remap(e['source'], e['map'][..., 0], e['map'][..., 1], cv2.INTER_LINEAR)
        like = lambda a: np.corrcoef(*(cv2.GaussianBlur(v, (0, 0), 1)[e['known']].mean(-1) for v in (a, e['driving'])))[0, 1]
        assert 1-like(back) < .4*(1-like(e['source'])) and like(back) > .85 and e['known'].mean() > .2

def test_nothing_changes_without_a_change(store):
    P = store['mesh'][0].astype(float); assert np.allclose(T.pose_mesh(P, face_shape(), np.zeros(52)), P, atol=1e-3)
    y, m, ok = T.moved(store['crop'][0], P, P)
    assert np.abs(m - F.grid(128))[ok].max() < .01 and np.array_equal(y, store['crop'][0])

def test_a_turned_head_keeps_its_size(store):
    P = store['mesh'][0].astype(float); Q = T.pose_mesh(P, face_shape(), np.zeros(52), (20, 0, 0), (3, -2))
    d = lambda X: np.linalg.norm(X[:, None] - X[None], axis=-1); assert np.allclose(d(P[::40]), d(Q[::40]), rtol=1e-4)

def test_losses_fall_when_the_map_is_right(store):
    b = T.drawer(store, np.arange(3), 2)(np.random.default_rng(0)); m = M.MotionModel(**M.PRESETS['compact']).eval(); z = b['map']
    class Right(torch.nn.Module):
        def forward(self, *a): return dict(map=2*z/127 - 1, occlusion=b['known'][:, None])
    a = T.losses(m, b, np.random.default_rng(0)); m.dense_motion_network = Right(); c = T.losses(m, b, np.random.default_rng(0))
    assert c['map'] < .02 < a['map'] and c['picture'] < a['picture'] and c['occlusion'] < .01

def test_recipe_resumes_and_refuses(tmp_path, store):
    _, log, held = T.train(store, tmp_path, 'quick', progress=False, steps=2)
    _, more, _ = T.train(store, tmp_path, 'quick', progress=False, steps=3)
    assert [r['step'] for r in more] == [2, 3] and more[0] == log[0] and len(held) == 2
    with pytest.raises(ConfigError): T.train(store, tmp_path, 'huge')

# --- in the flow
class Still: # a model that says: nothing moved
    def __call__(self, now, before): return F.grid(len(now)).copy(), np.ones(now.shape[:2], np.float32)

def test_flow_asks_the_model_where_it_is_trusted():
    x = example_faces(1)[0]; f = find_faces(x, max_faces=1)[0]; a = F.look(x, f); b = F.look(np.roll(x, 4, 1), f, a.side)
    m = F.motion(a, b, Still()); assert np.allclose(m, F.grid(a.side), atol=1e-3)
    flow = F.MotionFlow(model=Still()); flow.start(x, f, 255-x, np.ones(x.shape[:2], np.float32))
    assert not flow.step(x, f)['due']

@pytest.mark.skipif(not (M.package_dir()/'weights'/'motion.safetensors').is_file(), reason='the weights do not ship')
def test_what_ships_beats_no_motion(store):
    got = T.evaluate(M.load_motion(), store, range(3)); assert got['learned'] < .5*got['none']
    x = store['crop'][0]; m, trust = M.LearnedMotion()(x, x)
    assert m.shape == (128, 128, 2) and np.abs(m - F.grid(128)).max() < .5 and trust.shape == (128, 128)
