"Morphable model and renderer: closed forms, finite differences, brute force, stand-in files of the published layouts"
import json, math, pickle, subprocess, sys
import numpy as np, pytest, torch
from deidnb.core import AssetError, ConfigError, InputError, OutputError, data_dir
from deidnb.morphable.model import (SIZES, Coefficients, MorphableModel, icosphere, linear_light, load_bfm, load_flame,
                                    load_ict, orthonormal_modes, outward, toy_model, unit_modes)
from deidnb.morphable.render import (AMBIENT, DISTANCE, FOCAL, NEAR, encode, interpolate, pinhole, place, project,
                                     rasterise, render, rotation, sh_basis, shade, vertex_normals)

@pytest.fixture(autouse=True)
def two_threads():
    n = torch.get_num_threads(); torch.set_num_threads(2); torch.manual_seed(0); yield; torch.set_num_threads(n)

def test_import_is_cheap():
    code = "import sys, deidnb.morphable.model; assert not {'torch', 'scipy', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0

# ---- coefficients
@pytest.mark.parametrize('batch', [(), (3,), (2, 5), (0,)])
@pytest.mark.parametrize('kind', ['numpy', 'torch'])
def test_pack_is_the_inverse_of_unpack(batch, kind):
    x = np.random.default_rng(0).standard_normal((*batch, 261)).astype(np.float32); x = torch.tensor(x) if kind == 'torch' else x
    c = Coefficients.unpack(x); assert tuple(c.batch) == batch and (c.pack() == x).all() and type(c.pack()) is type(x)
    at = 0
    for k, n in SIZES.items(): assert (getattr(c, k) == x[..., at:at+n]).all(); at += n
    assert at == 261 and (c.numpy().torch().pack() == torch.as_tensor(x)).all()

@pytest.mark.parametrize('field', SIZES)
@pytest.mark.parametrize('bad', ['short', 'nan', 'inf', 'text', 'scalar', 'batch', 'int tensor', 'nan tensor'])
def test_bad_fields_are_named(field, bad):
    n = SIZES[field]; v = {'short': np.zeros(n-1), 'nan': np.full(n, np.nan), 'inf': np.full((2, n), np.inf), 'text': 'x', 'scalar': 1., 'batch': np.zeros((7, n)),
                           'int tensor': torch.zeros(n, dtype=torch.long), 'nan tensor': torch.full((n,), math.nan)}[bad]
    with pytest.raises(InputError) as e: Coefficients.zeros(2).replace(**{field: v})
    assert field in str(e.value) or bad == 'batch' and field == 'alpha'     # alpha sets the batch: the next field is blamed

def test_unknown_field_and_mixtures():
    with pytest.raises(ConfigError, match="'gamma'"): Coefficients.zeros().replace(gama=np.zeros(27))
    with pytest.raises(InputError, match='mixes'): Coefficients.zeros().replace(gaze=torch.zeros(4))
    with pytest.raises(InputError, match='261'): Coefficients.unpack(np.zeros(260))

# ---- model
def test_padding_and_validation():
    v, f = icosphere(0); g = np.random.default_rng(0); m = MorphableModel(v, f, *unit_modes(g.normal(size=(2, 12, 3))))
    assert m.identity.shape == (80, 12, 3) and (m.id_std[2:] == 0).all() and m.expression.shape == (64, 12,
        3) and m.albedo_basis.shape == (80, 12, 3)
    a = g.normal(size=80).astype(np.float32); b = a.copy(); b[2:] = 0
    assert np.array_equal(m.shape(a), m.shape(b)) and np.allclose(m.albedo(a), m.albedo_mean)
    for bad in (dict(triangles=f+12), dict(mean=v*np.nan), dict(mean=v[:, :2]), dict(uv=np.zeros((3, 2))), dict(identity=np.zeros((81, 12, 3)), id_std=np.zeros(81)),
                dict(identity=np.zeros((2, 12, 3)), id_std=np.zeros(3)), dict(expression=np.full((1, 12, 3), np.nan), exp_std=[1]), dict(albedo_basis=np.zeros((1, 12, 3)), alb_std=[-1])):
        with pytest.raises((InputError, ConfigError)): MorphableModel(**(dict(mean=v, triangles=f) | bad))

def test_shape_broadcasts_over_any_batch_and_matches_torch():
    m = toy_model(1); g = np.random.default_rng(0)
    for batch in ((), (3,), (2, 3)):
        a, b = g.normal(size=(*batch, 80)), g.normal(size=(*batch, 64)); S = m.shape(a, b)
        T = m.shape(torch.tensor(a), torch.tensor(b))
        assert S.shape == (*batch, 42, 3) and S.dtype == np.float32 and T.dtype == torch.float64 and np.abs(S
            - T.numpy()).max() < 1e-5

def test_orthonormal_modes_keep_the_distribution():
    A = np.random.default_rng(0).standard_normal((6, 20, 3)); P, s = orthonormal_modes(A)
    F, B = (P*s[:, None, None]).reshape(6, -1), A.reshape(6, -1)
    assert np.allclose(F.T @ F, B.T @ B, atol=1e-4) and np.allclose(P.reshape(6, -1) @ P.reshape(6, -1).T, np.eye(6),
        atol=1e-5) and (np.diff(s) <= 0).all()

def test_sample_statistics():
    c = toy_model(1, modes=20).sample(2000, np.random.default_rng(0)); a = c.alpha[:, :20]
    # 40000 numbers: 6 and 7 deviations
    assert abs(a.mean()) < .03 and abs(a.var() - 1) < .05 and (c.alpha[:,
            20:] == 0).all() and 0 <= c.beta.min() and c.beta.max() <= 1 and (c.pose == 0).all()

@pytest.mark.parametrize('level', [0, 1, 3])
def test_icosphere_is_closed_and_outward(level):
    v, f = icosphere(level); e = np.concatenate([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]])
    assert len(v) == 10*4**level+2 and len(f) == 20*4**level and len(np.unique(e, axis=0)) == len(e)
    assert {tuple(x) for x in e} == {tuple(x[::-1])
                                     for x in e} and (np.linalg.det(v[f]) > 0).all() and np.allclose(np.linalg.norm(v,
            axis=1), 1, atol=1e-6)

def test_save_load(tmp_path):
    m = toy_model(2); m.landmarks = np.arange(68); p = m.save(tmp_path/'m.safetensors')
    n = MorphableModel.load(p); c = m.sample(4, np.random.default_rng(0))
    assert np.abs(m.shape(c.alpha, c.beta) - n.shape(c.alpha, c.beta)).max() < 1e-3 and np.abs(m.albedo(c.delta)
        - n.albedo(c.delta)).max() < 1e-3
    assert n.meta == m.meta and n.names == m.names and np.array_equal(n.landmarks, m.landmarks) and np.array_equal(n.uv,
        m.uv) and np.array_equal(n.mean, m.mean)
    with pytest.raises(OutputError): m.save(p)
    m.save(p, overwrite=True)
    for bad in (b'', b'not a model', json.dumps({}).encode()*40):
        (tmp_path/'x.safetensors').write_bytes(bad)
        with pytest.raises(AssetError, match='x.safetensors'): MorphableModel.load(tmp_path/'x.safetensors')

# ---- loaders, on stand-ins of the published layouts
def grid(n=10): # a bulging sheet with y up and z toward the viewer, quads ordered to face the viewer
    y, x = np.mgrid[1:-1:n*1j, -1:1:n*1j]
    v = np.stack([x, y, 1-.5*(x**2+y**2)], -1).reshape(-1, 3).astype(np.float32)*3
    i = np.arange(n*n).reshape(n, n)
    return v, np.stack([i[:-1, :-1], i[1:, :-1], i[1:, 1:], i[:-1, 1:]], -1).reshape(-1, 4)

def eyes68(v, left=(-1., .7), right=(1., .7)): # 68 indices whose eye points are the vertices nearest to two places
    at = lambda p: int(np.argmin(np.abs(v[:, :2] - p).sum(1))); i = np.zeros(68, int); i[36:42], i[42:48] = at(left), at(right)
    return i

def check_frame(m, v, kp):
    assert np.allclose((m.mean[kp[36]] + m.mean[kp[42]])/2, 0, atol=1e-5) and np.isclose(np.linalg.norm(m.mean[kp[36]]
            - m.mean[kp[42]]), 1, atol=1e-5)
    # up is negative y, near is negative z
    assert m.mean[v[:, 1].argmax(), 1] < m.mean[v[:, 1].argmin(), 1] and m.mean[v[:, 2].argmax(), 2] == m.mean[:, 2].min()
    n = vertex_normals(torch.tensor(m.mean)[None], torch.tensor(m.triangles))[0]; assert (n[:, 2] < 0).all()

def write_ict(path, flip=False):
    v, q = grid(); g = np.random.default_rng(0)
    z = dict(neutral=v, faces=(q[:, ::-1] if flip else q).astype(np.int32), uv=g.random((150, 2)).astype(np.float32), uv_faces=q.astype(np.int32), identity=g.normal(size=(100, 100, 3)).astype(np.float32),
             expression=g.normal(size=(3, 100, 3)).astype(np.float32), expression_names=np.array(['jawOpen', 'smile_L', 'smile_R']))
    np.savez(path, **z); return z

@pytest.mark.parametrize('flip', [False, True])
def test_load_ict(tmp_path, flip):
    z = write_ict(tmp_path/'ict_facemodel_11248.npz', flip); v, kp = z['neutral'], eyes68(z['neutral'])
    m = load_ict(tmp_path, landmarks=kp); unit = np.linalg.norm(v[kp[36]] - v[kp[42]])
    check_frame(m, v, kp)
    assert len(m.triangles) == 2*81 and m.names == ('jawOpen', 'smile_L', 'smile_R') and (m.id_std[:80] > 0).all()
    # beta = 1: the whole named shape
    beta = np.zeros(64); beta[1] = 1
    assert np.allclose(m.shape(np.zeros(80), beta) - m.mean, z['expression'][1]*[1, -1, -1]/unit, atol=1e-5)
    B = (z['identity'][:80]*np.float32([1, -1, -1])/unit).reshape(80, -1)
    P = (m.identity*m.id_std[:, None, None]).reshape(80, -1)
    assert np.allclose(P.T @ P, B.T @ B, atol=1e-3)
    if not flip: assert np.allclose(m.uv[z['faces'].ravel()], z['uv'][z['uv_faces'].ravel()])

def test_load_ict_refuses(tmp_path):
    with pytest.raises(AssetError, match='ICT-FaceKit'): load_ict(tmp_path)
    with pytest.raises(ConfigError, match="'narrow'"): load_ict(tmp_path, area='narow')
    np.savez(tmp_path/'ict_facemodel_11248.npz', neutral=np.zeros((3, 3)))
    with pytest.raises(AssetError, match='layout'): load_ict(tmp_path)
    (tmp_path/'ict_facemodel_11248.npz').write_bytes(b'no zip')
    with pytest.raises(AssetError): load_ict(tmp_path)

def test_load_bfm(tmp_path):
    from scipy.io import savemat
    v, q = grid(); g = np.random.default_rng(0); kp = eyes68(v)
    tri = np.concatenate([q[:, [0, 1, 2]], q[:, [0, 2, 3]]])
    I, E, T = (g.normal(size=(300, k))*s for k, s in ((80, .1), (64, .1), (80, 3.)))
    tex = g.uniform(60, 200, (1, 300)); path = tmp_path/'BFM_model_front.mat'
    savemat(path, dict(meanshape=v.reshape(1, -1), idBase=I, exBase=E, meantex=tex, texBase=T, tri=tri+1, keypoints=kp[None]+1))
    m = load_bfm(tmp_path); unit = np.linalg.norm(v[kp[36]] - v[kp[42]]); check_frame(m, v, kp)
    assert np.array_equal(m.triangles, tri)
    # the published coefficient keeps its meaning
    a = np.zeros(80); a[5] = 2
    assert np.allclose(m.shape(a) - m.mean, 2*I[:, 5].reshape(-1, 3)*[1, -1, -1]/unit, atol=1e-5)
    d = np.zeros(80); d[7] = .05; shown = encode(torch.tensor(m.albedo(d))).numpy()*255
    assert np.abs(shown - (tex.reshape(-1, 3) + .05*T[:, 7].reshape(-1, 3))).max() < .02
    with pytest.raises(AssetError, match='licence form'): load_bfm(tmp_path/'absent.mat')
    savemat(path, dict(meanshape=v.reshape(1, -1)))
    with pytest.raises(AssetError, match='layout'): load_bfm(path)

def test_load_flame(tmp_path):
    v, q = grid(); v = v/20; g = np.random.default_rng(0)
    tri = np.concatenate([q[:, [0, 1, 2]], q[:, [0, 2, 3]]]); D = g.normal(size=(100, 3, 400))*.01
    kp = eyes68(v, (-.05, .035), (.05, .035))
    J = np.zeros((5, 100)); J[3, kp[42]], J[4, kp[36]] = 1, 1
    z = dict(v_template=v, shapedirs=D, f=tri.astype(np.uint32), J_regressor=J)
    unit = np.linalg.norm(v[kp[36]] - v[kp[42]])
    np.savez(tmp_path/'generic_model.npz', **z); m = load_flame(tmp_path); check_frame(m, v, kp)
    b = np.zeros(64); b[63] = 1; assert np.allclose(m.shape(np.zeros(80), b) - m.mean, D[..., 363]*[1, -1, -1]/unit, atol=1e-5)
    a = np.zeros(80); a[79] = 1; assert np.allclose(m.shape(a) - m.mean, D[..., 79]*[1, -1, -1]/unit, atol=1e-5)
    pkl = tmp_path/'plain'/'generic_model.pkl'; pkl.parent.mkdir(); pkl.write_bytes(pickle.dumps(z))
    assert np.allclose(load_flame(pkl.parent).mean, m.mean)

class Evil:
    def __reduce__(self): return (open, ('evil_was_here', 'w'))

def test_load_flame_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/'generic_model.pkl').write_bytes(pickle.dumps(dict(v_template=Evil())))
    with pytest.raises(AssetError, match='chumpy'): load_flame(tmp_path)
    assert not (tmp_path/'evil_was_here').exists()
    with pytest.raises(AssetError, match='licence form'): load_flame(tmp_path/'none.npz')
    np.savez(tmp_path/'generic_model.npz', v_template=np.zeros((4, 3)))
    with pytest.raises(AssetError, match='layout'): load_flame(tmp_path)

ICT = data_dir() and data_dir()/'morphable'/'ict_facemodel_11248.npz'
needs_ict = pytest.mark.skipif(not (ICT and ICT.exists()), reason='no ICT model below DEIDNB_DATA')

@needs_ict
@pytest.mark.parametrize('area,V', [('head', 11248), ('face', 9409), ('narrow', 6706)])
def test_ict(area, V):
    m = load_ict(ICT.parent, area); assert len(m.mean) == V and m.names[30] == 'jawOpen' and len(m.landmarks) == 68
    # 36-41 are on the picture's left
    x = m.mean[m.landmarks]
    assert np.allclose(x[36:42].mean(0), [-.5, 0, 0], atol=.01) and np.allclose(x[42:48].mean(0), [.5, 0, 0], atol=.01)
    # nose tip nearest, chin lowest
    assert x[30, 2] == x[:, 2].min() and x[8, 1] == x[:, 1].max()

# ---- stages
def test_rotation_composes_and_has_gradients_at_zero():
    r = torch.randn(50, 3, dtype=torch.float64)*2; R = rotation(r); K = torch.zeros(50, 3, 3, dtype=r.dtype)
    K[:, 2, 1], K[:, 0, 2], K[:, 1, 0] = r.T; K = K - K.mT
    assert torch.allclose(R, torch.linalg.matrix_exp(K)) and torch.allclose(torch.linalg.det(R), torch.ones(50, dtype=r.dtype))
    for scale in (0, 1e-12, 9e-4, 1.1e-3, 1, math.pi):
        x = (torch.tensor([[.6, -.48, .64]], dtype=torch.float64)*scale).requires_grad_()
        assert torch.autograd.gradcheck(rotation, (x,), atol=1e-6)
    x = torch.zeros(1, 3, requires_grad=True); rotation(x).sum().backward(); assert x.grad.isfinite().all()
    assert torch.allclose(rotation(torch.tensor([[1e-3*.999, 0, 0]])), rotation(torch.tensor([[1e-3*1.001, 0, 0]])), atol=1e-5)

@pytest.mark.parametrize('hw', [(64, 64), (48, 96), (1, 1), (7, 3)])
def test_project(hw):
    h, w = hw; v = torch.tensor([[[0., 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, -8]]])
    xy, z = project(v, torch.tensor([[0., 0, 0, .5, -.25, 4]]), hw, focal=2., distance=10.)
    assert torch.allclose(z, torch.tensor([[14., 14, 14, 6]])) and torch.allclose(xy[0],
        torch.tensor([[(w-1)/2 + 2*w*x/d, (h-1)/2 + 2*w*y/d] for x, y, d in ((.5, -.25, 14), (1.5, -.25, 14),
                    (.5, .75, 14), (.5, -.25, 6))]), atol=1e-4)

def test_sh_basis_against_scipy():
    from scipy.special import sph_harm_y
    n = torch.nn.functional.normalize(torch.randn(100, 3, dtype=torch.float64), dim=1)
    x, y, z = n.T.numpy(); theta, phi = np.arccos(z), np.arctan2(y, x); want = []
    for l, m in ((0, 0), (1, -1), (1, 0), (1, 1), (2, -2), (2, -1), (2, 0), (2, 1), (2, 2)):
        Y = sph_harm_y(l, abs(m), theta, phi)
        Y = Y.real if m == 0 else (-1)**m*math.sqrt(2)*(Y.real if m > 0 else Y.imag)
        want.append(Y*[1, 2/3, 1/4][l])
    assert np.abs(sh_basis(n).numpy() - np.stack(want, 1)).max() < 1e-6

def test_shade_is_the_integral_of_radiance_times_cosine():
    L, _ = icosphere(5); L = torch.tensor(L).double(); g = torch.randn(9, dtype=torch.float64)
    damp = torch.tensor([1, *[2/3]*3, *[1/4]*5], dtype=torch.float64); radiance = (sh_basis(L)/damp) @ g
    n = L[::700]; E = 4*math.pi/len(L) * ((n @ L.T).clamp(min=0) * radiance).sum(1)
    got = shade(torch.ones(1, len(n), 3, dtype=L.dtype), n[None], g.repeat(3)[None], ambient=0)[0, :, 1]
    assert torch.allclose(got, E/math.pi, atol=.01*radiance.abs().max().item())

def test_shade_colours_and_runs():
    n = torch.nn.functional.normalize(torch.randn(5, 3), dim=1); a = torch.rand(5, 3); g = torch.randn(2, 27)
    one = torch.stack([a[i]*(sh_basis(n[i]) @ g[int(i >= 2)].view(3, 9).T + AMBIENT) for i in range(5)])
    assert torch.allclose(shade(a, n, g, count=[2, 3]), one, atol=1e-5) and torch.allclose(shade(a[None].expand(2, -1,
                -1), n[None].expand(2, -1, -1), g)[1, 2:], one[2:], atol=1e-5)
    assert torch.allclose(shade(a[None], n[None], torch.zeros(1, 27), ambient=1.)[0], a)

@pytest.mark.parametrize('level', [2, 4])
def test_normals_match_scattered_sum(level):
    v, f = icosphere(level); v = torch.tensor(v)[None]*torch.rand(3, len(v), 1) + .1
    v.requires_grad_(); f = torch.tensor(f); w = torch.randn(3, v.shape[1], 3)
    P = v[:, f]; n = torch.linalg.cross(P[:, :, 1]-P[:, :, 0], P[:, :, 2]-P[:, :, 0]); N = torch.zeros_like(v)
    for i in range(3): N = N.index_add(1, f[:, i], n)
    N = torch.nn.functional.normalize(N, dim=-1); got = vertex_normals(v, f); assert torch.allclose(got, N, atol=1e-4)
    a, = torch.autograd.grad((N*w).sum(), v, retain_graph=True)
    b, = torch.autograd.grad((got*w).sum(), v); assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)

def test_normals_of_lonely_vertices_and_edited_triangles():
    v = torch.tensor([[[0., 0, 0], [1, 0, 0], [0, 1, 0], [9, 9, 9]]], requires_grad=True)
    f = torch.tensor([[0, 1, 2]]); n = vertex_normals(v, f)
    assert n[0].tolist() == [[0, 0, 1]]*3 + [[0, 0, 0]]; n.sum().backward(); assert v.grad.isfinite().all()
    # the remembered table is not used for changed triangles
    f[0] = torch.tensor([0, 2, 3]); assert (vertex_normals(v, f)[0, 1] == 0).all()

# ---- rasteriser
def brute(xy, z, f, hw, cull): # every triangle at every pixel, in double precision
    h, w = hw; y, x = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing='ij')
    q = torch.stack([x, y], -1).view(-1, 2); P, Z = xy.double()[f], z.double()[f]
    cross = lambda a, b: a[..., 0]*b[..., 1] - a[..., 1]*b[..., 0]; area = cross(P[:, 1]-P[:, 0], P[:, 2]-P[:, 0])
    W = torch.stack([cross(P[:, None, (i+1) % 3]-q, P[:, None, (i+2) % 3]-q)/area[:, None] for i in range(3)], -1)
    # pixels on no edge
    d = 1/(W/Z[:, None]).sum(-1)
    ok = (W >= 0).all(-1) & (Z > NEAR).all(1)[:, None] & ((area < 0) if cull else area != 0)[:, None]
    safe = (W.min(-1).values.abs() > 1e-3).all(0)
    best, i = torch.where(ok, d, torch.inf).min(0); hit = best < torch.inf
    b = W[i, torch.arange(h*w)]/Z[i]; b = b/b.sum(-1, keepdim=True)
    return torch.where(hit, i, -1).view(h, w), b.view(h, w, 3), torch.where(hit, best, 0).view(h, w), safe.view(h, w)

@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('hw,chunk', [((17, 23), 2**22), ((32, 8), 50), ((1, 1), 1)])
@pytest.mark.parametrize('cull', [False, True])
def test_rasterise_against_brute_force(seed, hw, chunk, cull):
    g = torch.Generator().manual_seed(seed); B, V, T = 3, 40, 60
    xy = torch.rand(B, V, 2, generator=g)*60 - 20; z = torch.rand(B, V, generator=g)*10 - .5
    f = torch.stack([torch.randperm(V, generator=g)[:3] for _ in range(T)])
    R = rasterise(xy, z, f, hw, cull, chunk=chunk)
    for b in range(B):
        ids, bary, depth, safe = brute(xy[b], z[b], f, hw, cull); assert safe.float().mean() > .5 or hw == (1, 1)
        assert (R.ids[b] == ids)[safe].all() and torch.allclose(R.depth[b][safe], depth[safe].float(), rtol=1e-4, atol=1e-4)
        assert torch.allclose(R.bary[b][safe & (ids >= 0)], bary[safe & (ids >= 0)].float(),
                              atol=2e-3) and torch.equal(R.mask[b],
                                                         R.ids[b] >= 0) and (R.bary[b][~R.mask[b]] == 0).all()

def test_rasterise_is_watertight_and_deterministic():
    v, f = map(torch.tensor, icosphere(4))
    xy, z = project(v[None]*1.5, torch.tensor([[.1, .2, .3, 0, 0, 0]]), (200, 200))
    R = rasterise(xy, z, f, (200, 200), cull=True)
    # no holes
    y, x = torch.meshgrid(*[torch.arange(200)-99.5]*2, indexing='ij')
    assert R.mask[0][(x**2+y**2).sqrt() < FOCAL*200*1.5/math.sqrt(DISTANCE**2-1.5**2) - 1.5].all()
    assert all(torch.equal(a, b) for a, b in zip(R, rasterise(xy, z, f, (200, 200), cull=True)))

@pytest.mark.parametrize('n,radius', [(64, 1.), (128, .7), (150, 1.7)])
def test_sphere_silhouette_and_depth(n, radius):
    v, f = map(torch.tensor, icosphere(5)); xy, z = project(v[None]*radius, torch.zeros(1, 6), (n, n))
    R = rasterise(xy, z, f, (n, n)); r = FOCAL*n*radius/math.sqrt(DISTANCE**2-radius**2)
    y, x = torch.meshgrid(*[torch.arange(n)-(n-1)/2]*2, indexing='ij'); d = (x**2+y**2).sqrt()
    assert abs(R.mask.sum()/(math.pi*r**2) - 1) < .01 + 4/r**1.5
    # the boundary, to half a pixel
    assert R.mask[0][d < r-.5].all() and not R.mask[0][d > r+.1].any()
    t = torch.stack([x, y, torch.full_like(x, FOCAL*n)], -1)/(FOCAL*n); A = (t*t).sum(-1)
    true = (DISTANCE - (DISTANCE**2 - A*(DISTANCE**2-radius**2)).clamp(min=0).sqrt())/A
    assert (R.depth[0]-true)[d < r-2].abs().max() < .01*radius

def test_rendered_sphere_is_lambertian():
    v, f = icosphere(5); m = MorphableModel(v, f, albedo_mean=np.full((len(v), 3), .4))
    g = torch.randn(1, 27)*.15; c = m.neutral(1).torch().replace(gamma=g); n = 96
    out = render(m, c, (n, n))
    # the seen points
    p = torch.stack([*reversed(torch.meshgrid(*[torch.arange(n)-(n-1)/2]*2, indexing='ij')),
                     torch.full((n, n), FOCAL*n)], -1)/(FOCAL*n)*out['depth'][0][..., None] - torch.tensor([0, 0,
            DISTANCE])
    want = encode(.4*(sh_basis(torch.nn.functional.normalize(p, dim=-1)) @ g.view(3, 9).T + AMBIENT)).permute(2, 0, 1)
    inner = out['mask'][0] & (p[..., 2] < -.3)
    assert (out['image'][0]-want)[:, inner].abs().max() < .01 and inner.sum() > 300 and (out['image'][0][:,
            ~out['mask'][0]] == 0).all()

def cube(): # 8 corners, 12 outward triangles, two per side
    v = torch.tensor([[x, y, z] for x in (-1., 1) for y in (-1., 1) for z in (-1., 1)]); f = []
    for axis in range(3):
        for s in (0, 1):
            i = [k for k in range(8) if (k >> (2-axis)) & 1 == s]; f += [[i[0], i[1], i[3]], [i[0], i[3], i[2]]]
    f = torch.tensor(f); P = v[f]; inward = (torch.linalg.cross(P[:, 1]-P[:, 0], P[:, 2]-P[:, 0])*P.mean(1)).sum(1) < 0
    return v, torch.where(inward[:, None], f.flip(1), f)

@pytest.mark.parametrize('cull', [False, True])
def test_cube_hides_its_far_sides(cull):
    v, f = cube(); xy, z = project(v[None], torch.zeros(1, 6), (64, 64))
    R = rasterise(xy, z, f, (64, 64), cull); near = {i for i in range(12) if (v[f[i], 2] == -1).all()}
    assert set(R.ids.unique().tolist()) == near | {-1} and torch.allclose(R.depth[R.mask],
        torch.tensor(DISTANCE-1.)) and abs(R.mask.sum().item()**.5 - 2*FOCAL*64/(DISTANCE-1)) <= 1
    # three sides of a turned cube
    xy, z = project(v[None], torch.tensor([[.5, .6, 0, 0, 0, 0]]), (64, 64))
    R = rasterise(xy, z, f, (64, 64), cull); seen = {i//2 for i in R.ids.unique().tolist() if i >= 0}
    assert len(seen) == 3

def test_perspective_correct_weights_on_a_slanted_quad():
    v = torch.tensor([[[-1., -1, 0], [1, -1, 8], [1, 1, 8], [-1, 1, 0]]])
    f = torch.tensor([[0, 1, 2], [0, 2, 3]]); xy, z = project(v, torch.zeros(1, 6), (64, 64), focal=4.)
    R = rasterise(xy, z, f, (64, 64))
    # x = X/Z: a straight interpolation would be off by far more
    at = interpolate(v, R.ids, R.bary, f)[0]; x = torch.arange(64)-31.5; want = x/(FOCAL*64)*R.depth[0]
    assert (at[..., 0]-want)[R.mask[0]].abs().max() < 1e-4 and R.mask.sum() > 200

def test_outside_behind_degenerate_and_nan_are_ignored():
    f = torch.tensor([[0, 1, 2]]); z = torch.full((1, 3), 5.)
    for xy, depth in (([[-9., -9], [-5, -9], [-5, -1]], z), ([[70., 1], [90, 1], [80, 9]], z), ([[1., 1], [5, 5], [9, 9]], z), ([[1., 1], [9, 1], [1, 9]], -z), ([[1., 1], [9, 1], [1, 9]], torch.tensor([[5., 5, .01]])),
                      ([[math.nan, 1], [9, 1], [1, 9]], z), ([[1., 1], [math.inf, 1], [1, 9]], z), ([[1., 1], [9, 1], [1, 9]], torch.tensor([[5., math.nan, 5]]))):
        R = rasterise(torch.tensor([xy]), depth, f, (16, 16))
        assert not R.mask.any() and (R.ids == -1).all() and R.bary.isfinite().all()
    # larger than the picture
    R = rasterise(torch.tensor([[[-1e6, -1e6], [1e6, -1e6], [0., 1e6]]]), z, f, (16, 16))
    assert R.mask.all()
    assert rasterise(torch.zeros(1, 3, 2), z, f[:0], (4, 4)).mask.sum() == 0

# ---- gradients
def numeric(fun, x, i, h=1e-6):
    d = torch.zeros_like(x); d.view(-1)[i] = h; return ((fun(x+d) - fun(x-d))/(2*h)).item()

def test_gradients_of_weights_and_depth_by_vertex():
    v, f = cube()
    xy, z = project(v[None].double(), torch.tensor([[.5, .6, .1, 0, 0, 0]], dtype=torch.float64), (12, 12), focal=3.)
    C = torch.randn(1, 8, 2, dtype=torch.float64); W = torch.randn(12, 12, dtype=torch.float64)
    def fun(x): # x: (1, 8, 3) pixels and depth
        R = rasterise(x[..., :2], x[..., 2], f, (12, 12))
        return ((interpolate(C, R.ids, R.bary, f).sum(-1) + R.depth)*W*R.mask).sum()
    x = torch.cat([xy, z[..., None]], -1).requires_grad_(); g, = torch.autograd.grad(fun(x), x); assert (g != 0).sum() > 15
    for i in range(24): assert abs(numeric(fun, x.detach(), i) - g.view(-1)[i].item()) < 1e-5*max(1, g.abs().max().item())

def test_gradients_of_the_picture_by_every_field():
    m = toy_model(3, modes=4); g = np.random.default_rng(1)
    x = torch.tensor(m.sample(2, g).replace(gamma=g.normal(0, .1, (2, 27)), pose=g.normal(0, .2, (2, 6))).pack(),
                     dtype=torch.float64)
    y, xx = torch.meshgrid(*[torch.linspace(-1, 1, 20)]*2, indexing='ij')
    W = torch.randn(2, 3, 20, 20, dtype=torch.float64)*(xx**2 + y**2 < .12)
    fun = lambda x: (render(m, Coefficients.unpack(x), (20, 20))['image']*W).sum()
    x.requires_grad_(); a, = torch.autograd.grad(fun(x), x); x = x.detach()
    for i in [0, 1, 3, 80, 83, 144, 147, 224, 230, 245, 251, 252, 253, 254, 255, 256]:
        for b in (0, 1): n = numeric(fun, x, 261*b+i); assert abs(a[b, i].item() - n) < 1e-4*max(1, abs(n)), (b, i)
    assert (a[:, 251:257] != 0).all() and (a[:, -4:] == 0).all()

def test_gradients_are_finite_everywhere():
    m = toy_model(3); x = torch.tensor(m.sample(3, np.random.default_rng(0)).pack(), requires_grad=True)
    for pose in ([0]*6, [0, 3., 0, 0, 0, 0], [0, 0, 0, 50, 0, 0], [0, 0, 0, 0, 0, -16.5], [0, 0, 0, 0, 0, -40]):
        out = render(m, Coefficients.unpack(x).replace(pose=torch.tensor(pose, dtype=torch.float32)), (16, 16))
        x.grad = None; (out['image'].sum() + out['depth'].sum() + out['normals'].sum()).backward()
        assert x.grad.isfinite().all()

# ---- render
@pytest.mark.parametrize('hw', [(1, 1), (5, 40), (64, 64)])
def test_render_returns_what_it_says(hw):
    m = toy_model(3); out = render(m, m.sample(2, np.random.default_rng(0)), hw, background=.25); h, w = hw
    assert {k: tuple(v.shape) for k, v in out.items() if k != 'fragments'} == dict(image=(2, 3, h, w), mask=(2, h, w),
        depth=(2, h, w), normals=(2, h, w, 3), visible=(2, 642), xy=(2, 642, 2), uv=(2, h, w, 2))
    assert out['image'].isfinite().all() and 0 <= out['image'].min() and out['image'].max() <= 1 and (out['image'].permute(0,
            2, 3, 1)[~out['mask']] == .25).all()

def test_one_face_is_a_batch_of_one_and_batches_do_not_mix():
    m = toy_model(3)
    c = m.sample(3, np.random.default_rng(0)).replace(pose=np.random.default_rng(1).normal(0, .3, (3, 6)),
                                                      gamma=np.random.default_rng(2).normal(0, .2, (3, 27)))
    out = render(m, c, (40, 40))
    for i in range(3): assert (render(m, c[i], (40, 40))['image'][0] - out['image'][i]).abs().max() < 1e-3
    for batch in ((2, 2), 0):
        with pytest.raises(InputError, match='batch'): render(m, Coefficients.zeros(batch), (8, 8))
    assert render(MorphableModel(m.mean, m.triangles), c, (8, 8))['uv'] is None

def test_visible_vertices_of_a_sphere():
    v, f = icosphere(4); m = MorphableModel(v, f)
    seen = render(m, m.neutral(1), (256, 256))['visible'][0].numpy()
    cos = -(v*(v + [0, 0, DISTANCE])).sum(1)/np.linalg.norm(v + [0, 0, DISTANCE], axis=1)
    assert seen[cos > .05].all() and not seen[cos < -.05].any()

def test_encode_is_the_inverse_of_linear_light():
    x = np.linspace(0, 1, 201); assert np.abs(encode(torch.tensor(linear_light(x)[0])).numpy() - x).max() < 1e-6
    t = torch.tensor([-1., 0, 1e-9, .0031308, .5, 1, 3], requires_grad=True)
    encode(t).sum().backward(); assert t.grad.isfinite().all()

# ---- back ends
def test_unknown_and_absent_back_ends():
    m = toy_model(1)
    with pytest.raises(ConfigError, match='opengl'): render(m, m.neutral(1), (8, 8), backend='opengl')
    try: import pytorch3d
    except ImportError:
        with pytest.raises(ConfigError, match='not installed'): render(m, m.neutral(1), (8, 8), backend='pytorch3d')

@pytest.mark.parametrize('hw', [(48, 48), (40, 64), (64, 40)])
def test_pytorch3d_agrees(hw):
    pytest.importorskip('pytorch3d', reason='PyTorch3D is not installed')
    m = toy_model(3); c = m.sample(2, np.random.default_rng(0))
    a, b = render(m, c, hw), render(m, c, hw, backend='pytorch3d')
    same = a['fragments'].ids == b['fragments'].ids
    assert same.float().mean() > .99 and (a['image']-b['image']).abs().permute(0, 2, 3, 1)[same].max() < 1e-3

def test_first_use_in_inference_mode_does_not_poison_the_model():
    import torch
    from deidnb.morphable.model import toy_model
    from deidnb.morphable.render import render
    m = toy_model(2); c = m.sample(1, np.random.default_rng(0)).torch()
    with torch.inference_mode(): seen = render(m, c, (32, 32))['image']
    c.alpha.requires_grad_(); again = render(m, c, (32, 32))['image']; again.sum().backward()
    assert torch.equal(seen, again.detach()) and float(c.alpha.grad.abs().sum()) > 0
