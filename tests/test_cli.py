"""The command line: exit codes, messages, interruption, what it does not do."""
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from deidnb.assets import example_faces
from deidnb.cli import main
from deidnb.core import sha256
from deidnb.faces.io import read_image, write_image

FACES = example_faces(12)

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); Path('in').mkdir()
    for i in range(3): write_image(f'in/{i}.jpg', FACES[i])
    write_image('photo.png', FACES[5])
    return tmp_path

def run(*a): return main([*map(str, a)])
def deid(*a, m='blur'): return run('deid', *a, '-m', m, '--quiet')
def command(*a, **k):
    return subprocess.run([sys.executable, '-m', 'deidnb.cli', *map(str, a)], capture_output=True, text=True, **k)

def test_exit_codes(here, capsys):
    assert deid('in', '-o', 'out') == 0
    assert deid('photo.png', '-o', 'one.png') == 0 and deid('photo.png', '-o', 'out2') == 0 and Path('out2/photo.png').is_file()
    Path('in/broken.jpg').write_bytes(b'x')
    assert deid('in', '-o', 'out') == 1                       # some failed
    assert deid('in', '-o', 'out', m='blurr') == 2 and deid('in', '-o', 'in') == 2 and deid('in', '-o', 'x', '--set',
        'oops') == 2 and deid('in', '-o', 'x', '--seed', '1') == 2
    assert deid('in', '-o', 'x', '--strength', 'huge') == 2 and deid('in', '-o', 'x', '--only',
        '1,2') == 2 and run('deid', 'in') == 2 and run() == 2 and run('nothing') == 2
    assert deid('nowhere', '-o', 'x') == 3 and deid('in/broken.jpg', '-o', 'x.jpg') == 3 and deid('in/broken.jpg', '-o', 'x') == 3
    Path('empty').mkdir(); assert deid('empty', '-o', 'x') == 3
    assert deid('photo.png', '-o', 'one.png') == 5 and deid('in', '-o', 'photo.png') == 5 and deid('in', '-o',
        'photo.png/sub') == 5
    err = capsys.readouterr().err
    assert all(l.startswith(('deidnb: ', 'usage: ', ' ')) for l in err.splitlines() if l and 'error:' not in l), err

def test_a_missing_model_is_exit_code_4(here, monkeypatch):
    import deidnb.assets
    from deidnb.core import AssetError
    def gone(*a, **k): raise AssetError('cannot be fetched', 'yunet', 'Run deidnb assets pull.')
    from deidnb.gate import shared_finder
    shared_finder.cache_clear(); monkeypatch.setattr(deidnb.assets, 'asset', gone)
    assert deid('in', '-o', 'out') == 4 and deid('photo.png', '-o', 'one.png') == 4
    shared_finder.cache_clear()
    assert not list(Path('out').glob('*.jpg')) and not Path('one.png').exists()

def test_fallback_is_exit_code_1(here, monkeypatch, capsys):
    import deidnb.generate.pixels as P
    monkeypatch.setattr(P.Blur, '__call__', lambda self, crop, z=None, *, rng: 1/0)
    assert deid('in', '-o', 'out') == 1 and deid('photo.png', '-o', 'one.png') == 1
    assert 'covered by a plain ellipse' in capsys.readouterr().err and Path('one.png').is_file()
    assert json.loads(Path('one.png.receipt.json').read_text())['outcome'] == 'fallback'

def test_help_is_fast_and_says_the_codes():
    best = 9
    for _ in range(3):
        t = time.perf_counter(); r = command('--help'); best = min(best, time.perf_counter()-t)
    assert r.returncode == 0 and '130 interrupted' in r.stdout and all(c in r.stdout
        for c in ('deid','methods','evaluate','assets','doctor','demo'))
    assert best < 1.  # 0.5 s on a quiet machine
    heavy = subprocess.run([sys.executable, '-c',
                            'import sys, deidnb.cli; deidnb.cli.parser(); print([m for m in ("torch","cv2","mediapipe","scipy","PIL","onnxruntime") if m in sys.modules])'],
                           capture_output=True, text=True)
    assert heavy.stdout.strip() == '[]'

def test_information(here, capsys):
    assert run('methods') == 0 and 'pixelate' in capsys.readouterr().out
    assert run('methods', '--json') == 0 and {'blur','donor_swap'} <= {m['name'] for m in json.loads(capsys.readouterr().out)}
    assert run('assets', 'list', '--json') == 0 and any(r['name'] == 'yunet' for r in json.loads(capsys.readouterr().out))
    assert run('assets', 'licences') == 0 and 'yunet' in capsys.readouterr().out
    assert run('assets', 'verify', 'yunet', 'sface') == 0 and run('assets', 'verify', 'yunett') == 4
    capsys.readouterr(); assert run('doctor', '--json') == 0
    d = json.loads(capsys.readouterr().out)
    assert d['packages']['numpy'] and d['assets']['yunet'] == 'ok' and isinstance(d['todo'], list)
    assert run('--version') == 0 and capsys.readouterr().out.startswith('deidnb ') and run('evaluate', '--help') == 0

def test_parameters_reach_the_method(here):
    assert deid('photo.png', '-o', 'a.png', '--set', 'radius=3', '--set', 'region=oval') == 0 and deid('photo.png',
        '-o', 'b.png', '--strength', 'strong') == 0
    r = json.loads(Path('a.png.receipt.json').read_text())
    assert r['params'] == dict(radius=3, region='oval') and r['faces'][0]['info']['radius'] == 3
    assert sha256('a.png') != sha256('b.png')
    for s in ('c','d'):
        assert run('deid', 'photo.png', '-o', f'{s}.png', '-m', 'noise', '--seed', 4, '--simulate', '--quiet') == 0
    assert sha256('c.png') == sha256('d.png') and json.loads(Path('c.png.receipt.json').read_text())['simulated']

def test_regions(here):
    write_image('two.png', np.concatenate(FACES[:2], 1)); a = read_image('two.png').rgb
    assert deid('two.png', '-o', 'left.png', '--only', '0,0,256,256') == 0 and deid('two.png', '-o', 'right.png',
        '--except', '0,0,256,256') == 0
    l, r = read_image('left.png').rgb, read_image('right.png').rgb
    assert (l[:, 300:] == a[:, 300:]).all() and (l[:, :256] != a[:, :256]).any() and (r[:, :200] == a[:,
            :200]).all() and (r[:, 256:] != a[:, 256:]).any()

def test_detections_saved_edited_replayed(here):
    assert deid('photo.png', '-o', 'a.png', '--save-detections', 'faces.json') == 0
    d = json.loads(Path('faces.json').read_text()); d['faces'][0]['box'] = [0,0,40,40]
    d['faces'][0].pop('landmarks', None)
    d['faces'][0]['points5'] = [[10,15],[30,15],[20,22],[13,30],[27,30]]
    Path('faces.json').write_text(json.dumps(d))
    assert deid('photo.png', '-o', 'b.png', '--detections', 'faces.json') == 0
    a, b = read_image('photo.png').rgb, read_image('b.png').rgb
    assert (a[100:] == b[100:]).all() and (a[5:35,5:35] != b[5:35,5:35]).any()
    Path('bad.json').write_text('{')
    assert deid('photo.png', '-o', 'c.png', '--detections', 'bad.json') == 3 and deid('photo.png', '-o', 'c.png',
        '--detections', 'none.json') == 3
    assert deid('in', '-o', 'x', '--detections', 'faces.json') == 2

def test_nothing_is_overwritten(here):
    before = sha256('photo.png')
    assert deid('photo.png', '-o', 'photo.png') == 2 and deid('photo.png', '-o', 'photo.png',
                                                              '--overwrite') == 2 and sha256('photo.png') == before
    assert deid('photo.png', '-o', 'a.png') == 0; a = sha256('a.png')
    assert deid('photo.png', '-o', 'a.png', '--set', 'radius=40') == 5 and sha256('a.png') == a
    assert deid('photo.png', '-o', 'a.png', '--set', 'radius=40', '--overwrite') == 0 and sha256('a.png') != a

def test_odd_names_on_a_plain_terminal(here):
    for n in ('-o.jpg', 'line\nbreak.jpg', '😀.jpg', os.fsdecode(b'\xff\xfe.jpg'), '\x1b[31m.jpg'):
        Path('in', n).write_bytes(b'broken')
    r = subprocess.run([sys.executable, '-m', 'deidnb.cli', 'deid', 'in', '-o', 'out', '-m', 'blur'],
                       capture_output=True, env=dict(os.environ, PYTHONIOENCODING='ascii:strict'))
    assert r.returncode == 1 and r.stderr.count(b'deidnb: ') == 5 == len(r.stderr.splitlines()), r.stderr
    # no bar without a terminal
    assert b'\x1b' not in r.stderr + r.stdout and b'3 done' in r.stdout and b'photo/s' not in r.stderr
    assert command('deid', '-o', 'out3', '-m', 'blur', '--', 'in/-o.jpg').returncode == 3

def many(n=16):
    Path('many').mkdir()
    big = np.concatenate(FACES[:2], 1)
    for i in range(n): write_image(f'many/{i:02d}.png', np.roll(big, i, 0))
    return n

# a job in the background of a shell ignores SIGINT; preexec_fn would fork this many-threaded process, which can hang
START = 'import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from deidnb.cli import main; sys.exit(main(sys.argv[1:]))'

def start(*extra):
    p = subprocess.Popen([sys.executable, '-c', START, 'deid', 'many', '-o', 'out', '-m', 'blur', *extra],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time()+60
    while len(list(Path('out').glob('[0-9]*.png'))) < 2 and time.time() < end and p.poll() is None: time.sleep(.01)
    return p

@pytest.mark.parametrize('sig,code', [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_stopped_and_resumed(here, sig, code):
    n = many(); p = start(); p.send_signal(sig); out, err = p.communicate(timeout=60)
    assert p.returncode == code, err
    if sig != signal.SIGKILL: assert 'interrupted' in err and 'Traceback' not in err and not list(Path('out').rglob('.deidnb-*'))
    done = {f: (f.stat().st_mtime_ns, sha256(f)) for f in Path('out').glob('[0-9]*.png')}
    logged = [json.loads(l) for l in Path('out/.deidnb/manifest.jsonl').read_text().splitlines()]
    sure = {l['item'] for l in logged if l['status'] == 'done'}
    assert 0 < len(sure) < n and {f.name for f in done} - sure <= {logged[-1]['item']}   # at most the one in flight
    assert run('deid', 'many', '-o', 'out', '-m', 'blur', '--quiet') == 0
    assert len(list(Path('out').glob('*.png'))) == n and not list(Path('out').rglob('.deidnb-*'))
    # what was done was not done again
    assert all((f.stat().st_mtime_ns, sha256(f)) == was for f,was in done.items() if f.name in sure)

def test_interrupt_with_workers(here):
    many(16); p = start('--jobs', '2'); p.send_signal(signal.SIGINT); out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'Traceback' not in err, err
    assert run('deid', 'many', '-o', 'out', '-m', 'blur', '--quiet') == 0 and len(list(Path('out').glob('*.png'))) == 16

def test_demo(here, capsys):
    assert run('demo', '-o', 'demo', '-m', 'pixelate') == 0
    out = capsys.readouterr().out
    assert 'no longer recognised by sface' in out and 'refused, as it should be' in out
    assert all(Path('demo', n).is_file()
               for n in ('sheet.png','receipt.json','report.html')) and len(list(Path('demo/photos').rglob('*.*g'))) >= 5
    page = Path('demo/report.html').read_text(); assert 'http' not in page and '<script' not in page and str(here) not in page
