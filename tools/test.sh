#!/usr/bin/env bash
# The tests in the order of the continuous integration; or only the steps named as arguments.
#   check-tree  nothing uncommitted (ALLOW_DIRTY=1: only that no step changes anything)
#   notebooks   cleaned and exported notebooks are what is committed, and keep the rules
#   nbtest      every notebook runs        pytest  every test passes
#   smoke       one papermill run          readme  README.md is what nbs/index.ipynb gives
set -euo pipefail
cd "$(dirname "$0")/.."
steps=("$@"); [ $# -gt 0 ] || steps=(check-tree notebooks nbtest pytest smoke readme)
[ -d .venv/bin ] && export PATH="$PWD/.venv/bin:$PATH"
export MPLBACKEND=Agg
workers=${NB_WORKERS:-2}; t0=$SECONDS; before=$(tools/tree_state.sh)

say()  { printf '\n== %s (%d s)\n' "$1" $((SECONDS - t0)); }
fail() { printf 'FAILED: %s\n' "$1" >&2; exit 1; }
same() { [ "$(tools/tree_state.sh)" = "$before" ] || { git status --short; git --no-pager diff --stat; fail "$1 changed files: run it, look at the difference and commit it"; }; }

for step in "${steps[@]}"; do
  say "$step"
  case $step in
    check-tree) [ -z "$before" ] || [ "${ALLOW_DIRTY:-0}" = 1 ] || { echo "$before"; fail 'the tree is not clean: commit first, or ALLOW_DIRTY=1 make test'; } ;;
    notebooks)  nbdev_clean;  same nbdev_clean
                nbdev_export; same nbdev_export
                python tools/check_notebooks.py || fail 'a notebook breaks a rule' ;;
    nbtest)     OMP_NUM_THREADS=1 nbdev_test --n_workers "$workers" --timing --do_print --skip_folder_re '^([_.]|reproduce)' ; same 'running the notebooks' ;;
    pytest)     python -m pytest -q; same pytest ;;
    smoke)      mkdir -p reports/smoke
                papermill nbs/reproduce/traditional_methods.ipynb reports/smoke/traditional_methods.ipynb -p preset quick -p out reports/smoke --cwd . --no-progress-bar --log-level WARNING
                same papermill ;;
    readme)     python tools/render_readme.py --check || fail 'README.md' ;;
    *)          fail "unknown step $step" ;;
  esac
done
say 'all passed'
