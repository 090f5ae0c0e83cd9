"Assets and sources: hostile archives, broken downloads, client settings, races, and the restricted unpickler"
import base64, builtins, hashlib, http.server, io, json, multiprocessing, os, pickle, re, signal, subprocess, sys, tarfile, threading, time, zipfile
from pathlib import Path
import numpy as np
import pytest
import yaml
import deidnb.assets as A
import deidnb.sources as S
from deidnb.core import AssetError, ConfigError

DATA = {'w.bin': b'weights' * 1000, 'w.xml': b'<net/>'}
sha = lambda b: hashlib.sha256(b).hexdigest()

# -- a little world: archives, a server, a manifest ---------------------------------------------------------------------

def wheel(path, files):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for n,b in files.items(): z.writestr(n, b)
    return path

def tgz(path, entries): # entries: (name, bytes) or TarInfo
    with tarfile.open(path, 'w:gz') as t:
        for e in entries:
            if isinstance(e, tarfile.TarInfo): t.addfile(e)
            else: i = tarfile.TarInfo(e[0]); i.size = len(e[1]); t.addfile(i, io.BytesIO(e[1]))
    return path

def row_for(archive, source, members, **kw):
    b = Path(archive).read_bytes()
    return dict(source=source, licence='MIT', origin='test', terms='none', redistribute=True, needed_by=['test'], archive=dict(name=Path(archive).name, size=len(b), sha256=sha(b)),
                files={f: dict(member=m, size=len(DATA[f]), sha256=sha(DATA[f])) for f,m in members.items()}) | kw

class Server:
    "Localhost files with counters, optional credentials, redirects and broken answers"
    def __init__(self, root):
        self.root, self.hits, self.auth_seen, self.need, self.redirect, self.cut, self.slow = Path(root), [], [], None, {}, 0, 0
        me = self
        class H(http.server.BaseHTTPRequestHandler):
            def log_message(self, *a): pass
            def do_GET(self):
                path = self.path.split('?')[0]
                me.hits.append(path); me.auth_seen.append(self.headers.get('Authorization'))
                if path in me.redirect:
                    self.send_response(302); self.send_header('Location', me.redirect[path])
                    self.end_headers(); return
                if me.need and self.headers.get('Authorization') != me.need: self.send_response(401); self.end_headers(); return
                f = me.root/path.strip('/').replace('%2f', '/').replace('%2F', '/'); f = f/'index.html' if f.is_dir() else f
                if not f.is_file(): self.send_response(404); self.end_headers(); return
                b = f.read_bytes(); self.send_response(200); self.send_header('Content-Length', str(len(b)))
                self.send_header('Content-Type', 'text/html' if f.suffix == '.html' else 'application/octet-stream')
                self.end_headers()
                if f.suffix in ('.whl', '.tgz') and me.slow: time.sleep(me.slow)
                if f.suffix in ('.whl', '.tgz') and me.cut: me.cut -= 1; b = b[:len(b)//2]
                try: self.wfile.write(b)
                except OSError: pass
                self.close_connection = True
        self.s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), H); self.url = f'http://127.0.0.1:{self.s.server_port}'
        threading.Thread(target=self.s.serve_forever, daemon=True).start()
    def count(self, end): return sum(h.endswith(end) for h in self.hits)

@pytest.fixture
def world(tmp_path, monkeypatch):
    "A manifest folder, an empty cache and an environment without the user's settings"
    for k in list(os.environ):
        if k.upper().startswith(('PIP_', 'NPM_', 'DEIDNB_')) or k.lower() in ('http_proxy', 'https_proxy', 'all_proxy',
            'xdg_config_home', 'xdg_config_dirs'):
            monkeypatch.delenv(k)
    monkeypatch.setenv('HOME', str(tmp_path/'home')); monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setenv('DEIDNB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull); monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('NPM_CONFIG_GLOBALCONFIG', str(tmp_path/'none'))
    (tmp_path/'manifests').mkdir(); monkeypatch.setattr(A, 'manifest_dir', lambda: tmp_path/'manifests'); A._seen.clear()
    class W:
        root, cache = tmp_path, tmp_path/'cache'
        def models(self, **rows):
            for k in A.KINDS: (tmp_path/f'manifests/{k}.yaml').write_text(yaml.safe_dump(rows if k == 'models' else {}))
        def wheel(self, name='toy-1.0-py3-none-any.whl'):
            (tmp_path/'links').mkdir(exist_ok=True)
            return wheel(tmp_path/'links'/name, {f'toy/{n}': b for n,b in DATA.items()} | {'toy/setup.py': b'raise SystemExit'})
        def simple(self, top, archive, fragment=True): # a simple index below top
            (top/'simple/toy').mkdir(parents=True, exist_ok=True); (top/'files').mkdir(exist_ok=True)
            (top/'files'/archive.name).write_bytes(archive.read_bytes())
            (top/'simple/toy/index.html').write_text(f'<a href="../../files/{archive.name}{"#sha256=" + sha(archive.read_bytes()) if fragment else ""}">{archive.name}</a>')
        left = property(lambda self: sorted(p.relative_to(self.cache).as_posix() for p in self.cache.rglob('*')
                                            if p.is_file() and p.suffix != '.lock') if self.cache.exists() else [])
    return W()

FILES = {'w.bin': 'toy/w.bin', 'w.xml': 'toy/w.xml'}

# -- ways to a file --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('way', ['find-links folder', 'find-links page', 'file index', 'http index', 'extra index',
                                 'archives folder', 'config file', 'http find-links'])
def test_pip_ways(world, monkeypatch, way):
    w = world.wheel(); world.models(toy=row_for(w, 'pip:toy==1.0', FILES)); top = world.root/'top'; world.simple(top, w)
    if way in ('http index', 'extra index', 'file index', 'config file'): monkeypatch.delenv('PIP_NO_INDEX')
    s = Server(top)
    if way == 'find-links folder': monkeypatch.setenv('PIP_FIND_LINKS', f'/nonexistent {w.parent}')
    if way == 'find-links page': monkeypatch.setenv('PIP_FIND_LINKS', (top/'simple/toy/index.html').as_uri())
    if way == 'http find-links': monkeypatch.setenv('PIP_FIND_LINKS', f'{s.url}/simple/toy/')
    if way == 'file index': monkeypatch.setenv('PIP_INDEX_URL', (top/'simple').as_uri())
    if way == 'http index': monkeypatch.setenv('PIP_INDEX_URL', f'{s.url}/simple/')
    if way == 'extra index':
        monkeypatch.setenv('PIP_INDEX_URL', f'{s.url}/empty')
        monkeypatch.setenv('PIP_EXTRA_INDEX_URL', f'{s.url}/nothing {s.url}/simple')
    if way == 'archives folder': monkeypatch.setenv('DEIDNB_ARCHIVES', str(w.parent)); monkeypatch.setenv('DEIDNB_OFFLINE', '1')
    if way == 'config file':
        (world.root/'pip.conf').write_text(f'[global]\nindex-url = {s.url}/simple\n')
        monkeypatch.setenv('PIP_CONFIG_FILE', str(world.root/'pip.conf'))
    assert A.asset('toy', 'w.bin').read_bytes() == DATA['w.bin'] and A.asset('toy').is_dir() and A.asset('toy', 'w.xml').exists()
    # no archive, nothing else
    assert world.left == [f'models/{A.folder_of(A.find_row("toy")).name}/{f}' for f in ('.verified.json', 'w.bin', 'w.xml')]
    n = len(s.hits); monkeypatch.setenv('DEIDNB_OFFLINE', '1'); A._seen.clear(); A.asset('toy'); assert len(s.hits) == n

@pytest.mark.parametrize('spec,scope', [('toy@1.0', ''), ('@lab/toy@1.0', '@lab')])
def test_npm(world, monkeypatch, spec, scope):
    name = spec.rpartition('@')[0]; s = Server(world.root/'npm'); other = Server(world.root/'npm2')
    t = tgz(world.root/'toy-1.0.tgz', [(f'package/{n}', b) for n,b in DATA.items()])
    world.models(toy=row_for(t, f'npm:{spec}', {f: f'package/{f}' for f in DATA}))
    d = world.root/'npm'/name; (d/'-').mkdir(parents=True); (d/'-/toy-1.0.tgz').write_bytes(t.read_bytes())
    (world.root/'home').mkdir(); rc = world.root/'home/.npmrc'
    rc.write_text(f'registry={other.url}/\n{scope}:registry={s.url}\n//127.0.0.1:{s.s.server_port}/:_authToken=${{TOKEN}}\n'
                  if scope else f'registry={s.url}/\n//127.0.0.1:{s.s.server_port}/:_authToken=${{TOKEN}}\n')
    monkeypatch.setenv('TOKEN', 'sesame'); s.need = 'Bearer sesame'
    assert A.asset('toy', 'w.xml').read_bytes() == DATA['w.xml']
    assert not other.hits and set(s.auth_seen) == {'Bearer sesame'}

def test_npm_tarball_elsewhere(world, monkeypatch):
    "A registry whose tarballs have other addresses than the usual one"
    s = Server(world.root/'npm'); t = tgz(world.root/'toy-1.0.tgz', [('package/w.bin', DATA['w.bin'])])
    world.models(toy=row_for(t, 'npm:toy@1.0', {'w.bin': 'package/w.bin'}))
    (world.root/'npm/blobs').mkdir(parents=True); (world.root/'npm/blobs/x.tgz').write_bytes(t.read_bytes())
    (world.root/'npm/toy').mkdir()
    (world.root/'npm/toy/index.html').write_text(json.dumps({'versions': {'1.0': {'dist': {'tarball': f'{s.url}/blobs/x.tgz'}}}}))
    monkeypatch.setenv('NPM_CONFIG_REGISTRY', s.url); assert A.asset('toy').read_bytes() == DATA['w.bin']

def test_url_and_path(world, monkeypatch):
    s = Server(world.root/'www'); (world.root/'www').mkdir()
    (world.root/'www/w.bin').write_bytes(DATA['w.bin']); f = world.root/'www/w.bin'
    files = {'w.bin': dict(size=7000, sha256=sha(DATA['w.bin']))}
    world.models(u=row_for(f, f'url:{s.url}/w.bin', {}, files=files), p=row_for(f, f'path:{f}', {}, files=files))
    assert A.asset('u').read_bytes() == DATA['w.bin'] and A.asset('p') == f
    f.write_bytes(b'x'*7000)
    with pytest.raises(AssetError, match='damaged'): A.asset('p')

def test_weights_trained_here(world, monkeypatch):
    "Rows of weights.yaml, several files in one folder, no stamps inside the package"
    (world.root/'pkg/weights').mkdir(parents=True)
    monkeypatch.setattr(A, 'package_dir', lambda: world.root/'pkg'); world.models()
    for n in 'ab': (world.root/f'pkg/weights/{n}.safetensors').write_bytes(n.encode()*9)
    rows = [dict(file=f'deidnb/weights/{n}.safetensors', sha256=sha(n.encode()*9), size=9, licence='Apache-2.0',
                 command='x') for n in 'ab']
    (world.root/'manifests/weights.yaml').write_text(yaml.safe_dump(rows))
    calls = []; monkeypatch.setattr(A, 'sha256', lambda f: calls.append(f) or sha(Path(f).read_bytes()))
    for _ in range(3):
        for n in 'ab': assert A.asset(n) == world.root/f'pkg/weights/{n}.safetensors'
        A._seen.clear()
    assert len(calls) == 2 and sorted(p.name for p in (world.root/'pkg/weights').iterdir()) == ['a.safetensors', 'b.safetensors']
    (world.root/'pkg/weights/a.safetensors').write_bytes(b'x'*9)
    with pytest.raises(AssetError, match='a is damaged'): A.asset('a')
    assert [r['name'] for r in A.rows()] == ['a', 'b'] and {r['name'] for r in A.licence_rows()} >= {'a', 'b'}

# -- damage ----------------------------------------------------------------------------------------------------------

def pulled(world, monkeypatch):
    w = world.wheel(); world.models(toy=row_for(w, 'pip:toy==1.0', FILES)); monkeypatch.setenv('PIP_FIND_LINKS', str(w.parent))
    return A.asset('toy', 'w.bin')

@pytest.mark.parametrize('harm', ['truncate', 'flip', 'flip and restore mtime', 'delete', 'folder', 'stamp'])
def test_damaged_cache_is_mended(world, monkeypatch, harm):
    p = pulled(world, monkeypatch); s = p.stat(); A._seen.clear() if 'flip' in harm else None
    if harm == 'truncate': p.write_bytes(DATA['w.bin'][:50])
    if 'flip' in harm: p.write_bytes(b'W' + DATA['w.bin'][1:])
    if 'restore' in harm: os.utime(p, ns=(s.st_atime_ns, s.st_mtime_ns))
    if harm == 'delete': p.unlink()
    if harm == 'folder': p.unlink(); (p.parent/'w.xml').unlink()
    if harm == 'stamp': (p.parent/'.verified.json').write_text('{"files": nonsense')
    assert A.rows(['toy'])[0]['state'] == {'truncate': 'damaged', 'flip': 'damaged',
                                           'flip and restore mtime': 'damaged', 'stamp': 'ok'}.get(harm, 'missing')
    assert A.verify(['toy'])[0]['state'] == A.rows(['toy'])[0]['state']
    assert A.asset('toy', 'w.bin').read_bytes() == DATA['w.bin'] and A.verify(['toy'])[0]['state'] == 'ok'

def test_stamp_saves_hashing_and_verify_does_not(world, monkeypatch):
    p = pulled(world, monkeypatch); calls = []
    monkeypatch.setattr(A, 'sha256', lambda f: calls.append(f) or sha(Path(f).read_bytes())); A._seen.clear()
    A.asset('toy'); assert not calls
    A.verify(['toy']); assert len(calls) == 2

def test_read_only_cache(world, monkeypatch):
    p = pulled(world, monkeypatch); (p.parent/'.verified.json').unlink(); A._seen.clear()
    def no(*a): raise PermissionError('read-only')
    monkeypatch.setattr(A, '_write', no); monkeypatch.setenv('DEIDNB_OFFLINE', '1')
    assert A.asset('toy', 'w.bin') == p

@pytest.mark.parametrize('change,text', [({'size': 10}, 'longer'), ({'size': 10**6}, 'truncated'),
                                         ({'sha256': '0'*64}, 'expected 000000000000')])
def test_wrong_archive(world, monkeypatch, change, text):
    w = world.wheel(); r = row_for(w, 'pip:toy==1.0', FILES); r['archive'] |= change
    world.models(toy=r); monkeypatch.setenv('PIP_FIND_LINKS', str(w.parent))
    with pytest.raises(AssetError, match=text): A.asset('toy')
    assert world.left == []

@pytest.mark.parametrize('change', [{'sha256': '0'*64}, {'size': 6999}, {'size': 7001}, {'member': 'toy/absent'}])
def test_wrong_member(world, monkeypatch, change):
    w = world.wheel(); r = row_for(w, 'pip:toy==1.0', FILES); r['files']['w.bin'] |= change
    world.models(toy=r); monkeypatch.setenv('PIP_FIND_LINKS', str(w.parent))
    with pytest.raises(AssetError, match=r'toy-1\.0-py3-none-any\.whl:toy/'): A.asset('toy')
    assert world.left == []

def test_next_place_is_tried_when_one_is_wrong(world, monkeypatch):
    w = world.wheel(); world.models(toy=row_for(w, 'pip:toy==1.0', FILES))
    bad = world.root/'bad'; bad.mkdir(); (bad/w.name).write_bytes(w.read_bytes()[:-9] + b'tampered!')
    monkeypatch.setenv('PIP_FIND_LINKS', f'{bad} {w.parent}'); assert A.asset('toy', 'w.bin').exists()

def test_broken_connection_is_tried_again_and_leaves_nothing(world, monkeypatch):
    w = world.wheel(); world.models(toy=row_for(w, 'pip:toy==1.0', FILES))
    top = world.root/'top'; world.simple(top, w); s = Server(top)
    monkeypatch.setenv('PIP_FIND_LINKS', f'{s.url}/simple/toy/'); s.cut = 9
    with pytest.raises(AssetError, match='truncated|broke'): A.asset('toy')
    assert world.left == [] and not list(world.cache.glob('.fetch-*'))
    s.cut = 1; assert A.asset('toy', 'w.bin').read_bytes() == DATA['w.bin']

def test_full_disk(world, monkeypatch):
    w = world.wheel(); world.models(toy=row_for(w, 'pip:toy==1.0', FILES)); monkeypatch.setenv('PIP_FIND_LINKS', str(w.parent))
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(S, 'copy_checked', full)
    with pytest.raises(AssetError, match='No space left.*DEIDNB_CACHE'): A.asset('toy')

# -- hostile archives ------------------------------------------------------------------------------------------------

def special(name, kind, target='/etc/passwd'):
    i = tarfile.TarInfo(name); i.type, i.linkname = kind, target; return i

def hostile(tmp, what):
    "An archive in which 'toy/w.bin' or another listed member is not what it should be; (archive, member)"
    b = DATA['w.bin']
    if what == 'zip climbing':   return wheel(tmp/'a.whl', {'../w.bin': b}), '../w.bin'
    if what == 'zip absolute':   return wheel(tmp/'a.whl', {'/w.bin': b}), '/w.bin'
    if what == 'zip backslash':  return wheel(tmp/'a.whl', {'x': b}), '..\\w.bin'
    if what == 'zip link':
        i = zipfile.ZipInfo('toy/w.bin'); i.create_system, i.external_attr = 3, (0o120777 << 16)
        with zipfile.ZipFile(tmp/'a.whl', 'w') as z: z.writestr(i, '/etc/passwd')
        return tmp/'a.whl', 'toy/w.bin'
    if what == 'zip twice':
        with zipfile.ZipFile(tmp/'a.whl', 'w') as z, pytest.warns(UserWarning):
            z.writestr('toy/w.bin', b); z.writestr('toy/w.bin', b)
        return tmp/'a.whl', 'toy/w.bin'
    if what == 'zip bomb':       return wheel(tmp/'a.whl', {'toy/w.bin': b'\0' * 50_000_000}), 'toy/w.bin'
    if what == 'zip broken':
        p = wheel(tmp/'a.whl', {'toy/w.bin': os.urandom(7000)}); d = bytearray(p.read_bytes())
        d[300:320] = bytes(20); p.write_bytes(d); return p, 'toy/w.bin'
    if what == 'tar climbing':   return tgz(tmp/'a.tgz', [('../w.bin', b)]), '../w.bin'
    if what == 'tar symlink':    return tgz(tmp/'a.tgz', [special('toy/w.bin', tarfile.SYMTYPE)]), 'toy/w.bin'
    if what == 'tar hard link':
        return tgz(tmp/'a.tgz', [('toy/x', b), special('toy/w.bin', tarfile.LNKTYPE, 'toy/x')]), 'toy/w.bin'
    if what == 'tar device':     return tgz(tmp/'a.tgz', [special('toy/w.bin', tarfile.CHRTYPE)]), 'toy/w.bin'
    if what == 'tar folder':     return tgz(tmp/'a.tgz', [special('toy/w.bin', tarfile.DIRTYPE)]), 'toy/w.bin'
    if what == 'tar twice':      return tgz(tmp/'a.tgz', [('toy/w.bin', b), ('toy/w.bin', b)]), 'toy/w.bin'
    if what == 'tar cut':
        p = tgz(tmp/'a.tgz', [('toy/w.bin', os.urandom(200_000))]); p.write_bytes(p.read_bytes()[:5000]); return p, 'toy/w.bin'
    if what == 'no archive':     (tmp/'a.tgz').write_bytes(b'hello'); return tmp/'a.tgz', 'toy/w.bin'

@pytest.mark.parametrize('what', ['zip climbing', 'zip absolute', 'zip backslash', 'zip link', 'zip twice', 'zip bomb', 'zip broken', 'tar climbing', 'tar symlink',
                                  'tar hard link', 'tar device', 'tar folder', 'tar twice', 'tar cut', 'no archive'])
def test_hostile_archives(tmp_path, what):
    p, member = hostile(tmp_path, what); out = tmp_path/'deep/out'; out.mkdir(parents=True)
    before = {x for x in tmp_path.rglob('*')}
    with pytest.raises(AssetError): A.extract(p, row_for(p, 'pip:toy==1.0', {'w.bin': member}), out)
    assert {x for x in tmp_path.rglob('*')} == before

def test_hostile_manifest_names(tmp_path):
    p = wheel(tmp_path/'a.whl', {'toy/w.bin': DATA['w.bin']}); r = row_for(p, 'pip:toy==1.0', {'w.bin': 'toy/w.bin'})
    r['files'] = {'../w.bin': r['files']['w.bin']}; (tmp_path/'out').mkdir()
    with pytest.raises(AssetError, match='safe'): A.extract(p, r, tmp_path/'out')
    assert not (tmp_path/'w.bin').exists()

@pytest.mark.parametrize('evil', [None, 'toy/set/../../up.pgm', 'toy/set/sub/x.pgm/', 'toy/set/z.pgm'])
def test_tree(tmp_path, evil):
    files = {f's{i}/{j}.pgm': f'{i}{j}'.encode() for i in (1,2) for j in (1,2)}
    p = wheel(tmp_path/'a.whl', {f'toy/set/{n}': b for n,b in files.items()} | ({evil: b''} if evil else {})
              | {'toy/set/readme.jpg': b'no'})
    row = dict(archive=dict(name='a.whl'), tree=dict(prefix='toy/set/', suffix='.pgm', count=4, size=8,
                                                     sha256=A.tree_hash({n: sha(b) for n,b in files.items()})))
    (tmp_path/'out').mkdir()
    if evil and not evil.endswith('/'):
        with pytest.raises(AssetError): A.extract(p, row, tmp_path/'out')
        assert not (tmp_path/'up.pgm').exists() and not (tmp_path/'out/z.pgm').exists()
    else: assert A.extract(p, row, tmp_path/'out') == {n: sha(b) for n,b in files.items()}

# -- several at once ----------------------------------------------------------------------------------------------------

CHILD = '''
import sys; from pathlib import Path
import deidnb.assets as A
A.manifest_dir = lambda: Path(sys.argv[1])
for n in sys.argv[2:]: print(A.asset(n, 'w.bin').stat().st_size)
'''
def child(world, *names):
    return subprocess.Popen([sys.executable, '-c', CHILD, str(world.root/'manifests'), *names], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)

def test_processes_at_once_fetch_once(world, monkeypatch):
    w = world.wheel(); r = row_for(w, 'pip:toy==1.0', FILES)
    world.models(one=r, two=r | {'files': {'w.bin': r['files']['w.bin']}})
    top = world.root/'top'; world.simple(top, w); s = Server(top); s.slow = .5
    monkeypatch.setenv('PIP_FIND_LINKS', f'{s.url}/simple/toy/')
    ps = [child(world, *n) for n in (['one'], ['two'], ['two', 'one'])]
    for p in ps: out, err = p.communicate(timeout=60); assert p.returncode == 0 and set(out.split()) == {'7000'}, err
    assert s.count('.whl') == 1  # the two rows share one archive

def test_threads_at_once_fetch_once(world, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor
    w = world.wheel(); world.models(toy=row_for(w, 'pip:toy==1.0', FILES))
    top = world.root/'top'; world.simple(top, w); s = Server(top); s.slow = .3
    monkeypatch.setenv('PIP_FIND_LINKS', f'{s.url}/simple/toy/')
    with ThreadPoolExecutor(8) as ex: got = list(ex.map(lambda _: A.asset('toy', 'w.bin').read_bytes(), range(8)))
    assert set(got) == {DATA['w.bin']} and s.count('.whl') == 1

def test_killed_fetch_leaves_nothing_half(world, monkeypatch):
    w = world.wheel(); world.models(toy=row_for(w, 'pip:toy==1.0', FILES))
    top = world.root/'top'; world.simple(top, w); s = Server(top); s.slow = 20
    monkeypatch.setenv('PIP_FIND_LINKS', f'{s.url}/simple/toy/'); p = child(world, 'toy'); t = time.time()
    while not s.count('.whl') and time.time() - t < 30: time.sleep(.05)
    p.kill(); p.wait(); assert not any('models/' in f for f in world.left)
    s.slow = 0; assert A.asset('toy', 'w.bin').read_bytes() == DATA['w.bin'] and not list(world.cache.glob('.fetch-*'))

# -- errors and secrets -------------------------------------------------------------------------------------------------

def test_offline_message(world, monkeypatch):
    w = world.wheel(); world.models(toy=row_for(w, 'pip:toy==1.0', FILES)); monkeypatch.delenv('PIP_NO_INDEX')
    monkeypatch.setenv('PIP_INDEX_URL', 'http://me:hunter2@127.0.0.1:9/simple'); monkeypatch.setenv('PIP_RETRIES', '0')
    with pytest.raises(AssetError) as e: A.asset('toy')
    t = str(e.value); print(t)
    assert 'hunter2' not in t and 'no connection' in t and 'DEIDNB_ARCHIVES' in t and w.name in t and '\n' not in t
    cause = e.value
    while cause: assert 'hunter2' not in repr(cause); cause = cause.__cause__

@pytest.mark.parametrize('cred,ok', [('me:p%40ss@', True), ('me:wrong@', False), ('', False)])
def test_index_credentials(world, monkeypatch, cred, ok):
    w = world.wheel(); world.models(toy=row_for(w, 'pip:toy==1.0', FILES))
    top = world.root/'top'; world.simple(top, w); s = Server(top)
    # absolute links carry no credentials
    f = top/'simple/toy/index.html'
    f.write_text(f.read_text().replace('../../files', f'{s.url}/files'))
    s.need = 'Basic ' + base64.b64encode(b'me:p@ss').decode(); monkeypatch.delenv('PIP_NO_INDEX')
    monkeypatch.setenv('PIP_INDEX_URL', s.url.replace('//', f'//{cred}') + '/simple')
    if ok: assert A.asset('toy', 'w.bin').exists(); return
    with pytest.raises(AssetError, match='HTTP 401') as e: A.asset('toy')
    assert 'wrong' not in str(e.value)

def test_credentials_do_not_follow_a_redirect(world, monkeypatch):
    w = world.wheel(); world.models(toy=row_for(w, 'pip:toy==1.0', FILES))
    top = world.root/'top'; world.simple(top, w); a, b = Server(top), Server(top)
    a.redirect = {f'/files/{w.name}': f'{b.url}/files/{w.name}'}; monkeypatch.delenv('PIP_NO_INDEX')
    monkeypatch.setenv('PIP_INDEX_URL', a.url.replace('//', '//me:pw@') + '/simple')
    assert A.asset('toy', 'w.bin').exists() and a.auth_seen[-1] and b.auth_seen == [None]

@pytest.mark.parametrize('text', ['https://u:pw@h.example/x', 'see http://pw@h.example:80/',
                                  'https://h.example/f?sig=pw&x=pw', "'https://u:pw@h.example'"])
def test_redact(text): assert 'pw' not in S.redact(text) and 'h.example' in S.redact(text)

@pytest.mark.parametrize('call,text', [(lambda: A.asset('toi'), "Did you mean 'toy'"), (lambda: A.asset('toy', 'w.ml'), "Did you mean 'w.xml'"), (lambda: A.pull('nothing'), 'no asset or group'),
                                       (lambda: A.load_manifest('model'), "Did you mean 'models'"), (lambda: A.dataset('x'), 'no dataset')])
def test_mistyped(world, monkeypatch, call, text):
    pulled(world, monkeypatch)
    with pytest.raises((AssetError, ConfigError), match=text): call()

def test_user_rows(world, monkeypatch):
    world.models(mine=dict(source='user:', licence='none', origin='x', terms='yours', obtain='ask',
                           files={'a.onnx': {}, 'b.onnx': {'optional': True}}))
    with pytest.raises(AssetError, match='a.onnx.*ask. Terms: yours'): A.asset('mine', 'a.onnx')
    monkeypatch.setenv('DEIDNB_MODELS', str(world.root/'m')); (world.root/'m').mkdir(); (world.root/'m/a.onnx').write_bytes(b'x')
    assert A.asset('mine', 'a.onnx').parent == world.root/'m' and A.rows(['mine'])[0]['state'] == 'ok'

# -- client settings ----------------------------------------------------------------------------------------------------

LAYERS = [('xdg', 'index-url', 'a'), ('legacy', 'index-url', 'b'), ('user', 'index-url', 'c'),
          ('own', 'index-url', 'd'), ('env', 'PIP_INDEX_URL', 'e')]

@pytest.mark.parametrize('use', [('xdg',), ('xdg', 'legacy'), ('xdg', 'legacy', 'user'), ('xdg', 'legacy', 'user',
            'own'), ('xdg', 'user', 'env'), ('legacy', 'own', 'env'), ('xdg', 'null'), ()])
@pytest.mark.skipif(sys.platform != 'linux', reason='the places differ elsewhere')
def test_pip_precedence_is_pips(world, monkeypatch, use):
    "Same answer as pip itself"
    home = world.root/'home'
    files = dict(xdg=world.root/'xdg/pip/pip.conf', legacy=home/'.pip/pip.conf', user=home/'.config/pip/pip.conf',
                 own=world.root/'own.conf')
    for k in ('PIP_CONFIG_FILE', 'PIP_NO_INDEX'): monkeypatch.delenv(k)
    monkeypatch.setenv('XDG_CONFIG_DIRS', str(world.root/'xdg'))
    for i,k in enumerate(use):
        if k in files:
            files[k].parent.mkdir(parents=True, exist_ok=True)
            files[k].write_text(f'[global]\nindex_url = https://{k}.example/simple\ntimeout = {i}\n[list]\nindex-url = https://no.example/\n')
    if 'own' in use: monkeypatch.setenv('PIP_CONFIG_FILE', str(files['own']))
    if 'null' in use: monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    if 'env' in use: monkeypatch.setenv('PIP_INDEX_URL', 'https://env.example/simple')
    code = ('from pip._internal.configuration import Configuration as C\nc = C(isolated=False); c.load(); d = {}\n'
            'for f in c._dictionary.values() if isinstance(next(iter(c._dictionary.values()), ""), dict) else [c._dictionary]: d.update(f)\n'
            'import json; print(json.dumps({k: d.get(f":env:.{k}", d.get(f"global.{k}")) for k in ("index-url", "timeout")}))')
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    if r.returncode: pytest.skip(f'this pip has other insides: {r.stderr[-200:]}')
    mine = S.pip_config(); assert {k: mine.get(k) for k in ('index-url', 'timeout')} == json.loads(r.stdout)

def test_pip_sections_and_broken_file(tmp_path):
    f = tmp_path/'pip.conf'
    f.write_text('[global]\ncert=/a.pem\ntimeout=5\n[install]\nfind-links = /x\n  /y\n[download]\ntimeout=9\n[freeze]\ntimeout=1\n')
    c = S.pip_config({}, [f]); assert (c['cert'], c['timeout'], c['find-links'].split()) == ('/a.pem', '9', ['/x', '/y'])
    f.write_text('no section\n')
    with pytest.raises(ConfigError, match='pip configuration'): S.pip_config({}, [f])

def test_certificates_proxy_trust(monkeypatch):
    for k in ('REQUESTS_CA_BUNDLE', 'CURL_CA_BUNDLE', 'SSL_CERT_FILE'): monkeypatch.delenv(k, raising=False)
    assert S.pip_client({}).verify is True
    monkeypatch.setenv('SSL_CERT_FILE', '/c.pem'); assert S.pip_client({}).verify == '/c.pem'
    monkeypatch.setenv('REQUESTS_CA_BUNDLE', '/b.pem'); assert S.pip_client({}).verify == '/b.pem'
    c = S.pip_client(S.pip_config({'PIP_CERT': '/a.pem', 'PIP_PROXY': 'http://p.example:8080',
                                   'PIP_DEFAULT_TIMEOUT': '7', 'PIP_TRUSTED_HOST': 'h.example g.example:81',
                                   'PIP_CLIENT_CERT': '/k.pem'}, []))
    assert (c.verify, c.proxy, c.timeout, c.trusted, c.cert) == ('/a.pem', 'http://p.example:8080', 7.,
        ('h.example', 'g.example:81'), '/k.pem')

def test_requests_gets_the_settings(monkeypatch):
    import requests
    seen = {}
    def send(self, req, **kw):
        seen.update(kw, url=req.url, auth=req.headers.get('Authorization')); r = requests.Response()
        r.status_code = 200; r.request = req; return r
    monkeypatch.setattr(requests.Session, 'send', send); monkeypatch.setenv('REQUESTS_CA_BUNDLE', '/other.pem')
    c = S.Client(proxy='http://p.example:1', verify='/a.pem', timeout=3); c.get('https://u:pw@h.example/x')
    assert seen['verify'] == '/a.pem' and seen['proxies']['https'] == 'http://p.example:1' and seen['timeout'] == 3 and 'pw' not in seen['url'] and seen['auth'].startswith('Basic ')

def test_npm_precedence(tmp_path):
    g, u, p = (tmp_path/n for n in 'gup'); g.write_text('registry=https://g.example/\ncafile=/g.pem\n')
    u.write_text('registry="https://u.example/"\nstrict-ssl = true\n')
    p.write_text('; x\n# y\nregistry = https://p.example/\n')
    assert S.npm_config({}, [g])['registry'] == 'https://g.example/' and S.npm_config({},
        [g,u])['registry'] == 'https://u.example/' and S.npm_config({}, [g,u,p])['registry'] == 'https://p.example/'
    c = S.npm_config({'NPM_CONFIG_REGISTRY': 'https://e.example/', 'npm_config_https_proxy': 'http://q.example'}, [g,u,p])
    assert (c['registry'], c['https-proxy'], c['cafile']) == ('https://e.example/', 'http://q.example', '/g.pem')
    assert S.npm_client(c, c['registry']).verify == '/g.pem'

def test_npm_passwords_stay_home():
    word = base64.b64encode(b'pw').decode()
    cfg = {'//a.example/npm/:username': 'me', '//a.example/npm/:_password': word, '//b.example/:_authToken': 'T'}
    assert S.npm_client(cfg, 'https://a.example/npm/').auth == {'a.example': 'Basic ' + base64.b64encode(b'me:pw').decode()}
    assert S.npm_client(cfg, 'https://b.example/').auth == {'b.example': 'Bearer T'} and S.npm_client(cfg,
        'https://c.example/').auth == {}

# -- pickles ---------------------------------------------------------------------------------------------------------

class Call:
    def __init__(self, f, *a): self.f, self.a = f, a
    def __reduce__(self): return self.f, self.a

BAD = dict(system=lambda: Call(os.system, 'touch owned'), eval=lambda: Call(eval, '1+1'), exec=lambda: Call(exec, 'x=1'), open=lambda: Call(open, 'owned', 'w'),
           getattr=lambda: Call(getattr, 'a', 'upper'), popen=lambda: {'a': [Call(subprocess.Popen, ['touch', 'owned'])]}, objects=lambda: np.array([{}, 1], dtype=object),
           ndarray=lambda: Call(np.ndarray, (10**9,)), load=lambda: Call(np.load, 'x'), cls=lambda: Path, instance=lambda: Path('x'), setitem=lambda: {1: {2, 3}})

@pytest.mark.parametrize('what', BAD)
@pytest.mark.parametrize('protocol', [0, 2, 4, 5])
def test_pickles_with_more_than_arrays(tmp_path, monkeypatch, what, protocol):
    monkeypatch.chdir(tmp_path); (tmp_path/'x.ckpt').write_bytes(pickle.dumps(BAD[what](), protocol))
    with pytest.raises(AssetError): A.unpickle_arrays('x.ckpt')
    assert not (tmp_path/'owned').exists()

def test_pickle_persistent_id_and_junk(tmp_path):
    class P(pickle.Pickler):
        def persistent_id(self, o): return 'x' if o == 'me' else None
    with open(tmp_path/'p', 'wb') as f: P(f).dump(['me'])
    for b in (None, b'', b'junk', b'\x80\x04'):
        if b is not None: (tmp_path/'p').write_bytes(b)
        with pytest.raises(AssetError): A.unpickle_arrays(tmp_path/'p')

@pytest.mark.parametrize('protocol', [3, 4])
@pytest.mark.parametrize('dtype', ['f4', '>f8', 'u1', 'i8', 'c8', '?'])
def test_pickled_arrays_come_back(tmp_path, protocol, dtype):
    a = np.asfortranarray(np.arange(24).reshape(2,3,4)).astype(dtype)
    x = {'layer': {'kernel': a, 'bias': a[0,0].copy()}, 'n': (1, 2.5, 'x', None, True)}
    (tmp_path/'x').write_bytes(pickle.dumps(x, protocol))
    y, z = A.unpickle_arrays(tmp_path/'x'), pickle.loads((tmp_path/'x').read_bytes())
    assert np.array_equal(y['layer']['kernel'],
                          a) and y['layer']['kernel'].dtype == z['layer']['kernel'].dtype and y['n'] == x['n']

# -- the real manifests ---------------------------------------------------------------------------------------------

def test_manifests():
    m, d = A.load_manifest('models'), A.load_manifest('datasets')
    assert {'lfw', 'celebahq', 'ffpp', 'voxceleb', 'ffhq', 'wflw', 'vggface2', 'orl', 'casia_webface', 'celeba', 'grid'} <= set(d)
    for n,r in m.items():
        assert r['licence'] and r['licence_weights'] and r['origin'] and r['terms'] and isinstance(r['redistribute'],
            bool) and r['used_by'], n
        assert set(r['needed_by']) <= set(A.GROUPS), n
        if r['source'] == 'user:': assert r['obtain'] and not r['needed_by']; continue
        assert re.fullmatch(r'pip:[\w-]+==[\w.]+|npm:(@[\w-]+/)?[\w-]+@[\w.]+', r['source']), n
        for w in [r['archive'], *([r['tree']] if 'tree' in r else r['files'].values())]:
            assert re.fullmatch('[0-9a-f]{64}', w['sha256']) and w['size'] > 0, n
        for f in r.get('files', ()): A.safe_name(f)
    for n,r in d.items(): assert r['licence'] and r['terms'] and r['origin'] and r['obtain'] and r['layout'] and r['expects'], n

@pytest.mark.parametrize('group', A.GROUPS)
def test_groups(group): assert A.select(group) and all(group in r['needed_by'] for r in A.select(group))

def test_dataset_layout(tmp_path, monkeypatch):
    monkeypatch.setenv('DEIDNB_DATA', str(tmp_path)); (tmp_path/'wflw').mkdir()
    with pytest.raises(AssetError, match='lacks WFLW_annotations.*layout'): A.dataset('wflw')
    (tmp_path/'own').mkdir(); assert A.dataset('own') == tmp_path/'own'
    monkeypatch.delenv('DEIDNB_DATA')
    with pytest.raises(AssetError, match='DEIDNB_DATA'): A.dataset('ffhq')

def test_import_is_cheap():
    r = subprocess.run([sys.executable, '-c',
                        'import sys, deidnb.assets; print([m for m in ("torch", "cv2", "requests", "mediapipe", "pypi_simple") if m in sys.modules])'],
                       capture_output=True, text=True)
    assert r.stdout.strip() == '[]', r.stdout + r.stderr
