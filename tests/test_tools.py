"The scripts that guard the repository: they must object to what they are there to object to"
import base64, importlib.util, json, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from deidnb.core import repo_root

TOOLS = repo_root()/'tools'
if not TOOLS.is_dir(): pytest.skip('not a checkout', allow_module_level=True)

def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS/f'{name}.py')
    m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m); return m

check, readme = tool('check_notebooks'), tool('render_readme')
KERNEL = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
def md(s): return dict(cell_type='markdown', id='m', metadata={}, source=s)
def code(s, *outputs, **meta):
    return dict(cell_type='code', id='c', metadata=meta, execution_count=None, source=s, outputs=list(outputs))
def shown(s): return dict(output_type='stream', name='stdout', text=s)
def nb(*cells, metadata=KERNEL): return dict(nbformat=4, nbformat_minor=5, metadata=metadata, cells=list(cells))

HEAD = md('# Title\n> One line')
GOOD = [HEAD, code('#| export\nimport os'), code('#| export\ndef f(): return 1'), code('f()', shown('1'))]

def problems(tmp_path, book):
    p = tmp_path/'x.ipynb'; p.write_text(book if isinstance(book, str) else json.dumps(book))
    return [t for _,t in check.check(p)]

def test_good_notebook(tmp_path): assert problems(tmp_path, nb(*GOOD)) == []

@pytest.mark.parametrize('book,text', [
    (nb(*GOOD[1:]), 'does not begin'),
    (nb(md('# Title only'), *GOOD[1:]), 'does not begin'),
    (nb(*GOOD, code('#| export\n' + '\n'.join(f'x{i} = 1' for i in range(56)))), '56 lines'),
    (nb(*GOOD, code('#| export\nimport re\nx = 1')), 'imports and other code'),
    (nb(*GOOD, code('#| export\nimport pytest')), 'exports an import of pytest'),
    (nb(*GOOD, code('#| export\nfrom hypothesis.strategies import integers')), 'exports an import of hypothesis'),
    (nb(*GOOD, code('#| export\ndef f(:')), 'does not parse'),
    (nb(*GOOD[:-1]), 'shows nothing'),
    (nb(*GOOD, code('1/0', dict(output_type='error', ename='ZeroDivisionError'))), 'shows an error: ZeroDivisionError'),
    (nb(*GOOD, code('x', shown('see /ho' + 'me/ann/photo.jpg'))), 'machine path'),
    (nb(*GOOD, code('x', dict(output_type='execute_result', data={'text/plain': "PosixPath('/t" + "mp/abc')"}))), 'machine path'),
    (nb(*GOOD, md('open /ro' + 'ot/x')), 'machine path'),
    (nb(*GOOD, code('x', collapsed=True)), "metadata ['collapsed']"),
    (nb(*GOOD, metadata=KERNEL | {'widgets': {}}), 'metadata'),
    (nb(*GOOD, {k: v for k,v in md('x').items() if k != 'id'}), 'no id'),
    (nb(*GOOD, md('x' * 2_000_001)), 'MB'),
])
def test_bad_notebooks(tmp_path, book, text): assert any(text in p for p in problems(tmp_path, book)), problems(tmp_path, book)

@pytest.mark.parametrize('cell', [code('x', tags=['parameters']),
                                  md('a relative/home/page and https://x.example/home/y'), code('import re\nx = 1'),
                                  code('#| export\n"a" # 55\n' + '\n'.join(['x = 1']*53))])
def test_allowed(tmp_path, cell): assert problems(tmp_path, nb(*GOOD, cell)) == []

def test_check_exit_code(tmp_path):
    for book, rc in ((nb(*GOOD), 0), (nb(*GOOD[:-1]), 1)):
        (tmp_path/'x.ipynb').write_text(json.dumps(book))
        assert subprocess.run([sys.executable, TOOLS/'check_notebooks.py', tmp_path/'x.ipynb'],
                              capture_output=True).returncode == rc

def test_render():
    png = base64.b64encode(b'PNG').decode()
    text, pics = readme.render(nb(HEAD, md('![a](images/a.png) [b](tutorials/b.ipynb) [c](../LICENSE) [d](https://x.example/y.ipynb)'), code('#| hide\nsecret = 1', shown('no')), code('#| default_exp x'),
        code('#| echo: false\nprint(1)', shown('shown\n')), code('print("```")', shown('```\n')), code('plot()', dict(output_type='display_data', data={'image/png': png, 'text/plain': '<Figure>'}))))
    assert pics == {'index_0.png': b'PNG'} and '![](nbs/images/index_0.png)' in text and '<Figure>' not in text and 'secret' not in text and 'print(1)' not in text and 'shown' in text
    assert '![a](nbs/images/a.png) [b](nbs/tutorials/b.ipynb) [c](LICENSE) [d](https://x.example/y.ipynb)' in text and '````python' in text

def test_render_links_of_outputs():
    text, _ = readme.render(nb(HEAD, code('#| echo: false\nMarkdown(t)', dict(output_type='execute_result',
                    data={'text/markdown': '[r](../reports/a.csv) [n](reproduce/b.ipynb)',
                          'text/plain': '<Markdown>'}))))
    assert '[r](reports/a.csv) [n](nbs/reproduce/b.ipynb)' in text and '<Markdown>' not in text

def test_readme_check_objects(tmp_path, monkeypatch, capsys):
    (tmp_path/'nbs').mkdir()
    (tmp_path/'nbs/index.ipynb').write_text(json.dumps(nb(HEAD, code('plot()', dict(output_type='display_data',
                        data={'image/png': base64.b64encode(b'PNG').decode()})))))
    monkeypatch.setattr(readme, 'ROOT', tmp_path)
    run = lambda *a: (monkeypatch.setattr(sys, 'argv', ['x', *a]), readme.main())[1]
    assert run('--check') == 1 and run() == 0 and run('--check') == 0
    (tmp_path/'nbs/images/index_0.png').write_bytes(b'other'); assert run('--check') == 1
    run(); (tmp_path/'README.md').write_text('edited by hand'); assert run('--check') == 1

def test_memory_of_long_videos(tmp_path):
    from deidnb.faces.video import read_video
    from deidnb.video.rendered import write_clip
    m = tool('video_memory'); x = [np.full((96, 128, 3), 20*i, np.uint8) for i in range(5)]; clip = write_clip(tmp_path/'in.mp4', x, sound=False)
    level = [round(float(y.mean())/20) for *_, y in read_video(m.longer(clip, .48, tmp_path/'long.mp4'))]
    assert level == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2, 3]
