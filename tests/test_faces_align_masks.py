"Alignment, pasting and masks: closed forms, round trips, edges"
import cv2, numpy as np, pytest
from deidnb.core import ConfigError, Crop, Edit, Face, package_dir, transform_points
from deidnb.faces.align import (TEMPLATE5, align5, crop_face, crop_native, invert, is_integer_shift, paste,
                                template_points, umeyama, warp)
from deidnb.faces.find import find_faces
from deidnb.faces.io import read_image
from deidnb.faces.masks import COMPOSED, REGIONS, ellipse_points, face_mask, feather, fill, region_mask

@pytest.fixture(scope='module')
def pics(): return [read_image(p).rgb for p in sorted((package_dir()/'examples').glob('face_*.jpg'))]
@pytest.fixture(scope='module')
def found(pics): return [find_faces(p)[0] for p in pics]

def psnr(a, b): return 10*np.log10(255**2/max(np.mean((a.astype(float)-b)**2), 1e-10))
def rot(t, s=1., x=0., y=0.): return np.array([[s*np.cos(t), -s*np.sin(t), x], [s*np.sin(t), s*np.cos(t), y]])

@pytest.mark.parametrize('seed', range(20))
def test_umeyama_recovers_a_similarity(seed):
    g = np.random.default_rng(seed); M = rot(g.uniform(-3, 3), g.uniform(.1, 9), *g.normal(size=2)*50)
    p = g.normal(size=(g.integers(2, 9), 2))*20
    assert np.allclose(umeyama(p, p @ M[:, :2].T + M[:, 2]), M, atol=1e-6)

def test_umeyama_is_the_least_squares_answer():
    g = np.random.default_rng(0); x, y = g.normal(size=(5,2)), g.normal(size=(5,2))
    # linear form of the same problem
    A = np.array([r for a,b in x for r in ([a,-b,1,0],[b,a,0,1])])
    a, b, tx, ty = np.linalg.lstsq(A, y.ravel(), rcond=None)[0]
    assert np.allclose(umeyama(x, y), [[a,-b,tx],[b,a,ty]], atol=1e-8)

@pytest.mark.parametrize('bad', [(np.zeros((1,2)),)*2, (np.zeros((5,2)),)*2, (np.zeros((5,3)),)*2,
                                 (np.full((5,2), np.nan),)*2, (np.eye(2), np.zeros((3,2)))])
def test_umeyama_refuses(bad):
    with pytest.raises(ConfigError): umeyama(*bad)

def test_template():
    assert np.allclose(template_points(112), TEMPLATE5, atol=1e-5)
    assert np.allclose(template_points(224, .72, (0,4)), (TEMPLATE5*2-112)*.72+112+[0,4], atol=1e-4)

@pytest.mark.parametrize('dx,dy', [(0,0), (3,-5), (-40,12), (300,0)])
def test_integer_shift_warps_are_copies(pics, dx, dy):
    a = warp(pics[0], [[1,0,dx],[0,1,dy]], (256,256), border='zero'); b = np.zeros_like(pics[0])
    xs, ys = slice(max(dx,0), min(256,256+dx)), slice(max(dy,0), min(256,256+dy))
    if xs.start < xs.stop: b[ys, xs] = pics[0][max(-dy,0):256-max(dy,0), max(-dx,0):256-max(dx,0)]
    assert (a == b).all()

@pytest.mark.parametrize('s', [.5, .25, .125])
def test_shrinking_is_the_mean_of_blocks(pics, s):
    k = int(1/s); M = [[s,0,.5*s-.5],[0,s,.5*s-.5]]
    a = warp(pics[1], M, (256//k, 256//k)); b = pics[1].reshape(256//k, k, 256//k, k, 3).mean((1,3))
    assert np.abs(a[2:-2,2:-2]-b[2:-2,2:-2]).mean() < 1.5

@pytest.mark.parametrize('angle', [0, 7, 30, 90, 180])
@pytest.mark.parametrize('size,least', [(256, 29), (512, 37)])
def test_round_trip_loss(pics, found, angle, size, least):
    f = found[2]; T = cv2.getRotationMatrix2D((128,128), angle, 1.)
    im = cv2.warpAffine(pics[2], T, (256,256), borderMode=cv2.BORDER_REFLECT_101, flags=cv2.INTER_CUBIC)
    g = Face(f.box, transform_points(T, f.points5)); c = crop_face(im, g, size)
    m = np.zeros((size,size), np.float32); cv2.circle(m, (size//2, size//2), int(.25*size), 1., -1)
    out = paste(im, c, Edit(c.image, m)); d = cv2.warpAffine(m, invert(c.matrix), (256,256)) > .5
    assert psnr(out[d], im[d]) > least and (out[~cv2.dilate(d.astype(np.uint8),
                                                            np.ones((9,9))).astype(bool)] == im[~cv2.dilate(d.astype(np.uint8),
                np.ones((9,9))).astype(bool)]).all()

def test_alignment_ignores_rotation_and_scale(pics, found):
    a, _ = align5(pics[4], found[4].points5)
    for t, s in ((.4, 1.), (-.9, 1.7), (2.5, 2.)):
        M = rot(t, s); c = transform_points(M, [[128,128]])[0]; M[:, 2] = 300-c; big = warp(pics[4], M, (600,600))
        b, _ = align5(big, transform_points(M, found[4].points5)); assert psnr(a[15:-15,15:-15], b[15:-15,15:-15]) > 27

@pytest.mark.parametrize('size', [112, 256, 512])
def test_crop_face_holds_the_oval(pics, found, size):
    for p, f in zip(pics, found):
        c = crop_face(p, f, size); o = c.face.landmarks[REGIONS['oval'], :2]
        assert o.min() >= 0 and o.max() <= size and c.image.shape == (size,size,3)
        assert np.allclose(transform_points(invert(c.matrix), c.face.points5), f.points5, atol=.02)

@pytest.mark.parametrize('box', [(-30,-40,60,70), (200,180,300,290), (0,0,256,256), (250,250,255,255)])
def test_native_crops_at_the_edge(pics, box):
    f = Face(box, np.array([[.3,.4],[.7,.4],[.5,.6],[.35,.8],[.65,.8]])*(np.array(box[2:])-box[:2])+box[:2])
    c = crop_native(pics[3], f)
    assert is_integer_shift(c.matrix) and min(c.image.shape[:2]) >= 1
    e = Edit(255-c.image, np.ones(c.image.shape[:2], np.float32)); out = paste(pics[3], c, e)
    x, y = -c.matrix[:, 2].astype(int); h, w = c.image.shape[:2]
    assert (out[y:y+h, x:x+w] == e.image).all() and (paste(pics[3], c, Edit(c.image, e.mask)) == pics[3]).all()
    keep = np.ones((256,256), bool); keep[y:y+h, x:x+w] = False; assert (out[keep] == pics[3][keep]).all()

def test_large_windows_are_shrunk(pics, found):
    big = cv2.resize(pics[0], (2560,2560), interpolation=cv2.INTER_CUBIC); f = Face(found[0].box*10, found[0].points5*10)
    c = crop_native(big, f, max_side=512); assert max(c.image.shape[:2]) == 512
    out = paste(big, c, Edit(c.image, np.ones(c.image.shape[:2], np.float32))); assert psnr(out, big) > 33

def test_half_masks_blend():
    rgb = np.full((40,40,3), 100, np.uint8); c = crop_native(rgb, Face([10,10,20,20], np.eye(5)[:, :2]*3+12), pad=0)
    out = paste(rgb, c, Edit(np.full_like(c.image, 200), np.full(c.image.shape[:2], .5, np.float32)))
    assert set(np.unique(out)) == {100, 150}
    assert (rgb == 100).all()  # the input is not touched

def test_paste_refuses(pics, found):
    c = crop_native(pics[0], found[0]); m = np.ones(c.image.shape[:2], np.float32)
    for e in (Edit(c.image[1:], m), Edit(c.image, m[1:]), Edit(c.image.astype(float), m), Edit(c.image, m*np.nan)):
        with pytest.raises(ConfigError): paste(pics[0], c, e)

def test_every_region_of_every_face(pics, found):
    for p, f in zip(pics, found):
        R = {n: region_mask(p.shape, f.landmarks, n) for n in [*REGIONS, *COMPOSED]}
        for n, m in R.items():
            assert m.shape == p.shape[:2] and m.dtype == np.float32 and 0 <= m.min() <= m.max() <= 1 and (m.sum() > 0
                or n in ('lips_inner','mouth_interior')), n
        for inner, outer in (('left_eye','oval'), ('lips_inner','lips_outer'), ('mouth','face'), ('skin','face')):
            assert (R[inner]*(1-R[outer])).sum() <= .02*R[inner].sum()+2
        assert (R['skin']*R['eyes']).sum() < .02*R['skin'].sum() and R['face'].sum() > 5*R['mouth'].sum()

@pytest.mark.parametrize('pts,area', [([[2,2],[12,2],[12,8],[2,8]], 60), ([[0,0],[10,0],[0,10]], 50)])
def test_fill_has_the_right_area(pts, area): assert abs(fill((40,40), np.array(pts, float)+10).sum()-area) < .2*area

def test_masks_outside_the_picture_are_fine(found):
    for s in (-1000, 1000): assert region_mask((50,60,3), found[0].landmarks+s, 'skin').sum() == 0
    f = Face(found[0].box+5000, found[0].points5+5000)
    assert face_mask((50,60), f).sum() == 0 and face_mask((1,1), found[0]).shape == (1,1)

def test_face_mask_covers(pics, found):
    for p, f in zip(pics, found):
        oval = region_mask(p.shape, f.landmarks, 'face') > .99
        for k in (dict(), dict(feather=.15), dict(feather=0, grow=0), dict(region='head')):
            assert face_mask(p.shape, f, **k)[oval].min() > .97, k
        bare = Face(f.box, f.points5); assert face_mask(p.shape, bare)[oval].mean() > .97

def test_feather():
    m = np.zeros((61,61), np.float32); m[30,30] = 1; b = feather(m, 4)
    assert abs(b.sum()-1) < 1e-3 and abs(b[30,30]-1/(2*np.pi*16)) < 2e-4
    with pytest.raises(ConfigError, match='Did you mean'): region_mask((5,5), np.zeros((478,3)), 'skni')
    assert np.isfinite(ellipse_points(Face([0,0,9,9], np.zeros((5,2))))).all()
