"identity.lds and train.lds: the scheduler oracle, the transform, its bad input, and whether shipped samples are like people"
import math, time
import numpy as np, pytest
torch = pytest.importorskip('torch'); pytest.importorskip('diffusers')
from deidnb.core import AssetError, ConfigError, InputError
from deidnb.identity.experts import stored_threshold
from deidnb.identity.lds import LDS, MODES, PARTS, Sampler, Whitening, ddim, ddim_scheduler, denoiser, level_edges, level_interval, load_sampler, narrowing, part_masks, save_sampler
from deidnb.identity.mechanism import Source
from deidnb.train import lds as T

unit = lambda x: x/np.linalg.norm(x, axis=1, keepdims=True)
sim = lambda k=0: dict(rng=k, simulate=True)

@pytest.fixture(scope='module')
def sampler(): return load_sampler()
@pytest.fixture(scope='module')
def held(sampler): return sampler.people('held_z'), sampler.people('held_alpha')
@pytest.fixture(scope='module')
def drawn(sampler): # as many as are held out
    d = sampler.draw(1000, 'joint', Source(1, simulate=True)); return unit(d['z']), d['alpha']

# ---- the loop and the schedule

def test_ddim_oracle(): # diffusers tests/schedulers/test_scheduler_ddim.py: full loop without noise
    from diffusers import DDIMScheduler
    s = DDIMScheduler(1000, beta_start=1e-4, beta_end=.02, beta_schedule='linear', clip_sample=True); n = 4*3*8*8
    x = (torch.arange(n).reshape(3, 8, 8, 4)/n).permute(3, 0, 1, 2); out = ddim(lambda x, t: x*t/(t+1), x, s, 10)
    assert abs(float(out.abs().sum()) - 172.0067) < 1e-2 and abs(float(out.abs().mean()) - .223967) < 1e-3
    v = DDIMScheduler(1000, beta_start=1e-4, beta_end=.02, beta_schedule='linear', clip_sample=True,
                      prediction_type='v_prediction')
    out = ddim(lambda x, t: x*t/(t+1), x, v, 10)
    assert abs(float(out.abs().sum()) - 52.5302) < 1e-2 and abs(float(out.abs().mean()) - .0684) < 1e-3

@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'sample'])
@pytest.mark.parametrize('eta', [0., .5])
def test_ddim_step_by_hand(prediction, eta): # Song et al. 2020, eq. 12, written out
    s = ddim_scheduler(prediction); s.set_timesteps(50); bar = s.alphas_cumprod.double(); g = torch.Generator().manual_seed(0)
    t, tau = int(s.timesteps[20]), int(s.timesteps[21])
    x, out, n = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(3))
    a, b = bar[t], bar[tau]
    x0, e = dict(epsilon=lambda: ((x - (1-a).sqrt()*out)/a.sqrt(), out),
                 sample=lambda: (out, (x - a.sqrt()*out)/(1-a).sqrt()),
                 v_prediction=lambda: (a.sqrt()*x - (1-a).sqrt()*out, a.sqrt()*out + (1-a).sqrt()*x))[prediction]()
    sigma = eta*((1-b)/(1-a)*(1-a/b)).sqrt(); want = b.sqrt()*x0 + (1-b-sigma**2).sqrt()*e + sigma*n
    got = s.step(out, s.timesteps[20], x, eta=eta, variance_noise=n if eta else None).prev_sample
    assert torch.allclose(got, want, atol=1e-5)

def test_schedule_starts_at_noise(): # trailing spacing: the first step is the last of training
    s = ddim_scheduler(); s.set_timesteps(50)
    assert int(s.timesteps[0]) == 999 and float(s.alphas_cumprod[-1]) < 1e-4 and len(s.timesteps) == 50

# ---- parts

def test_whitening_round_trip():
    r = np.random.default_rng(0)
    x = r.normal(size=(3000, 9)) @ np.diag(10.**np.arange(-4, 5)/100) @ np.linalg.qr(r.normal(size=(9, 9)))[0]
    w = Whitening.fit(x, 0.)
    assert np.allclose(np.cov(w.whiten(x.astype(np.float64)).T)[4:, 4:], np.eye(5),
                       atol=.02) and np.abs(w.restore(w.whiten(x)) - x).max() < 1e-2*x.std()

def test_masks_hide_what_is_not_given():
    "What is neither wanted nor given has no influence"
    s = load_sampler(); f = torch.tensor([MODES['z']]).float(); wanted, given = part_masks(f)
    assert float(wanted.sum()) == 128 and float(given.sum()) == 0
    x = torch.randn(2, 208, generator=torch.Generator().manual_seed(0)); y = x.clone(); y[:, 128:] += 5
    with torch.no_grad(): assert torch.equal(s.net(x*wanted, torch.tensor([300]), f), s.net(y*wanted, torch.tensor([300]), f))

@pytest.mark.parametrize('levels', [2, 10])
def test_level_edges(levels):
    c = np.random.default_rng(0).uniform(-.3, .6, 20000); e = level_edges(c, levels)
    assert len(e) == levels+1 and e[0] == 1 and e[-1] == -1
    got = [((c >= lo) & (c < hi)).mean() for lo, hi in (level_interval(k, e) for k in range(levels))]
    assert np.allclose(got, 1/levels, atol=2e-3)

# ---- the transform

@pytest.mark.parametrize('level', [0, 4, 9])
def test_level_is_kept(level, held):
    z = held[0]; psi = LDS(level, steps=10); lo, hi = psi.interval
    c = z @ unit(psi.sampler.draw(500, 'z', Source(0, simulate=True), steps=10)['z']).T
    z = z[((c >= lo) & (c <= hi)).mean(1) > .02][:40]; assert len(z) == 40
    new = psi(z, **sim()); c = (z*new).sum(1); lo, hi = psi.interval
    assert new.dtype == np.float32 and np.allclose(np.linalg.norm(new, axis=1), 1,
                                                   atol=1e-5) and (c >= lo-1e-5).all() and (c <= hi+1e-5).all()

@pytest.mark.parametrize('level', [0, 5, 9])
def test_own_levels(level, held): # the tenths of each source: reached by everybody, also by a code that is like nobody's
    z = np.concatenate([held[0][:20], np.eye(128, dtype=np.float32)[:5]])
    psi = LDS(level, own=True, steps=10); lo, hi = psi.shells(z); c = (z*psi(z, **sim())).sum(1)
    assert (c >= lo[:, 0]-1e-5).all() and (c <= hi[:, 0]+1e-5).all() and np.ptp(lo) + np.ptp(hi) > .01
    seen = load_sampler().people('seen_z'); s = z @ seen.T
    assert np.allclose(((s >= lo) & (s < hi)).mean(1), .1, atol=.005)

@pytest.mark.parametrize('level', [0, 6, 9])
def test_own_shells_of_many(level, held): # in parts of 500: the same as one by one, and of the right shape for nobody
    z = np.concatenate([held[0], held[0]])[:1203]; psi = LDS(level, own=True)
    lo, hi = psi.shells(z); one = [psi.shells(z[i:i+1]) for i in (0, 499, 500, 1202)]
    assert lo.shape == hi.shape == (1203, 1) and np.allclose([(float(a[0, 0]), float(b[0, 0])) for a, b in one],
                                                             [(lo[i, 0], hi[i, 0]) for i in (0, 499, 500, 1202)],
                                                             atol=1e-6) and psi.shells(z[:0])[0].shape == (0, 1)
    c = z[:50] @ load_sampler().people('seen_z').T
    assert np.allclose(hi[:50, 0] if level else 1., np.quantile(c, 1 - level/10, axis=1) if level else 1., atol=1e-6)

def test_filter_is_not_idle(held): # without it most samples lie outside the shell: 40 of 40 inside has probability 1e-40
    z = held[0][:40]; lo, hi = LDS(9).interval; c = (z*LDS(None, steps=10)(z, **sim())).sum(1)
    assert ((c < lo) | (c > hi)).sum() > 20

def test_different_and_own_interval(held):
    z = held[0][:30]; tau = stored_threshold('sface'); psi = LDS(cosine='different', steps=10)
    assert psi.level is None and ((z*psi(z, **sim())).sum(1) <= tau + 1e-5).all()
    c = (z*LDS(cosine=(.1, .2), steps=10)(z, **sim())).sum(1); assert (c > .1-1e-5).all() and (c < .2+1e-5).all()

def test_seeds(held):
    z = held[0][:3]; psi = LDS(None, steps=5)
    assert np.array_equal(psi(z, **sim(3)), psi(z, **sim(3))) and not np.allclose(psi(z, **sim(3)), psi(z, **sim(4)))
    assert np.array_equal(psi(z, rng=torch.Generator().manual_seed(3), simulate=True), psi(z, **sim(3)))
    # seeds of the process play no part
    torch.manual_seed(0); np.random.seed(0); a = psi(z); torch.manual_seed(0)
    np.random.seed(0); assert not np.allclose(a, psi(z))
    with pytest.raises(ConfigError, match='rng'): psi(z, rng=3)
    with pytest.raises(ConfigError, match='rng'): psi.sample(2, rng=3)

def test_unfiltered_ignores_z(held): # epsilon = 0: same draw for any code
    psi = LDS(None, steps=5)
    assert np.array_equal(psi(held[0][:2], **sim()),
                          psi(held[0][2:4], **sim())) and psi.guarantee.epsilon == 0 and LDS(3).guarantee.epsilon is None and 'filter' in str(LDS(3).guarantee)

def test_shapes_and_empty(held):
    psi = LDS(None, steps=3); z = held[0]
    assert psi(z[0], **sim()).shape == (128,) and psi(z[:1], **sim()).shape == (1, 128) and psi.sample(0).shape == (0,
        128) and psi.sample_alpha(2).shape == (2, 80) and psi(z[:0]).shape == (0, 128)
    a, b = psi.person(z[0], **sim()); assert a.shape == (128,) and b.shape == (80,)
    a, b = psi.sample_joint(z=z[:4], **sim())
    assert np.allclose(a, z[:4], atol=1e-6) and b.shape == (4, 80)
    a, b = psi.sample_joint(alpha=held[1][:4], **sim()); assert a.shape == (4, 128) and np.array_equal(b, held[1][:4])

good = np.eye(128, dtype=np.float32)[:2]
@pytest.mark.parametrize('call, error, say', [
    (lambda: LDS(10), ConfigError, 'level'), (lambda: LDS(-1), ConfigError, 'level'), (lambda: LDS(1.5), ConfigError, 'level'), (lambda: LDS('far'), ConfigError, 'level'), (lambda: LDS(True), ConfigError, 'level'),
    (lambda: LDS(cosine=(.5, .1)), ConfigError, 'cosine'), (lambda: LDS(cosine='same'), ConfigError, 'cosine'), (lambda: LDS(cosine=(np.nan, 1)), ConfigError, 'cosine'), (lambda: LDS(cosine=.3), ConfigError, 'cosine'),
    (lambda: LDS(own='yes'), ConfigError, 'own'), (lambda: LDS(steps=0), ConfigError, 'steps'), (lambda: LDS(steps=1001), ConfigError, 'steps'), (lambda: LDS(eta=2), ConfigError, 'eta'), (lambda: LDS(tries=0), ConfigError, 'tries'), (lambda: LDS(path='/no/such'), AssetError, 'no/such'),
    (lambda: LDS()(2*good), InputError, 'z'), (lambda: LDS()(0*good), InputError, 'z'), (lambda: LDS()(np.nan*good), InputError, 'z'), (lambda: LDS()(good[:, :64]), InputError, 'z'), (lambda: LDS()('face'), InputError, 'z'),
    (lambda: LDS().sample(-1), ConfigError, 'n'), (lambda: LDS().sample(2.5), ConfigError, 'n'), (lambda: LDS().sample_joint(), ConfigError, 'sample_joint'), (lambda: LDS().sample_joint(2, z=good), ConfigError, 'sample_joint'),
    (lambda: LDS().sample_joint(z=2*good), InputError, 'z'), (lambda: LDS().sample_joint(alpha=np.zeros((2, 79))), InputError, 'alpha'), (lambda: LDS().sample_joint(alpha=np.full((2, 80), np.inf)), InputError, 'alpha'),
    (lambda: LDS(cosine=(.99, 1), tries=8, steps=2)(good), InputError, 'row 0')])
def test_bad_input(call, error, say):
    with pytest.raises(error) as e: call()
    assert say in str(e.value) and '\n' not in str(e.value)

def test_broken_weights(tmp_path):
    (tmp_path/'x.safetensors').write_bytes(b'no'); 
    with pytest.raises(AssetError, match='not the weights'): Sampler(tmp_path/'x.safetensors')

def test_save_and_load(tmp_path):
    net = denoiser(32, 1); w = {k: Whitening.fit(np.random.default_rng(0).normal(size=(300, d))) for k, d in PARTS.items()}
    s = Sampler(save_sampler(tmp_path/'s.safetensors', net, w, prediction='v_prediction', schedule='squaredcos_cap_v2'))
    u = s.standard(4000, 'joint', Source(0, simulate=True), steps=10)
    # an untrained network answers v = 0: the standard normal, once the loss of 10 steps is made good
    assert abs(float(u.std()) - 1) < .005 and abs(float(u.mean())) < .01

@pytest.mark.parametrize('steps, eta', [(10, 0.), (10, 1.), (25, .5), (50, 0.), (1000, 0.)])
def test_narrowing(steps, eta): # standard error of the standard deviation of 100,000 normals: .0022
    s, g = ddim_scheduler(), torch.Generator().manual_seed(0); n = 100_000 if steps < 1000 else 5_000
    end = ddim(lambda x, t: 0*x, torch.randn(n, generator=g), s, steps, eta, lambda shape: torch.randn(shape, generator=g))
    assert abs(float(end.std()) - narrowing(s, steps, eta)) < 5/math.sqrt(2*n)

def test_speed(): # the bar is 20 s on two free cores; CPU seconds, because cores are shared
    psi = LDS(None); psi.sample(10); t = time.process_time(); psi.sample(1000, **sim())
    spent = time.process_time() - t; print(f'{10*spent/2:.1f} s for 10,000 on two cores')
    assert spent < 4

# ---- are samples like people (the numbers of the manifest row, with the shipped weights; fixed seeds)

def test_measures_catch_broken_samplers(held): # shrunken, repeated, shuffled, memorised
    z, _ = held; r = np.random.default_rng(0)
    g = unit(r.multivariate_normal(z.mean(0), .5*np.cov(z.T), len(z)).astype(np.float32))
    assert T.two_sample_auc(g, z)[1] > .7 and T.mmd_test(g, z, 200)[1] < .01 and T.precision_recall(z, g)[1] < .5
    few = z[r.integers(20, size=len(z))] + 0; assert T.precision_recall(z[500:], few[:500])[1] < .4
    seen = load_sampler().people('seen_z')
    copied = unit(seen[:1000] + .01*r.normal(size=(1000, 128)).astype(np.float32))
    assert T.closer_than_strangers(T.nearest_cosine(copied, seen), T.nearest_cosine(z, seen))[1] < 1e-6

def test_nobody_is_memorised(sampler, held, drawn): # P(false alarm) < 1e-3
    seen = sampler.people('seen_z')
    assert T.closer_than_strangers(T.nearest_cosine(drawn[0], seen), T.nearest_cosine(held[0], seen))[1] > 1e-3

def test_code_and_shape_belong_together(held, drawn): # correlation of ridge and sampled shape, standard error below .01; fitted on one half of the held-out people
    z, a = held; z2, a2 = drawn; h = len(z)//2; f = T.fit_ridge(z[:h], a[:h])
    people, joint, shuffled = T.agreement(f(z[h:]), a[h:]), T.agreement(f(z2), a2), T.agreement(f(z2),
        np.random.default_rng(0).permutation(a2))
    assert people > .2 and joint > .8*people and abs(shuffled) < .03
    given = load_sampler().draw(len(z), 'alpha_of_z', Source(0, simulate=True), given=z)['alpha']
    assert T.agreement(f(z[h:]), given[h:]) > .8*people

# ---- the recipe

def test_read_people(tmp_path):
    z = unit(np.random.default_rng(0).normal(size=(5, 128)))
    for bad, say in ((dict(alpha=np.zeros((5, 80))), 'lacks code'), (dict(code=z, alpha=np.zeros((4, 80))), 'expected'),
                     (dict(code=3*z, alpha=np.zeros((5, 80))), 'unit')):
        np.savez(tmp_path/'t.npz', **bad)
        with pytest.raises(InputError, match=say): T.read_people(tmp_path/'t.npz')
    np.savez(tmp_path/'t.npz', code=z, alpha=np.ones((5, 80))); a, b = T.read_people(tmp_path/'t.npz')
    assert np.allclose(a, z, atol=1e-6) and b.dtype == np.float32
    with pytest.raises(InputError): T.read_people(tmp_path/'none.npz')

def test_resumed_training_is_the_same(tmp_path):
    x = np.random.default_rng(0).normal(size=(300, 208)).astype(np.float32)
    kw = dict(steps=6, batch=32, width=32, blocks=1, progress=False)
    T.train_network(x, tmp_path/'a', stop_after=1e-9, **kw)
    a, _ = T.train_network(x, tmp_path/'a', **kw); b, _ = T.train_network(x, tmp_path/'b', **kw)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))

def test_delong_interval_covers(): # 95 % interval in 300 trials: fewer than 270 hits has probability < 1e-3
    from scipy.stats import norm
    r = np.random.default_rng(0); truth = norm.cdf(1/math.sqrt(2))
    hits = sum(lo <= truth <= hi for _, lo, hi in (T.delong(r.normal(1, 1, 80), r.normal(size=60)) for _ in range(300)))
    assert 270 <= hits

def test_mmd_false_alarms(): # p < .05 in 60 trials: more than 9 has probability < 1e-3
    r = np.random.default_rng(0)
    assert sum(T.mmd_test(r.normal(size=(40, 5)), r.normal(size=(40, 5)), 99, k)[1] <= .05 for k in range(60)) <= 9
