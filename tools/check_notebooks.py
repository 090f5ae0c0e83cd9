#!/usr/bin/env python
"""Rules a notebook must keep, checked without running it.

Usage: check_notebooks.py [NOTEBOOK ...]   all of nbs/ by default; exit 1 if a rule is broken

  - begins with an H1 and a one-line summary in a block quote
  - exported cells have at most 55 lines; imports sit in cells of their own; nothing test-only is exported
  - a notebook that exports shows something, and no output is an error
  - no path of one machine in source or output; less than 2 MB; no stray metadata; every cell has an id
"""
import ast, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES, MAX_BYTES = 55, 2_000_000
TEST_ONLY = {'pytest', 'hypothesis', 'nbdev', 'IPython'}
MACHINE = re.compile(r'''(?<![\w.<>-])(/work/|/root/|/home/\w|/Users/\w|/tmp/\w|/var/folders/|[A-Z]:\\Users)''')
PLAIN_OUT = ('text/plain', 'text/markdown', 'text/html')

def text_of(x): return x if isinstance(x, str) else ''.join(x)

def imports_of(tree): return [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]

def modules_of(node): return [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or '']

def check_code(src, exported):
    "Problems of one code cell"
    code = '\n'.join('' if l.lstrip().startswith(('#|', '%', '!')) else l for l in src.splitlines())
    if not exported: return
    if (n := len(code.strip().splitlines())) > MAX_LINES: yield f'exported cell has {n} lines, at most {MAX_LINES}'
    try: tree = ast.parse(code)
    except SyntaxError as e: yield f'does not parse: {e}'; return
    found = imports_of(tree)
    if found and len(found) != len(tree.body): yield 'imports and other code in one exported cell'
    for n in found:
        for m in modules_of(n):
            if m.split('.')[0] in TEST_ONLY: yield f'exports an import of {m}'

def check_outputs(cell):
    "Problems of what a cell shows"
    for out in cell.get('outputs', []):
        if out['output_type'] == 'error': yield f"shows an error: {out.get('ename')}"
        shown = text_of(out.get('text', '')) + ''.join(text_of(out.get('data', {}).get(k, '')) for k in PLAIN_OUT)
        if m := MACHINE.search(shown): yield f'output shows a machine path: {shown[max(0, m.start()-20):m.end()+30]!r}'

def check(path):
    "All problems of one notebook as (cell number or None, text)"
    raw = path.read_bytes()
    if len(raw) > MAX_BYTES: yield None, f'{len(raw)/1e6:.2f} MB, at most {MAX_BYTES/1e6:g}'
    nb = json.loads(raw); cells = nb['cells']
    first = text_of(cells[0]['source']) if cells and cells[0]['cell_type'] == 'markdown' else ''
    if not re.match(r'# \S.*\n+> \S', first): yield 0, "does not begin with '# Title' and '> one line'"
    if set(nb['metadata']) - {'kernelspec', 'language_info'}: yield None, f"metadata {sorted(nb['metadata'])}"
    exports = shows = False
    for i, c in enumerate(cells):
        src = text_of(c['source'])
        if not c.get('id'): yield i, 'has no id'
        if set(c.get('metadata', {})) - {'tags'}: yield i, f"metadata {sorted(c['metadata'])}"
        if m := MACHINE.search(src): yield i, f'source holds a machine path: {src[m.start():m.end()+20]!r}'
        if c['cell_type'] != 'code': continue
        exported = bool(re.search(r'^#\|\s*exporti?\b', src, re.M))
        exports, shows = exports or exported, shows or bool(c.get('outputs'))
        for p in (*check_code(src, exported), *check_outputs(c)): yield i, p
    if exports and not shows: yield None, 'exports code but shows nothing (run it and save)'

def main(argv):
    paths = [Path(a) for a in argv] or sorted(p for p in (ROOT/'nbs').rglob('*.ipynb')
                                              if not any(x.startswith(('.', '_')) for x in p.relative_to(ROOT).parts))
    bad = 0
    for p in paths:
        name = p.resolve().relative_to(ROOT) if p.resolve().is_relative_to(ROOT) else p
        for i, text in check(p): bad += 1; print(f"{name}{'' if i is None else f' cell {i}'}: {text}")
    print(f'{len(paths)} notebooks, {bad} problems')
    return bool(bad)

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
