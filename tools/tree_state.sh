#!/usr/bin/env bash
# Prints what differs from the last commit (nothing for a clean tree); ignored files do not count.
set -euo pipefail
cd "$(dirname "$0")/.."
git status --porcelain --untracked-files=all
git diff --quiet HEAD || git diff HEAD --no-ext-diff --binary | git hash-object --stdin
