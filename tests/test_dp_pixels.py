"DP-Pix and DP-SVD: exact samplers against closed forms, audits, broken mechanisms, guarantees"
import math, os
import numpy as np, pytest, cv2
from scipy import stats
from deidnb.core import Crop, Face, ConfigError
from deidnb.generate import dp_pixels as D
from deidnb.identity.bounds import epsilon_lower_bound
from deidnb.identity import noise as N

def low_bound(a, b): return epsilon_lower_bound(a, b, confidence=1-1e-4)
SEEDED = np.random.default_rng(11).bytes           # reproducible tests: the samplers take any source of bytes
PICTURE = cv2.GaussianBlur(np.random.default_rng(3).integers(0, 256, (256, 256, 3)).astype(np.uint8), (0, 0), 2)
POINTS = np.array([(95, 119), (161, 119), (127, 158), (99, 186), (154, 186)], np.float32)
def crop(p=PICTURE): return Crop(p, np.eye(3)[:2], Face((60, 46, 200, 238), POINTS))

@pytest.mark.parametrize('n', [1, 2, 3, 5, 64, 1000, 2**33 + 7, 3**38])
def test_uniform(n):
    u = N.uniform_below(n, 20000, SEEDED)
    assert u.min() >= 0 and u.max() < n
    if n > 1:
        assert stats.chisquare(np.bincount(u, minlength=n) if n <= 1000 else np.histogram(u/n, bins=10,
                range=(0, 1))[0]).pvalue > 1e-6

@pytest.mark.parametrize('n', [0, -1, 2**62])
def test_uniform_refuses(n):
    with pytest.raises(ConfigError): N.uniform_below(n, 1, os.urandom)

@pytest.mark.parametrize('a,b', [(0, 1), (1, 1), (1, 7), (6, 7), (13, 5), (9, 1), (2**40, 2**41)])
def test_coins(a, b):
    n, p = 40000, math.exp(-a/b); got = N.bernoulli_exp(np.full(n, a), b, SEEDED).mean()
    assert abs(got - p) <= 5*math.sqrt(p*(1-p)/n) + 1e-12

def test_coins_with_mixed_exponents():
    a = np.arange(12).repeat(20000); got = N.bernoulli_exp(a, 4, SEEDED).reshape(12, -1).mean(1); p = np.exp(-np.arange(12)/4)
    assert (np.abs(got - p) <= 5*np.sqrt(p*(1-p)/20000) + 1e-12).all()

@pytest.mark.parametrize('t,s', [(1, 1), (1, 3), (7, 2), (100, 1), (13005, 2), (255*16*65536, 65536//2)])
def test_discrete_laplace_probabilities(t, s):
    n = 40000; x = N.discrete_laplace(n, t, s, SEEDED); q = math.exp(-s/t)
    var = 2*q/(1-q)**2; assert abs(x.mean()) < 5*math.sqrt(var/n)
    assert abs((x == 0).mean() - (1-q)/(1+q)) < 5*math.sqrt((1-q)/(1+q)/n) + 1e-9
    cdf = lambda v: np.where(v < 0, q**(-v)/(1+q), 1 - q**(v+1)/(1+q))
    for v in np.round(np.array([-3, -1, -.3, .3, 1, 3])*t/s).astype(int):
        assert abs((x <= v).mean() - cdf(float(v))) < 5*math.sqrt(.25/n)

def test_discrete_laplace_equals_opendp():
    dp = pytest.importorskip('opendp.prelude'); dp.enable_features('contrib')
    m = dp.m.make_laplace(dp.atom_domain(T=int), dp.absolute_distance(T=int), scale=12.5)
    ours = N.discrete_laplace(4000, 25, 2, SEEDED); theirs = np.array([m(0) for _ in range(4000)])
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-5

@pytest.mark.parametrize('k', [1, 2, 3, 8, 16, 24])
def test_radial_noise(k):
    n, rate = (6000 if k < 16 else 200), 1/700
    x = N.discrete_radial(k, n, rate, SEEDED).astype(float); r = np.linalg.norm(x, axis=1)
    assert stats.kstest(r*rate, stats.gamma(k).cdf).pvalue > 1e-5
    u = x/np.maximum(r, 1e-9)[:, None]
    assert np.abs(u.mean(0)).max() < 5/math.sqrt(k*n) and np.abs(u.T@u/n - np.eye(k)/k).max() < 6/math.sqrt(n)/max(k, 2) + 2/700

def test_radial_noise_on_a_coarse_lattice():
    "closed form in two dimensions: every lattice point has weight exp(-rate |x|)"
    x = N.discrete_radial(2, 60000, .7, SEEDED); g = np.arange(-40, 41)
    w = np.exp(-.7*np.hypot(*np.meshgrid(g, g))); w /= w.sum()
    for p in ((0, 0), (1, 0), (0, -1), (1, 1), (2, -1), (-3, 0)):
        want = w[40+p[0], 40+p[1]]; assert abs((x == p).all(1).mean() - want) < 5*math.sqrt(want/60000)

def pair(b=4, m=4, n=40):
    cell = np.full((b*b, 3), 128, np.uint8); x, y = cell.copy(), cell.copy(); x[:m], y[:m] = 0, 255
    return [np.tile(z.reshape(b, b, 3), (n, n, 1)) for z in (x, y)]

def outputs(op, runs=20):
    return [np.concatenate([op.edit(x, 1., np.random.default_rng(5+r))[0][::4, ::4].astype(float).sum(-1).ravel()
                            for r in range(runs*i, runs*i+runs)]) for i, x in enumerate(pair())]

@pytest.mark.parametrize('eps', [.5, 1., 2.])
@pytest.mark.parametrize('colour', [False, True])
def test_dp_pix_keeps_its_epsilon(eps, colour):
    low = low_bound(*outputs(D.DPPix(epsilon=eps, m=4, cell=4, colour=colour, simulate=True)))
    assert low <= eps and (colour or low > .6*eps), 'a valid bound that the audit nearly reaches'

@pytest.mark.parametrize('wrong', ['half the noise', 'no noise', 'three channels, noise of one',
                                   'means rounded before the noise, noise of a mean of 8 x 8'])
def test_broken_mechanisms_are_caught(wrong):
    class Broken(D.DPPix):
        def edit(self, w, unit, rng):
            kw = dict(simulate=True, colour=False, m=self.m, cell=self.cell)
            if wrong == 'no noise': return D.DPPix(epsilon=1e4, **kw).edit(w, unit, rng)
            if wrong == 'half the noise': return D.DPPix(epsilon=2*self.epsilon, **kw).edit(w, unit, rng)
            if wrong.startswith('means'): return D.DPPix(epsilon=4*self.epsilon, **kw).edit(w, unit, rng)
            return np.concatenate([D.DPPix(epsilon=self.epsilon, **kw).edit(np.repeat(w[..., k:k+1], 3, -1), unit,
                        rng)[0][..., :1] for k in range(3)], -1), {}
    a, b = outputs(Broken(epsilon=1., m=4, cell=4))
    low = 99. if len(np.intersect1d(a, b)) == 0 else low_bound(a, b)
    assert low > 1.

def test_more_than_m_pixels_are_not_covered():
    "the guarantee is for m pixels: with twice as many the bound is exceeded, as it says"
    x, y = pair(m=8); op = D.DPPix(epsilon=1., m=4, cell=4, colour=False, simulate=True)
    outs = [np.concatenate([op.edit(z, 1., np.random.default_rng(r+50*i))[0][::4, ::4, 0].astype(float).ravel()
                            for r in range(8)]) for i, z in enumerate((x, y))]
    assert 1. < low_bound(*outs) <= 2.

def test_dp_svd_sampler_keeps_its_epsilon_and_half_noise_is_caught():
    def low(rate):
        a, b = (N.discrete_radial(3, 30000, rate, SEEDED)[:, 0].astype(float) for _ in range(2)); return low_bound(a, b + 900)
    assert .2 < low(1/600) <= 1.5 < low(1/200)

def test_noise_scale_of_dp_pix():
    op = D.DPPix(epsilon=20., m=2, cell=8, colour=False, simulate=True)
    y = op.edit(np.full((512, 512, 3), 128, np.uint8), 1., np.random.default_rng(0))[0][::8, ::8, 0].astype(float)
    b = 255*2/(64*20.); assert abs(np.abs(y - 128).mean() - _rounded_abs(b)) < .03
def _rounded_abs(b): x = np.random.default_rng(1).laplace(0, b, 400000); return np.abs(np.rint(x)).mean()

@pytest.mark.parametrize('cls', list(D.PRIVATE.values()))
def test_contract(cls):
    for p in (*cls.presets.values(), *cls.strength.values(), dict(region='oval'), dict(colour=False)):
        c = crop(); op = cls(**p); e = op(c, None, rng=None)
        assert e.image.shape == c.image.shape and e.image.dtype == np.uint8 and (c.image == PICTURE).all()
        x0, y0, x1, y1 = e.info['window']; out = np.ones((256, 256), bool); out[y0:y1, x0:x1] = False
        assert (e.image[out] == PICTURE[out]).all()
        import json; json.dumps(e.info)
        g = op.guarantee; assert g.epsilon == op.epsilon and g.valid and g.excludes and 'eps=' in str(g)

@pytest.mark.parametrize('cls', list(D.PRIVATE.values()))
def test_released_noise_ignores_seeds(cls):
    f = lambda s, **k: cls(**k)(crop(), None, rng=np.random.default_rng(s)).image
    assert (f(1) != f(1)).any() and (f(1, simulate=True) == f(1, simulate=True)).all() and (f(1, simulate=True) != f(2,
            simulate=True)).any()
    assert not cls(simulate=True).guarantee.valid
    with pytest.raises(ConfigError): cls(simulate=True)(crop(), None, rng=None)

@pytest.mark.parametrize('bad', [lambda: D.DPPix(epsilon=0), lambda: D.DPPix(epsilon=float('inf')), lambda: D.DPPix(m=0), lambda: D.DPPix(m=1.5), lambda: D.DPPix(cell=0),
                                 lambda: D.DPSVD(epsilon=-1), lambda: D.DPSVD(k=0), lambda: D.DPSVD(k=N.MAX_K+1), lambda: D.DPSVD(region='x')])
def test_wrong_configuration(bad):
    with pytest.raises(ConfigError): bad()

@pytest.mark.parametrize('h,w', [(1, 1), (3, 200), (200, 3), (31, 17)])
def test_odd_windows(h, w):
    x = np.random.default_rng(0).integers(0, 256, (h, w, 3)).astype(np.uint8)
    for op in (D.DPPix(cell=7), D.DPSVD(k=24), D.DPSVD(colour=False)): assert op.edit(x, 1., None)[0].shape == x.shape
    assert D.DPSVD(k=2).edit(np.zeros((20, 30, 3), np.uint8), 1.,
                             None)[0].max() == 0, 'an empty picture has no singular vectors to show'

def test_svd_without_noise_is_the_low_rank_picture():
    x = PICTURE[:120, :90]; y = D.DPSVD(k=5, epsilon=1e4).edit(x, 1., None)[0]
    U, S, Vt = np.linalg.svd(x.reshape(120, -1).astype(float), full_matrices=False)
    assert np.abs(y.reshape(120, -1) - np.clip((U[:, :5]*S[:5])@Vt[:5], 0, 255)).max() <= .6
