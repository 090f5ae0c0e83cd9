"DiffDeID: network, pipeline, what it is shown, the method and its recipe."
import cv2, numpy as np, pytest
from deidnb.assets import example_faces
from deidnb.core import ConfigError, InputError
from deidnb.faces.align import crop_native
from deidnb.faces.find import find_faces

torch = pytest.importorskip('torch')
from deidnb.generate import denoiser as N, diffdeid as G, inpaint as I
from deidnb.generate.fusion import SIDE, crop_matrix, move_mesh, warp
from deidnb.morphable.model import Coefficients
from deidnb.train import diffusion as T
PHOTOS = example_faces(3); TINY = dict(size=128, fold=2, widths=(8, 16, 16, 16), attend=(8,))
rng = lambda k=0: np.random.default_rng(k)
def unit(n=1, k=0): z = rng(k).standard_normal((n, 128)); return (z/np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)

@pytest.fixture(scope='module')
def faces(): return [find_faces(x, max_faces=1)[0] for x in PHOTOS]
@pytest.fixture(scope='module')
def people(faces): # crop, mesh, blendshapes
    Ms = [crop_matrix(f.points5, f.landmarks) for f in faces]
    return [(warp(x, M, (SIDE, SIDE)), move_mesh(M, f.landmarks), f.blendshapes) for x, f, M in zip(PHOTOS, faces, Ms)]
@pytest.fixture(scope='module')
def file(tmp_path_factory): # an untrained network
    torch.manual_seed(0); net = N.Denoiser(**TINY); p = tmp_path_factory.mktemp('w')/'x.safetensors'
    with torch.no_grad(): [q.add_(.02*torch.randn_like(q)) for q in net.parameters()]
    arrays = dict(guess_u=np.zeros((129, 4), np.float16), guess_v=np.zeros((4, 27648), np.float16),
                  guess_mean=np.zeros(128, np.float32), alpha=.1*rng().standard_normal((129, 80)).astype(np.float16),
                  delta=np.zeros((129, 80), np.float16))
    G.save_diffdeid(net, p, arrays, schedule=T.SCHEDULE); return str(p)

# --- network and pipeline
@pytest.mark.parametrize('off', ['render', 'attention', 'identity'])
def test_ablations_have_gradients_everywhere(off):
    net = N.Denoiser(**TINY, **{off: False})
    with torch.no_grad(): [q.add_(.02*torch.randn_like(q)) for q in net.parameters()]
    x = lambda: torch.randn(2, 3, 128, 128)
    net(x(), torch.tensor([3, 700]), x(), x(), torch.randn(2, 261), torch.from_numpy(unit(2))).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())

def test_paper_preset_samples_down_by_16():
    p = N.DENOISERS['paper']; assert p['size'] == 256 and 2**(len(p['widths'])-1)*p['fold'] == 16

@pytest.mark.parametrize('shape', [(1, 3, 64, 64), (1, 1, 128, 128)])
def test_wrong_sizes(shape):
    with pytest.raises(InputError):
        N.Denoiser(**TINY)(torch.zeros(shape), torch.tensor([1]), torch.zeros(shape), torch.zeros(shape),
                           torch.zeros(1, 261), torch.zeros(1, 128))

@pytest.mark.parametrize('name', ['DDIMScheduler', 'DDPMScheduler', 'DPMSolverMultistepScheduler'])
def test_schedulers_of_diffusers(name):
    import diffusers
    kw = {k: v for k, v in T.SCHEDULE.items() if k not in ('clip_sample', 'rescale_betas_zero_snr')}
    s = getattr(diffusers, name)(**kw)
    pipe = N.DiffDeIDPipeline(N.Denoiser(size=32, fold=2, widths=(8, 16), attend=(8,)), s)
    pipe.set_progress_bar_config(disable=True); x, seen = torch.rand(1, 3, 32, 32), []
    y = pipe(x, x, torch.zeros(1, 261), torch.from_numpy(unit()), num_inference_steps=4,
             generator=torch.Generator().manual_seed(0), callback_on_step_end=lambda p, i, t, kw: (seen.append(int(t)),
            kw)[1])
    assert y.shape == x.shape and torch.isfinite(y).all() and len(seen) == 4 and seen == sorted(seen, reverse=True)

def test_only_the_face_is_drawn_and_the_rest_is_seen():
    net = N.Denoiser(**TINY); seen = []; net.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    pipe = N.DiffDeIDPipeline(net, N.DDIMScheduler(**T.SCHEDULE))
    pipe.set_progress_bar_config(disable=True)
    x, h = torch.rand(1, 3, 128, 128)*2-1, torch.zeros(1, 1, 128, 128); h[..., 40:90, 40:90] = 1
    y = pipe(x, x, torch.zeros(1, 261), torch.from_numpy(unit()), h, x, 3, torch.Generator().manual_seed(0))
    assert torch.equal(y*(1-h), x*(1-h)) and all(torch.equal(s*(1-h), x*(1-h)) for s in seen) and len(seen) == 3

# --- what it is shown
@pytest.mark.parametrize('mouth', [False, True])
def test_masked_picture_shows_no_face(people, mouth):
    x, P, b = people[0]; drawn = np.zeros((SIDE, SIDE, 4), np.uint8); a = G.shown(x, P, drawn, mouth)
    hidden = (a['hard'] > 0) & (G.mouth_zone(P) == 0 if mouth else True)
    y = x.copy(); y[hidden] = 255 - y[hidden]; c = G.shown(y, P, drawn, mouth)
    assert hidden.sum() > 2000 and np.array_equal(a['masked'], c['masked']) and np.array_equal(a['rendered'], c['rendered'])

def test_rendering_follows_the_code_and_not_the_albedo_of_the_face(people):
    x, P, b = people[0]; c = G.fit_crop(x, P, b)
    a = G.conditions(x, x, P, P, b, c, unit()[0], np.ones(80)); other = c.replace(delta=-c.delta)
    m = G.with_albedo(c, np.ones(80)); assert np.array_equal(m.delta, np.ones(80, np.float32)) and a['rho'].shape == (261,)
    # the same albedo needs no other light
    keep = lambda c: G.rendering(G.with_albedo(c, c.delta), P).astype(int)
    assert np.abs(keep(c) - G.rendering(c, P)).max() <= 1

def test_gaze_is_painted(people):
    x, P, b = people[0]; Q = P.copy(); Q[468:478, 0] += 3; c = G.fit_crop(x, P, b)
    assert np.abs(G.rendering(c, P).astype(int) - G.rendering(c, Q)).sum() > 500

def test_fit_that_fails_is_marked(people):
    x, P, b = people[0]; d = T.fitted((x, np.full_like(P, np.nan), b), None)[0]
    assert not d['rho'].any() and not d['drawn'].any()

# --- baselines
@pytest.mark.parametrize('steps,length,resample', [(20, 5, 3), (10, 10, 2), (7, 3, 2), (5, 10, 4)])
def test_walk_of_repaint(steps, length, resample):
    w = I.repaint_levels(steps, length, resample); ups = sum(b > a for a, b in zip(w, w[1:]))
    assert w[0] == steps and w[-1] == 0 and max(w) == steps and all(abs(a-b) == 1 for a,
        b in zip(w, w[1:])) and ups == len(range(0, steps-length, length))*(resample-1)*length

@pytest.mark.parametrize('kw', [dict(steps=0), dict(steps=5, length=0), dict(steps=5, resample=1.5), dict(steps=True)])
def test_walk_refuses(kw):
    with pytest.raises(ConfigError): I.repaint_levels(**kw)

def test_repaint_keeps_what_is_known_and_follows_the_generator():
    pipe = I.RePaintPipeline(N.Denoiser(**TINY, **T.TASKS['prior']), N.DDIMScheduler(**T.SCHEDULE))
    pipe.set_progress_bar_config(disable=True)
    x, h = torch.rand(1, 3, 128, 128)*2-1, torch.zeros(1, 1, 128, 128); h[..., 40:90, 40:90] = 1
    a, b, c = (pipe(x, h, 4, 2, 2, torch.Generator().manual_seed(k)) for k in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(a*(1-h), x*(1-h)) and a.abs().max() <= 1

def test_keypoints_say_where_and_no_more(people):
    x, P, b = people[0]; Q = P.copy(); keep = np.isin(np.arange(478), I.POINTS)
    Q[~keep] += 5
    assert np.array_equal(I.keypoints(P), I.keypoints(Q)) and not np.array_equal(I.keypoints(P),
        I.keypoints(P + 3)) and len(I.POINTS) == 7

@pytest.mark.parametrize('task', list(T.TASKS))
def test_baselines_are_told_less(people, task):
    x, P, b = people[0]; drawn, rho = G.rendering(G.fit_crop(x, P, b), P), np.ones(261, np.float32)
    own = dict(drawn=drawn[None], rho=rho[None])
    d = dict(crop=x[None], mesh=P[None], code=unit(), own=own)
    e = T.example(d, 0, 'own', rng(5), task)
    told = dict(masked=np.abs(e['masked']).sum() > 0, rho=e['rho'].any(), code=e['code'].any(), whole=e['hard'].min() == 1)
    assert told == dict(masked=task != 'prior', rho=task == 'diffdeid', code=task == 'diffdeid', whole=task == 'prior')

@pytest.fixture(scope='module')
def blind(tmp_path_factory): # untrained networks of the baselines
    out = {}
    for k in ('inpaint', 'prior'):
        torch.manual_seed(0); net = N.Denoiser(**TINY | T.TASKS[k]); out[k] = str(tmp_path_factory.mktemp('b')/f'{k}.safetensors')
        with torch.no_grad(): [q.add_(.02*torch.randn_like(q)) for q in net.parameters()]
        G.save_diffdeid(net, out[k], {}, schedule=T.SCHEDULE)
    return out

@pytest.mark.parametrize('name', ['inpaint', 'prior'])
def test_baselines_see_nothing_of_the_face(blind, faces, name):
    make = (lambda: I.Inpaint(2, True, blind[name])) if name == 'inpaint' else (lambda: I.RePaint(4, 2, 2, True, blind[name]))
    c = crop_native(PHOTOS[0], faces[0]); a = make()(c, rng=rng())
    other = crop_native(PHOTOS[0], faces[0]); core = a.mask > .999; other.image = other.image.copy()
    other.image[core] = 255 - other.image[core]
    b = make()(other, rng=rng()); deep = cv2.erode(core.astype(np.uint8), np.ones((15, 15))) > 0
    assert deep.sum() > 2000 and np.abs(a.image[deep].astype(int)
                                        - b.image[deep]).mean() < 8 and np.array_equal(a.image[a.mask == 0],
        c.image[a.mask == 0])
    assert np.array_equal(make()(c, rng=rng()).image, a.image) and not np.array_equal(make()(c, rng=rng(1)).image, a.image)

def test_baselines_refuse_a_network_that_is_told_who(file):
    with pytest.raises(InputError): I.load_inpainter(file)

def test_a_baseline_is_no_diffdeid(blind):
    with pytest.raises(InputError): G.load_diffdeid(blind['inpaint'])

@pytest.mark.parametrize('make', [lambda: I.Inpaint(0), lambda: I.Inpaint(True), lambda: I.RePaint(20, 0),
                                  lambda: I.RePaint(20, 5, 0)])
def test_baselines_bad_settings(make):
    with pytest.raises(ConfigError): make()

# --- the method
def test_method(file, faces):
    c = crop_native(PHOTOS[0], faces[0])
    one = lambda k, **kw: G.DiffDeID(steps=2, simulate=True, weights=file, **kw)(c, rng=rng(k))
    a, b, other = one(0), one(0), one(1)
    assert np.array_equal(a.image, b.image) and not np.array_equal(a.image,
        other.image) and np.array_equal(a.image[a.mask == 0], c.image[a.mask == 0]) and a.mask.max() == 1
    assert a.info['level'] == 6 and one(0, level=9).info['level'] == 9

def test_noise_is_secret_unless_simulated(file, faces):
    c = crop_native(PHOTOS[0], faces[0]); z = unit()[0]
    a, b = (G.DiffDeID(steps=1, weights=file)(c, z=z, rng=rng(0)).image for _ in range(2))
    assert not np.array_equal(a, b)

@pytest.mark.parametrize('kw', [dict(mouth=False), dict(albedo='kept')])
def test_options_change_the_picture(file, faces, kw):
    c = crop_native(PHOTOS[1], faces[1]); z = unit()[0]
    draw = lambda **k: G.DiffDeID(steps=2, simulate=True, weights=file, **k)(c, z=z, rng=rng(0)).image
    assert not np.array_equal(draw(), draw(**kw))

@pytest.mark.parametrize('kw', [dict(steps=0), dict(steps=2.5), dict(steps=True), dict(albedo='mine'), dict(level=10),
                                dict(weight=-1)])
def test_bad_settings(kw):
    with pytest.raises(ConfigError): G.DiffDeID(**kw)

def test_needs_a_mesh(file, faces):
    from dataclasses import replace
    c = crop_native(PHOTOS[0], faces[0]); c.face = replace(c.face, landmarks=None)
    with pytest.raises(InputError): G.DiffDeID(steps=1, weights=file)(c)

@pytest.mark.parametrize('content', [b'', b'not a network', None])
def test_other_files(tmp_path, content):
    p = tmp_path/'x.safetensors'
    if content is not None: p.write_bytes(content)
    with pytest.raises(InputError): G.load_diffdeid(str(p))

def test_the_gate_goes_farther(file):
    d = G.DiffDeID(steps=3, weights=file); e = d.escalate(2)
    assert e.lds.level > d.lds.level and e.config['weight'] > d.config['weight'] and e.args == d.args and d.escalate(6) is None

# --- recipe
def batch(n=4, k=0):
    g = torch.Generator().manual_seed(k); x = lambda c=3: torch.rand(n, c, SIDE, SIDE, generator=g)*2-1
    h = torch.zeros(n, 1, SIDE, SIDE); h[..., 40:90, 40:90] = 1
    return dict(known=x(), target=x(), masked=x(), rendered=x(), mask=h, hard=h, grid=torch.zeros(n, SIDE, SIDE, 2),
                rho=torch.zeros(n, 261), code=torch.from_numpy(unit(n)), t=torch.tensor([0, 300, 700, 999][:n]),
                noise=torch.randn(n, 3, SIDE, SIDE, generator=g))

def test_whoever_knows_the_answer_has_no_loss():
    from contextlib import nullcontext
    b, bar = batch(), torch.as_tensor(T.schedule())
    right = lambda seen, t, *m: (a := bar[t].view(-1, 1, 1, 1)).sqrt()*b['noise'] - (1-a).sqrt()*b['target']
    t, _ = T.losses(right, {}, b, bar, nullcontext, False); assert all(v < 1e-8 for v in t.values())
    w, _ = T.losses(lambda *a: right(*a) + .1, {}, b, bar, nullcontext, False)
    assert w['denoise'] == pytest.approx(.01, rel=1e-3)

def test_losses_look_inside_the_mask_only():
    from contextlib import nullcontext
    b, bar = batch(), torch.as_tensor(T.schedule()); g = torch.randn(4, 3, SIDE, SIDE)
    f = lambda add: T.losses(lambda *a: g + add, {}, b, bar, nullcontext, False)[0]['denoise']
    assert f(0) == f(5*(1-b['hard'])) and f(0) != f(5*b['hard'])

def test_the_network_never_sees_the_target_inside_the_mask_at_the_last_step():
    from contextlib import nullcontext
    b, bar, seen = batch() | dict(t=torch.full((4,), 999)), torch.as_tensor(T.schedule()), []
    for x in (b, b | dict(target=-b['target'])):
        T.losses(lambda s, *a: (seen.append(s), torch.zeros_like(s))[1], {}, x, bar, nullcontext, False)
    assert (seen[0]-seen[1]).abs().max() < 2e-3

def test_squeeze_keeps_the_most_there_is():
    W = rng().standard_normal((129, 300)).astype(np.float32) @ np.diag(np.r_[np.full(5, 10.),
            np.full(295, .01)]).astype(np.float32)
    u, v = T.squeeze(W, 5)
    assert u.shape == (129, 5) and np.abs(u.astype(np.float32) @ v - W).max() < .5

def test_albedo_of_a_code():
    z = unit(400); B = rng(1).standard_normal((128, 80)); rho = np.zeros((400, 261))
    rho[:, 144:224] = z @ B + 2; A = T.fit_albedo(rho, z, 1e-3)
    assert np.abs(np.c_[np.ones(400), z] @ A - rho[:, 144:224]).max() < .05

def test_last_stage_asks_for_the_new_code_and_keeps_the_expression():
    from deidnb.morphable.regress import HEADS
    from contextlib import nullcontext
    import torch.nn.functional as F
    torch.manual_seed(0); b, bar = batch(2), torch.as_tensor(T.schedule())
    o = b | dict(zone=torch.zeros(2, 1, SIDE, SIDE), own=torch.from_numpy(unit(2, 5)), t=torch.tensor([300, 800]))
    o['mask'] = o['hard'] = torch.ones(2, 1, SIDE, SIDE)
    class Net(torch.nn.Module): # draws one picture whatever it is shown
        def __init__(self): super().__init__(); self.x = torch.nn.Parameter(o['known'].clone())
        def forward(self, x, t, *a): q = bar[t].view(-1, 1, 1, 1); return (q.sqrt()*x - self.x)/(1-q).sqrt().clamp(min=1e-3)
    parts = dict(sface=lambda x: x.mean((2, 3)) @ torch.eye(3, 128),
                 m3d=type('M', (), dict(raw=staticmethod(lambda x: x.flatten(1)[:, 3000:3000 + sum(HEADS.values())]))))
    # nothing changed: the expression is kept
    net = Net(); t, out = T.follow(net, parts, o, bar, nullcontext)
    assert (out - o['known']/2 - .5).abs().max() < 1e-3 and t['utility'] < 1e-3
    e = F.normalize(parts['sface'](T_crops(out)))
    assert t['follow'].item() == pytest.approx((1 - (e*o['code']).sum(1)).mean().item(), abs=1e-3)
    t['follow'].backward(); assert net.x.grad.abs().sum() > 0

def T_crops(x):
    from deidnb.train.fusion import sface_crops
    return sface_crops(x)

def test_running_mean_is_kept():
    r = T.Running(); [r.update(0.) for _ in range(3)]; s = T.Running()
    s.load_state_dict(r.state_dict()); assert s.value == r.value < 1

def test_unknown_preset(tmp_path):
    with pytest.raises(ConfigError): T.train(tmp_path, preset='large')

@pytest.mark.parametrize('reenact', [True, False])
def test_frames_of_a_video_share_shape_and_light_only_when_reenacted(faces, file, monkeypatch, reenact):
    seen, draw = [], G.draw; monkeypatch.setattr(G, 'draw', lambda p, b, *a: (seen.append(b), draw(p, b, *a))[1])
    d = G.DiffDeID(steps=1, simulate=True, reenact=reenact, weights=file); x, f = PHOTOS[0], faces[0]; dark = np.uint8(x*.6)
    who = d.decide(crop_native(x, f), rng=rng(0)); assert ('first' in who) == reenact
    for y in (x, dark): d.draw(crop_native(y, find_faces(y, max_faces=1)[0]), **who)
    a, b = (Coefficients.unpack(s['rho'][0].numpy()) for s in seen); assert np.allclose(a.gamma, b.gamma, atol=1e-4) == reenact
    # the expression is the frame's
    assert np.array_equal(seen[0]['code'], seen[1]['code']) and not np.allclose(a.beta, b.beta, atol=1e-6)

def test_a_batch_draws_what_single_pictures_get(faces, file):
    d = G.DiffDeID(steps=2, simulate=True, weights=file)
    crops = [crop_native(x, f) for x, f in zip(PHOTOS, faces)]; who = d.decide(crops[0], rng=rng(0))
    for a, c in zip(d.draw_all(crops, **who), crops):
        b = d.draw(c, **who); assert np.abs(a.image.astype(int) - b.image).max() <= 1 and np.array_equal(a.mask, b.mask)
