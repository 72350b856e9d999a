#!/usr/bin/env bash
# Run the tests in .venv, which is made if need be. Arguments go to pytest: scripts/test.sh tests/loss -k chunked
# Without any, all tests run, a file of them on each core.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
# One thread a process: several OpenMP processes on few cores spin against each other and take 5 to 10 times as long.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# nproc itself counts OMP_NUM_THREADS.
(($#)) || set -- --numprocesses "$(env -u OMP_NUM_THREADS nproc)" --dist loadfile --no-loadscope-reorder
exec "$PYTHON" -m pytest "$@"
