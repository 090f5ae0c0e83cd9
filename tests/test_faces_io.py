"Pictures in and out: formats, broken files, metadata, failures to write"
import io, os, struct, zlib
from pathlib import Path
import numpy as np, pytest
from PIL import Image, ImageCms
from deidnb.core import ConfigError, InputError, OutputError, package_dir
from deidnb.faces.io import FORMATS, Picture, as_rgb, clean_exif, list_images, read_image, upright, write_image

@pytest.fixture(scope='module')
def rgb(): return read_image(package_dir()/'examples'/'face_02.jpg').rgb

def save(path, im, **k): im.save(path, **k); return path

@pytest.mark.parametrize('fmt', list(FORMATS))
def test_every_format_round_trips(tmp_path, rgb, fmt):
    p = write_image(tmp_path/f'a{FORMATS[fmt]}', rgb); q = read_image(p)
    assert q.format == fmt and q.rgb.shape == rgb.shape and q.rgb.flags['C_CONTIGUOUS']
    err = np.abs(q.rgb.astype(int)-rgb).mean()
    assert err == 0 if fmt in ('PNG','TIFF','BMP') else err < (12 if fmt == 'GIF' else 3)
    assert os.stat(p).st_mode & 0o777 == 0o644 and len(list(tmp_path.iterdir())) == 1

@pytest.mark.parametrize('mode', ['1','L','P','RGB','RGBA','LA','CMYK','YCbCr','LAB','HSV','I','F','I;16'])
def test_every_mode_reads(tmp_path, mode):
    g = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48,1)); base = Image.fromarray(np.repeat(g[...,None],3,2))
    if mode == 'I;16': im = Image.fromarray(g.astype(np.uint16)*257)
    elif mode in ('I',): im = Image.fromarray(g.astype(np.int32)*257)
    elif mode == 'F': im = Image.fromarray(g.astype(np.float32)/255)
    elif mode == 'LAB':
        im = ImageCms.profileToProfile(base, ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB'), outputMode='LAB')
    elif mode == 'HSV': pytest.skip('no file format stores it')
    else: im = (Image.fromarray(g) if mode == 'P' else base).convert(mode)
    q = read_image(save(tmp_path/'a.tif', im))
    assert q.rgb.shape == (48,64,3) and q.rgb.dtype == np.uint8
    if mode != '1': assert np.abs(q.rgb.astype(int).mean(2)-g).mean() < 14, mode
    assert (q.alpha is not None) == (mode in ('RGBA','LA'))

def test_16_bit_colour_png_is_noted(tmp_path):
    def chunk(t, d): return struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t+d))
    rows = b''.join(b'\0' + np.full((4,3), 65535, '>u2').tobytes() for _ in range(4))
    (tmp_path/'a.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 4, 4, 16, 2, 0, 0, 0))
                                   + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))
    q = read_image(tmp_path/'a.png'); assert (q.rgb == 255).all() and any('16-bit' in n for n in q.meta['notes'])

def test_alpha_survives(tmp_path, rgb):
    a = np.tile(np.arange(256, dtype=np.uint8), (256,1)); save(tmp_path/'a.png', Image.fromarray(np.dstack([rgb, a])))
    q = read_image(tmp_path/'a.png'); assert (q.alpha == a).all()
    for ext in ('png','webp','tif'):
        b = read_image(write_image(tmp_path/f'b.{ext}', q.rgb, q)); assert (b.alpha == a).all()
    pal = Image.fromarray(rgb).quantize(16); pal.info['transparency'] = 0; pal.save(tmp_path/'p.png', transparency=0)
    assert read_image(tmp_path/'p.png').alpha is not None

def test_colour_profile_is_applied(tmp_path, rgb):
    lab = Image.fromarray(rgb)
    p = save(tmp_path/'a.jpg', lab, quality=95, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes())
    assert np.abs(read_image(p).rgb.astype(int)-rgb).mean() < 3
    p = save(tmp_path/'b.jpg', lab, quality=95, icc_profile=b'not a profile'); q = read_image(p)
    assert any('ignored' in n for n in q.meta['notes']) and q.rgb.shape == rgb.shape

@pytest.mark.parametrize('o', range(1, 9))
def test_orientation(tmp_path, rgb, o):
    ex = Image.Exif(); ex[274] = o; im = rgb[:200]
    p = save(tmp_path/'a.png', Image.fromarray(im), exif=ex); q = read_image(p)
    assert (q.rgb == upright(im, o)).all() and q.meta['orientation'] == o
    for m in ('keep', 'orientation'):  # not turned twice
        w = write_image(tmp_path/f'{m}.png', q.rgb, q, metadata=m)
        assert (read_image(w).rgb == q.rgb).all() and Image.open(w).getexif()[274] == 1

def _thumbnailed(tmp_path, rgb):
    "A JPEG whose EXIF holds an embedded thumbnail, as cameras write it"
    t = io.BytesIO(); Image.fromarray(rgb).resize((64,64)).save(t, 'JPEG'); t = t.getvalue()
    ifd0 = struct.pack('<H', 2) + struct.pack('<HHI4s', 0x010F, 2, 4, b'Cam\0') + struct.pack('<HHIHH', 0x0112, 3, 1, 1, 0)
    off1 = 8+len(ifd0)+4
    ifd1 = struct.pack('<H', 3) + struct.pack('<HHIHH', 0x0103, 3, 1, 6, 0) + struct.pack('<HHII', 0x0201, 4, 1,
        off1+2+36+4) + struct.pack('<HHII', 0x0202, 4, 1, len(t)) + struct.pack('<I', 0)
    exif = b'Exif\0\0' + b'II*\0' + struct.pack('<I', 8) + ifd0 + struct.pack('<I', off1) + ifd1 + t
    Image.fromarray(rgb).save(tmp_path/'t.jpg', quality=90, exif=exif); return tmp_path/'t.jpg', t

@pytest.mark.parametrize('metadata', ['strip', 'keep', 'orientation'])
@pytest.mark.parametrize('ext', ['jpg', 'png', 'webp', 'tif'])
def test_the_thumbnail_never_survives(tmp_path, rgb, metadata, ext):
    p, t = _thumbnailed(tmp_path, rgb); assert t in p.read_bytes()
    q = read_image(p); out = write_image(tmp_path/f'o.{ext}', np.zeros_like(q.rgb), q, metadata=metadata).read_bytes()
    assert t not in out and t[100:400] not in out and out.count(b'\xff\xd8\xff') <= 1
    assert (b'Cam' in out) == (metadata == 'keep')

def test_xmp_comments_and_maker_notes_are_dropped(tmp_path, rgb):
    ex = Image.Exif(); ex.get_ifd(0x8769)[0x927C] = b'MAKER'*50; ex.get_ifd(0x8825)[29] = '2020:01:01'
    ex[0x02BC] = b'<x:xmpmeta>'; ex[0x010E] = 'SECRET'*1000
    p = save(tmp_path/'a.jpg', Image.fromarray(rgb), exif=ex, xmp=b'<x:xmpmeta>preview</x:xmpmeta>', comment=b'a comment')
    q = read_image(p)
    keep = write_image(tmp_path/'k.jpg', q.rgb, q, metadata='keep').read_bytes()
    strip = write_image(tmp_path/'s.jpg', q.rgb, q).read_bytes()
    for b in (b'MAKER', b'xmpmeta', b'a comment', b'SECRET'): assert b not in keep and b not in strip
    assert b'2020:01:01' in keep and b'Exif' not in strip

def test_secondary_pictures_are_dropped(tmp_path, rgb):
    a = Image.fromarray(rgb); a.save(tmp_path/'m.jpg', format='MPO', save_all=True, append_images=[a.rotate(5)])
    q = read_image(tmp_path/'m.jpg'); assert q.format == 'JPEG' and 'dropped' in q.meta['notes'][0]
    assert getattr(Image.open(write_image(tmp_path/'o.jpg', q.rgb, q, metadata='keep')), 'n_frames', 1) == 1

@pytest.mark.parametrize('ext', ['gif', 'webp', 'png', 'tif'])
def test_animations_and_pages_are_refused(tmp_path, rgb, ext):
    ims = [Image.fromarray(rgb[:64,:64]), Image.fromarray(rgb[64:128,:64])]
    ims[0].save(tmp_path/f'a.{ext}', save_all=True, append_images=ims[1:])
    with pytest.raises(InputError, match='frames or pages') as e: read_image(tmp_path/f'a.{ext}')
    assert 'split' in str(e.value)

def broken(d, rgb):
    "Files that are no usable picture, by name"
    good = {}
    for f,e in FORMATS.items(): b = io.BytesIO(); Image.fromarray(rgb).save(b, f); good[e] = b.getvalue()
    out = {}
    for e,b in good.items():
        for k in (0, 1, 8, 20, len(b)//3, len(b)//2): out[f'cut_{k}{e}'] = b[:k]
        out[f'flip{e}'] = bytes(x ^ 255 for x in b[:64]) + b[64:]
    g = np.random.default_rng(0)
    out |= {f'noise_{i}.jpg': g.bytes(5000) for i in range(5)} | {'text.png': b'hello', 'html.jpg': b'<html>404</html>',
        'zip.png': b'PK\x03\x04'+g.bytes(100), 'svg.png': b'<svg/>', 'nul.webp': bytes(4096),
        'riff.webp': b'RIFF\xff\xff\xff\xffWEBPVP8 '+bytes(40), 'soi.jpg': b'\xff\xd8\xff', 'pdf.jpg': b'%PDF-1.4',
        'ps.jpg': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'}
    for n,b in out.items(): (d/n).write_bytes(b)
    return [d/n for n in out]

def test_broken_files_end_in_one_line(tmp_path, rgb):
    files = broken(tmp_path, rgb); assert len(files) >= 50
    for p in files:
        with pytest.raises(InputError) as e: read_image(p)
        m = str(e.value); assert p.name in m and '\n' not in m and len(m) < 600 and e.value.remedy

def test_bombs_are_refused_before_decoding(tmp_path):
    def chunk(t, d): return struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t+d))
    (tmp_path/'b.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 2**31-1, 2**31-1, 8, 2,
                0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b''))
    with pytest.raises(InputError): read_image(tmp_path/'b.png')
    Image.new('L', (2000,2000)).save(tmp_path/'c.png')
    with pytest.raises(InputError, match='limit'): read_image(tmp_path/'c.png', max_pixels=10**6)
    assert read_image(tmp_path/'c.png').rgb.shape == (2000,2000,3)

@pytest.mark.parametrize('size', [(1,1), (20000,3), (3,20000), (2,1)])
def test_odd_sizes(tmp_path, size):
    assert read_image(save(tmp_path/'a.png', Image.new('RGB', size))).rgb.shape == (size[1], size[0], 3)

def test_names(tmp_path, rgb):
    for n in ('ünï 写真 🙂.png', 'a'*200+'.png', ' spaced .jpg', '-dash.png', 'no_suffix', "quote'\".png", 'a.JPG', 'dots..png'):
        assert read_image(write_image(tmp_path/n, rgb[:32,:32])).rgb.shape == (32,32,3)
    with pytest.raises(OutputError): write_image(tmp_path/('a'*300+'.png'), rgb)
    with pytest.raises(InputError): read_image(tmp_path/('a'*300+'.png'))
    for bad in (tmp_path, tmp_path/'none.png', 'nul\0byte.png', '/dev/null'):
        with pytest.raises(InputError): read_image(bad)

def test_writing_fails_cleanly(tmp_path, rgb, monkeypatch):
    p = write_image(tmp_path/'a.png', rgb); before = p.read_bytes()
    with pytest.raises(OutputError, match='exists'): write_image(p, rgb)
    def full(self, fp, *a, **k): Path(fp).write_bytes(b'half'); raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(Image.Image, 'save', full)
        with pytest.raises(OutputError, match='No space left'): write_image(p, rgb, overwrite=True)
    assert p.read_bytes() == before and list(tmp_path.iterdir()) == [p]
    (tmp_path/'file').write_text('x')
    with pytest.raises(OutputError): write_image(tmp_path/'file'/'a.png', rgb)
    for k in (dict(metadata='all'), dict(quality=0)):
        with pytest.raises(ConfigError): write_image(tmp_path/'b.png', rgb, **k)
    with pytest.raises(OutputError): write_image(tmp_path/'big.webp', np.zeros((20000,4,3), np.uint8))
    if os.geteuid() != 0:
        (tmp_path/'ro').mkdir(mode=0o555)
        with pytest.raises(OutputError): write_image(tmp_path/'ro'/'a.png', rgb)

def test_format_follows_the_input(tmp_path, rgb):
    for f,e in FORMATS.items(): assert Image.open(write_image(tmp_path/f'like_{f}', rgb, Picture(rgb, format=f))).format == f
    im = Image.open(write_image(tmp_path/'a.jpg', rgb)); assert im.layer[0][1:3] == (1,1)  # 4:4:4

@pytest.mark.parametrize('a', [np.zeros((0,5,3)), np.zeros(5), np.zeros((2,2,5)), np.full((2,2,3), np.inf),
                               np.full((2,2), np.nan), np.full((2,2,3), 300), np.full((2,2,3), -1),
                               np.full((2,2,3), 2.), np.array([['a']]), np.zeros((2,2,3), complex), None, 'x'])
def test_what_is_no_picture(a):
    with pytest.raises(InputError): as_rgb(a)

@pytest.mark.parametrize('a,v', [(np.full((2,3), True), 255), (np.full((2,3,1), 7, np.uint8), 7), (np.full((2,3,4), .5),
            128), (np.full((2,3,3), 200, np.int64), 200), (np.full((2,3), 257*9, np.uint16), 9),
                                 (np.full((2,3,2), 5, np.uint8), 5), (np.ones((2,3,3), np.float16), 255)])
def test_what_is_one(a, v): r = as_rgb(a); assert r.shape == (2,3,3) and r.dtype == np.uint8 and (r == v).all()

def test_list_images(tmp_path, rgb):
    for n in ('b.PNG', 'a.jpg', 'sub/c.webp', 'sub/.hid/d.png', '.e.png', 'f.txt'):
        (tmp_path/n).parent.mkdir(parents=True, exist_ok=True); (tmp_path/n).write_bytes(b'x')
    assert [str(p.relative_to(tmp_path)) for p in list_images(tmp_path)] == ['a.jpg', 'b.PNG',
        'sub/c.webp'] and list_images(tmp_path/'f.txt') == [tmp_path/'f.txt']
    with pytest.raises(InputError): list_images(tmp_path/'nope')

def test_clean_exif_of_rubbish():
    for b in (b'', b'Exif\0\0', b'Exif\0\0II*\0\xff\xff\xff\xff', os.urandom(300)):
        e = Image.Exif(); e.load(clean_exif(b)); assert e[274] == 1
