#!/usr/bin/env python
"""README.md from nbs/index.ipynb: markdown as it is, code fenced, text outputs, pictures saved to nbs/images.

Usage: render_readme.py          write README.md and nbs/images/index_*.png
       render_readme.py --check  exit 1 and show the difference if they are not what the notebook gives
"""
import argparse, base64, difflib, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = '<!-- Made from nbs/index.ipynb by tools/render_readme.py; edit the notebook. -->\n\n'

def text_of(x): return x if isinstance(x, str) else ''.join(x)

def fence(text, lang=''):
    ticks = '`' * max(3, max((len(m) for m in re.findall(r'`+', text)), default=0) + 1)
    return f'{ticks}{lang}\n{text.rstrip()}\n{ticks}'

def relink(text):
    "Links as seen from the top of the repository instead of nbs/"
    text = re.sub(r'(\]\(|src=")(?=images/)', r'\1nbs/', text)
    return re.sub(r'\]\((?!\w+:|/|#|nbs/|\.\./)([\w./-]+\.ipynb)', r'](nbs/\1', text).replace('](../', '](')

def render(nb):
    "The README's text and {picture name: bytes}"
    parts, pictures = [], {}
    for cell in nb['cells']:
        src = text_of(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(relink(src)); continue
        if cell['cell_type'] != 'code': continue
        directives = re.findall(r'^#\|\s*(.+)$', src, re.M)
        if any(d.split()[0] in ('hide', 'default_exp', 'export', 'exporti') for d in directives): continue
        code = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
        if code and not any(re.match(r'(hide_input|echo:\s*false)', d) for d in directives): parts.append(fence(code, 'python'))
        if any(re.match(r'(hide_output|output:\s*false)', d) for d in directives): continue
        for out in cell.get('outputs', []):
            data = out.get('data', {})
            if out['output_type'] == 'stream':
                if out['name'] == 'stdout': parts.append(fence(text_of(out['text'])))
            elif pic := next((k for k in ('image/png', 'image/jpeg') if k in data), None):
                name = f"index_{len(pictures)}.{pic[6:].replace('jpeg', 'jpg')}"
                pictures[name] = base64.b64decode(text_of(data[pic])); parts.append(f'![](nbs/images/{name})')
            elif 'text/markdown' in data: parts.append(relink(text_of(data['text/markdown'])))
            elif 'text/plain' in data: parts.append(fence(text_of(data['text/plain'])))
    return HEAD + '\n\n'.join(p.strip() for p in parts if p.strip()) + '\n', pictures

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--check', action='store_true')
    check = ap.parse_args().check
    readme, pictures = render(json.loads((ROOT/'nbs/index.ipynb').read_text('utf-8')))
    images, target = ROOT/'nbs/images', ROOT/'README.md'
    old = {p.name: p.read_bytes() for p in images.glob('index_*')} if images.is_dir() else {}
    now = target.read_text('utf-8') if target.exists() else ''
    if check:
        sys.stdout.writelines(difflib.unified_diff(now.splitlines(True), readme.splitlines(True), 'README.md', 'nbs/index.ipynb'))
        stale = sorted(n for n in {*old, *pictures} if old.get(n) != pictures.get(n))
        for n in stale: print(f'nbs/images/{n} differs from the notebook')
        if now != readme or stale: print('README.md is not what nbs/index.ipynb gives: run `make readme`'); return 1
        return 0
    for n in old.keys() - pictures.keys(): (images/n).unlink()
    for n,b in pictures.items(): images.mkdir(exist_ok=True); (images/n).write_bytes(b)
    target.write_text(readme, 'utf-8')
    return 0

if __name__ == '__main__': sys.exit(main())
