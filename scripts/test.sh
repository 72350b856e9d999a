#!/usr/bin/env bash
# Run the tests in .venv, which is created if necessary. Arguments are passed to pytest, as in
# scripts/test.sh tests/loss -k chunked. Without arguments, all tests run, distributed over the cores by file.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
# One thread per process: several OpenMP processes compete for few cores and take 5 to 10 times as long.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# nproc would return OMP_NUM_THREADS.
(($#)) || set -- --numprocesses "$(env -u OMP_NUM_THREADS nproc)" --dist loadfile --no-loadscope-reorder
exec "$PYTHON" -m pytest "$@"
