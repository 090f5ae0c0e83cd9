"""identity.bounds, identity.audit and identity.broken. Simulation seeds are fixed; beside every statistical test stands the probability that it fails
although all is well, if the seed were drawn anew (FAR: false-alarm rate)."""
import math
import numpy as np, pytest
from scipy import stats
from deidnb.core import ConfigError
from deidnb.identity import audit as A, bounds as B
from deidnb.identity.broken import BROKEN, DataDependentScale, ForgottenDimension, HalfNoise, OneNumber, Overclaim, ReusedDraw, TextbookLaplace
from deidnb.identity.dp import AnalyticGaussian, Exponential, Laplace, PrivUnit, PrivUnitG, VonMisesFisher

def laplace(dim=2, epsilon=1.): return Laplace(dim, epsilon, normalise=False)
def library(d): return np.r_[np.eye(d), -np.eye(d)]

# ---- counts and bounds
@pytest.mark.parametrize('k,n,lo,hi', [(90, 100, .82378, None), (10, 100, None, .17622), (0, 50, 0., 1-.025**(1/50)),
                                       (50, 50, .025**(1/50), 1.)])
def test_clopper_pearson(k, n, lo, hi):
    a, b = B.binomial_bounds(k, n, .025)
    assert (lo is None or abs(a-lo) < 5e-6) and (hi is None or abs(b-hi) < 5e-6)

def test_clopper_pearson_is_the_tail_of_the_binomial():
    for k, n in ((3, 17), (40, 90), (1, 1000)):
        lo, hi = B.binomial_bounds(k, n, .03)
        assert stats.binom.sf(k-1, n, lo) == pytest.approx(.03, abs=1e-9) and stats.binom.cdf(k, n,
            hi) == pytest.approx(.03, abs=1e-9)

def test_same_clopper_pearson_as_in_measure():
    from deidnb.measure.verification import clopper_pearson
    i = clopper_pearson(37, 120)
    assert B.binomial_bounds(37, 120, .025) == (pytest.approx(i.lo, abs=1e-12), pytest.approx(i.hi, abs=1e-12))

@pytest.mark.parametrize('n', [1, 10, 1000, 10**6])
@pytest.mark.parametrize('confidence', [.8, .95, .999])
def test_ceiling(n, confidence):
    r = ((1-confidence)/2)**(1/n)
    assert B.ceiling(n, confidence=confidence) == pytest.approx(max(0, math.log(r/(1-r))), abs=1e-6)
    assert float(B.epsilon_from_counts(n//2, n, n//3, n, confidence=confidence)) <= B.ceiling(n, confidence=confidence)

@pytest.mark.parametrize('eps', [.1, 1., 3., 9.])
def test_draws_needed_is_the_smallest_number(eps):
    n = B.draws_needed(eps)
    assert B.ceiling(n) >= eps > B.ceiling(n-1) if n > 1 else B.ceiling(n) >= eps

def test_bound_grows_with_evidence_and_falls_with_delta_and_confidence():
    f = lambda *a, **k: float(B.epsilon_from_counts(*a, **k))
    assert f(600, 1000, 200, 1000) < f(6000, 10000, 2000, 10000) < math.log(3)
    assert f(600, 1000, 200, 1000, delta=.1) < f(600, 1000, 200, 1000) and f(600, 1000, 200, 1000,
        confidence=.99) < f(600, 1000, 200, 1000) and f(5, 1000, 1, 1000, delta=.5) == 0

@pytest.mark.parametrize('eps,delta', [(.3, 0.), (1., 0.), (2., 0.), (1., .05)])
@pytest.mark.parametrize('confidence', [.9, .95])
def test_coverage_on_the_hardest_sound_mechanism(eps, delta, confidence):
    "randomised response, leaking with probability delta, is exactly (eps, delta)-private: alarms in at most 1-confidence of 3000 audits; FAR 1e-6 a case"
    g, n, q = np.random.default_rng(5), 800, (1-delta)/(1+math.exp(eps)); p = math.exp(eps)*q + delta
    alarms = (B.epsilon_from_counts(g.binomial(n, p, 3000), n, g.binomial(n, q, 3000), n, delta, confidence) > eps).sum()
    assert B.binomial_bounds(alarms, 3000, 1e-6)[0] <= 1-confidence

def test_coverage_with_chosen_threshold():
    "the whole chain on Laplace noise (truth 1): at most 5 % of 300 bounds above 1; FAR 1e-6"
    g = np.random.default_rng(6); z = g.laplace(size=(300, 2, 4000)); lows = [B.epsilon_lower_bound(a+1, b) for a, b in z]
    assert B.binomial_bounds(sum(v > 1 for v in lows), 300, 1e-6)[0] <= .05 and np.median(lows) > .7

def test_a_statistic_judged_on_its_training_draws_lies():
    "what the parts are for: a table of 144 cells finds epsilon > 0 in noise if it is asked about the draws it was made from; on fresh ones FAR 1e-6"
    g = np.random.default_rng(7); lies = honest = 0
    for _ in range(60):
        a, b, c, d = g.random((4, 1000, 2)); s = A.fit_histogram(a, b, np.zeros(2), np.eye(2)[0])
        lies += B.epsilon_lower_bound(s(a), s(b)) > 0; honest += B.epsilon_lower_bound(s(c), s(d)) > 0
    assert lies > 55 and B.binomial_bounds(honest, 60, 1e-6)[0] <= .05

@pytest.mark.parametrize('event', range(4))
def test_events_are_counted_as_chosen(event):
    a, b, t = np.array([1., 2, 3, 4]), np.array([3., 4, 5]), 3.
    assert B.count_event(a, b, (t, event)) == [(2, 4, 3, 3), (3, 3, 2, 4), (2, 4, 0, 3), (0, 3, 2, 4)][event]

@pytest.mark.parametrize('a,b', [(np.ones(400), np.zeros(400)), (np.zeros(400), np.ones(400))])
def test_perfect_separation_reaches_the_ceiling(a, b): assert B.epsilon_lower_bound(a, b) == B.ceiling(200)

# ---- one run
@pytest.mark.parametrize('m,r,v,delta,eps', [(1000, 1000, 600, 0, .29747), (1000, 1000, 1000, 1e-5, 5.78228),
                                             (1000, 100, 95, 1e-5, 2.16518), (1000, 1000, 500, 0, 0.),
                                             (1000, 0, 0, 0, 0.)])
def test_one_run_oracles(m, r, v, delta, eps): assert B.one_run_bound(m, r, v, delta) == pytest.approx(eps, abs=6e-6)

def test_one_run_p_value():
    assert B.one_run_p_value(10, 10, 10, 0.) == pytest.approx(2**-10) and B.one_run_p_value(10, 10, 0, 1.) == 1
    for m, r, v, e, d in ((60, 40, 33, .7, 1e-3), (20, 20, 20, 2., 1e-4), (9, 7, 1, .1, .01)):   # the sum of (5) written out
        q = 1/(1+math.exp(-e)); pmf = lambda j: math.comb(r, j)*q**j*(1-q)**(r-j) if 0 <= j <= r else 0.
        alpha = max(sum(pmf(j) for j in range(v-i, v))/i for i in range(1, m+1))
        want = sum(pmf(j) for j in range(v, r+1)) + 2*m*d*alpha
        assert B.one_run_p_value(m, r, v, e, d) == pytest.approx(min(1, want), rel=1e-9)

@pytest.mark.parametrize('eps', [.5, 2.])
def test_one_run_coverage(eps):
    "right guesses of randomised response: at most 5 % of 2000 bounds above eps; FAR 1e-6"
    v = np.random.default_rng(8).binomial(300, 1/(1+math.exp(-eps)), 2000)
    low = {k: B.one_run_bound(300, 300, k) for k in set(v.tolist())}
    assert B.binomial_bounds(sum(low[k] > eps for k in v.tolist()), 2000, 1e-6)[0] <= .05

def test_right_guesses():
    s, c = np.arange(10.), np.arange(10) >= 5
    assert A.right_guesses(s, c, 1.) == (10, 10) and A.right_guesses(-s, c, 1.) == (10, 0) and A.right_guesses(s, c, .2) == (2, 2)

# ---- Renyi
@pytest.mark.parametrize('order', [1.01, 1.5, 2, 8, 100])
@pytest.mark.parametrize('eps', [1e-3, .5, 5., 40.])
def test_renyi_inverse(order, eps):
    assert B.epsilon_of_renyi(B.renyi_of_epsilon(eps, order), order) == pytest.approx(eps, rel=1e-4)

def test_renyi_formula_by_randomised_response():
    p = np.array([.8, .2]); e = math.log(4)
    for k in (1.5, 2., 7.): assert B.renyi_of_epsilon(e, k) == pytest.approx(math.log((p**k*p[::-1]**(1-k)).sum())/(k-1))

def test_renyi_bound_holds_and_is_sharp_for_gaussians():
    "D_k(N(m, 1) | N(0, 1)) = k m^2/2; the statistic is the exact log-ratio; FAR < .05 a case (seed fixed), clipped far out"
    g, m = np.random.default_rng(9), .5; a, b = g.normal(size=(2, 200_000)); ratio = lambda x: m*x - m*m/2
    for k in (1.5, 2., 3.): d = B.renyi_divergence_bound(ratio(a+m), ratio(b), k, 1.5); assert .7*k*m*m/2 < d <= k*m*m/2

def test_renyi_of_equal_inputs_is_zero():
    g = np.random.default_rng(10); assert B.renyi_lower_bound(*g.normal(size=(2, 20_000))) < .05

# ---- statistics
def test_lowest_bit():
    x = np.random.default_rng(11).normal(size=200)*10.**np.random.default_rng(12).integers(-9, 9, 200); b = A.lowest_bit(x)
    for v, k in zip(x, b): n, d = float(v).as_integer_ratio(); assert k == (n & -n).bit_length() - 1 - (d.bit_length() - 1)
    assert A.lowest_bit(np.array([0.]))[0] == 9999

def test_rounding_hides_last_bits_and_keeps_sizes():
    x = np.random.default_rng(13).normal(size=1000); f = A.coarse(x)
    assert np.abs(f(x)-x).max() < 1e-3 and len(np.unique(f(x))) < 1000 and (f(x+1e-9) == f(x)).mean() > .99

@pytest.mark.parametrize('name', ['logistic', 'net', 'histogram', 'lattice'])
def test_statistics_are_fair_to_equal_inputs(name):
    "both 'neighbours' are the same distribution: the bound is 0 up to 5 %; FAR 1e-4 at confidence .9999"
    a, b = (A.draw(laplace(3), np.eye(3)[0], 6000, [14, i]) for i in range(2))
    s = A.statistics(laplace(3), *np.eye(3)[:2], a[:2000], b[:2000], (name,))[name]
    assert B.epsilon_lower_bound(s(a[2000:]), s(b[2000:]), confidence=.9999) == 0

def test_net_sees_what_is_not_linear():
    class Ring:
        dimension = 2
        def __call__(self, z, *, rng=None, simulate=False):
            g = np.random.default_rng(rng); x = g.normal(size=z.shape)
            return np.where((x[:, :1]*x[:, 1:] > 0) == (z[:, :1] > .5), x, x*[1, -1])
    net, logistic = (A.audit(Ring(), n=12_000, claim=1., attack=k, pairs=[np.eye(2)]) for k in ('net', 'logistic'))
    assert net.bound > 5 and not logistic.caught

# ---- mechanisms: the family-wise rate of a false accusation is 1e-3 in each of these tests
FAMILY = 1e-3
@pytest.mark.parametrize('seed', [0, 1])
def test_every_broken_mechanism_is_caught(seed):
    found = A.audit_all(BROKEN, alarm=FAMILY, seed=seed, n=16_000)
    assert {a.mechanism: a.caught for a in found} == {k: True for k in BROKEN}, found

@pytest.mark.parametrize('cls', [HalfNoise, ForgottenDimension, OneNumber, DataDependentScale])
@pytest.mark.parametrize('eps', [.5, 2.])
def test_broken_at_other_settings(cls, eps): assert A.audit(cls(3, eps), n=16_000, confidence=1-FAMILY).caught

HONEST = {f'{n} {e:g}': f(e) for e in (.5, 2., 5.) for n, f in {'laplace 2': lambda e: laplace(2, e), 'laplace 6': lambda e: laplace(6, e), 'laplace unit': lambda e: Laplace(3, e), 'gaussian': lambda e: AnalyticGaussian(4, e, delta=1e-4, normalise=False),
    'gaussian unit': lambda e: AnalyticGaussian(4, e, delta=1e-4), 'privunit': lambda e: PrivUnit(8, e), 'privunitg': lambda e: PrivUnitG(8, e), 'vmf': lambda e: VonMisesFisher(5, e), 'exponential': lambda e: Exponential(library(4), e)}.items()}
def test_no_honest_mechanism_is_accused():
    found = A.audit_all(HONEST, alarm=FAMILY, n=10_000, pilot=500); assert not [a for a in found if a.caught]
    with pytest.raises(ConfigError, match='alarm instead'): A.audit_all(HONEST, confidence=.9)
    assert all(a.confidence == 1-FAMILY/len(HONEST) for a in found)

@pytest.mark.parametrize('name,psi', [('laplace', laplace(2, 2.)), ('privunit', PrivUnit(8, 2.)), ('privunitg', PrivUnitG(8, 2.)), ('vmf', VonMisesFisher(3, 2.)),
                                      ('gaussian', AnalyticGaussian(4, 2., delta=.01))], ids=lambda x: x if isinstance(x, str) else '')
def test_half_the_noise_of_each(name, psi):
    "the same mechanism under half its epsilon (and a tenth of its delta) is refuted: the audit is sharp"
    a = A.audit(Overclaim(psi, psi.epsilon/2), n=60_000, delta=getattr(psi, 'delta', 0)/10, confidence=.99)
    assert a.caught and (a.delta > 0) == (name == 'gaussian'), a

def test_exponential_mechanism_under_its_exact_epsilon():
    "for a library that is symmetric about 0 the normalisers are equal and the largest log-ratio is epsilon/2: the claim is safe, half of that is refuted"
    psi = Exponential(library(2), 4.)
    truth = float(np.abs(psi.log_ratio(psi.library, [1., 0], [-1., 0])).max())
    a = A.audit(psi, confidence=.99)
    assert truth == pytest.approx(2., rel=1e-3) and .8*truth < a.bound <= truth and A.audit(Overclaim(psi, truth/2),
        confidence=.99).caught

@pytest.mark.parametrize('psi', [laplace(2), PrivUnit(4, 1.), AnalyticGaussian(2, 1., delta=1e-4, normalise=False),
                                 VonMisesFisher(3, 1.)], ids=repr)
def test_what_is_released_is_audited_too(psi):
    "no seed here: FAR 1e-6 for each"
    kw = dict(n=8000, pilot=400, simulate=False, confidence=1-1e-6)
    assert not A.audit(psi, **kw).caught and not A.audit(psi, attack='lattice', **kw).caught

def test_lattice_of_textbook_noise_is_a_matter_of_precision():
    class Float32(TextbookLaplace):
        def __call__(self, z, **kw): return super().__call__(z, **kw).astype(np.float32)
    assert A.audit(TextbookLaplace(2), attack='lattice', confidence=1-FAMILY).caught and not A.audit(TextbookLaplace(2),
        confidence=1-FAMILY).caught, 'the formula is right'
    assert A.audit(Float32(2), attack='lattice', confidence=1-FAMILY).bound < 1

def test_companions_find_the_reused_draw_and_nothing_else():
    kw = dict(n=3000, pilot=300, confidence=1-FAMILY)
    assert A.audit(ReusedDraw(4), companions=1, **kw).caught and not A.audit(laplace(4), companions=1, **kw).caught

def test_one_run_audit():
    kw = dict(m=3000, confidence=1-FAMILY)
    two = lambda p: {k: v for k, v in A.neighbour_pairs(p.dim).items() if k in ('diagonal antipodes', 'last axis antipodes')}
    for bad in (HalfNoise(2, 2.), ReusedDraw(4), ForgottenDimension(4), OneNumber(4), DataDependentScale()):
        assert A.audit_one_run(bad, pairs=two(bad), **kw).caught, bad
    for good in (laplace(2, 2.), laplace(4), PrivUnit(8, 2.), VonMisesFisher(4, 2.), AnalyticGaussian(4, 2., delta=1e-4)):
        assert not A.audit_one_run(good, pairs=two(good), **kw).caught, good
    assert A.audit_one_run(PrivUnit(8, 2.), **kw).bound > 1.5

def test_claim_by_distance_in_many_dimensions():
    claim = lambda m: lambda a, b: m.epsilon*np.abs(a-b).sum()/m.l1; kw = dict(n=12_000, pilot=600, confidence=1-FAMILY)
    for psi, bad in ((laplace(128, 4.), False), (HalfNoise(128, 4.), True)):
        assert A.audit(psi, claim=claim(psi), **kw).caught == bad
    assert not A.audit(HalfNoise(128, 4.), **kw).caught, 'which the audit of the worst case cannot see'

@pytest.mark.parametrize('kw', [dict(attack='histogram'), dict(tester='renyi'), dict(attack='histogram',
            tester='renyi'), dict(attack='net')], ids=str)
def test_other_testers(kw):
    assert A.audit(HalfNoise(2), confidence=1-FAMILY, **kw).caught and not A.audit(laplace(2), confidence=1-FAMILY, **kw).caught

@pytest.mark.parametrize('kw', [dict(), dict(attack='net'), dict(attack='histogram'), dict(tester='renyi')], ids=str)
def test_a_mechanism_that_ignores_its_input_shows_nothing(kw):
    "statistics overfit 250 draws, the bound does not: it is 0; FAR 1e-3 a case"
    class Blind:
        dimension = 6
        def __call__(self, z, *, rng=None, simulate=False): return np.random.default_rng(rng).normal(size=z.shape)
    a = A.audit(Blind(), n=1000, pilot=200, claim=.01, confidence=1-FAMILY, **kw); assert a.bound == 0 and not a.caught
    assert A.audit_one_run(Blind(), m=400, claim=.01, confidence=1-FAMILY, pairs=[np.eye(6)[:2]]).bound == 0

def test_a_lying_density_cannot_raise_a_bound():
    class Liar(Laplace):
        log_ratio = property(lambda self: lambda out, z0, z1: 1e3*np.sin(1e3*out[:, 0]))
    assert A.audit(Liar(2, 1., normalise=False), n=16_000, attack='density', confidence=1-FAMILY).bound < 1

# ---- the result and its arguments
def test_result():
    a = A.audit(HalfNoise(2), n=8000)
    assert 'CAUGHT' in repr(a) and a.verdict == 'CAUGHT' and a.row()['mechanism'] == 'HalfNoise(dim=2, epsilon=1)'
    k, n, l, m = a.counts
    assert n == m == a.n == 4000 and float(B.epsilon_from_counts(k, n, l, m)) == a.bound <= a.ceiling and a.seconds > 0
    assert A.audit(HalfNoise(2), n=8000).bound == a.bound != A.audit(HalfNoise(2), n=8000, seed=1).bound
    text = A.Audits([a, a])._repr_markdown_()
    assert len({l.count('|') for l in text.splitlines()}) == 1 and len(text.splitlines()) == 4

def test_verdicts():
    assert A.audit(laplace(2, 1e4), n=400).verdict.startswith('cannot tell') and A.audit(laplace(2, 2.),
        n=4000).verdict == 'not refuted'
    class Silent:
        dimension = 2
        def __call__(self, z, **kw): return z
    a = A.audit(Silent(), n=400); assert a.verdict == 'no claim' and a.bound == a.ceiling == B.ceiling(200) and not a.caught

@pytest.mark.parametrize('kw,word', [(dict(n=3), 'n must'), (dict(n=10.5), 'n must'), (dict(n=math.nan), 'n must'), (dict(pilot=2), 'pilot'), (dict(confidence=1.), 'confidence'), (dict(confidence='x'), 'confidence'), (dict(claim=-1.), 'claim'), (dict(claim=math.inf), 'claim'),
    (dict(delta=1.5), 'delta'), (dict(tester='x'), 'tester'), (dict(tester='renyi', delta=.1), 'delta'), (dict(attack='densty'), 'density'), (dict(pairs=[]), 'pairs'), (dict(pairs=[np.eye(3)]), 'pairs'), (dict(pairs=[np.full((2, 2), np.nan)]), 'pairs'), (dict(pairs={'same': np.ones((2, 2))}), 'same'), (dict(dim=0), 'dim'), (dict(seed='x'), 'seed'), (dict(companions=-1), 'companions')])
def test_bad_arguments(kw, word):
    with pytest.raises(ConfigError, match=word): A.audit(laplace(2), **dict(n=100, pilot=50) | kw)

def test_bad_mechanisms():
    for f, word in ((lambda: A.audit(3), 'psi'), (lambda: A.audit(lambda z, **k: z, n=100), 'dim'), (lambda: A.audit(lambda z, **k: z*np.nan, n=100, dim=2), 'psi'), (lambda: A.audit_one_run(lambda z, **k: z*np.nan, m=100, dim=2), 'psi'), (lambda: A.audit(lambda z, **k: z[:3], n=100, dim=2), 'psi'),
                    (lambda: A.audit_one_run(laplace(2), attack='x'), 'attack'), (lambda: A.audit(Laplace(2, 1.), n=100, attack='density'), 'attack'), (lambda: A.audit_one_run(Laplace(2, 1.), m=100, attack='density'), 'attack'), (lambda: A.audit_one_run(5), 'psi')):
        with pytest.raises(ConfigError, match=word): f()

@pytest.mark.parametrize('psi', [HalfNoise(2), ForgottenDimension(2), OneNumber(2), ReusedDraw(2), TextbookLaplace(2),
                                 DataDependentScale(2)], ids=repr)
def test_broken_mechanisms_are_for_simulations_only(psi):
    with pytest.raises(ConfigError, match='simulat'): psi(np.array([1., 0]))
    assert not psi.guarantee.valid and psi.mistake in psi.guarantee.because
    x = psi(np.eye(2), rng=4, simulate=True)
    assert (x == psi(np.eye(2), rng=4, simulate=True)).all() and (x != psi(np.eye(2), rng=5, simulate=True)).any()

def test_torch_generators_are_accepted():
    import torch
    assert (HalfNoise(2)(np.eye(2), rng=torch.Generator().manual_seed(4), simulate=True) == HalfNoise(2)(np.eye(2),
            rng=4, simulate=True)).all()

# -- chapter 4: attributes by a vote ------------------------------------------------------------------------------------
def test_the_vote_of_chapter_4_costs_what_all_choices_cost_and_not_one():
    "Two tables that differ in one row, the photo's fifth neighbour: the claim over all attributes holds (one-sided 95 %, fixed seeds), the one for a single choice does not"
    from deidnb.identity.attributes import DPKAnonymity
    c, k, e = 6, 5, .5; f = np.arange(1., 8)[:, None]; half = np.array([[1]*c, [1]*c, [0]*c, [0]*c])
    kw = dict(epsilon=e, k=k, ratio=1., names=tuple('abcdef'), conflicts=())
    tables = [DPKAnonymity(f, np.r_[half, [[v]*c], [[0]*c]*2], **kw) for v in (1, 0)]
    claim = tables[0].per_voter; assert claim == c*e
    # the number of attributes is the likelihood ratio
    a, b = (t(np.zeros((8000, 1)), rng=i, simulate=True).sum(1).astype(float) for i, t in enumerate(tables))
    assert e < B.epsilon_lower_bound(a, b) <= claim
