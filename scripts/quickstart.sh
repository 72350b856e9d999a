#!/usr/bin/env bash
# From nothing to distilled students, on real data: quickstart.sh [--smoke] [--dir DIR] [--from FOLDER]
#
# Sets up .venv, gets Multi30K De-En (else the LibreOffice help), trains a teacher, a Base student (cross-entropy), an
# HKD-T and an HKD-S student (the hard gate, by token and by sentence), translates the test set with fairseq-generate,
# prints BLEU, chrF, TER and calibration errors of all four side by side, and writes DIR/report.html. Uses a GPU if there
# is one.
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
# The teacher is about twice the student. A learning rate that falls to 0 lets each model reach the best validation
# loss that its updates allow; sizes and updates are for 29,000 pairs and 2 CPU cores.
vocab=4000 batch=2048 teacher_updates=2400 student_updates=1400 warmup=400 beam=5 longest=1.5
teacher_size=(--encoder-layers 3 --decoder-layers 2 --encoder-embed-dim 192 --decoder-embed-dim 192
    --encoder-ffn-embed-dim 384 --decoder-ffn-embed-dim 384 --encoder-attention-heads 4 --decoder-attention-heads 4)
student_size=(--encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 128 --decoder-embed-dim 128
    --encoder-ffn-embed-dim 256 --decoder-ffn-embed-dim 256 --encoder-attention-heads 4 --decoder-attention-heads 4)
if ((smoke)); then
    vocab=2000 teacher_updates=90 student_updates=70 warmup=40 beam=1 longest=1.0
fi
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
text=$dir/text-$data
bin=$dir/data-bin
PYTHON=$PYTHON bash "$root/scripts/prepare_data.sh" "$text" "$bin" --vocab "$vocab"

# ---------------------------------------------------------------------------------------------------------- training
# fairseq drops a last batch whose size is no multiple of this, 8 by default: 6 of 1,014 validation sentences.
every=(--required-batch-size-multiple 1)

# train NAME UPDATES OPTIONS...: to DIR/NAME, with its log; resumes by itself.
train() {
    local name=$1 updates=$2 run=$dir/$1
    shift 2
    recorded "$run" checkpoint_best.pt checkpoint_last.pt && { say "$name: trained before"; return; }
    mkdir -p "$run"
    say "$name: training, $updates updates (log: $run/train.log)"
    "$BIN/fairseq-train" "$bin" --user-dir "$root/hgkd_fairseq" --save-dir "$run" "${device[@]}" \
        --arch transformer_iwslt_de_en --share-all-embeddings --dropout 0.2 --max-tokens "$batch" "${every[@]}" --seed 1 \
        --optimizer adam --adam-betas '(0.9, 0.98)' --lr 0.004 --clip-norm 1.0 --weight-decay 0.0001 \
        --lr-scheduler polynomial_decay --warmup-updates "$warmup" \
        --total-num-update "$updates" --max-update "$updates" \
        --best-checkpoint-metric nll_loss --no-epoch-checkpoints \
        --no-progress-bar --log-format simple --log-interval 50 "$@" 2>&1 |
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

train teacher "$teacher_updates" "${teacher_size[@]}" --criterion label_smoothed_cross_entropy --label-smoothing 0
for method in base hkd-t hkd-s; do
    mapfile -t options < <("$BIN/hgkd" methods "$method" --teacher "$dir/teacher/checkpoint_best.pt")
    train "$method" "$student_updates" "${student_size[@]}" --task translation_with_teacher --criterion hard_gate_kd \
        "${options[@]}"
done

# ----------------------------------------------------------------------------------------------- translating, scoring
say "translating the test set and scoring, beam $beam (log: $dir/score-*.log)"
# score NAME...: all that is measured of these models
score() {
    local log=$dir/score-$1.log
    OMP_NUM_THREADS=1 "$BIN/hgkd" score "$bin" "${@/#/$dir/}" --reference "$text/test.en" \
        --generate "--beam $beam --max-len-a $longest --max-len-b 10 ${device[*]}" >"$log" 2>&1 ||
        { tail -n 1 "$log" >&2; exit 1; }
}

# Two at a time, of one thread each: so small a model does not keep two cores busy.
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
score teacher hkd-t &
score base hkd-s &
wait -n
wait -n

say "report: comparing"
"$BIN/hgkd" report "$dir/base" "$dir/teacher" "$dir/hkd-t" "$dir/hkd-s" --reference "$text/test.en" \
    --output "$dir/report.html" >"$dir/table.md" 2>"$dir/report.log" || { tail -n 1 "$dir/report.log" >&2; exit 1; }
cat "$dir/table.md"
say "the same with diagrams and training curves: $dir/report.html"
