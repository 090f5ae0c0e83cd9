"""Private mechanisms on the sphere: oracles, guarantees, samplers, expected cosines, bad input, chapter 4.
Simulations have fixed seeds. Tests on released noise (which has no seed) fail by chance with a probability below 1e-6 each."""
import math, time
from functools import lru_cache
import numpy as np, pytest
from scipy import integrate, special, stats
from deidnb.core import ConfigError, InputError, DeidnbError
from deidnb.identity import noise as N, mechanism as M, dp, accounting as A, attributes as T

@lru_cache(64)
def codes(n, d, seed=0):
    z = np.random.default_rng(seed).normal(size=(n, d))
    return (z/np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
def projections(u, z): return np.einsum('ij,ij->i', u, z).astype(np.float64)
SPHERE = dict(PrivUnit=dp.PrivUnit, PrivUnitG=dp.PrivUnitG, VonMisesFisher=dp.VonMisesFisher, AnalyticGaussian=lambda d,
              e: dp.AnalyticGaussian(d, e, 1e-5))
ALL = dict(SPHERE, Laplace=dp.Laplace)
SEEDED = np.random.default_rng(5).bytes

# ---- noise
@pytest.mark.parametrize('sigma', [.4, 1., 3.7, 200., 2.**30])
def test_discrete_gaussian(sigma):
    n = 30000; x = N.discrete_gaussian(n, sigma, SEEDED).astype(float)
    if sigma < 10:
        g = np.arange(-40, 41); p = np.exp(-g**2/(2*sigma**2)); p /= p.sum()
        assert (np.abs(np.array([(x == v).mean() for v in g]) - p) < 5*np.sqrt(p*(1-p)/n) + 1e-4).all()
    assert abs(x.mean()) < 5*sigma/math.sqrt(n) + 1e-9 and (sigma < 3 or abs(x.var()/sigma**2 - 1) < 5*math.sqrt(2/n))

def test_choose_exp():
    l = np.log([.5, .3, .15, .05]); got = np.bincount(N.choose_exp(np.tile(l, (40000, 1)), SEEDED), minlength=4)
    assert stats.chisquare(got, 40000*np.exp(l)).pvalue > 1e-6
    rows = N.choose_exp([[0, -100.], [-100., 0]]*50, SEEDED); assert (rows.reshape(-1, 2) == [0, 1]).all()
    assert N.choose_exp(np.zeros((0, 3)), SEEDED).shape == (0,)

def test_lattice_normals():
    x = N.lattice_normals((40000,), SEEDED); assert (x == np.rint(x)).all() and stats.kstest(x/N.STEPS, 'norm').pvalue > 1e-6

# ---- oracles
@pytest.mark.parametrize('e,delta,sigma', [(1, 1e-5, 3.7306316), (.5, 1e-6, 8.0576185), (2, 1e-5, 1.9938124),
                                           (8, 1e-5, .6002291), (.1, 1e-3, 17.4043962)])
def test_gaussian_oracle(e, delta, sigma):
    assert abs(dp.gaussian_sigma(e, delta) - sigma) < 6e-8
    assert dp.gaussian_sigma(e, delta, 2.) == pytest.approx(2*dp.gaussian_sigma(e, delta))
    s = dp.gaussian_sigma(e, delta); p, q = stats.norm(0, s), stats.norm(1, s)   # second derivation: the hockey-stick divergence
    cut = .5 - e*s*s
    assert integrate.quad(lambda x: p.pdf(x) - math.exp(e)*q.pdf(x), -40*s, cut, limit=400,
                          points=[-s, -5*s])[0] == pytest.approx(delta, rel=1e-4)

def test_gaussian_delta_oracle():
    assert dp.gaussian_delta(1, 3.7306316) == pytest.approx(1e-5, rel=1e-6)
    assert dp.gaussian_delta(1, 1e3) < 1e-30 and dp.gaussian_sigma(1, 1e-5) < math.sqrt(2*math.log(1.25e5))

def test_accounting_oracles():
    pytest.importorskip('dp_accounting')
    assert A.subsampled_gaussian(1.5, .04, 2250, 1e-5, 'rdp') == pytest.approx(7.3293347, abs=1e-5)
    assert A.subsampled_gaussian(1.5, .04, 2250, 1e-5) == pytest.approx(6.768787, abs=1e-4)
    with pytest.raises(ConfigError, match='accountant'): A.subsampled_gaussian(1, 1, 1, 1e-5, 'x')

def test_normalising_constant():
    mpmath = pytest.importorskip('mpmath')
    for d in (2, 3, 16, 128, 512, 2048):
        for k in (1e-4, .1, 1., 20., 300., 4000.):
            h = mpmath.mpf(d)/2; ratio = mpmath.besseli(h, k)/mpmath.besseli(h-1, k)
            lg = mpmath.log(mpmath.hyp0f1(h, mpmath.mpf(k)**2/4))
            assert dp.mean_resultant(k, d) == pytest.approx(float(ratio), rel=1e-8) and dp.log_mgf(k,
                d) == pytest.approx(float(lg), rel=1e-9, abs=1e-12)

def test_cap_against_integration():
    mpmath = pytest.importorskip('mpmath')
    for d, s in ((2, .5), (3, .9), (16, .3), (128, .97), (128, .01), (512, 1e-3), (4096, .99)):
        f = lambda t: (1 - t**2)**((d-3)/mpmath.mpf(2)); g = mpmath.sqrt(1 - mpmath.mpf(s))
        total = mpmath.beta(mpmath.mpf(1)/2, (mpmath.mpf(d)-1)/2)
        share = mpmath.betainc((mpmath.mpf(d)-1)/2, mpmath.mpf(1)/2, 0, mpmath.mpf(s))/total/2
        assert dp.log_cap(s, d) == pytest.approx(float(mpmath.log(share)), rel=1e-9)
        assert dp.log_cap_mean(s,
                               d) == pytest.approx(float(mpmath.log(mpmath.mpf(s)**((mpmath.mpf(d)-1)/2)/((d-1)*total))),
                                                   rel=1e-9)

# ---- sensitivity
@pytest.mark.parametrize('d', [2, 3, 17, 128, 512])
def test_l1_diameter(d):
    z = codes(4000, d); assert np.abs(z[:2000] - z[2000:]).sum(1).max() <= dp.Laplace(d, 1).l1*(1 + 1e-6)
    c = np.sign(z)/math.sqrt(d); assert np.abs(2*c).sum(1).max() == pytest.approx(2*math.sqrt(d))

def test_printed_sensitivities():
    z = codes(50, 128); e = dp.Laplace(128, 1, 'empirical', z)
    assert e.l1 == pytest.approx(max(np.abs(a-b).sum() for a in z for b in z), rel=1e-5) and not e.guarantee.valid
    p = dp.Laplace(512, 1, 'paper512'); assert p.l1 == 512 and 'as printed' in p.guarantee.because
    assert dp.Laplace(128, 1).guarantee.valid and not dp.Laplace(128, 1, 10.).guarantee.valid
    with pytest.raises(ConfigError, match='codes'): dp.Laplace(8, 1, 'empirical')

# ---- guarantees: the density ratio
GRID = [(d, e) for d in (2, 3, 16, 128) for e in (.1, 1., 6., 50., 400.)]
@pytest.mark.parametrize('name', ['PrivUnit', 'PrivUnitG', 'VonMisesFisher', 'Laplace', 'Exponential'])
@pytest.mark.parametrize('d,e', GRID)
def test_density_ratio_is_bounded(name, d, e):
    lib = np.r_[codes(20, d, 9), -codes(20, d, 9)]
    psi = dp.Exponential(lib, e) if name == 'Exponential' else dp.Laplace(d, e,
        normalise=False) if name == 'Laplace' else ALL[name](d, e)
    z = codes(200, d, 1); corner = np.full((1, d), 1/math.sqrt(d)); worst = 0.
    for a, b in ((z, np.roll(z, 1, 0)), (z, -z), (np.repeat(corner, 200, 0), np.repeat(-corner, 200, 0))):
        outs = [psi(a, rng=1, simulate=True), psi(b, rng=2, simulate=True)] + ([] if name == 'Exponential'
            else [a, -a, b, codes(200, d, 3)])
        for u in outs: worst = max(worst, np.abs(psi.log_ratio(u, a, b)).max())
    if name == 'Exponential':
        for a in lib[:5]: worst = max(worst, np.abs(psi.log_ratio(lib, a[None], -a[None])).max())
    assert worst <= e*(1 + 1e-6)
    if name in ('PrivUnit', 'VonMisesFisher', 'Laplace'): assert worst >= e*(1 - 1e-4), 'the bound is reached'

def test_a_broken_mechanism_exceeds_its_bound():
    psi = dp.PrivUnit(64, 2.); psi.e0 += 1; z = codes(500, 64)
    assert np.abs(psi.log_ratio(psi(z, rng=0, simulate=True), z, -z)).max() > 2

@pytest.mark.parametrize('d,e', GRID)
def test_priv_unit_spends_exactly_epsilon_and_well(d, e):
    psi = dp.PrivUnit(d, e); a = math.exp(psi.log_share); total = psi.e0 + math.log1p(-a) - psi.log_share
    assert e*(1 - 2*M.MARGIN) < total < e
    best = max(psi.split(e, x)[1] for x in np.linspace(1e-6, psi.widest(e), 700)); assert psi.expected_cosine() >= best*(1 - 1e-4)
    for other in (dp.PrivUnitG, dp.VonMisesFisher, dp.Laplace):
        assert psi.expected_cosine() >= other(d, e).expected_cosine() - 1e-5, 'optimal among pure mechanisms'

# ---- samplers: projections against the integrated density
def cdf_of(psi):
    d, n = psi.dim, 1_000_001 if type(psi) is dp.PrivUnit else 6001 if isinstance(psi, dp.AnalyticGaussian) else 40001
    th = np.linspace(0, math.pi, n)[1:-1]; t = np.cos(th); z = np.zeros((1, d))
    z[0, 0] = 1
    base = (d-2)*np.log(np.sin(th))                                              # density of the angle of uniform directions
    if type(psi) is dp.PrivUnit:
        w = np.where(t >= psi.gamma, special.log_expit(psi.e0) - psi.log_share, special.log_expit(-psi.e0)
                     - math.log1p(-math.exp(psi.log_share)))
    elif isinstance(psi, dp.VonMisesFisher): w = psi.kappa*t
    elif isinstance(psi, dp.PrivUnitG): w = psi.log_density(t[:, None]*np.eye(1, d), z)
    else: w = psi.log_density(t)
    f = np.exp(base + w - (base + w).max()); F = (np.cumsum(f[::-1]) - f[::-1]/2)/f.sum()
    return lambda x: np.interp(x, t[::-1], F)

@pytest.mark.parametrize('name', list(SPHERE))
@pytest.mark.parametrize('d,e', [(3, 2.), (16, 6.), (16, 60.), (128, 1.), (128, 6.), (128, 300.)])
def test_simulated_projections(name, d, e): # fixed seed; the level 1e-4 is what a new seed would risk
    psi = SPHERE[name](d, e); z = codes(10000, d); u = psi(z, rng=7, simulate=True)
    assert stats.kstest(projections(u, z), cdf_of(psi)).pvalue > 1e-4

@pytest.mark.parametrize('name', list(SPHERE))
@pytest.mark.parametrize('d,e,n', [(3, 2., 2000), (32, 6., 500), (128, 7., 200), (128, 100., 800)])
def test_released_projections(name, d, e, n):
    psi = SPHERE[name](d, e); z = codes(n, d); u = psi(z); assert stats.kstest(projections(u, z), cdf_of(psi)).pvalue > 1e-6
    assert np.abs(np.linalg.norm(u, axis=1) - 1).max() < 1e-5 and u.dtype == np.float32

@pytest.mark.parametrize('name', list(SPHERE))
@pytest.mark.parametrize('simulate', [True, False])
def test_directions_are_uniform_around_the_code(name, simulate):
    d, n = 12, 3000; psi = SPHERE[name](d, 4.); z = np.tile(codes(1, d), (n, 1)).astype(np.float64)
    u = psi(z, **(dict(rng=3, simulate=True) if simulate else {})).astype(np.float64)
    w = u - projections(u, z)[:, None]*z; w /= np.linalg.norm(w, axis=1, keepdims=True); basis = np.linalg.svd(z[:1])[2][1:]
    for b in basis[:4]: assert stats.kstest(w@b, stats.beta((d-2)/2, (d-2)/2, loc=-1, scale=2).cdf).pvalue > 2e-7

@pytest.mark.parametrize('simulate', [True, False])
@pytest.mark.parametrize('e', [.5, 40.])
def test_raw_laplace(simulate, e):
    psi = dp.Laplace(32, e, normalise=False); z = codes(600, 32)
    y = psi(z, **(dict(rng=3, simulate=True) if simulate else {})).astype(np.float64)
    assert stats.kstest(((y - z)/psi.scale).ravel(), 'laplace').pvalue > 1e-6

def test_raw_gaussian():
    psi = dp.AnalyticGaussian(32, 5., 1e-5, normalise=False); z = codes(400, 32)
    assert stats.kstest(((psi(z) - z)/psi.sigma).ravel(), 'norm').pvalue > 1e-6

# ---- floating point
def test_released_laplace_and_gaussian_live_on_a_lattice():
    z = M.unit_codes(codes(20, 16)); s = M.Source()
    l, g = dp.Laplace(16, 3., normalise=False), dp.AnalyticGaussian(16, 3., normalise=False)
    for y in (l.released(z, s)*2**20, g.released(z, s)/g.step): assert (y == np.rint(y)).all()

@pytest.mark.parametrize('name', ['PrivUnit', 'PrivUnitG', 'VonMisesFisher'])
def test_what_can_come_out_does_not_depend_on_the_code(name):
    psi = SPHERE[name](24, 5.); assert psi.exact
    k = int(min(max(2*psi.tries, 8), max(2**18//24, 8))); z = M.unit_codes(codes(40, 24))
    class Fixed: # the same lattice points for everybody; other bytes (coins) from a second stream
        def __init__(self): self.points, self.coins = np.random.default_rng(0), np.random.default_rng(1)
        def bits(self, n): return (self.points if n == 8*24*k else self.coins).bytes(n)
    f = Fixed(); drawn = {r.tobytes() for _ in range(50) for r in M.normalised(N.lattice_normals((k, 24), f.bits))}
    u = np.concatenate([psi.released(row[None], Fixed()) for row in z])
    assert all(r.tobytes() in drawn for r in u), 'bit for bit a point that was drawn without looking'
    assert len({r.tobytes() for r in u}) > 1

def test_guarantee_says_when_it_is_not_exact():
    for f in (dp.PrivUnit, dp.PrivUnitG, dp.VonMisesFisher):
        a, b = f(128, 7.), f(128, 200.); assert a.exact and not b.exact
        assert 'exact coins' in a.guarantee.because and any('not proved' in x
                                                            for x in b.guarantee.excludes) and not any('not proved' in x
            for x in a.guarantee.excludes)

# ---- expected cosine: within 5 standard errors of 10,000 draws and 1e-5
@pytest.mark.parametrize('name', list(ALL))
@pytest.mark.parametrize('d,e', [(2, 1.), (3, 20.), (16, .1), (16, 6.), (128, 1.), (128, 7.), (128, 80.), (128, 1000.),
                                 (512, 30.)])
def test_expected_cosine(name, d, e):
    psi = ALL[name](d, e); z = codes(10000, d); c = projections(psi(z, rng=11, simulate=True), z); got = psi.expected_cosine()
    if name == 'Laplace':
        z = np.tile(codes(1, d, 4), (10000, 1)); c = projections(psi(z, rng=11, simulate=True), z)
        got = psi.expected_cosine(z[0])
    assert abs(c.mean() - got) < 5*c.std()/math.sqrt(len(c)) + 1e-5

def test_expected_cosine_grows_with_epsilon():
    for f in ALL.values():
        v = [f(64, e).expected_cosine() for e in (.01, .1, 1, 10, 100, 1000)]
        assert (np.diff(v) > 0).all() and 0 < v[0] and v[-1] <= 1

def test_laplace_direction_matters_little():
    psi = dp.Laplace(128, 50.); v = [psi.expected_cosine(z) for z in codes(10, 128)]
    assert np.ptp(v) < .01*np.mean(v) and abs(np.mean(v) - psi.expected_cosine()) < .01*np.mean(v)

# ---- exponential mechanism
@pytest.mark.parametrize('simulate', [True, False])
def test_exponential(simulate):
    lib = codes(8, 5, 2); psi = dp.Exponential(lib, 9.); z = np.tile(codes(1, 5), (4000, 1))
    u = psi(z, **(dict(rng=1, simulate=True) if simulate else {}))
    p = np.exp(psi.log_probability(z[:1]))[0]
    n = [(u == c).all(1).sum() for c in psi.library.astype(np.float32)]
    assert stats.chisquare(n, 4000*p).pvalue > 1e-6
    q = np.exp(9.*(1 - M.MARGIN)*(lib@z[0].astype(float))/4); assert p == pytest.approx(q/q.sum(), rel=1e-6)
    assert psi.expected_cosine(z[:1]) == pytest.approx(float(p@(lib@z[0])), rel=1e-5)

# ---- composition
def test_compose():
    pytest.importorskip('dp_accounting'); psi = dp.PrivUnit(16, .3)
    assert A.compose(psi, 1) == psi.guarantee and A.compose(psi, 4, delta=0).epsilon == pytest.approx(1.2)
    v = [A.compose(psi, n, 1e-6) for n in (2, 20, 200)]
    assert [g.releases for g in v] == [2, 20, 200] and all(g.epsilon <= n*.3 + 1e-9 for g, n in zip(v, (2, 20, 200)))
    # second derivation: randomised response with probability e^eps/(1+e^eps), 200 times, is the worst case
    e, n = v[2].epsilon, 200; k = np.arange(n+1); loss = (2*k - n)*.3; p = stats.binom(n, special.expit(.3)).pmf(k)
    assert (p*np.maximum(0, 1 - np.exp(e - loss))).sum() <= 1e-6 and (p*np.maximum(0, 1 - np.exp(e*.98 - loss))).sum() > 1e-6
    g = dp.AnalyticGaussian(16, 1., 1e-6); many = A.compose(g, 50, 1e-5)
    assert many.epsilon < 50 and dp.gaussian_delta(many.epsilon, g.sigma/math.sqrt(50), g.l2) <= 1e-5
    with pytest.raises(ConfigError, match='delta'): A.compose(g.guarantee, 10, 1e-9)
    with pytest.raises(ConfigError, match='releases'): A.compose(psi, 0)
    assert not A.compose(dp.Laplace(16, .1, 1.), 3).valid

def test_subsampling():
    for e in (.01, 1., 20.):
        for q in (.01, .3):
            assert A.subsampled(e, q)[0] == pytest.approx(math.log(1 + q*(math.exp(e) - 1)))
            assert A.subsampled(e, q)[0] < e
    assert A.subsampled(2., 1.)[0] == pytest.approx(2.) and A.subsampled(1., 0.) == (0., 0.) and A.subsampled(1000.,
        .1)[0] == pytest.approx(1000 + math.log(.1)) and A.subsampled(1., .5, 1e-5)[1] == 5e-6

# ---- the shared interface
@pytest.mark.parametrize('name', list(ALL))
def test_interface(name):
    psi = ALL[name](16, 3.); z = codes(4, 16)
    assert psi(z).shape == (4, 16) and psi(z[0]).shape == (16,) and psi(z[:0]).shape == (0,
        16) and psi(z).dtype == np.float32 and psi.dimension == 16
    import torch
    a = psi(z, rng=5, simulate=True)
    assert (a == psi(z, rng=5, simulate=True)).all() and (a == psi(z, rng=torch.Generator().manual_seed(5),
            simulate=True)).all() and (a != psi(z, rng=6, simulate=True)).any()
    assert (psi(z) != psi(z)).any() and (psi(z, simulate=True) != psi(z, simulate=True)).any()
    g = psi.guarantee
    assert g.epsilon == 3. and g.valid and g.protects == 'the identity code' and 'any two' in g.neighbours and any('picture' in x
        for x in g.excludes) and (g.delta > 0) == (name == 'AnalyticGaussian')
    before = z.copy(); psi(z); assert (z == before).all()

@pytest.mark.parametrize('name', list(ALL))
@pytest.mark.parametrize('d', [2, 3, 128, 1024])
@pytest.mark.parametrize('e', [1e-3, 1e6])
def test_extreme_epsilon(name, d, e):
    if name == 'AnalyticGaussian' and d == 1024 and e < 1: e = .01
    psi = ALL[name](d, e); z = codes(3, d)
    for u in (psi(z), psi(z, rng=0, simulate=True)):
        assert np.isfinite(u).all() and np.abs(np.linalg.norm(u, axis=1) - 1).max() < 1e-5
    c = psi.expected_cosine(); assert (c > .99 if e > 1 else -1e-9 < c < .01) and c <= 1 + 1e-9
    if e > 1: assert projections(psi(z), z).min() > .9

BAD_CODES = [np.zeros(8), 2*codes(1, 8), codes(1, 8)*np.nan, np.r_[np.inf, np.zeros(7)], codes(1, 7),
             np.zeros((2, 2, 8)), 'face', [['a']*8], None, [[1, 0], [1]]]
@pytest.mark.parametrize('name', list(ALL) + ['Exponential'])
@pytest.mark.parametrize('z', BAD_CODES, ids=range(len(BAD_CODES)))
def test_bad_codes(name, z):
    psi = dp.Exponential(codes(5, 8), 1.) if name == 'Exponential' else ALL[name](8, 1.)
    with pytest.raises(InputError, match='^z: .*[.] [A-Z]'): psi(z)

@pytest.mark.parametrize('make', [dp.Laplace, dp.AnalyticGaussian, dp.PrivUnit, dp.PrivUnitG, dp.VonMisesFisher,
                                  lambda d, e: dp.Exponential(codes(5, 8), e)])
@pytest.mark.parametrize('e', [0, -1, math.inf, -math.inf, math.nan, 'much', [1, 2]])
def test_bad_epsilon(make, e):
    with pytest.raises(ConfigError, match='epsilon must be a finite number'): make(8, e)

@pytest.mark.parametrize('make,word', [(lambda: dp.PrivUnit(1, 1), 'dim'), (lambda: dp.PrivUnit(8.5, 1), 'dim'), (lambda: dp.PrivUnit(math.nan, 1), 'dim'), (lambda: dp.AnalyticGaussian(8, 1, 0), 'delta'), (lambda: dp.AnalyticGaussian(8, 1, math.nan), 'delta'),
    (lambda: dp.Laplace(8, 1, -3.), 'sensitivity'), (lambda: dp.Laplace(8, 1, 'l2'), 'sensitivity'), (lambda: dp.VonMisesFisher(8), 'epsilon or kappa'), (lambda: dp.VonMisesFisher(8, 1., kappa=1.), 'epsilon or kappa'), (lambda: dp.VonMisesFisher(8, kappa=-1), 'kappa'),
    (lambda: dp.Exponential(codes(1, 8), 1), 'library'), (lambda: dp.Exponential(np.zeros((4, 8)), 1), 'library'), (lambda: dp.PrivUnit(8, 1)(codes(1, 8), rng=1), 'simulate=True'), (lambda: dp.PrivUnit(8, 1)(codes(1, 8), rng='x', simulate=True), 'rng'), (lambda: A.subsampled(1, 2), 'ratio')])
def test_bad_arguments(make, word):
    with pytest.raises(DeidnbError, match=word): make()

@pytest.mark.parametrize('name', ['PrivUnit', 'VonMisesFisher'])
def test_speed(name): # processor time of two cores, so that a busy machine does not matter
    psi, z = SPHERE[name](128, 6.), codes(100_000, 128); psi(z[:10], rng=0, simulate=True); took = []
    for _ in range(3): start = time.process_time(); psi(z, rng=0, simulate=True); took.append(time.process_time() - start)
    assert min(took)/2 < 2

# ---- chapter 4
def table(n=3000, c=13, seed=0):
    r = np.random.default_rng(seed); a = r.random((n, c)) < .5
    for g in T.CONFLICTS:
        ix = [T.ATTRIBUTES.index(k) for k in g]
        a[:, ix] = np.arange(len(ix)) == r.integers(0, len(ix), n)[:, None]
    return r.normal(size=(n, 6)), a

def test_tau():
    v = np.random.default_rng(0).integers(0, 2, (500, 13)); out = T.tau_votes(v, 2.5); assert out.sum(1).max() <= 2.5 + 1e-12
    few = v.sum(1) <= 2; assert (out[few] == v[few]).all() and np.abs(out[:250] - out[250:]).sum(1).max() <= 5 + 1e-9

def test_vote_is_the_k_nearest_of_the_sample():
    f, a = table(); psi = T.DPKAnonymity(f, a, .1, k=7, ratio=1.); x = f[5] + .01
    near = np.argsort(np.linalg.norm(f - x, axis=1))[:7]
    assert (psi.vote(x, M.Source(1, simulate=True)) == a[near].sum(0)).all()
    sizes = [(M.Source(s, simulate=True).uniform(3000) < .05).sum() for s in range(300)]
    assert abs(np.mean(sizes) - 150) < 5*math.sqrt(3000*.05*.95/300)

@pytest.mark.parametrize('e,k,dq', [(.05, 100, 1.), (1., 10, 1.), (.3, 20, 4.)])
def test_equations_4_5_and_4_6(e, k, dq):
    f, a = table(); psi = T.DPKAnonymity(f, a, e, k=k, sensitivity=dq)
    v = np.random.default_rng(1).integers(0, k, 13).astype(float); p = psi.probabilities(v)
    e = e*(1 - M.MARGIN); x = np.exp(e*v/(2*dq))
    single = [i for i in range(13) if i not in (2, 3, 4, 9, 10)]
    assert p[single] == pytest.approx((x/(x + np.exp(e*(k - v)/(2*dq))))[single]) and p[[2, 3,
            4]] == pytest.approx(x[[2, 3, 4]]/x[[2, 3, 4]].sum()) and p[[9, 10]] == pytest.approx(x[[9, 10]]/x[[9,
                10]].sum())

def test_draws_follow_the_probabilities():
    f, a = table(); psi = T.DPKAnonymity(f, a, .1, k=50); s = M.Source(4, simulate=True)
    v = psi.vote(f[0], s); o = np.array([psi.draw(v, s) for _ in range(1500)])
    p = psi.probabilities(v)
    assert (np.abs(o.mean(0) - p) < 5*np.sqrt(p*(1-p)/1500) + 1e-9).all() and (o[:, 2:5].sum(1) == 1).all() and (o[:,
            9:11].sum(1) == 1).all()

def log_p(psi, votes, o):
    "log P[O = o | votes], from the definition"
    p = psi.probabilities(votes); grouped = [i for g in psi.groups for i in g]
    return sum(math.log(p[i] if o[i] else 1-p[i]) for i in range(len(o)) if i not in grouped) + sum(math.log(p[i])
        for g in psi.groups for i in g if o[i])

@pytest.mark.parametrize('tau', [None, 1., 3.])
def test_chapter_4_guarantees_bound_the_likelihood_ratio(tau):
    f, a = table(); k, r = 10, np.random.default_rng(3); psi = T.DPKAnonymity(f, a, .2, k=k, tau=tau)
    lim = (lambda v: v) if tau is None else (lambda v: T.tau_votes(v, tau))
    worst = [0, 0]
    extreme = np.zeros((2, 13), bool); extreme[0, [0, 1, 5, 6, 7, 8, 11, 12, 2, 9]] = 1; extreme[1, [3, 10]] = 1
    for trial in range(300):
        rows = a[r.integers(0, len(a), k)].astype(float); other = rows.copy()
        other[0] = a[r.integers(0, len(a))]; far = a[r.integers(0, len(a), k)].astype(float)
        if trial % 3 == 0: rows[0], other[0] = extreme
        if trial % 3 == 1: rows[:], other[:], far[:] = extreme[0], extreme[0], extreme[1]; other[0] = extreme[1]
        o = psi.draw(lim(rows).sum(0), M.Source(trial, simulate=True)) if trial % 2 else extreme[trial//2 % 2]
        for i, b in enumerate((other, far)):
            worst[i] = max(worst[i], abs(log_p(psi, lim(rows).sum(0), o) - log_p(psi, lim(b).sum(0), o)))
    assert worst[0] <= psi.per_voter and worst[1] <= psi.guarantee.epsilon and worst[0] > .3*psi.per_voter and worst[1] > .3*psi.guarantee.epsilon
    assert psi.table_guarantee.epsilon == pytest.approx(math.log1p(.05*math.expm1(psi.per_voter))) and psi.per_voter == pytest.approx(.2*(10
            if tau is None else min(10, 2*tau)))

def test_algorithm_1():
    f, a = table(); psi = T.DPKAnonymity(f, a, .5, k=40); o = psi(f[:20])
    assert o.shape == (20, 13) and o.dtype == bool and psi(f[0]).shape == (13,) and psi(f[:0]).shape == (0, 13)
    strong, weak = (np.mean([T.attribute_accuracy(p(f[i], rng=i, simulate=True),
                                                  p.average(p.vote(f[i], M.Source(i, simulate=True))))
                             for i in range(60)]) for p in (T.DPKAnonymity(f, a, e, k=41) for e in (50., .001)))
    assert strong > .95  and abs(weak - (8*.5 + 3*(1/3*1 + 2/3*1/3) + 2*.5)/13) < .08  # eps -> 0: coins, and one of a group
    assert T.attribute_accuracy([[1, 0], [1, 1]], [[1, 1], [1, 1]]) == .75

@pytest.mark.parametrize('change,word', [(dict(epsilon=0), 'epsilon'), (dict(epsilon=math.nan), 'epsilon'), (dict(k=0), 'k must'), (dict(k=10**6), 'k must'), (dict(k=200, ratio=.01), 'fewer than k'), (dict(ratio=0), 'ratio'), (dict(ratio=1.5), 'ratio'), (dict(tau=-1), 'tau'),
    (dict(sensitivity=0), 'sensitivity'), (dict(attributes=np.full((3000, 13), 2)), '0 or 1'), (dict(attributes=np.zeros((3, 13))), 'shape'), (dict(features=np.full((3000, 6), np.nan)), 'finite'), (dict(conflicts=(('Bald', 'Yung'),)), 'Young'), (dict(conflicts=(('Bald', 'Male'), ('Male', 'Young'))), 'overlap')])
def test_chapter_4_bad_input(change, word):
    f, a = table(); keep = dict(features=f, attributes=a, epsilon=.1, k=20); keep.update(change)
    with pytest.raises(DeidnbError, match=word): T.DPKAnonymity(**keep)
    with pytest.raises(InputError, match='dimension 6'): T.DPKAnonymity(f, a, .1, k=20)(f[:, :2])
