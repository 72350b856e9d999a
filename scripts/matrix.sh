#!/usr/bin/env bash
# Test the plugin with several versions of Python, torch and fairseq, each in its own environment. See --help.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'END'
usage: matrix.sh [--dir FOLDER] [--packages FOLDER] [--keep] [PYTHON TORCH FAIRSEQ]...
Installs the plugin beside each torch and distribution of fairseq, as a user's pip would, asks `hgkd doctor`, and runs
some tests of this checkout's source: a teacher and a student trained by fairseq-train, one killed and resumed, the loss by hand. Prints a line a
row: "works", or what doctor, pip or the tests say. A row takes 2 minutes after its download: 200 MB to 3 GB.
  PYTHON TORCH FAIRSEQ  a row, as in: 3.11 torch==2.13.0 ve-fairseq==0.12.3; PYTHON may be a path, the others are what
                        pip takes. Several may be given; without any, all rows run: Python 3.11 and 3.12, the lowest torch
                        of setup.py and that of constraints.txt, and three distributions of fairseq
  --dir FOLDER          for environments and logs (default: a temporary one, which is removed)
  --packages FOLDER     packages that every environment sees, to spare the download: the site-packages of another one
  --keep                leave environments in --dir
END
}

dir="" packages="" keep="" rows=()
while (($#)); do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --keep) keep=1 && shift ;;
        --dir | --packages)
            (($# > 1)) || { echo "matrix.sh: $1 needs a folder" >&2 && exit 2; }
            [[ $1 == --packages ]] || mkdir -p "$2" || exit 2
            [[ -d $2 ]] || { echo "matrix.sh: $1 $2 is no folder" >&2 && exit 2; }
            declare "${1#--}=$(cd "$2" && pwd)"
            shift 2
            ;;
        *)
            [[ $# -ge 3 && $1 != -* ]] || { echo "matrix.sh: a row is PYTHON TORCH FAIRSEQ; see --help" >&2 && exit 2; }
            rows+=("$1 $2 $3") && shift 3
            ;;
    esac
done
if ((!${#rows[@]})); then
    lowest=$(sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' "$root/setup.py").0
    newest=$(sed -n 's/^torch==//p' "$root/scripts/constraints.txt")
    for python in 3.11 3.12; do
        for torch in "$lowest" "$newest"; do
            for fairseq in ve-fairseq==0.12.3 fairseq-fixed==0.12.3.1 fairseq; do
                rows+=("$python torch==$torch $fairseq")
            done
        done
    done
fi
if [[ -z $dir ]]; then
    dir=$(mktemp -d)
    trap 'rm -rf "$dir"' EXIT
fi

# find_python VERSION|PATH: print the path of this Python. pyenv may have versions that are not on the PATH.
find_python() {
    local candidate
    for candidate in "$1" "python$1" "${HGKD_PYTHON:-}" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if [[ -n $candidate ]] && "$candidate" -c 'import sys; sys.exit(sys.argv[1] not in (sys.argv[2], "%d.%d" %
            sys.version_info[:2]))' "$1" "$candidate" 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

pip() { "$1/venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check "${@:2}"; }

# others PYTHON: print the requirements in setup.py other than fairseq, for use with another distribution of fairseq.
others() { "$1" -c 'import setuptools, sys
setuptools.setup = lambda **given: print(*[one for one in given["install_requires"] if "fairseq" not in one])
sys.argv = ["setup.py"]; exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": "setup.py"})'; }

install() { # FOLDER PYTHON TORCH FAIRSEQ
    "$2" -m venv "$1/venv" || return
    if [[ -n $packages ]]; then
        echo "$packages" >"$("$1/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
    fi
    pip "$1" setuptools wheel "$3" && pip "$1" "$3" "$4" || return
    mkdir -p "$1/source" && cp -r "$root"/{setup.py,pyproject.toml,README.md,MANIFEST.in,hgkd_fairseq} "$1/source" || return
    if [[ $4 == ve-fairseq* ]]; then
        pip "$1" "$3" "$4" "$1/source" || return
    else
        local needed
        needed=$(cd "$1/source" && others "$1/venv/bin/python") || return
        # shellcheck disable=SC2086
        pip "$1" --no-deps "$1/source" && pip "$1" "$3" $needed || return
    fi
    pip "$1" --constraint <(grep -E '^(pytest|hypothesis)==' "$root/scripts/constraints.txt") pytest hypothesis
}

check() { # FOLDER
    (cd "$root" && OMP_NUM_THREADS=1 "$1/venv/bin/python" -m pytest -q -p no:cacheprovider \
        tests/fairseq_runs/test_training.py tests/loss/test_gated_distillation.py tests/loss/test_native.py \
        -k "log_lines or killed_and_resumed or hand_example or usable_here")
}

summary() { tail -1 "$1/tests.log" | sed -E 's/, [0-9]+ (deselected|warnings?)//g; s/ \([0-9:]+\)//'; }

row() { # FOLDER PYTHON TORCH FAIRSEQ
    local folder=$1 python failed
    rm -rf "$folder" && mkdir -p "$folder"
    python=$(find_python "$2") || { echo "no such Python here" && return; }
    if ! install "$folder" "$python" "$3" "$4" >"$folder/install.log" 2>&1; then
        echo "is not installed: $(grep -E 'ERROR|error:' "$folder/install.log" | head -1 | cut -c1-200)"
        return
    fi
    if ! (cd "$folder" && "$folder/venv/bin/hgkd" doctor) >"$folder/doctor.log" 2>&1; then
        failed=$(sed -n 's/^FAIL  *//p' "$folder/doctor.log" | tr -s ' ' | paste -sd'|' | sed 's/|/; /g')
        echo "doctor: ${failed:-$(tail -1 "$folder/doctor.log")}"
        return
    fi
    if check "$folder" >"$folder/tests.log" 2>&1; then
        echo "works: doctor, $(summary "$folder")"
    else
        echo "tests: $(grep -E '^(FAILED|ERROR|E  )' "$folder/tests.log" | head -1 | cut -c1-200), $(summary "$folder")"
    fi
}

for given in "${rows[@]}"; do
    read -r python torch fairseq <<<"$given"
    folder=$dir/$(tr -c 'a-zA-Z0-9.\n' - <<<"${python##*/}-$torch-$fairseq")
    echo "| $python | $torch | $fairseq | $(row "$folder" "$python" "$torch" "$fairseq") |"
    [[ -n $keep ]] || rm -rf "$folder/venv" "$folder/source"
done
