#!/usr/bin/env bash
# Train and compare a teacher and distilled students: quickstart.sh [--smoke] [--dir DIR] [--from FOLDER]
#
# The script sets up .venv and downloads Multi30K De-En (or the LibreOffice help, if Multi30K is not available). Four
# students are trained on the first 5,000 pairs: Base (cross-entropy), Word-KD, HKD-T and HKD-S (the hard gate, by token
# and by sentence). Their teacher has the same size and is trained on all other pairs, like an existing model that was
# trained on other data. The script prints BLEU, chrF, TER and calibration errors of all five models and writes
# DIR/report.html. It uses a GPU if there is one. For all models, translations are those of the checkpoint with the
# highest validation BLEU, and all other scores are those of the checkpoint with the lowest validation NLL.
#
#   --smoke        run everything at toy size, in 5 minutes on 2 cores, as a test that it works; scores are meaningless
#   --dir DIR      folder for runs and logs (default runs/quickstart, or runs/smoke)
#   --from FOLDER  a local copy of the data, see get_data.sh; HGKD_DATA can name it too
#
# After an interruption, start it again: finished steps are skipped, and training resumes.
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
# Distillation helps with few pairs, training until convergence, and a teacher trained on more data. The students'
# dropout is the one with the lowest validation NLL of Base; model sizes and updates are chosen for 2 CPU cores.
pairs=5000 scored=5000 vocab=2000 batch=2048 updates=1800 warmup=200 beam=5 longest=1.5
if ((smoke)); then
    scored=100 updates=70 warmup=40 beam=1 longest=1.0
fi
size=(--encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 128 --decoder-embed-dim 128
    --encoder-ffn-embed-dim 256 --decoder-ffn-embed-dim 256 --encoder-attention-heads 4 --decoder-attention-heads 4)
for_teacher=(--dropout 0.1 --lr 0.004 --lr-scheduler polynomial_decay --total-num-update "$updates")
# A student's epochs are short, so that every third one is enough for validation and checkpoints.
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
    PYTHON=$PYTHON bash "$root/scripts/get_data.sh" "$name" "$dir/text-$name" "${from[@]}" || status=$?
    if ((status == 0)); then data=$name; break; fi
    # 3: this corpus is not available; 2: --from holds another one. Any other error ends the script.
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
# fairseq drops sentences of the last batch to make its size a multiple of this. The default, 8, would drop 6 of the
# 1,014 validation sentences.
every=(--required-batch-size-multiple 1)

# train NAME SEED DATA OPTIONS...: train a model in DIR/NAME, which gets train.log too, or resume its training.
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
    write "$run/settings" "$wanted"
    say "$name: training (log: $run/train.log)"
    "$BIN/fairseq-train" "$data" --user-dir "$root/hgkd_fairseq" --save-dir "$run" "${device[@]}" \
        --no-progress-bar --log-format simple --log-interval 50 "${settings[@]}" 2>&1 |
        tee -a "$run/train.log" | progress "$name"
    record "$run" checkpoint_best.pt checkpoint_last.pt
}

# progress NAME: reduce a training log to one line per validation, and errors. Unlike awk, sed -u does not buffer lines.
progress() {
    { grep --line-buffered -E ' valid \| epoch|error:|Error' || true; } | sed -u -E "
        s/^.* valid \| epoch 0*([0-9]+) .*\| nll_loss ([0-9.]+) \|/          $1: epoch \1, validation NLL \2 bits |/
        s/ \|.* teacher_share ([0-9.]+) .* ece ([0-9.]+) .*num_updates ([0-9]+).*/, ECE \2, teacher share \1, \3 updates/
        s/ \|.* num_updates ([0-9]+).*/, \1 updates/"
}

# model NAME: train the teacher or a student.
model() {
    local options words
    if [[ $1 == teacher ]]; then
        train teacher 1 "$bin-teacher" "${for_teacher[@]}" --criterion label_smoothed_cross_entropy --label-smoothing 0
        return
    fi
    words=$("$BIN/hgkd" methods "$1" --teacher "$dir/teacher/checkpoint_best.pt")
    mapfile -t options <<<"$words"
    train "$1" 2 "$bin" "${for_student[@]}" --task translation_with_teacher --criterion hard_gate_kd "${options[@]}"
}

# score NAME...: compute all scores of these models.
score() {
    local log=$dir/score-${1}.log
    say "translating the test set and scoring, beam $beam: $* (log: $log)"
    "$BIN/hgkd" score "$bin" "${@/#/$dir/}" --reference "$text/test.en" --checkpoint best --checkpoint best-bleu \
        --generate "--beam $beam --max-len-a $longest --max-len-b 10 ${device[*]}" >"$log" 2>&1 ||
        { tail -n 1 "$log" >&2; exit 1; }
}

# both "COMMAND NAME..." "COMMAND NAME...": run two commands in parallel, with one thread each, because models of this
# size do not use two cores efficiently. Each command is a process group (set -m), which is killed when this script
# exits.
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
