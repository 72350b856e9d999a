#!/usr/bin/env bash
# The one table of methods: what each adds to a fairseq-train of `--task translation_with_teacher --criterion
# hard_gate_kd`. Sourced by the recipes; run as a program it prints the table, "name TAB title TAB options", or with
# `methods.sh NAME TEACHER` the options of one method, one a line. TEACHER stands for the teacher's checkpoint.
#
# Values are those of the papers that `hgkd gates` names. sd and word-kd differ in the teacher only: one of the
# student's own architecture, or a bigger one. seq-kd is base on other data: the teacher's translations of the training
# sources. progressive (ps-kd) and annealed (annealing) change over the run and need --max-update.

methods_table() {
    cat <<'END'
base|Base|--gate none
ls-uniform|LS-Uniform|--gate none --label-smoothing 0.1
ls-unigram|LS-Unigram|--teacher-source unigram --gate always --kd-weight 0.1 --teacher-temperature 1
loras|Loras|--teacher-source loras --gate always --kd-weight 0.1 --teacher-temperature 1
conf-pen|ConfPen|--gate none --confidence-penalty 0.1
tf-kd|TF-KD|--gate virtual-teacher --kd-weight 0.1 --virtual-gold 0.9
ps-kd|PS-KD|--teacher-source previous-epoch --gate progressive --kd-weight 0.8 --teacher-temperature 1
sd|SD|--teacher-path TEACHER --gate always --kd-weight 0.5
beta|Beta|--teacher-source ema --store-ema --ema-decay 0.999 --gate beta
word-kd|Word-KD, 0.5|--teacher-path TEACHER --gate always --kd-weight 0.5
always|always the teacher|--teacher-path TEACHER --gate always --kd-weight 1
seq-kd|Seq-KD|--gate none
hkd-t|HKD-T|--teacher-path TEACHER --gate token
hkd-s|HKD-S|--teacher-path TEACHER --gate sentence
hkd-t-argmax|HKD-T, argmax|--teacher-path TEACHER --gate token --gate-on argmax
hkd-t-reversed|HKD-T reversed|--teacher-path TEACHER --gate token-reversed
hkd-s-reversed|HKD-S reversed|--teacher-path TEACHER --gate sentence-reversed
random|random gate|--teacher-path TEACHER --gate random
selective-batch|Selective-KD, batch|--teacher-path TEACHER --gate selective-batch
selective-global|Selective-KD, global|--teacher-path TEACHER --gate selective-global --gate-queue 30000
alm-kd|ALM-KD|--teacher-path TEACHER --gate instance --weight-rule convex
annealing|Annealing KD|--teacher-path TEACHER --gate annealed --gate-share 0.7 --teacher-temperature-start 10 --teacher-temperature 1
soft|soft gate|--teacher-path TEACHER --gate soft --gate-sharpness 2
soft-learned|learned soft gate|--teacher-path TEACHER --gate soft-learned
END
}

# method_names: all of them, on one line.
method_names() { methods_table | cut -d'|' -f1 | paste -sd' '; }

# method_options NAME TEACHER: sets the array `method`; status 1 where there is no such method.
method_options() {
    local name title options word
    while IFS='|' read -r name title options; do
        [[ $name == "$1" ]] || continue
        method=()
        for word in $options; do
            [[ $word != TEACHER ]] || word=$2
            method+=("$word")
        done
        return 0
    done < <(methods_table)
    return 1
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    if (($# == 0)); then
        methods_table | tr '|' '\t'
    elif (($# == 2)) && method_options "$1" "$2"; then
        printf '%s\n' "${method[@]}"
    else
        echo "methods.sh: give nothing, or NAME and TEACHER; NAME is one of: $(method_names)" >&2
        exit 2
    fi
fi
