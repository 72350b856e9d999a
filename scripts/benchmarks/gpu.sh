#!/usr/bin/env bash
# Tests and benchmarks the CUDA path on this machine and writes all results to one folder. See --help.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

usage() {
    cat <<'END'
usage: gpu.sh [--out DIR] [--minutes N] [--part tests|loss|step|train]... [options] [-- OPTIONS]
On a Linux machine with Python >= 3.11, torch, Triton and a CUDA device: tests on the device, then the loss head, a
training step and whole trainings measured. Nothing is installed and no network is needed. Each part has a share of the
time that is left as its limit; one that fails or is cut short is reported, and the next one runs.
  --out DIR      all results: gpu.md, CSV files, logs (default runs/gpu)
  --minutes N    for all parts together (default 10)
  --part PART    this part only; may be given again (default: all four, in their order)
  --site DIR     put on PYTHONPATH: a folder of packages, or of wheels (*.whl), which are unpacked
  --device D     cuda (default), or cpu: every part at toy size, to try this script itself
  --recipe DIR   for train: a folder that a recipe of scripts/recipes made with --until data, or trained in before;
                 unfinished trainings go on where they were
  --methods LIST for train, after the teacher (default "base word-kd hkd-t hkd-s random")
  --jobs N       of these at a time (default 5)
  --profile      also what one pass of the loss runs on the device, by torch's profiler
  --commit NAME  what gpu.md calls this checkout (default: git's answer)
  OPTIONS        of the recipe: --max-update N, --precision P, ...
Environment: PYTHON (default: .venv/bin/python, else python3).
END
}

fail() {
    echo "gpu.sh: $*" >&2
    exit 2
}

out=$root/runs/gpu minutes=10 parts=() site="" device=cuda recipe="" jobs=5 profile=() commit="" extra=()
methods="base word-kd hkd-t hkd-s random"
while (($#)); do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --profile) profile=(--profile) ;;
        --)
            shift
            extra=("$@")
            break
            ;;
        --out | --minutes | --part | --site | --device | --recipe | --methods | --jobs | --commit)
            [[ -n ${2:-} ]] || fail "$1 needs a value"
            case $1 in
                --out) out=$2 ;;
                --minutes) minutes=$2 ;;
                --part) parts+=("$2") ;;
                --site) site=$2 ;;
                --device) device=$2 ;;
                --recipe) recipe=$2 ;;
                --methods) methods=$2 ;;
                --jobs) jobs=$2 ;;
                --commit) commit=$2 ;;
            esac
            shift
            ;;
        *) fail "unknown argument $1: see --help" ;;
    esac
    shift
done
((${#parts[@]})) || parts=(tests loss step train)
for part in "${parts[@]}"; do [[ $part =~ ^(tests|loss|step|train)$ ]] || fail "--part $part: must be tests, loss, step or train"; done
[[ $minutes =~ ^[1-9][0-9]{0,3}$ ]] || fail "--minutes $minutes: needs a whole number above 0"
[[ $jobs =~ ^[1-9][0-9]?$ ]] || fail "--jobs $jobs: needs a whole number above 0"
[[ $device =~ ^(cuda|cpu)$ ]] || fail "--device $device: must be cuda or cpu"
[[ -z $recipe || -f $recipe/recipe ]] || fail "--recipe $recipe: no folder of a recipe; make it with multi30k-de-en.sh --until data --dir DIR"
[[ -z $site || -d $site ]] || fail "--site $site: no such folder"

mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
work=$(mktemp -d)
# Trainings in the background are process groups of their own, which timeout ends.
trap 'for job in $(jobs -p); do kill "$job" 2>/dev/null || true; done; rm -rf "$work"' EXIT
# An absolute path, but with symbolic links kept: a virtual environment is found through the path of its interpreter.
python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
python=$(command -v "$python") || fail "PYTHON names no program"
if [[ -n $site ]]; then
    site=$(cd "$site" && pwd)
    if compgen -G "$site/*.whl" >/dev/null; then
        for wheel in "$site"/*.whl; do "$python" -m zipfile -e "$wheel" "$work/site" || fail "$wheel cannot be unpacked"; done
        site=$work/site
    fi
fi
export PYTHONPATH=$root${site:+:$site}${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
[[ $device == cuda ]] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=

# Packages on PYTHONPATH may lack their console scripts, which the recipes call: create them.
mkdir "$work/bin"
for command in fairseq-{train,generate,preprocess}:fairseq_cli.@.cli_main hgkd:hgkd_fairseq.cli.main \
    sacrebleu:sacrebleu.sacrebleu.main sacremoses:sacremoses.cli.cli subword-nmt:subword_nmt.subword_nmt.main; do
    name=${command%%:*} entry=${command#*:}
    entry=${entry/@/${name#fairseq-}}
    printf '#!/bin/sh\nexec "%s" -c "import sys; from %s import %s; sys.exit(%s())" "$@"\n' \
        "$python" "${entry%.*}" "${entry##*.}" "${entry##*.}" >"$work/bin/$name"
done
printf '#!/bin/sh\nexec "%s" "$@"\n' "$python" >"$work/bin/python"
chmod +x "$work"/bin/*

if ! "$python" - "$device" "${commit:-$(git -C "$root" describe --always --dirty 2>/dev/null || echo unknown)}" >"$work/head" <<'END'; then
import platform, sys
from importlib.metadata import PackageNotFoundError, version
import torch
device, commit = sys.argv[1:]
if device == "cuda" and not torch.cuda.is_available():
    sys.exit("gpu.sh: torch sees no CUDA device; --device cpu tries the script without one")
def of(name):
    try: return version(name)
    except PackageNotFoundError: return "none"
print("# The CUDA path, proven and measured\n\nWritten by `scripts/benchmarks/gpu.sh`; raw numbers in the CSV files and logs beside it.\n")
rows = {"commit": commit, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
if device == "cuda":
    import subprocess
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    rows["driver, clock, power"] = subprocess.run(query, capture_output=True, text=True).stdout.strip() or "unknown"
    rows["compute capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
rows |= {"Python": platform.python_version(), "torch": torch.__version__}
rows |= {name: of(name) for name in ("triton", "ve-fairseq", "liger-kernel")}
print("| | |\n|---|---|")
for item in rows.items(): print("| {} | {} |".format(*item))
END
    exit 1
fi
cat "$work/head"

# limit PART: print the time limit of a part in seconds: of the time that is left, its share among the parts in `waiting`.
# Of 10 minutes, tests, loss and step have about 2, 3 and 2 or more, and train has the rest.
begin=$SECONDS waiting=()
weight() {
    case $1 in
        train) [[ -n $recipe ]] && echo 3 || echo 0 ;; # not run without one
        loss) echo 3 ;;
        *) echo 2 ;;
    esac
}
limit() {
    local left=$((minutes * 60 - (SECONDS - begin))) all=0 part
    for part in "${waiting[@]}"; do all=$((all + $(weight "$part"))); done
    left=$((left * $(weight "$1") / all))
    echo $((left > 5 ? left : 5))
}

# limited SECONDS LOG COMMAND...: run a command with a time limit. timeout runs it in its own process group and signals
# the whole group.
launcher=() # exec in the background, so that the job is timeout itself, which passes signals to its group
signal=TERM grace=5
limited() {
    local seconds=$1 log=$2
    shift 2
    "${launcher[@]}" timeout --signal="$signal" --kill-after="$grace" "$seconds" "$@" >>"$log" 2>&1
}

# worse STATUS STATUS: print the one to report of two runs: a failure rather than a time limit or success
worse() { if (($1 == 0 || $1 == 124 || $1 == 137)) && (($2)); then echo "$2"; else echo "$1"; fi; }

report=$work/report
: >"$report"
failed=0
# outcome PART STATUS LOG: add a heading with the outcome of a part to the report
outcome() {
    local text="done"
    ((!$2)) || failed=1
    case $2 in 0) ;; 124 | 137) text="cut short at its time limit; what was finished stands below" ;; *) text="FAILED (status $2), see $(basename "$3")" ;; esac
    printf '\n## %s: %s\n\n' "$1" "$text" | tee -a "$report"
}

part_tests() {
    local seconds status signal=INT grace=20 workers=()
    local selected=(-m cuda tests/fairseq_runs tests/data tests/loss) # trainings first: they take longest
    seconds=$(limit tests)
    rm -f "$out/tests.log"
    if [[ $device == cpu ]]; then
        selected=(tests/loss/test_devices.py -k "cpu and (few or pads or alignment)")
    elif "$python" -c 'import xdist' 2>/dev/null; then
        workers=(-n "$(($(nproc) > 16 ? 16 : $(nproc)))" --maxschedchunk 1)
    fi
    # At SIGINT pytest prints the failures so far. timeout sends it twice: to the process and to its group.
    (cd "$root" && limited "$seconds" "$out/tests.log" "$python" -c 'import signal, sys, pytest
def stop(*_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, stop)
sys.exit(pytest.main())' -v -p no:cacheprovider -W ignore --durations=8 -rfE "${workers[@]}" "${selected[@]}")
    status=$?
    outcome "Tests on the device" "$status" "$out/tests.log"
    { echo '```'; grep -aE '^(FAILED|ERROR) |(passed|failed|error).* in |^Timeout' "$out/tests.log" | tail -n 40; echo '```'; } >>"$report"
}

part_loss() {
    local end=$((SECONDS + $(limit loss))) status=0 name one arguments table
    rm -f "$out"/loss*.md "$out/loss.csv"
    # The most important runs come first, since the time may end before the last. Compiling takes longer than measuring,
    # so only one shape includes the compiled peers.
    local runs=(
        "wmt-base-bf16 --shape wmt-base --dtype bf16 --time --errors --memory"
        "fp16 --shape wmt-base --dtype fp16 --time --memory --rungs triton --without compiled chunks TRL"
        "fp32 --shape wmt-base iwslt --dtype fp32 --time --memory --rungs triton --without compiled chunks TRL"
        "bf16 --shape iwslt wmt-big nllb --dtype bf16 --time --memory --rungs triton --without compiled TRL"
        "nllb-fp32 --shape nllb --dtype fp32 --time --rungs triton --without compiled chunks TRL"
    )
    [[ $device == cuda ]] || runs=("toy --tokens 64 --dim 16 --vocabulary 101 --dtype fp32 --time --errors --rungs chunked --without compiled")
    for one in "${runs[@]}"; do
        name=${one%% *}
        read -ra arguments <<<"${one#* }"
        ((SECONDS < end)) || { ((status)) || status=124; break; }
        limited $((end - SECONDS)) "$out/loss.log" "$python" "$here/loss.py" --device "$device" --repeats 9 "${arguments[@]}" \
            --csv "$out/loss.csv" --markdown "$out/loss-$name.md" "${profile[@]}" || status=$(worse $status $?)
    done
    outcome "The loss head" "$status" "$out/loss.log"
    for table in "$out"/loss-*.md; do [[ ! -f $table ]] || { sed 1d "$table"; echo; } >>"$report"; done
}

part_step() {
    local end=$((SECONDS + $(limit step))) status=0 one arguments
    rm -f "$out/step.md" "$out/step.csv"
    local runs=("--arch-size wmt-base --dtype bf16 fp16" "--arch-size iwslt --dtype bf16 fp16")
    [[ $device == cuda ]] || runs=("--arch-size tiny")
    for one in "${runs[@]}"; do
        read -ra arguments <<<"$one"
        ((SECONDS < end)) || { ((status)) || status=124; break; }
        limited $((end - SECONDS)) "$out/step.log" "$python" "$here/step.py" --device "$device" --repeats 9 "${arguments[@]}" \
            --rungs "$([[ $device == cuda ]] && echo triton || echo chunked)" \
            --csv "$out/step.csv" --markdown "$out/step.md" || status=$(worse $status $?)
    done
    outcome "A training step" "$status" "$out/step.log"
    [[ ! -f $out/step.md ]] || cat "$out/step.md" >>"$report"
}

# train_one METHOD SECONDS: train a method with the recipe that created the folder
train_one() {
    local name style gpus=1
    read -r name style <"$recipe/recipe"
    [[ $device == cuda ]] || gpus=0
    # shellcheck disable=SC2086  style is an option and its value, or nothing
    PYTHON=$work/bin/python limited "$2" "$out/train-$1.log" bash "$root/scripts/recipes/$name.sh" $style \
        --dir "$recipe" --gpus "$gpus" --method "$1" "${extra[@]}"
}

part_train() {
    local end status=0 method running=() pid
    if [[ -z $recipe ]]; then
        printf '\n## Trainings: not run, no --recipe\n' | tee -a "$report"
        return
    fi
    end=$((SECONDS + $(limit train)))
    recipe=$(cd "$recipe" && pwd)
    train_one teacher $((end - SECONDS)) || status=$?
    if ((!status)); then
        for method in $methods; do
            while (($(jobs -rp | wc -l) >= jobs)); do sleep 1; done
            ((SECONDS < end)) || { ((status)) || status=124; break; }
            { launcher=(exec) && train_one "$method" $((end - SECONDS)); } &
            running+=($!)
        done
        for pid in "${running[@]}"; do wait "$pid" || status=$(worse $status $?); done
    fi
    outcome "Trainings" "$status" "$out/train-*.log"
    summary >>"$report"
}

# summary: print the progress and the scores of every run in the recipe's folder
summary() {
    local run line
    for run in "$recipe"/*/train.log; do
        [[ -f $run ]] || continue
        line=$(grep -aoE 'valid \| epoch [0-9]+ .*num_updates [0-9]+' "$run" | tail -n 1) || true
        printf -- '- `%s`: %s\n' "$(basename "$(dirname "$run")")" "${line:-no epoch yet}"
    done
    echo
    echo '```'
    for run in "$recipe"/* "$recipe"/*/average*; do
        [[ -f $run/scores.json ]] || continue
        printf '%s\n' "${run#"$recipe"/}"
        grep -hs '^BLEU' "$run/bleu" || true # one that is being scored lacks some
        grep -hs '^ECE.*mode:forced' "$run/scores" || true
    done
    echo '```'
}

for ((number = 0; number < ${#parts[@]}; number++)); do
    part=${parts[number]} waiting=("${parts[@]:number}")
    if ((SECONDS - begin >= minutes * 60)); then
        printf '\n## %s: not begun, the time was over\n' "$part" | tee -a "$report"
        failed=1
    else
        "part_$part"
    fi
    cat "$work/head" "$report" >"$out/gpu.md" # after each part: a machine that goes away leaves what there is
done
echo
echo "gpu.sh: $((SECONDS - begin)) s, results in $out"
exit "$failed"
