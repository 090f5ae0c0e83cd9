"The widget: photos in, callbacks, messages, safe saving"
import builtins, datetime, json
import numpy as np
import pytest
pytest.importorskip('ipywidgets')
from deidnb.core import ConfigError, DeidnbError, package_dir
from deidnb import widget as W

FACE = package_dir()/'examples'/'face_02.jpg'

def upload(name, data):
    return (dict(name=name, type='image/jpeg', size=len(data), content=memoryview(data),
                 last_modified=datetime.datetime(2026, 1, 1)),)

@pytest.fixture
def w(tmp_path): return W.protect_widget('face 3', 'mask', 'strong', out=tmp_path/'out.png')

def test_photos_by_name_and_path():
    assert len(W.photo_names()) == 13
    for n in W.photo_names(): assert W.load_photo(n).rgb.dtype == np.uint8
    assert (W.load_photo(str(FACE)).rgb == W.load_photo('face 3').rgb).all()
    with pytest.raises(DeidnbError, match='nobody.jpg'): W.load_photo('nobody.jpg')

@pytest.mark.parametrize('shape', [(40,60,3), (700,300,3), (1,1,3)])
@pytest.mark.parametrize('at', [-1, 0, .37, 1, 2])
def test_split_view(shape, at):
    a, b = np.zeros(shape, np.uint8), np.full(shape, 200, np.uint8); v = W.split_view(a, b, at, 512)
    assert max(v.shape) <= max(512, 3) and v.dtype == np.uint8 and (a == 0).all() and (b == 200).all()
    if at <= 0: assert (v == 200).all()
    if at >= 1: assert (v == 0).all()
    if at == .37 and shape[1] > 10: assert (v[:, 0] == 0).all() and (v[:, -1] == 200).all()

def test_click_protect_slide_save(w, tmp_path):
    assert w.save_button.disabled and w.slider.disabled and w.save() is None and 'press Protect' in w.status.value
    w.go.click()
    assert w.result.ok and not w.save_button.disabled and 'protected' in w.table.value and '1 face found, 1 protected' in w.status.value
    seen = {w.view.value}
    for x in (0., .3, 1.): w.slider.value = x; seen.add(w.view.value)
    assert len(seen) >= 3
    w.save_button.click()
    from deidnb.faces.io import read_image
    assert (read_image(tmp_path/'out.png').rgb == w.result.image).all()
    assert json.loads((tmp_path/'out.png.receipt.json').read_text())['method'] == 'mask'
    before = (tmp_path/'out.png').read_bytes(); w.save_button.click()
    assert 'exists already' in w.status.value and (tmp_path/'out.png').read_bytes() == before

def test_saves_what_was_shown_with_the_method_that_made_it(w, tmp_path):
    w.protect(); w.method.value = 'blur'; w.save()
    assert json.loads((tmp_path/'out.png.receipt.json').read_text())['method'] == 'mask'

def test_another_photo_forgets_the_result(w):
    w.protect(); w.photo.value = 'face 1'
    assert w.result is None and w.save_button.disabled and w.table.value == ''

def test_upload(w):
    w.upload.value = upload('me <b>.jpg', FACE.read_bytes())
    assert w.photo.value == 'me <b>.jpg' and (w.picture.rgb == W.load_photo('face 3').rgb).all()
    w.protect(); assert w.result.ok
    w.upload.value = upload('<script>.txt', b'Dear Sir')
    assert '&lt;script&gt;.txt: is not a picture' in w.status.value and w.photo.value == 'me <b>.jpg'

def test_no_face_and_unwritable(w, tmp_path):
    w.photos['wall'] = W.load_photo('face 1'); w.photos['wall'].rgb = np.full((200,200,3), 180, np.uint8)
    w.photo.options = [*w.photo.options, 'wall']; w.photo.value = 'wall'
    w.protect(); assert 'No face was found' in w.table.value and w.save_button.disabled and w.save() is None
    w.photo.value = 'face 3'; w.protect(); (tmp_path/'file').write_text(''); w.name.value = str(tmp_path/'file'/'x.png')
    assert w.save() is None and 'file/x.png' in w.status.value
    w.name.value = str(tmp_path/'x.exe')
    assert w.save() is None and 'x.exe' in w.status.value and not list(tmp_path.glob('x.exe*'))

def test_unknown_method_or_missing_file():
    with pytest.raises(ConfigError, match='folders only'): W.protect_widget(method='k_same_eigen')
    with pytest.raises(ConfigError, match="no method 'blr'"): W.protect_widget(method='blr')
    assert 'nobody.jpg' in W.protect_widget('nobody.jpg', 'blur').status.value

def test_without_ipywidgets(monkeypatch):
    real = builtins.__import__
    def no(name, *a, **k):
        if name == 'ipywidgets': raise ImportError(name)
        return real(name, *a, **k)
    monkeypatch.setattr(builtins, '__import__', no)
    with pytest.raises(ConfigError, match="is not installed") as e: W.protect_widget()
    assert "pip install 'deidnb[all]'" in str(e.value)
