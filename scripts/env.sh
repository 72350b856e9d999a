# Sourced by other scripts: creates .venv with the tested, pinned versions if necessary, and sets PYTHON and BIN.
# Needs Python 3.11 or 3.12, which HGKD_PYTHON=/path/to/python3.11 can name. An interrupted installation is repeated.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=$root/.venv/bin
PYTHON=$BIN/python

find_python() {
    local candidate candidates=(python3.11 python3.12 python3)
    [[ -z ${HGKD_PYTHON:-} ]] || candidates=("$HGKD_PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "no Python 3.11 or 3.12 found: install one, or name it in HGKD_PYTHON" >&2
    return 1
}

stamp=$root/.venv/installed
wanted() { cat "$root/scripts/constraints.txt" "$root/setup.py" | sha256sum; }
made() { [[ -f $stamp && $(<"$stamp") == "$(wanted)" ]]; }

make_environment() {
    local python
    python=$(find_python)
    rm -f "$stamp" # what it names may be half replaced when this is interrupted
    echo "setting up .venv with $("$python" --version) (about 2 minutes)" >&2
    # Without pip, the environment is missing or its creation was interrupted.
    "$PYTHON" -m pip --version &>/dev/null || "$python" -m venv "$root/.venv"
    "$PYTHON" -m pip install --quiet --quiet --disable-pip-version-check --no-compile \
        --constraint "$root/scripts/constraints.txt" --editable "$root[test,report,triton,recipes]" >&2
    # pip would compile on one core. Status 1 is expected: some packages have files for other versions of Python.
    "$PYTHON" -W ignore -m compileall -qq -j 0 "$root/.venv/lib" >&2 || true
    wanted >"$stamp" # written last: without it the next call installs again
}

# Scripts that start at once on a fresh machine take turns.
if ! made; then
    if command -v flock >/dev/null && { exec 7>>"$root/.venv.lock"; } 2>/dev/null; then
        flock -n 7 2>/dev/null || { echo "waiting for another script that sets up .venv" >&2 && flock 7 2>/dev/null; } || true
    fi
    made || make_environment
    { exec 7>&-; } 2>/dev/null
fi
