"""More than a hundred broken or odd inputs: each ends as a protected picture or as one line that names the file; the batch goes on; nothing is overwritten."""
import errno, io, os, struct, zlib
from pathlib import Path
import cv2, numpy as np, pytest
from PIL import Image
from deidnb.assets import example_faces
from deidnb.core import InputError, OutputError, sha256
from deidnb.faces.io import read_image
from deidnb.pipeline import Deidentifier

FACE = example_faces(1)[0]
R = np.random.default_rng(0)

def enc(im, fmt, **kw):
    b = io.BytesIO(); (im if isinstance(im, Image.Image) else Image.fromarray(im)).save(b, fmt, **kw); return b.getvalue()

def png_bomb(w, h):
    "A small PNG that claims a huge size"
    chunk = lambda t, d: struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t+d))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)) + chunk(b'IDAT',
        zlib.compress(b'\0'*100000, 9)) + chunk(b'IEND', b'')

def real_bomb(w, h):
    "A PNG of one colour: all pixels are there, 1000 times smaller than its content"
    return enc(Image.new('L', (w, h), 128), 'PNG')

def tiff(a): return cv2.imencode('.tif', a)[1].tobytes()
def png(a): return cv2.imencode('.png', a)[1].tobytes()

def corpus():
    "name -> (bytes, expectation); expectation: 'made', 'error', or 'either'"
    out, P = {}, Image.fromarray(FACE)
    whole = dict(jpg=enc(P, 'JPEG', quality=90), png=enc(P, 'PNG'), webp=enc(P, 'WEBP', quality=90), tif=enc(P, 'TIFF'),
                 gif=enc(P, 'GIF'), bmp=enc(P, 'BMP'))
    prog = enc(P, 'JPEG', quality=90, progressive=True)
    for k,b in whole.items():
        out[f'whole.{k}'] = (b, 'made')
        for share in (0., .002, .01, .1, .5, .9): out[f'cut_{share}.{k}'] = (b[:int(len(b)*share)], 'error')
        out[f'last_byte.{k}'] = (b[:-1], 'either')
        z = bytearray(b); z[len(z)//3:len(z)//3+200] = b'\0'*200; out[f'zeros_inside.{k}'] = (bytes(z), 'either')
        out[f'garbage_after.{k}'] = (b + R.bytes(500), 'either')
        out[f'all_zero.{k}'] = (b'\0'*3000, 'error')
        out[f'text.{k}'] = (b'this is not a picture\n'*20, 'error')
    out['progressive_cut.jpg'] = (prog[:len(prog)//2], 'error')
    # the name lies
    out['png_called.jpg'], out['jpg_called.png'], out['webp_called.tif'], out['gif_called.webp'] = (whole['png'],
        'made'), (whole['jpg'], 'made'), (whole['webp'], 'made'), (whole['gif'], 'made')
    out['html.jpg'], out['script.png'], out['zip.webp'], out['pdf.tif'] = (b'<!doctype html><html></html>',
        'error'), (b'#!/bin/sh\nrm -rf /\n', 'error'), (b'PK\x03\x04'+b'\0'*200, 'error'), (b'%PDF-1.7\n'+b'\0'*200,
        'error')
    out['svg.png'], out['eps.jpg'], out['heic.heic'], out['jp2.jp2'] = (b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        'error'), (b'%!PS-Adobe-3.0 EPSF-3.0\nquit\n', 'error'), (b'\0\0\0\x18ftypheic'+b'\0'*99,
        'error'), (b'\0\0\0\x0cjP  \r\n\x87\n'+b'\0'*99, 'error')
    # sizes
    out['bomb_declared.png'], out['bomb_declared_65k.png'], out['bomb_real.png'] = (png_bomb(2**31-1, 2**31-1),
        'error'), (png_bomb(65000, 65000), 'error'), (real_bomb(16000, 14000), 'error')
    out['bomb.bmp'] = (struct.pack('<2sIHHIIiiHHIIiiII', b'BM', 200, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0,
                                   0), 'error')
    for w,h in ((1,1), (2,2), (1,300), (300,1), (7,5)):
        out[f'tiny_{w}x{h}.png'] = (enc(Image.new('RGB', (w,h), (9,9,9)), 'PNG'), 'error')
    wide = np.full((260, 20000, 3), 90, np.uint8); wide[2:258, 9000:9256] = FACE
    out['wide_20000.jpg'], out['tall_20000.jpg'] = (enc(wide, 'JPEG'),
                                                    'either'), (enc(np.ascontiguousarray(wide.transpose(1,0,2)),
            'JPEG'), 'either')
    # several frames
    f2 = [P, P.rotate(5)]
    for k,fmt in (('gif','GIF'), ('webp','WEBP'), ('png','PNG'), ('tif','TIFF')):
        out[f'animated.{k}'] = (enc(f2[0], fmt, save_all=True, append_images=f2[1:]), 'error')
    # modes and depths
    g = P.convert('L')
    for mode,k in (('1','png'), ('L','png'), ('P','png'), ('LA','png'), ('RGBA','png'), ('CMYK','jpg'), ('CMYK','tif'),
                   ('YCbCr','jpg'), ('YCbCr','tif'), ('LAB','tif'), ('L','jpg'), ('1','tif'), ('P','gif'),
                   ('RGBA','webp'), ('RGBA','tif'), ('HSV','png')):
        if mode == 'HSV': continue
        im = P.convert('RGB').convert(mode) if mode != 'LAB' else Image.merge('LAB', P.split())
        out[f'mode_{mode}.{k}'] = (enc(im, dict(png='PNG', jpg='JPEG', tif='TIFF', gif='GIF', webp='WEBP')[k]), 'either'
                                   if mode in ('1','LAB') else 'made')
    bgr = np.ascontiguousarray(FACE[..., ::-1])
    out['deep_rgb.png'], out['deep_rgb.tif'], out['deep_grey.png'] = (png(bgr.astype(np.uint16)*257),
        'made'), (tiff(bgr.astype(np.uint16)*257),
                  'made'), (png(cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY).astype(np.uint16)*257), 'made')
    grey = FACE.mean(2).astype(np.float32)
    nan = grey/255; nan = nan.copy(); nan[:9] = np.nan
    for name,a in (('float01', grey/255), ('float255', grey), ('float_nan', nan),
                   ('float_inf', np.where(grey > 200, np.inf, grey/255).astype(np.float32))):
        out[f'{name}.tif'] = (enc(Image.fromarray(a), 'TIFF'), 'either')
    pal = P.convert('P', palette=Image.ADAPTIVE); pal.info['transparency'] = 3
    out['palette_transparent.png'] = (enc(pal, 'PNG', transparency=3), 'made')
    clear = P.convert('RGBA'); clear.putalpha(0); out['fully_transparent.png'] = (enc(clear, 'PNG'), 'either')
    for o in range(1, 10):
        e = Image.Exif(); e[274] = o; turned = {3: 180, 6: 90, 8: 270}.get(o, 0)
        out[f'exif_{o}.jpg'] = (enc(P.rotate(turned, expand=True), 'JPEG', exif=e), 'made' if o in (1,3,6,8,9) else 'either')
    out['exif_rubbish.jpg'], out['icc_rubbish.jpg'] = (enc(P, 'JPEG', exif=b'Exif\0\0MM\0*' + R.bytes(60)),
                                                       'either'), (enc(P, 'JPEG', icc_profile=R.bytes(300)), 'made')
    out['no_face.jpg'], out['noise.png'] = (enc(np.full((200,200,3), 77, np.uint8), 'JPEG'),
                                            'error'), (enc(np.random.default_rng(0).integers(0, 256, (64,64,3),
                dtype=np.uint8), 'PNG'), 'error')
    # names
    j = whole['jpg']
    for n in ('ü ñ 日本語.jpg', '😀.jpg', '-rf.jpg', '--help.jpg', 'quo"te\'s.jpg', 'line\nbreak.jpg', 'tab\there.jpg', ' space .jpg', '$(touch hacked).jpg', '`id`;ls.jpg', 'back\\slash.jpg', '%s%n{}.jpg', 'UPPER.JPG', 'two.dots.tar.jpg',
              'a'*251+'.jpg', 'é'*125+'.jpg', 'b'*251+'.gif'[:4], '\x1b[31mred.jpg', 'nul_like_.jpg', 'CON.jpg', 'r\u202eevil.jpg'): out[n] = (j if not n.endswith('.gif') else whole['gif'], 'made')
    return out

CORPUS = corpus()

@pytest.fixture(scope='module')
def blur(): return Deidentifier('blur', strength='strong')

@pytest.fixture(scope='module')
def batch(tmp_path_factory, blur):
    "One run over the whole corpus, beside things that are no files at all"
    top = tmp_path_factory.mktemp('corpus'); src, dst = top/'in', top/'out'; src.mkdir()
    for n,(b,_) in CORPUS.items(): (src/n).write_bytes(b)
    (src/os.fsdecode(b'not_utf8_\xff\xfe.jpg')).write_bytes(CORPUS['whole.jpg'][0])
    (src/'folder.jpg').mkdir(); (src/'folder.jpg'/'inside.jpg').write_bytes(CORPUS['whole.jpg'][0])
    os.mkfifo(src/'pipe.jpg'); (src/'loop.jpg').symlink_to('loop.jpg')
    (src/'dangling.jpg').symlink_to('nowhere.jpg'); (src/'circle').symlink_to('.')
    (src/'link.jpg').symlink_to('whole.jpg'); (src/'device.jpg').symlink_to('/dev/zero')
    before = {p.name: sha256(p) for p in src.iterdir() if p.is_file() and not p.is_symlink()}
    records = {}
    s = blur.folder(src, dst, progress=False, report=lambda n, r: records.__setitem__(n, r))
    return dict(src=src, dst=dst, summary=s, records=records, before=before)

def out_of(batch, name):
    from deidnb.manifest import output_path
    return output_path(name, batch['dst'])

def test_the_corpus_is_large(): assert len(CORPUS) >= 100

def test_everything_is_accounted_for(batch):
    s = batch['summary']
    assert s['items'] == s['done'] + s['failed'] == len(batch['records']) and s['skipped'] == 0
    assert set(CORPUS) <= set(batch['records'])
    assert s['exit_code'] == 1

@pytest.mark.parametrize('name', CORPUS, ids=lambda n: n.encode('unicode_escape').decode()[:40])
def test_made_or_one_line(batch, name):
    rec, want = batch['records'][name], CORPUS[name][1]
    out = out_of(batch, name)
    if rec['status'] == 'done':
        assert want != 'error', rec
        assert rec['outcome'] == 'protected' and rec['receipt']['count']['fallback'] == 0
        im = read_image(out).rgb
        assert sha256(out) == rec['output_sha256']
        source = read_image(batch['src']/name).rgb
        assert im.shape == source.shape
        for f in rec['receipt']['faces']:
            x0,y0,x1,y1 = [int(v) for v in f['box']]
            a, b = source[max(y0,0):y1, max(x0,0):x1].astype(float), im[max(y0,0):y1, max(x0,0):x1].astype(float)
            assert np.abs(a-b).mean() > 3, 'the face was left as it is'
    else:
        assert want != 'made', rec['error']
        assert '\n' not in rec['error'] and ' '.join(name.split()) in rec['error'] and 'unexpected' not in rec['error'], rec['error']
        assert not out.exists()

@pytest.mark.parametrize('name', ['folder.jpg','pipe.jpg','loop.jpg','dangling.jpg','device.jpg'])
def test_not_files(batch, name):
    rec = batch['records'][name]
    assert rec['status'] == 'failed' and name in rec['error'] and 'unexpected' not in rec['error'] and not out_of(batch,
        name).is_file()

def test_circles_and_links(batch):
    assert not any(n.startswith('circle/') for n in batch['records'])
    assert batch['records']['link.jpg']['status'] == 'done' and not out_of(batch, 'link.jpg').is_symlink()
    assert batch['records']['folder.jpg/inside.jpg']['status'] == 'done'
    assert batch['records'][os.fsdecode(b'not_utf8_\xff\xfe.jpg')]['status'] == 'done'

def test_sources_are_untouched_and_nothing_is_left_behind(batch):
    assert {p.name: sha256(p) for p in batch['src'].iterdir() if p.is_file() and not p.is_symlink()} == batch['before']
    assert not list(batch['dst'].rglob('*.tmp')) and not Path('hacked').exists()

def test_again_skips_what_is_done(batch, blur):
    pngs = {p: sha256(p) for p in batch['dst'].rglob('*') if p.is_file() and '.deidnb' not in p.parts}
    s = blur.folder(batch['src'], batch['dst'], progress=False)
    assert (s['skipped'], s['done'], s['failed']) == (batch['summary']['done'], 0, batch['summary']['failed'])
    assert {p: sha256(p) for p in pngs} == pngs

def test_nothing_is_overwritten(tmp_path, blur):
    (tmp_path/'in').mkdir(); (tmp_path/'out').mkdir()
    for n in ('a.jpg','b.jpg','c.jpg'): (tmp_path/'in'/n).write_bytes(CORPUS['whole.jpg'][0])
    (tmp_path/'out'/'a.jpg').write_bytes(b'mine'); (tmp_path/'out'/'b.jpg').mkdir()
    (tmp_path/'elsewhere.jpg').write_bytes(b'also mine'); (tmp_path/'out'/'c.jpg').symlink_to(tmp_path/'elsewhere.jpg')
    s = blur.folder(tmp_path/'in', tmp_path/'out', progress=False)
    assert s['failed'] == 3 and (tmp_path/'out'/'a.jpg').read_bytes() == b'mine' and (tmp_path/'elsewhere.jpg').read_bytes() == b'also mine'
    s = blur.folder(tmp_path/'in', tmp_path/'out', progress=False, overwrite=True)
    assert s['done'] == 2 and s['failed'] == 1 and (tmp_path/'elsewhere.jpg').read_bytes() == b'also mine' and not (tmp_path/'out'/'c.jpg').is_symlink()

ARRAYS = dict(nan=np.full((64,64,3), np.nan), inf=np.full((64,64,3), np.inf, np.float32), text=np.full((4,4,3), 'x'), objects=np.full((4,4,3), None), empty=np.zeros((0,9,3), np.uint8), flat=np.zeros(99, np.uint8),
    five=np.zeros((9,9,5), np.uint8), four_d=np.zeros((2,9,9,3), np.uint8), negative=np.full((9,9,3), -4), large=np.full((9,9,3), 9999), complex=np.zeros((9,9,3), complex), scalar=np.uint8(3), none=None, string='photo.jpg')

@pytest.mark.parametrize('name', ARRAYS)
def test_arrays_that_are_no_pictures(name, blur):
    with pytest.raises(InputError) as e: blur.photo(ARRAYS[name])
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('a', [FACE, FACE/255., FACE.astype(np.uint16)*257, FACE.mean(2).astype(np.uint8),
                               np.dstack([FACE, FACE[..., :1]]), np.asfortranarray(FACE), FACE[::-1][::-1]],
                         ids=['uint8','float','uint16','grey','alpha','fortran','strides'])
def test_arrays_that_are(a, blur):
    b = np.array(a); r = blur.photo(a)
    assert r.ok and r.image.shape == (256,256,3) and r.image.dtype == np.uint8 and (np.asarray(a) == b).all()

@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_disk_trouble(tmp_path, blur, monkeypatch, code):
    (tmp_path/'in').mkdir()
    for i in range(3): (tmp_path/'in'/f'{i}.jpg').write_bytes(CORPUS['whole.jpg'][0])
    save, calls = Image.Image.save, []
    def full(self, fp, *a, **k):
        calls.append(fp)
        if len(calls) == 2: Path(fp).write_bytes(b'half'); raise OSError(code, os.strerror(code))
        return save(self, fp, *a, **k)
    monkeypatch.setattr(Image.Image, 'save', full)
    s = blur.folder(tmp_path/'in', tmp_path/'out', progress=False)
    assert (s['done'], s['failed']) == (2, 1) and '1.jpg' in s['failures'][0]['error'] and s['failures'][0]['code'] == 5
    assert not (tmp_path/'out'/'1.jpg').exists() and not list((tmp_path/'out').glob('.deidnb-*'))
    monkeypatch.undo()
    assert blur.folder(tmp_path/'in', tmp_path/'out', progress=False)['done'] == 1

def test_read_only_destination(tmp_path, blur, monkeypatch):
    (tmp_path/'in').mkdir(); (tmp_path/'in'/'a.jpg').write_bytes(CORPUS['whole.jpg'][0])
    mkdir = Path.mkdir
    def refuse(self, *a, **k):
        if 'out' in self.parts: raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return mkdir(self, *a, **k)
    monkeypatch.setattr(Path, 'mkdir', refuse)
    with pytest.raises(OutputError, match='cannot be made'): blur.folder(tmp_path/'in', tmp_path/'out', progress=False)

def test_what_was_written_is_what_was_checked(tmp_path, blur, monkeypatch):
    "A writer that writes something else is caught, and its file removed"
    (tmp_path/'a.png').write_bytes(CORPUS['whole.png'][0])
    import deidnb.faces.io as fio
    write = fio.write_image
    monkeypatch.setattr(fio, 'write_image', lambda p, rgb, **k: write(p, FACE, **k))
    from deidnb.pipeline import protect_file
    with pytest.raises(OutputError, match='not what was checked'): protect_file(blur, tmp_path/'a.png', tmp_path/'b.png')
    assert not (tmp_path/'b.png').exists()

@pytest.mark.parametrize('metadata', ['strip','keep','orientation'])
def test_metadata_never_shows_the_face(tmp_path, blur, metadata):
    "The thumbnail inside EXIF is the unprotected face"
    e = Image.Exif(); e[271], e[274] = 'camera maker', 1
    thumb = enc(Image.fromarray(FACE).resize((64,64)), 'JPEG'); raw = e.tobytes()
    (tmp_path/'a.jpg').write_bytes(enc(FACE, 'JPEG', exif=raw + thumb))
    from deidnb.pipeline import protect_file
    protect_file(blur, tmp_path/'a.jpg', tmp_path/'b.jpg', metadata=metadata)
    b = (tmp_path/'b.jpg').read_bytes()
    assert thumb not in b and b.count(b'\xff\xd8\xff') == 1
    assert (Image.open(tmp_path/'b.jpg').getexif().get(271) == 'camera maker') == (metadata == 'keep')
