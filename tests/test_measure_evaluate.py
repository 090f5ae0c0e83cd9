"Tasks, resumption, honesty about failures, the command line"
import csv, json, shutil
from pathlib import Path
import cv2, numpy as np, pytest
from deidnb.core import ConfigError, InputError, data_dir, package_dir
from deidnb.measure import evaluate as E
from deidnb.measure.tables import Table

EXAMPLES = sorted((package_dir()/'examples').glob('face_*.jpg'))


class Thumb:
    "A stand-in recogniser: 8x8 thumbnail of the aligned face"
    name = 'thumb'
    def encode(self, pictures, faces, batch=16):
        from deidnb.faces.align import align5
        t = np.stack([cv2.resize(align5(p, f.points5)[0], (8, 8),
                                 interpolation=cv2.INTER_AREA).astype(np.float32).ravel() for p,
                      f in zip(pictures, faces)])
        t = t - t.mean(1, keepdims=True); return t/np.maximum(np.linalg.norm(t, axis=1, keepdims=True), 1e-9)
    def score(self, a, b): return (a*b).sum(-1)
    def distance(self, a, b): return np.linalg.norm(a-b, axis=-1)
    def threshold(self, fpr=1e-3): return .93


@pytest.fixture
def album(tmp_path):
    "Three people with two pictures each: the second is a slightly changed first"
    root = tmp_path/'album'
    for i, p in enumerate(EXAMPLES[:3]):
        a = cv2.imread(str(p)); (root/f'p{i}').mkdir(parents=True)
        cv2.imwrite(str(root/f'p{i}'/'1.png'), a)
        cv2.imwrite(str(root/f'p{i}'/'2.png'), cv2.convertScaleAbs(a, alpha=.95, beta=6))
    return root


def copy(src, dst, change=lambda a: a, suffix=None):
    for p in src.rglob('*.png'):
        q = dst/p.relative_to(src); q = q.with_suffix(suffix or q.suffix)
        q.parent.mkdir(parents=True, exist_ok=True); cv2.imwrite(str(q), change(cv2.imread(str(p))))
    return dst


def run(album, dst, **kw):
    return E.evaluate_pairs(album, dst, experts=[Thumb()], attributes=False, progress=False, n_boot=100, **kw)


def test_identity_is_never_a_success(album, tmp_path):
    t = run(album, copy(album, tmp_path/'same'), name='same')
    assert t.get('same', 'thumb: success').value == 0 and t.get('same', 'thumb: TPR').value == t.get('same',
        'thumb: TPR orig').value == 1
    assert t.get('same', 'thumb: rank-1').value == 1 and t.get('same', 'MAE').value == 0 and t.get('same',
        'PSNR').value == 100 and t.get('same', 'found by MTCNN').value == 1


def test_swapped_people_are(album, tmp_path):
    "Everybody gets the next person's picture: full success, and every rank-1 guess is wrong"
    dst = tmp_path/'swap'
    for i in range(3): shutil.copytree(album/f'p{(i+1) % 3}', dst/f'p{i}')
    t = run(album, dst, name='swap')
    assert t.get('swap', 'thumb: success').value == 1 and t.get('swap', 'thumb: rank-1').value == 0 and t.get('swap',
        'thumb: AUC').value < .5
    assert t.get('swap', 'thumb: success').people == 3 and t.get('swap', 'thumb: success').n == 6 and t.get('swap',
        'thumb: success').lo < .5


def test_covered_faces_do_not_crash(album, tmp_path):
    t = run(album, copy(album, tmp_path/'grey', lambda a: np.full_like(a, 128)), name='g')
    assert t.get('g', 'found by YuNet').value == 0 and 'landmark NME' not in [r.measure for r in t if np.isfinite(r.value)]


def test_bad_pictures_are_counted_not_fatal(album, tmp_path):
    dst = copy(album, tmp_path/'d', lambda a: cv2.GaussianBlur(a, (0, 0), 3))
    (dst/'p0'/'1.png').write_bytes(b'broken')
    cv2.imwrite(str(dst/'p1'/'1.png'), np.zeros((9, 9, 3), np.uint8)); (dst/'p2'/'1.png').unlink()
    t = run(album, dst)
    assert t.meta['errors'] == 2 and t.meta['measured'] == 3 and t.meta['without_protected_picture'] == 1 and '1.png' in t.meta['first_error']


def test_no_face_in_the_original(album, tmp_path):
    cv2.imwrite(str(album/'p0'/'1.png'), np.full((200, 200, 3), 99, np.uint8)); t = run(album, copy(album, tmp_path/'x'))
    assert t.meta['no_face_in_original'] == 1 and t.meta['measured'] == 5


def test_results_do_not_depend_on_the_file_type(album, tmp_path):
    a, b = (run(album, copy(album, tmp_path/s[1:], lambda p: cv2.GaussianBlur(p, (0, 0), 4), s), name='x')
            for s in ('.png', '.tiff'))
    assert a.to_csv() == b.to_csv()


def test_people_csv(album, tmp_path):
    names = [p.relative_to(album).as_posix() for p in album.rglob('*.png')]
    with open(tmp_path/'who.csv', 'w', newline='') as f:
        csv.writer(f).writerows([['file', 'person'], *[[n, 'only one'] for n in names]])
    t = run(album, copy(album, tmp_path/'s'), people=tmp_path/'who.csv', name='s')
    assert t.meta['people'] == 1 and np.isnan(t.get('s', 'landmark NME').lo)
    (tmp_path/'bad.csv').write_text('a\n')
    with pytest.raises(InputError, match='two columns'): run(album, tmp_path/'s', people=tmp_path/'bad.csv')


def test_resume_and_shards(album, tmp_path):
    task, calls = E.folder_task(album), []
    class Source:
        def prepare(self): calls.append('prepare')
        def __call__(self, key):
            calls.append(key)
            if len(calls) == 5: raise KeyboardInterrupt
            return cv2.GaussianBlur(cv2.imread(str(album/key))[..., ::-1], (0, 0), 3), {}
    o = E.Originals(task, {'thumb': Thumb()}, tmp_path/'o', False).fill(task.keys); f = tmp_path/'run'
    with pytest.raises(KeyboardInterrupt): E.run_chunks(Source(), o, f, task.protect, size=2)
    assert len(list(f.glob('chunk_*.json'))) == 1 and not list(f.glob('.deidnb-*'))
    E.run_chunks(Source(), o, f, task.protect, size=2, shard=(1, 2)); done = len(list(f.glob('chunk_*.json')))
    E.run_chunks(Source(), o, f, task.protect, size=2); rows, arrays = E.load_chunks(f)
    assert done == 2 and [r['key'] for r in rows] == task.protect and len(arrays['code_thumb']) == 6
    assert calls.count(task.protect[0]) == 1                                          # finished chunks are not made again
    whole = tmp_path/'whole'; E.run_chunks(Source(), o, whole, task.protect, size=6); r2, a2 = E.load_chunks(whole)
    assert np.allclose(a2['code_thumb'], arrays['code_thumb'], atol=1e-5) and r2[3]['nme'] == pytest.approx(rows[3]['nme'])


def test_damaged_records_are_made_again(album, tmp_path):
    task = E.folder_task(album); E.Originals(task, {'thumb': Thumb()}, tmp_path/'o', False).fill(task.keys)
    f = sorted((tmp_path/'o').glob('*.npz')); f[0].write_bytes(b'PK\x03\x04broken'); f[1].write_bytes(b'')
    o = E.Originals(task, {'thumb': Thumb()}, tmp_path/'o', False); assert sum(o._needs(o.load(k)) for k in task.keys) == 2
    o.fill(task.keys); assert not any(o._needs(o.load(k)) for k in task.keys)


def test_recalibration_catches_a_collapsed_code():
    "All protected codes in one corner: no one passes the old threshold, but the corner is as near to its owner as before"
    g = np.random.default_rng(0); n, d = 400, 16; unit = lambda x: x/np.linalg.norm(x, axis=1, keepdims=True); who = np.arange(n)
    ref = unit(g.normal(size=(n, d))); pro = unit(.3*ref + 2*np.eye(d)[0])
    e = Thumb(); gen = e.score(ref, pro); imp = E.recalibrated_scores(e, ref, pro, who)
    from deidnb.measure.verification import auc
    assert (gen >= .93).mean() < .05 and len(imp) >= 100_000 and auc(gen, imp) > .6 and E.auc_interval(gen, imp,
        who)[0] == pytest.approx(auc(gen, imp))


def test_method_from_the_table(album, tmp_path):
    kw = dict(experts=[Thumb()], attributes=False, progress=False, n_boot=50, work=tmp_path/'w')
    t = E.evaluate_method('mask', album, out=tmp_path/'out', **kw)
    assert t.get('mask', 'thumb: success').value == 1 and t.get('mask', 'time per face').value > 0
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['results.csv', 'results.html', 'results.json', 'results.md']
    assert len(list((tmp_path/'w').glob('mask-*/images/**/*.png'))) == 6 and E.evaluate_method('mask', album,
        **kw).to_csv() == t.to_csv()


def test_merged_table_keeps_one_order_of_measures():
    a = Table().add('a', 'x: success', 1).add('a', 'PSNR', 1)
    b = Table().add('b', 'x: success', 1).add('b', 'landmark NME', 1).add('b', 'PSNR', 1)
    m = E.merge([a, b]); assert m.measures == ['x: success', 'landmark NME', 'PSNR'] and m.subjects == ['a', 'b']


@pytest.mark.parametrize('argv,text', [(['a'], 'two folders'), (['a', 'b', '-m', 'blur'], 'one folder'),
                                       (['lfw', '-m', 'nosuch'], 'nosuch'), (['lfw', '-m', 'blur', '--shard', 'x'],
            'I/N')])
def test_command_line_errors(argv, text):
    with pytest.raises(ConfigError, match=text): E.main(argv)


def test_set_needs_an_equals_sign():
    with pytest.raises(ConfigError, match='K=V'): E._params(E.parser().parse_args(['x', '--set', 'sigma']))


@pytest.mark.parametrize('text', ['', '5\t300\n', 'x\nA\t1\n'])
def test_bad_pairs_file(text, tmp_path):
    (tmp_path/'pairs.txt').write_text(text)
    with pytest.raises(InputError): E.read_pairs(tmp_path/'pairs.txt')


def test_lfw_task():
    if data_dir() is None or not (data_dir()/'lfw'/'pairs.txt').is_file(): pytest.skip('needs LFW below $DEIDNB_DATA')
    t = E.lfw_task()
    assert len(t.pairs) == 1500 and all(t.people[a] == t.people[b] and a != b for a,
                                        b in t.pairs) and set(t.protect) == {b for _, b in t.pairs}
    assert len(E.lfw_task(7).pairs) == 7
    f = E.lfw_task(first=True)
    assert f.name == 'lfw-first' and not set(f.protect) & set(t.protect) and {(a, b) for b,
        a in f.pairs} <= set(t.pairs) and len(f.pairs) > 1000


def test_measure_does_not_import_generate():
    for p in (package_dir()/'measure').glob('*.py'):
        assert 'deidnb.generate' not in p.read_text() and 'from ..generate' not in p.read_text()
