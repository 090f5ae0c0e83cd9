"Picture and set distances against closed forms and recorded reference values"
import math, pickle
import cv2, numpy as np, pytest
from deidnb.core import AssetError, ConfigError, InputError
from deidnb.measure import quality as Q


@pytest.fixture(scope='module')
def camera():
    from skimage.data import camera
    c = camera(); return c, np.clip(c + np.random.RandomState(5).normal(0, 20, c.shape), 0, 255).astype(np.uint8)


def test_oracles(camera):
    a, b = camera
    assert Q.psnr(a, b) == pytest.approx(22.40935, abs=1e-5)          # IPOL 22.409353
    assert Q.ssim(a, b, wang=True) == pytest.approx(.35796, abs=1e-5) # IPOL .357959
    assert Q.ssim(a, b) == pytest.approx(.3674518, abs=1e-7)


@pytest.mark.parametrize('c', [1, 5, 100])
def test_constant_shift(c):
    a = np.full((20, 20, 3), 50, np.uint8); b = a + np.uint8(c)
    assert Q.mae(a, b) == c and Q.psnr(a, b) == pytest.approx(20*math.log10(255/c))


def test_mask_is_a_weight():
    g = np.random.default_rng(0); a, b, m = g.integers(0, 255, (9, 7, 3)), g.integers(0, 255, (9, 7, 3)), g.random((9, 7))
    assert Q.mae(a, b, m) == pytest.approx(np.average(np.abs(a-b).mean(-1), weights=m))
    assert Q.psnr(a, b, mask=np.ones((9, 7))) == pytest.approx(Q.psnr(a, b))


def test_uint8_does_not_wrap():
    assert Q.mae(np.zeros((4, 4), np.uint8), np.full((4, 4), 255, np.uint8)) == 255


@pytest.mark.parametrize('d', [4, 64, 2048])
def test_frechet_equal_covariances(d):
    if d > 500: assert Q.frechet_gaussians(np.zeros(d), np.eye(d), np.ones(d), np.eye(d)) == pytest.approx(2048, rel=1e-9); return
    g = np.random.default_rng(d); q = g.normal(size=(d, d)); S = q @ q.T
    assert Q.frechet_gaussians(np.zeros(d), S, np.ones(d), S) == pytest.approx(d, rel=1e-6)


def test_frechet_scaled(): assert Q.frechet_gaussians(np.zeros(64), np.eye(64), np.zeros(64), 4*np.eye(64)) == pytest.approx(64.0)


def test_frechet_against_the_matrix_square_root():
    from scipy.linalg import sqrtm
    g = np.random.default_rng(1); A, B = (x @ x.T/9 + .1*np.eye(9) for x in g.normal(size=(2, 9, 9))); m = g.normal(size=9)
    want = m @ m + np.trace(A + B - 2*np.real(sqrtm(A @ B)))
    assert Q.frechet_gaussians(m, A, m*0, B) == pytest.approx(want, rel=1e-8)


def test_frechet_one_dimension():
    assert Q.frechet_gaussians([1.], [[4.]], [3.], [[9.]]) == pytest.approx(4 + (2-3)**2)


@pytest.mark.parametrize('n', [5, 30, 200])
def test_few_and_many_pictures_agree(n):
    g = np.random.default_rng(n); a, b = g.normal(size=(n, 40)), g.normal(size=(n+3, 40))*1.3 + .2
    want = Q.frechet_gaussians(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert Q.frechet_distance(a, b) == pytest.approx(want, rel=1e-6)
    assert Q.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert Q.frechet_distance(a, b) == pytest.approx(Q.frechet_distance(b, a), rel=1e-6)


def test_kernel_distance_is_unbiased_and_frechet_is_not():
    g = np.random.default_rng(3); k = [Q.kernel_mmd(*np.split(g.normal(size=(40, 16)), 2)) for _ in range(400)]
    assert abs(np.mean(k)) < 4*np.std(k)/20                     # mean 0 within 4 standard errors (p < 1e-4)
    assert np.mean([Q.frechet_distance(*np.split(g.normal(size=(40, 16)), 2)) for _ in range(20)]) > 1


def test_kernel_mmd_against_a_double_loop():
    g = np.random.default_rng(4); x, y = g.normal(size=(6, 3)), g.normal(size=(5, 3)); k = lambda p, q: (p @ q/3 + 1)**3
    a = np.mean([k(x[i], x[j]) for i in range(6) for j in range(6) if i != j])
    b = np.mean([k(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    c = np.mean([k(p, q) for p in x for q in y]); assert Q.kernel_mmd(x, y) == pytest.approx(a + b - 2*c)


@pytest.mark.parametrize('bad', [np.zeros((1, 4)), np.zeros((4,)), np.zeros((3, 5))])
def test_wrong_sets(bad):
    with pytest.raises(InputError): Q.frechet_distance(np.zeros((4, 4)), bad)


@pytest.fixture(scope='module')
def faces():
    from deidnb.core import package_dir
    return [cv2.imread(str(p))[..., ::-1].copy() for p in sorted((package_dir()/'examples').glob('face_*.jpg'))[:3]]


@pytest.mark.parametrize('net', ['alex', 'vgg'])
def test_lpips(net, faces):
    import torch
    a = [cv2.resize(f, (96, 96)) for f in faces]; b = [cv2.GaussianBlur(f, (0, 0), 2) for f in a]
    d = Q.lpips(a, b, net); assert d.shape == (3,) and (d > .02).all()
    assert np.allclose(Q.lpips(b, a, net), d, atol=1e-6) and np.all(Q.lpips(a, a, net) == 0)
    with torch.no_grad(): assert np.allclose(Q.lpips_net(net)(Q.to_tensor(a), Q.to_tensor(b)).ravel(), d, atol=1e-5)
    assert np.allclose([Q.lpips(p, q, net) for p, q in zip(a, b)], d, atol=1e-6)       # batching changes nothing
    assert (Q.lpips(a, [cv2.GaussianBlur(f, (0, 0), 5) for f in a], net) > d).all()


def test_lpips_with_the_package_weights_is_not_random():
    import torch
    w = next(Q.lpips_net('alex').net.parameters()); assert .05 < float(w.std()) < .2 and not torch.isnan(w).any()


def test_inception_formats(tmp_path):
    import torch
    class Tiny(torch.nn.Module):
        def forward(self, x): return x.mean((2, 3))
    torch.jit.save(torch.jit.script(Tiny()), str(tmp_path/'t.pt'))
    import onnx
    from onnx import helper as h, TensorProto as T
    g = h.make_graph([h.make_node('GlobalAveragePool', ['x'], ['y'])], 'g',
                     [h.make_tensor_value_info('x', T.FLOAT, ['n', 3, 299, 299])],
                     [h.make_tensor_value_info('y', T.FLOAT, ['n', 3, 1, 1])])
    onnx.save(h.make_model(g, opset_imports=[h.make_opsetid('', 13)], ir_version=8), str(tmp_path/'t.onnx'))
    im = [np.full((64, 80, 3), (10, 20, 30), np.uint8)]*3
    for f in ('t.pt', 't.onnx'): assert np.allclose(Q.features('inception', im, weights=tmp_path/f), [[10, 20, 30]]*3, atol=1e-3)
    assert np.allclose(Q.Inception(tmp_path/'t.pt', low=-1, high=1)(im)[0], np.array([10, 20, 30])/127.5-1, atol=1e-5)
    noisy = [np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8)]
    # only 'clean' is anti-aliased
    a, b = (Q.Inception(tmp_path/'t.pt', resize=r).prepare(noisy[0]).std() for r in ('clean', 'legacy'))
    assert a < .7*b
    with pytest.raises(ConfigError): Q.Inception(tmp_path/'t.pt', resize='x')


def test_inception_refuses_pickles_and_missing_files(tmp_path):
    class Evil:
        def __reduce__(self): return (pytest.fail, ('executed',))
    (tmp_path/'p.pt').write_bytes(pickle.dumps(Evil()))
    for f, what in ((tmp_path/'p.pt', 'TorchScript'), (None, 'not here'), (tmp_path/'no.pt', 'not here')):
        with pytest.raises(AssetError, match=what): Q.Inception(f)
    (tmp_path/'b.onnx').write_bytes(b'x')
    with pytest.raises(AssetError, match='ONNX'): Q.Inception(tmp_path/'b.onnx')


def test_shapes_and_names():
    with pytest.raises(InputError): Q.mae(np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(InputError): Q.psnr(np.zeros((0, 2)), np.zeros((0, 2)))
    with pytest.raises(ConfigError): Q.features('fid', [])
    with pytest.raises(ConfigError): Q.lpips_net('squeeze')
