"The demo: inputs, one search a picture, measures, files, exit code"
import json
import numpy as np
import pytest
from deidnb.core import ConfigError, Face
from deidnb import demo

class Counting:
    "A finder that sees one face in the middle"
    def __init__(self): self.calls = 0
    def find(self, rgb, **kw):
        self.calls += 1; h, w = rgb.shape[:2]
        return [Face([.3*w,.3*h,.7*w,.7*h], np.array([[.4,.45],[.6,.45],[.5,.55],[.42,.62],[.58,.62]])*[w,h], .9)]

class Same:
    "A recogniser that knows everybody who has not changed at all"
    name, kind = 'same', 'cosine'
    def encode(self, pictures, faces): return np.array([[float(p.mean())] for p in pictures])
    def score(self, a, b): return 1 - np.abs(np.subtract(a, b))[:, 0]/255
    def threshold(self, fpr): return .999

def test_inputs_all_and_few(tmp_path):
    assert len(demo.make_inputs(tmp_path/'a')) == 8
    few = demo.make_inputs(tmp_path/'b', names=('broken.jpg','formats/grey.png'))
    assert {p.relative_to(tmp_path/'b').as_posix()
            for p in few} == {'broken.jpg','formats/grey.png'} == {p.relative_to(tmp_path/'b').as_posix()
        for p in (tmp_path/'b').rglob('*.*')}
    with pytest.raises(ConfigError, match='formats/grey.png'): demo.make_inputs(tmp_path/'c', names=('formats/gray.png',))

def test_every_picture_is_searched_once():
    f = Counting(); r = demo.Remember(f); a, b = np.zeros((40,50,3), np.uint8), np.ones((40,50,3), np.uint8)
    assert r.find(a, mesh=True) is r.find(a.copy(), mesh=True) and f.calls == 1
    r.find(b, mesh=True); r.find(a, mesh=False); r.find(a.reshape(50,40,3), mesh=True)
    assert f.calls == 4

def test_measure_tells_changed_from_unchanged():
    a, b = np.full((64,64,3), 90, np.uint8), np.full((64,64,3), 160, np.uint8)
    kept, changed = demo.measure([('kept', a, a), ('changed', a, b)], Counting(), {'same': Same()})
    assert kept['detected'] and not kept['scores']['same']['passed'] and changed['scores']['same']['passed']
    s = demo.summary([kept, changed], 12.)
    assert s['recognisers']['same']['lost'] == 1 and s['faces'] == s['detected'] == 2 and s['nme'] is None
    assert ('no longer recognised by same' in dict(demo.lines(s))) and dict(demo.lines(s))['median time per face'] == '12 ms'

def test_run_writes_everything_and_says_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert demo.run('out', 'mask', names=('formats/transparent.png','broken.jpg')) == 0
    said = capsys.readouterr().out
    for name in ('sheet.png','receipt.json','report.html'): assert (tmp_path/'out'/name).is_file() and f'out/{name}' in said
    assert 'refused, as it should be: out/input/broken.jpg' in said and str(tmp_path) not in said
    receipt = json.loads((tmp_path/'out'/'receipt.json').read_text())
    assert receipt['method'] == 'mask' and [f['item']
                                            for f in receipt['failures']] == ['broken.jpg'] and receipt['summary']['faces'] == 1

def test_the_broken_file_must_be_refused(tmp_path, monkeypatch):
    make = demo.make_inputs
    def mended(folder, overwrite=True, names=None):
        out = make(folder, overwrite, names)
        (folder/'broken.jpg').write_bytes(make(folder/'..'/'other')[1].read_bytes())
        return out
    monkeypatch.setattr(demo, 'make_inputs', mended)
    assert demo.run(tmp_path/'out', 'mask', names=('broken.jpg',)) == 1

def test_the_default_demo_is_drawn_with_a_fixed_seed(tmp_path):
    r = demo.protect(tmp_path/'out', names=('formats/rotated.jpg',))
    assert r['d'].seed is not None and r['d'].simulate and all(p['receipt']['simulated'] for p in r['photos'].values())
    assert demo.protect(tmp_path/'mask', 'mask', names=('formats/rotated.jpg',))['d'].seed is None
    page = demo.write(tmp_path/'out', r)['report'].read_text()
    assert 'fixed seed' in page
