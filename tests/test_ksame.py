"k-Same: cluster sizes, the 1/k bound, the algebra of averages, closed sets"
import numpy as np, pytest
from deidnb.core import Crop, Face, ConfigError, InputError
from deidnb.generate import ksame as K

POINTS = np.array([(24, 30), (41, 30), (32, 40), (25, 47), (39, 47)], np.float32)

def faces(n, seed=0, size=64):
    "n smooth random pictures with a common part, like aligned faces"
    rng = np.random.default_rng(seed); base = rng.normal(128, 40, (8, 8, 3))
    import cv2
    pics = [cv2.resize(np.clip(base + rng.normal(0, 25, (8, 8, 3)), 0, 255).astype(np.uint8), (size, size),
                       interpolation=cv2.INTER_CUBIC) for _ in range(n)]
    return [Crop(p, np.eye(3)[:2], Face((15, 12, 50, 58), POINTS)) for p in pics]

@pytest.mark.parametrize('n', [2, 3, 5, 8, 13, 40, 41])
@pytest.mark.parametrize('k', [2, 3, 5, 8])
@pytest.mark.parametrize('seed', [None, 0, 1])
def test_every_cluster_has_k_to_2k_minus_1(n, k, seed):
    v = np.random.default_rng(n).normal(size=(n, 6)); rng = None if seed is None else np.random.default_rng(seed)
    if n >= k:
        c = K.greedy_clusters(v, k, rng)
        assert sorted(np.concatenate(c)) == list(range(n)) and all(k <= len(x) < 2*k for x in c)
    if n >= 2*k:
        p = K.furthest_pairs(v, k, rng); c = [x for q in p for x in q]
        assert sorted(np.concatenate(c)) == list(range(n)) and all(len(x) >= k for x in c)

def test_first_cluster_is_the_nearest():
    v = np.array([[0.], [10], [.1], [10.1], [.2], [9.9]])
    assert [c.tolist() for c in K.greedy_clusters(v, 3)] == [[0, 2, 4], [1, 3, 5]]
    (a, b), = K.furthest_pairs(v, 3); assert a.tolist() == [0, 2, 4] and b.tolist() == [1, 3, 5]

def test_identical_faces_keep_the_sizes():
    for f in (K.greedy_clusters, lambda v, k: [c for p in K.furthest_pairs(v, k) for c in p]):
        c = f(np.zeros((11, 3)), 3); assert sorted(np.concatenate(c)) == list(range(11)) and min(map(len, c)) >= 3

@pytest.mark.parametrize('cls', list(K.KSAME.values()))
@pytest.mark.parametrize('n,k', [(6, 2), (7, 3), (10, 3), (25, 4)])
def test_releases_are_shared_by_k(cls, n, k):
    cs = faces(n); m = cls(k=k).prepare(cs, ids=range(n))
    key = [(e.image.tobytes(), e.mask.tobytes()) for e in (m(c, None, rng=None) for c in cs)]
    assert min(key.count(q) for q in key) >= k
    assert all(m(c).info['shared_by'] >= k for c in cs)

@pytest.mark.parametrize('cls', list(K.KSAME.values()))
@pytest.mark.parametrize('seed', range(5))
def test_nearest_source_attack_is_bounded(cls, seed):
    cs = faces(30, seed); k = 3; m = cls(k=k).prepare(cs)
    v = np.stack([c.image.ravel() for c in cs]).astype(float)
    hit = np.mean([np.argmin(((v - m(c).image.ravel())**2).sum(1)) == i for i, c in enumerate(cs)])
    assert hit <= 1/k

def test_a_mechanism_that_mixes_in_the_source_is_caught():
    cs = faces(30); m = K.KSamePixel(k=3).prepare(cs); v = np.stack([c.image.ravel() for c in cs]).astype(float)
    broken = [.6*m(c).image.ravel() + .4*c.image.ravel() for c in cs]
    assert np.mean([np.argmin(((v - b)**2).sum(1)) == i for i, b in enumerate(broken)]) > 1/3

def test_averages_against_direct_computation():
    cs = faces(14); X = np.stack([c.image.reshape(-1) for c in cs]); k = 4
    m = K.KSamePixel(k=k).prepare(cs); g = K.greedy_clusters(K.face_vectors(cs), k)
    for c in g:
        for i in c: assert np.abs(m(cs[i]).image.reshape(-1) - X[c].mean(0)).max() <= .51
    f = K.KSameFurthest(k=3).prepare(cs)
    for a, b in K.furthest_pairs(K.face_vectors(cs), 3):
        assert np.abs(f(cs[a[0]]).image.reshape(-1)
                      - X[b].mean(0)).max() <= .51 and np.abs(f(cs[b[0]]).image.reshape(-1) - X[a].mean(0)).max() <= .51

@pytest.mark.parametrize('p', [1, 3, 8])
def test_eigen_equals_projection(p):
    cs = faces(14); X = np.stack([c.image.reshape(-1) for c in cs]).astype(float); m = K.KSameEigen(k=4, components=p).prepare(cs)
    V = np.linalg.svd(X - X.mean(0), full_matrices=False)[2][:p]
    where = np.array([m(c).info['cluster'] for c in cs])
    for j in set(where):
        want = np.clip(X.mean(0) + (X[where == j].mean(0) - X.mean(0))@V.T@V, 0, 255)
        assert np.abs(m(cs[int(np.argmax(where == j))]).image.reshape(-1) - want).max() <= 1.01

def test_blocks_do_not_matter():
    X = np.stack([c.image.reshape(-1) for c in faces(9)])
    S = [K.gram_eigen(X, b)[1] for b in (64, 1000, 10**6)]
    assert np.allclose(S[0], S[1], rtol=1e-4) and np.allclose(S[0], S[2], rtol=1e-4)
    W = np.random.default_rng(0).dirichlet(np.ones(9), 3)
    assert np.abs(K.weighted_faces(X, W, 100).astype(int) - K.weighted_faces(X, W)).max() <= 1

def test_the_random_start_changes_clusters_and_is_reproducible():
    v = np.random.default_rng(0).normal(size=(60, 5))
    g = lambda s: [c.tolist() for c in K.greedy_clusters(v, 4, np.random.default_rng(s))]
    assert g(1) == g(1) != g(2)

@pytest.mark.parametrize('bad,error', [
    (lambda: K.KSamePixel(k=1), ConfigError), (lambda: K.KSamePixel(k='x'), ConfigError), (lambda: K.KSameEigen(components=1.5), ConfigError),
    (lambda: K.KSamePixel(k=9).prepare(faces(8)), ConfigError), (lambda: K.KSameFurthest(k=5).prepare(faces(8)), ConfigError),
    (lambda: K.KSamePixel(k=2).prepare(faces(4), ids=[1, 2, 3, 1]), ConfigError), (lambda: K.KSamePixel(k=2).prepare(faces(4), ids=[1]), ConfigError),
    (lambda: K.KSamePixel(k=2).prepare(faces(2) + faces(2, size=32)), InputError), (lambda: K.KSamePixel(k=2)(faces(1)[0]), ConfigError),
    (lambda: K.KSamePixel(k=2).prepare(faces(4))(faces(1, seed=9)[0]), InputError)])
def test_misuse(bad, error):
    with pytest.raises(error) as e: bad()
    assert '\n' not in str(e.value)
