"Closed forms, second derivations and statistics for deidnb.measure.verification and calibration"
import numpy as np, pytest
from scipy import stats
from deidnb.core import ConfigError, InputError
from deidnb.measure import verification as V

SAME = np.tile(np.repeat([True, False], 300), 5)
def scores(rng, d=5., n=SAME): return np.where(n, d, 0) + rng.normal(size=len(n))
def people(rng):
    a, b = rng.integers(0, 400, 3000), rng.integers(400, 800, 3000)
    return np.where(SAME[:, None], np.stack([a, a], 1), np.stack([a, b], 1))

# --- pairs ---------------------------------------------------------------------------------------------
def write(tmp_path, text): f = tmp_path/'pairs.txt'; f.write_text(text, encoding='utf-8'); return f

def test_pairs_order_folds_and_unicode(tmp_path):
    p = V.lfw_pairs(write(tmp_path, '2\t1\nZoë\t1\t2\nZoë\t1\tBob\t13\nBob\t1\t3\nZoë\t2\tCy\t1\n').parent)
    assert p.first == ['Zoë/Zoë_0001.jpg']*2 + ['Bob/Bob_0001.jpg', 'Zoë/Zoë_0002.jpg'] and p.second[1] == 'Bob/Bob_0013.jpg'
    assert p.fold.tolist() == [0,0,1,1] and len(p) == 4

@pytest.mark.parametrize('text', ['', 'x y\n', '2 1\nA 1 2\n', '1 1\nA 1 B 2\nA 1 2\n', '1 1\nA 1 2\nA 1 B\n',
                                  '1 1\nA one 2\nA 1 B 2\n', '1 1\nA 1 2\nA 1 B 2\nA 1 B 3\n'])
def test_bad_pairs_are_one_line_errors(tmp_path, text):
    with pytest.raises(InputError) as e: V.lfw_pairs(write(tmp_path, text))
    assert '\n' not in str(e.value) and 'pairs.txt' in str(e.value)

def test_missing_pairs(tmp_path):
    with pytest.raises(InputError): V.lfw_pairs(tmp_path)

# --- accuracy ------------------------------------------------------------------------------------------
def naive_accuracy(s, y, k):
    out = []
    for f in np.unique(k):
        tr = k != f; grid = np.arange(0, 4, .01); d = 2-2*s
        acc = [((d[tr] < t) == y[tr]).mean() for t in grid]; t = grid[int(np.argmax(acc))]
        out.append(((d[~tr] < t) == y[~tr]).mean())
    return np.array(out)

@pytest.mark.parametrize('seed', range(4))
def test_reference_grid_equals_the_reference_loop(seed):
    r = np.random.default_rng(seed)
    s = np.clip(np.where(SAME, .55, .05) + r.normal(0, .15, 3000), -1, 1); k = np.arange(3000)//600
    assert np.allclose(V.kfold_accuracy(s, SAME, k, 'reference')[0], naive_accuracy(s, SAME, k))
    assert np.allclose(V.kfold_accuracy(s, SAME, 5, 'reference')[0], naive_accuracy(s, SAME, k))

@pytest.mark.parametrize('d', [1., 2., 3., 6.])
def test_accuracy_meets_the_normal_closed_form(d):
    r = np.random.default_rng(7); same = np.tile(np.repeat([True, False], 2000), 5)
    acc, t = V.kfold_accuracy(scores(r, d, same), same, 5)
    assert abs(acc.mean() - stats.norm.cdf(d/2)) < 4*np.sqrt(.25/20000) + .002 and np.abs(t-d/2).max() < .5

def test_perfect_and_blind():
    r = np.random.default_rng(0)
    for st in (None, 'reference'):
        assert V.kfold_accuracy(np.where(SAME, .8, .1), SAME, 5, st)[0].min() == 1
        assert abs(V.kfold_accuracy(r.normal(0,.2,3000), SAME, 5, st)[0].mean() - .5) < .04
    val, far = V.val_at_far(np.where(SAME, .8, .1), SAME, 5); assert val.min() == 1
    val, far = V.val_at_far(r.normal(size=3000), SAME, 5, .05); assert abs(val.mean()-far.mean()) < .03

def test_best_threshold_counts_every_cut():
    r = np.random.default_rng(3); s, y = r.integers(0, 6, 40).astype(float), r.random(40) < .5
    best = max(((s >= t) == y).sum() for t in np.r_[np.unique(s), 99]); assert ((s >= V.best_threshold(s, y)) == y).sum() == best

# --- thresholds ----------------------------------------------------------------------------------------
@pytest.mark.parametrize('n', [10, 100, 999, 1000, 1500, 5000])
@pytest.mark.parametrize('fpr', [.3, .1, .01, .001])
@pytest.mark.parametrize('ties', [False, True])
def test_threshold_is_the_lowest_allowed(n, fpr, ties):
    r = np.random.default_rng(n); s = np.round(r.normal(size=n), 1 if ties else 9)
    if n*fpr < 1:
        with pytest.raises(ConfigError): V.threshold_at_fpr(s, fpr)
        return
    t = V.threshold_at_fpr(s, fpr); assert (s >= t).mean() <= fpr
    lower = s[s < t]; assert len(lower) == 0 or (s >= lower.max()).mean() > fpr

def test_float32_scores_keep_the_promise():
    s = np.random.default_rng(0).normal(size=5000).astype(np.float32); assert (s >= V.threshold_at_fpr(s, 1e-3)).sum() == 5

@pytest.mark.parametrize('fpr', [0, 1, -1, 2])
def test_bad_rates(fpr):
    with pytest.raises(ConfigError): V.threshold_at_fpr(np.zeros(10), fpr)

def test_no_rate_at_1e4_on_official_pairs():
    r = np.random.default_rng(0)
    for n in (1500, 3000):
        with pytest.raises(ConfigError, match='cannot support'): V.tpr_at_fpr(r.normal(size=n), r.normal(size=n), 1e-4)

def test_nan_and_empty_are_refused():
    for g, i in (([1, np.nan], [0]), ([1], [np.nan]), ([], [1]), ([1], [])):
        for f in (V.roc, V.auc, V.eer):
            with pytest.raises(InputError): f(g, i)

# --- curve ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize('seed', range(3))
def test_auc_is_the_pairwise_count_and_the_area(seed):
    r = np.random.default_rng(seed); g, i = r.integers(0, 20, 80), r.integers(-5, 15, 60)
    count = (g[:,None] > i).mean() + .5*(g[:,None] == i).mean(); f, t, _ = V.roc(g, i)
    assert np.isclose(V.auc(g, i), count) and np.isclose(np.trapezoid(t, f), count) and np.isclose(V.auc(-np.array(i),
            -np.array(g)), count)

@pytest.mark.parametrize('d', [0., 1., 2., 4.])
def test_eer_and_auc_of_normals(d):
    r = np.random.default_rng(1); g, i = r.normal(d, 1, 100000), r.normal(0, 1, 100000)
    assert abs(V.eer(g, i) - stats.norm.sf(d/2)) < .006 and abs(V.auc(g, i) - stats.norm.cdf(d/2**.5)) < .006

# --- retrieval and documents' measures ----------------------------------------------------------------
@pytest.mark.parametrize('kind', ['cosine', 'euclidean'])
def test_rank1_against_brute_force(kind):
    r = np.random.default_rng(0); G, P = r.normal(size=(50,6)), r.normal(size=(70,6))
    gi, pi = r.integers(0,5,50), r.integers(0,5,70)
    c = lambda a, b: a@b/np.linalg.norm(a)/np.linalg.norm(b) if kind == 'cosine' else -np.linalg.norm(a-b)
    want = [gi[np.argmax([c(g, p) for g in G])] == q for p, q in zip(P, pi)]
    assert V.rank1(G, P, gi, pi, kind, chunk=16).tolist() == want

def test_success_rate_boundary_and_nan():
    assert V.success_rate([.59, .6, .61], .6) == 1/3
    for bad in ([np.nan], []):
        with pytest.raises(InputError): V.success_rate(bad, .6)
    with pytest.raises(ConfigError): V.identity_distance([[1.]], [[1.]], 'l1')

# --- intervals -----------------------------------------------------------------------------------------
@pytest.mark.parametrize('k, n, lo, hi', [(90, 100, .82378, None), (10, 100, None, .17622)])
def test_clopper_pearson_recorded(k, n, lo, hi):
    i = V.clopper_pearson(k, n); assert (lo is None or abs(i.lo-lo) < 5e-6) and (hi is None or abs(i.hi-hi) < 5e-6)

@pytest.mark.parametrize('k, n', [(0, 1), (0, 30), (1, 30), (15, 30), (30, 30)])
def test_intervals_by_definition(k, n):
    e, w = V.clopper_pearson(k, n), V.wilson(k, n)
    if k: assert np.isclose(stats.binom.sf(k-1, n, e.lo), .025)
    if k < n: assert np.isclose(stats.binom.cdf(k, n, e.hi), .025)
    for p in (w.lo, w.hi): # Wilson: |p - k/n| = z sqrt(p(1-p)/n)
        assert np.isclose(abs(p-k/n), stats.norm.isf(.025)*np.sqrt(p*(1-p)/n), atol=1e-9)

def test_bootstrap_covers_by_person():
    "95 % intervals of a mean of clustered data; 200 worlds, fails with probability < 1e-6 if coverage is at least .9"
    hit = 0
    for k in range(200):
        r = np.random.default_rng(k); who = np.repeat(np.arange(40), 5); x = r.normal(size=40)[who] + r.normal(0, .1, 200)
        i = V.bootstrap(np.mean, x, who, 200, r); hit += i.lo <= 0 <= i.hi
    assert hit >= stats.binom.ppf(1e-6, 200, .9)

def test_bootstrap_by_row_is_caught():
    "The broken version, rows taken for people, must not cover"
    hit = 0
    for k in range(100):
        r = np.random.default_rng(k); x = np.repeat(r.normal(size=20), 20)
        i = V.bootstrap(np.mean, x, np.arange(400), 100, r); hit += i.lo <= 0 <= i.hi
    assert hit < 70

def test_bootstrap_pairs_and_lengths():
    r = np.random.default_rng(0); who = people(r); s = scores(r)
    i = V.bootstrap(lambda s, y: V.auc(s[y], s[~y]), (s, SAME), who, 50); assert i.lo <= i.value <= i.hi
    with pytest.raises(InputError): V.bootstrap(np.mean, np.zeros(3), np.zeros(4))

def test_person_weights_repeat_pairs_by_both_people():
    class Fixed:
        def integers(self, *a): return np.array([0, 0, 2])
    ids = np.array([[0,0],[0,1],[0,2],[2,2],[1,1]]); assert V.person_weights(ids, 3, Fixed()).tolist() == [2,0,2,1,0]
    assert V.person_weights(np.array([0,1,2,2]), 3, Fixed()).tolist() == [2,0,1,1]

# --- protocol ------------------------------------------------------------------------------------------
def test_identity_mechanism_and_stranger():
    r = np.random.default_rng(0); o, who = scores(r), people(r)
    same = V.lfw_protocol(o, o, SAME, who, n=50)
    assert same['success'].value == 1 - same['tpr_original'].value and same['fpr'] == same['fpr_original'] <= 1e-3 and same['missing'] == 0
    rand = V.lfw_protocol(o, r.normal(size=3000), SAME, who, n=50, fpr=.01)
    assert abs(rand['success'].value - .99) < 4*np.sqrt(.01*.99/1500) + .004 and rand['auc'].lo < .5 < rand['auc'].hi

def test_a_shift_does_not_fool_the_recalibrated_attacker():
    r = np.random.default_rng(0); o, who = scores(r), people(r); q = V.lfw_protocol(o, o-10, SAME, who, n=20)
    assert q['tpr'].value == 0 and q['tpr'].hi > 0 and q['tpr_recalibrated'].value == q['tpr_original'].value and q['auc'].value > .99

def test_missing_faces_count_as_protected_and_are_reported():
    r = np.random.default_rng(0); o, who = scores(r), people(r); p = o.copy(); p[:100] = np.nan
    q = V.lfw_protocol(o, p, SAME, who, n=20)
    assert q['missing'] == 100 and np.isclose(q['tpr'].value, (p[SAME] >= q['threshold']).mean())
    with pytest.raises(InputError): V.lfw_protocol(o, p[:5], SAME, who)

def test_given_threshold_is_used():
    r = np.random.default_rng(0); o, who = scores(r), people(r)
    assert V.lfw_protocol(o, o, SAME, who, threshold=1e9, n=10)['tpr'].value == 0

@pytest.mark.parametrize('kind', ['cosine', 'euclidean'])
def test_all_scores_against_brute_force(kind):
    r = np.random.default_rng(0); x, who = r.normal(size=(25,4)).astype(np.float32), r.integers(0, 6, 25)
    c = lambda a, b: a@b/np.linalg.norm(a)/np.linalg.norm(b) if kind == 'cosine' else -np.linalg.norm(a-b)
    g, i = V.all_scores(x, who, kind); pairs = [(a, b) for a in range(25) for b in range(a+1, 25)]
    assert np.allclose(np.sort(g), sorted(c(x[a], x[b]) for a,b in pairs if who[a] == who[b]), atol=1e-5)
    assert np.allclose(np.sort(i), sorted(c(x[a], x[b]) for a,b in pairs if who[a] != who[b]), atol=1e-5)
