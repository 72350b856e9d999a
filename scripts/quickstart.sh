#!/usr/bin/env bash
# From nothing to distilled students, on real data: quickstart.sh [--smoke] [--dir DIR] [--from FOLDER]
#
# Sets up .venv and gets Multi30K De-En (else the LibreOffice help). The students have its first 5,000 pairs: Base
# (cross-entropy), Word-KD, HKD-T and HKD-S (the hard gate, by token and by sentence). Their teacher, of the same size, has
# all the others, and never sees theirs: like a model that is there already, from elsewhere. Prints BLEU, chrF, TER and
# calibration errors of all five side by side, and writes DIR/report.html. Uses a GPU if there is one. One rule for all:
# translations are those of the checkpoint with the highest BLEU on the validation set, everything else is measured at the
# one with the least NLL there.
#
#   --smoke        everything at toy size, in 5 minutes on 2 cores: shows that it runs, not that it is good
#   --dir DIR      where runs and logs go (default runs/quickstart, or runs/smoke)
#   --from FOLDER  a local copy of the data, see get_data.sh; also in HGKD_DATA
#
# Killed anywhere and started again, it goes on where it was: finished steps are skipped, training resumes.
set -euo pipefail

smoke=0 dir="" from=()
while (($#)); do
    case $1 in
        --smoke) smoke=1 ;;
        --dir | --from)
            [[ -n ${2:-} ]] || { echo "quickstart.sh: $1 needs a folder" >&2; exit 2; }
            [[ $1 == --dir ]] && dir=$2 || from=(--from "$2")
            shift
            ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "quickstart.sh: unknown argument $1; known are --smoke, --dir DIR, --from FOLDER" >&2; exit 2 ;;
    esac
    shift
done

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$root/scripts/steps.sh"
if ((smoke)); then dir=${dir:-$root/runs/smoke}; else dir=${dir:-$root/runs/quickstart}; fi
[[ $dir == /* ]] || dir=$PWD/$dir
if [[ $dir == *:* ]]; then
    echo "quickstart.sh: --dir $dir: fairseq takes a ':' for the end of a path; choose a folder without one" >&2
    exit 2
fi
mkdir -p -- "$dir" 2>/dev/null || { echo "quickstart.sh: --dir $dir cannot be made: name a folder to write to" >&2; exit 1; }
dir=$(cd -- "$dir" && pwd)
lock "$dir" || exit 1
say() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*"; }

# ---------------------------------------------------------------------------------------------------------- settings
# Few pairs, a training to its end, and a teacher that knows more: there distillation pays. The students' dropout is what
# gives Base the least NLL on the validation set; sizes and updates are for 2 CPU cores.
pairs=5000 scored=5000 vocab=2000 batch=2048 updates=1800 warmup=200 beam=5 longest=1.5
if ((smoke)); then
    scored=100 updates=70 warmup=40 beam=1 longest=1.0
fi
size=(--encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 128 --decoder-embed-dim 128
    --encoder-ffn-embed-dim 256 --decoder-ffn-embed-dim 256 --encoder-attention-heads 4 --decoder-attention-heads 4)
for_teacher=(--dropout 0.1 --lr 0.004 --lr-scheduler polynomial_decay --total-num-update "$updates")
# A student's epoch is short: validation, and a checkpoint to choose from, every third.
for_student=(--dropout 0.3 --lr 0.003 --lr-scheduler inverse_sqrt --save-interval 3 --validate-interval 3)
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=(--fp16)
else
    device=(--cpu)
    set -a && source "$root/scripts/cpu_memory.env" && set +a
fi

# -------------------------------------------------------------------------------------------------------------- data
data=""
for name in multi30k-de-en libreoffice-help-de-en; do
    status=0
    bash "$root/scripts/get_data.sh" "$name" "$dir/text-$name" "${from[@]}" || status=$?
    if ((status == 0)); then data=$name; break; fi
    # 3: this one cannot be had here; 2: --from holds another one. Anything else is wrong and has been said.
    ((status == 3 || (status == 2 && ${#from[@]} > 0))) || exit "$status"
done
if [[ -z $data ]]; then
    echo "quickstart.sh: no data: name a folder with Multi30K's train.de.gz and so on in --from FOLDER" >&2
    exit 1
fi
text=$dir/text bin=$dir/data-bin
mkdir -p "$text" "$text-teacher"
for language in de en; do
    head -n "$pairs" "$dir/text-$data/train.$language" >"$text/train.$language"
    tail -n "+$((pairs + 1))" "$dir/text-$data/train.$language" >"$text-teacher/train.$language"
    for subset in valid test; do
        head -n "$scored" "$dir/text-$data/$subset.$language" >"$text/$subset.$language"
        cp "$text/$subset.$language" "$text-teacher"
    done
done
PYTHON=$PYTHON bash "$root/scripts/prepare_data.sh" "$text-teacher" "$bin-teacher" --vocab "$vocab"
PYTHON=$PYTHON bash "$root/scripts/prepare_data.sh" "$text" "$bin" --like "$bin-teacher"

# ---------------------------------------------------------------------------------------------------------- training
# fairseq drops a last batch whose size is no multiple of this, 8 by default: 6 of 1,014 validation sentences.
every=(--required-batch-size-multiple 1)

# train NAME SEED DATA OPTIONS...: to DIR/NAME, with its log; resumes by itself.
train() {
    local name=$1 seed=$2 data=$3 run=$dir/$1 settings wanted
    shift 3
    settings=(--arch transformer_iwslt_de_en "${size[@]}" --share-all-embeddings --max-tokens "$batch" "${every[@]}"
        --seed "$seed" --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --weight-decay 0.0001
        --warmup-updates "$warmup" --max-update "$updates" --best-checkpoint-metric nll_loss "$@")
    wanted=$(printf '%s\n' "${device[@]}" "${settings[@]}"
        [[ " $* " != *" --teacher-path "* ]] || hashes "$dir/teacher/checkpoint_best.pt")
    if begun_otherwise "$run" "$wanted"; then
        echo "quickstart.sh: $run was begun with other settings, see $run/settings: remove it, or choose another --dir" >&2
        exit 1
    fi
    recorded "$run" checkpoint_best.pt checkpoint_last.pt && { say "$name: trained before"; return; }
    mkdir -p "$run"
    printf '%s\n' "$wanted" >"$run/settings"
    say "$name: training (log: $run/train.log)"
    "$BIN/fairseq-train" "$data" --user-dir "$root/hgkd_fairseq" --save-dir "$run" "${device[@]}" \
        --no-progress-bar --log-format simple --log-interval 50 "${settings[@]}" 2>&1 |
        tee -a "$run/train.log" | progress "$name"
    record "$run" checkpoint_best.pt checkpoint_last.pt
}

# One line an epoch, as it comes (awk would hold lines back), and whatever went wrong.
progress() {
    { grep --line-buffered -E ' valid \| epoch|error:|Error' || true; } | sed -u -E "
        s/^.* valid \| epoch 0*([0-9]+) .*\| nll_loss ([0-9.]+) \|/          $1: epoch \1, validation NLL \2 bits |/
        s/ \|.* teacher_share ([0-9.]+) .* ece ([0-9.]+) .*num_updates ([0-9]+).*/, ECE \2, teacher share \1, \3 updates/
        s/ \|.* num_updates ([0-9]+).*/, \1 updates/"
}

# model NAME: trains it
model() {
    local options
    if [[ $1 == teacher ]]; then
        train teacher 1 "$bin-teacher" "${for_teacher[@]}" --criterion label_smoothed_cross_entropy --label-smoothing 0
        return
    fi
    mapfile -t options < <("$BIN/hgkd" methods "$1" --teacher "$dir/teacher/checkpoint_best.pt")
    train "$1" 2 "$bin" "${for_student[@]}" --task translation_with_teacher --criterion hard_gate_kd "${options[@]}"
}

# score NAME...: all that is measured of these models
score() {
    local log=$dir/score-${1}.log
    say "translating the test set and scoring, beam $beam: $* (log: $log)"
    "$BIN/hgkd" score "$bin" "${@/#/$dir/}" --reference "$text/test.en" --checkpoint best --checkpoint best-bleu \
        --generate "--beam $beam --max-len-a $longest --max-len-b 10 ${device[*]}" >"$log" 2>&1 ||
        { tail -n 1 "$log" >&2; exit 1; }
}

# both "COMMAND NAME..." "COMMAND NAME...": at once, of one thread each: so small a model does not keep two cores busy. Each
# is a process group (set -m), which ends with this script.
set -m
trap 'for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done' EXIT
both() {
    local job words
    for job in "$@"; do
        read -ra words <<<"$job"
        OMP_NUM_THREADS=1 "${words[@]}" &
    done
    wait -n
    wait -n
}

both "model teacher" "model base"
both "model word-kd-0.7" "model hkd-t"
both "model hkd-s" "score base word-kd-0.7 hkd-t teacher"
score hkd-s

say "report: comparing"
"$BIN/hgkd" report "$dir/base" "$dir/teacher" "$dir/word-kd-0.7" "$dir/hkd-t" "$dir/hkd-s" \
    --reference "$text/test.en" --translations best-bleu --output "$dir/report.html" >"$dir/table.md" 2>"$dir/report.log" ||
    { tail -n 1 "$dir/report.log" >&2; exit 1; }
cat "$dir/table.md"
say "the same with diagrams and training curves: $dir/report.html"
