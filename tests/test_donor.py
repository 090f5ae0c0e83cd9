"Donor bank, choice and swap: what must hold for every face, and what must survive"
import numpy as np, pytest
from dataclasses import replace
from deidnb.assets import example_faces
from deidnb.core import ConfigError, InputError, rng
from deidnb.faces.align import crop_native, paste
from deidnb.faces.find import BLENDSHAPES, find_faces
from deidnb.generate import donor as D, donor_bank as DB
from deidnb.generate.donor_mesh import eye_distance, face_shape, transfer_shape

@pytest.fixture(scope='module')
def bank(): return DB.donor_bank()
@pytest.fixture(scope='module')
def faces():
    pics = example_faces(6); return [(p, find_faces(p)[0]) for p in pics]

def swapped(pic, face, seed=0, **kw):
    crop = crop_native(pic, face); e = D.DonorSwap(**kw)(crop, rng=rng(seed, simulate=True))
    return paste(pic, crop, e), e

# -- the bank

def test_bank_is_whole(bank):
    assert bank.n >= 3000 and len(bank) == 2*bank.n
    assert np.allclose(np.linalg.norm(bank.inner, axis=1), 1, atol=1e-3)
    for a in (bank.w, bank.inner, bank.blendshapes, bank.turn, bank.look, bank.age, bank.male, bank.lids):
        assert np.isfinite(a.astype(np.float32)).all()
    assert bank.blendshapes.min() >= 0 and bank.blendshapes.max() <= 1 and bank.age.min() >= 15
    P = bank._mesh.astype(np.float32)/64; assert (P[..., :2] > -60).all() and (P[..., :2] < 572).all()

def test_bank_is_balanced(bank):
    n = bank.n; dark = (bank.look[:n, 0] < 50).mean(); male = (bank.male[:n] > .5).mean()
    aside = (np.abs(bank.turn[:n, 0]) > 15).mean()
    assert dark > .12 and .35 < male < .65 and aside > .15

def test_mirrored_donor(bank):
    i = 17; P, Q = bank.mesh(i), bank.mesh(i + bank.n)
    assert np.allclose(bank.turn[i, 0], -bank.turn[i + bank.n, 0]) and np.array_equal(DB.donor_picture(bank, i)[:,
            ::-1], DB.donor_picture(bank, i + bank.n))
    assert np.abs(np.sort(511 - P[:, 0]) - np.sort(Q[:, 0])).max() < 1e-3

def test_stored_meshes_fit_the_pictures(bank):
    for i in (5, 900, 2500):
        P, f = bank.mesh(i), find_faces(DB.donor_picture(bank, i))[0]
        assert np.linalg.norm((P - f.landmarks)[:468, :2], axis=1).mean() < .04*eye_distance(P)

# -- the choice

def test_random_choice_is_uniform():
    cost, r = np.arange(100.), rng(0, simulate=True)
    n = np.bincount([DB.choose_donor(cost, r, pool=10) for _ in range(5000)], minlength=100)
    assert n[10:].sum() == 0 and ((n[:10]-500)**2/500).sum() < 27.9     # chi-squared, 9 degrees of freedom, p = .001

def test_far_keeps_the_least_like():
    cost, like, r = np.arange(100.), np.linspace(1, -1, 100), rng(0, simulate=True)
    assert {DB.choose_donor(cost, r, pool=40, like=like, far=.25) for _ in range(400)} == set(range(30, 40))
    assert {DB.choose_donor(cost, r, pool=40, like=-like, far=.25) for _ in range(400)} == set(range(10))

def test_exponential_choice_has_the_stated_epsilon():
    eps, r = 2., rng(0, simulate=True); a, b = np.zeros(50), np.full(50, 1e9); a[0], b[0] = 1e9, 0; n = 40000
    pa, pb = ((np.array([DB.choose_donor(c, r, 'exponential', epsilon=eps) for _ in range(n)]) == 0).mean() for c in (a, b))
    assert pa < pb and np.log(pb/pa) <= eps + .15 and np.log(pb/pa) > .5

def test_keyed_choice(faces):
    crop = crop_native(*faces[0]); one = lambda k, lv=0: D.DonorSwap(choice='key', key=k, level=lv)(crop, rng=None).info['donor']
    assert one('a') == one('a') and len({one(str(k)) for k in range(6)}) > 2 and one('a', 1) != one('a')

@pytest.mark.parametrize('kw', [dict(weight=-1), dict(weight=9), dict(far=0), dict(far=1.5), dict(pool=0),
                                dict(choice='best'), dict(choice='key'), dict(epsilon=0), dict(detail=2),
                                dict(cover=2)])
def test_bad_settings_are_named(kw):
    with pytest.raises(ConfigError) as e: D.DonorSwap(**kw)
    assert next(iter(kw)) in str(e.value) or 'key' in str(e.value)

def test_ladder_only_gets_stronger():
    steps = [D.DonorSwap().escalate(k).config for k in range(1, len(D.LADDER))]
    for a, b in zip(steps, steps[1:]):
        assert b['far'] <= a['far'] and all(b[k] >= a[k] for k in ('weight', 'detail', 'pool', 'limit', 'cover', 'level'))
    assert D.DonorSwap().escalate(len(D.LADDER)) is None and D.DonorSwap(weight=2.5).escalate(1).config['weight'] == 2.5

def test_guarantee_covers_the_whole_ladder():
    "The receipt's bound must hold for the strongest attempt, and may not deny the look at identity"
    closest = min(D.DonorSwap().escalate(k).config['far'] for k in range(1, len(D.LADDER)))
    for far in (1., .08, .001): assert f'more than {1/min(far, closest):.3g} times' in D.DonorSwap(far=far).guarantee.because
    assert D.DonorSwap(choice='exponential', epsilon=2.).guarantee.epsilon == 2

def test_a_face_is_measured_once(faces, monkeypatch):
    "Attempts at one face share what was measured on it, through the crops; without notes nothing is kept"
    seen = []; real = D.appearance; monkeypatch.setattr(D, 'appearance', lambda *a: seen.append(1) or real(*a)); p, f = faces[0]
    for notes, times in (({}, 1), (None, 2)):
        g = replace(f, notes=notes); seen.clear()
        for k in (0, 1): D.DonorSwap(level=k)(crop_native(p, g), rng=rng(0, simulate=True))
        assert len(seen) == times

# -- the swap

def test_only_what_is_marked_changes(faces):
    for p, f in faces[:3]:
        crop = crop_native(p, f); e = D.DonorSwap()(crop, rng=rng(1, simulate=True)); far = e.mask == 0
        assert far.any() and np.abs(e.image[far].astype(int)
                                    - crop.image[far]).max() <= 1 and e.mask.max() <= 1 and e.image.dtype == np.uint8

def test_weight_zero_keeps_the_shape(faces, bank):
    f = faces[0][1]; Q = transfer_shape(face_shape(), f.landmarks, f.blendshapes, bank.mesh(3), bank.blendshapes[3], 0.)
    assert np.allclose(Q, f.landmarks, atol=1e-3)

def blend(face, *names): return np.mean([face.blendshapes[BLENDSHAPES.index(n)] for n in names])

@pytest.mark.parametrize('names, least', [(('jawOpen',), .6), (('eyeBlinkLeft', 'eyeBlinkRight'), .8),
                                          (('mouthSmileLeft', 'mouthSmileRight'), .8),
                                          (('browDownLeft', 'browDownRight'), .6), (('mouthPucker',), .45)])
def test_expressions_survive(bank, names, least):
    "Donors that show an expression most are the targets; the change is compared with what it would be if the expression were lost"
    score = bank.blendshapes[:bank.n][:, [BLENDSHAPES.index(n) for n in names]].mean(1); kept = []
    for i in np.argsort(-score)[3:15]:
        pic = DB.donor_picture(bank, int(i)); f = find_faces(pic)[0]; g = find_faces(swapped(pic, f, seed=int(i))[0])
        assert g; kept.append((blend(g[0], *names) - np.median(score)) / max(blend(f, *names) - np.median(score), .05))
    assert np.median(kept) > least, kept

@pytest.mark.parametrize('side', [24, 60, 1400])
def test_sizes(faces, side):
    import cv2
    p, f = faces[2]; k = side/f.size
    im = cv2.resize(p, None, fx=k, fy=k, interpolation=cv2.INTER_AREA if k < 1 else cv2.INTER_CUBIC)
    g = replace(f, box=f.box*k, points5=f.points5*k, landmarks=f.landmarks*k); out, e = swapped(im, g)
    x = slice(int(g.box[1]), int(g.box[3])), slice(int(g.box[0]), int(g.box[2]))
    assert out.shape == im.shape and np.abs(out[x].astype(int) - im[x]).mean() > 3

def test_at_the_border_and_turned(faces):
    p, f = faces[4]; cut = int((f.box[0] + f.box[2])/2)
    for im, m in ((p[:, cut-20:], [[1, 0, 20-cut], [0, 1, 0]]), (np.ascontiguousarray(np.rot90(p, 2)),
            [[-1, 0, p.shape[1]-1], [0, -1, p.shape[0]-1]])):
        m = np.array(m, np.float32); P = f.landmarks.copy(); P[:, :2] = P[:, :2] @ m[:, :2].T + m[:, 2]
        b = (f.box.reshape(2, 2) @ m[:, :2].T + m[:, 2])
        g = replace(f, box=np.r_[b.min(0), b.max(0)], points5=f.points5 @ m[:, :2].T + m[:, 2], landmarks=P)
        out, _ = swapped(np.ascontiguousarray(im), g); assert out.shape == im.shape and not np.array_equal(out, im)

def test_no_mesh_no_swap(faces):
    p, f = faces[0]
    with pytest.raises(InputError, match='mesh'): swapped(p, replace(f, landmarks=None))

def test_passes_the_gate_and_keeps_the_face():
    from deidnb import Deidentifier
    d = Deidentifier('donor_swap'); done = [d.photo(p).faces[0] for p in example_faces(8)]
    assert sum(r.outcome == 'protected' for r in done) >= 7 and all(r.refound for r in done if r.outcome == 'protected')
    for r in done:
        for s in r.scores.values(): assert s['score'] < s['threshold']

def test_grey_photo_stays_grey(faces):
    p, f = faces[0]; grey = np.repeat(p.mean(2).astype(np.uint8)[..., None], 3, 2); out, _ = swapped(grey, f)
    assert np.abs(out.astype(int) - out.mean(2, keepdims=True)).max() <= 3

def test_rim_of_the_mirror_image(bank):
    i = 40; a, b = (DB.rim(DB.donor_picture(bank, j), bank.mesh(j), bank.look[j, :3]) for j in (i, i + bank.n))
    assert np.abs(a - b[::-1]).mean() < 2.5 and np.abs(bank.rim[i] - a).max() < 1 and np.array_equal(bank.rim[i
            + bank.n], bank.rim[i][::-1])
    side = DB.LOOK.index('side')
    assert bank.look[i, side] == -bank.look[i + bank.n, side] and bank.look[i, 0] == bank.look[i + bank.n, 0]

def test_inner_code_sees_the_face_alone(bank):
    "The stored code is that of the face: other hair and background leave it where it was"
    from deidnb.train.donors import inner_code
    for i in (3, 700, 2900):
        pic = DB.donor_picture(bank, i); f = find_faces(pic)[0]
        m = D.face_region(pic.shape[:2], f.landmarks, eye_distance(f.landmarks), 1.)[..., None] > 0
        a, b = (inner_code(np.where(m, pic, c).astype(np.uint8), f) for c in (20, 230))
        assert np.allclose(a, b, atol=1e-4) and a @ bank.inner[i] > .9 and bank.likeness(a).argmax() % bank.n == i

def test_lips_and_brows_follow_the_target(faces):
    import cv2
    p, f = faces[0]; crop = crop_native(p, f); P = crop.face.landmarks; u = eye_distance(P)
    T = D.lab(crop.image); hw = T.shape[:2]
    lips, brow = (D.fill(hw, P[D.REGIONS[r]])[..., None] for r in ('lips_outer', 'left_brow'))
    R = T.copy(); R[..., 1] += 15*lips[..., 0]
    skin = np.median(T[(D.fill(hw, P[D.REGIONS['left_cheek']]) > .5)], 0); R = R + 1.*(R - skin)*brow*[1, 0, 0]
    out = D.match_parts(T, R.astype(np.float32), P, P, u); left = lambda x, m, k: abs((((x - T)*m)[..., k]).sum())
    assert left(out, lips, 1) < .7*left(R, lips, 1) and left(out, brow, 0) < .7*left(R, brow, 0)
    still = D.match_parts(T, T.copy(), P, P, u); assert np.abs(still - T).max() < .1     # what agrees is left alone

def test_skirt_reaches_past_the_mesh(faces, bank):
    P = faces[1][1].landmarks; n = len(D.REGIONS['oval']); S = D.skirt(P, 1.3)
    assert S.shape == (478+n, 3) and np.array_equal(S[:478],
                                                    P) and D.skirt_triangles().max() == 477+n and len(D.skirt_triangles()) == len(face_shape().triangles) + 2*n
    assert np.allclose(D.reach(1.),
                       1.) and D.reach(1.25).max() == pytest.approx(1.25) and D.reach(1.25).min() == pytest.approx(1.06)
