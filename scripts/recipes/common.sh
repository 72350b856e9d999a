# Sourced by the recipes of this folder: from a recipe's data and settings to a scored model.
#
# A recipe sets, and says why:
#   title terms            what the data is, and on what terms it may be used
#   source target          languages
#   files=(FILE URL ...)   the original download
#   make_text DIR          function: from $original to DIR/{train,valid,test}.{SOURCE,TARGET}, tokenised, and where the
#                          score is to be on untokenised text DIR/reference.TARGET
#   make_pieces DIR        function: from $dir/text to DIR/{train,valid,test}.{SOURCE,TARGET} in pieces
#   dictionary=()          how fairseq-preprocess makes the dictionaries
#   scores=()              tokenised, or detokenised, or both: see bleu below. With tokenised, text/ holds tokens
#   model=() training=()   options of fairseq-train
#   batch_tokens           target tokens of one update, over all GPUs: the same recipe on any number of them
#   gpu_tokens             of these, at most on one GPU at a time
#   updates average        length of the training; checkpoints to average, 0: the best one
#   search=()              options of the beam search, of fairseq-generate and hgkd translate
#   generation=()          all options of fairseq-generate
# and calls `recipe "$@"`.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
name=$(basename "$0" .sh)
style="" more_usage=""
keep=10 # epochs whose checkpoints stay, so that any --average up to this can be chosen after the training
source "$root/scripts/steps.sh"

say() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

# fail STATUS MESSAGE. 2: usage; 3: the data cannot be had; 1: anything else.
fail() {
    local status=$1
    shift
    printf '%s.sh: %s\n' "$name" "$*" >&2
    exit "$status"
}

# methods ...: of `hgkd methods`, by whatever Python is there, so that --dry-run needs no .venv.
methods() {
    local python
    for python in "${PYTHON:-$root/.venv/bin/python}" python3.11 python3.12 python3; do
        ! PYTHONPATH=$root "$python" -m hgkd_fairseq.cli methods "$@" 2>/dev/null || return 0
    done
    fail 2 "needs Python 3.11 or later for its table of methods: name one in PYTHON"
}
method_names() { methods | cut -f1 | paste -sd' '; } # on one line

usage() {
    cat <<END
usage: $name.sh [--method NAME] [options] [-- OPTIONS]
$title: data, teacher, one method, translations, scores. Start it again after any
interruption: it goes on where it was.
  --method NAME   teacher, or one of (\`hgkd methods\` has their options; default hkd-t):
                  $(method_names | fold -s -w 62 | sed '2,$s/^/                  /')
  --seed N        of the student (default 1); the teacher's is 1
  --teacher CKPT  a teacher of your own; default: trained by this recipe, once, plain cross-entropy
  --dir DIR       where all goes (default runs/$name${style:+-STYLE})
  --from FOLDER   a folder with the original files: ${originals[*]}
  --gpus N        of this machine (default: all that are visible; 0: the CPU)
  --nodes N       machines of a Slurm job, each with --gpus N (default 1); see slurm.sh
  --torchrun      start several GPUs with torchrun instead of fairseq's own launcher
  --precision P   fp16 (default on a GPU), bf16, fp32 (default on the CPU)
  --average N     score the average of the last N epochs (default $average; 0: the best checkpoint; at most $keep)
  --max-update N  cut training short, for a trial (default $updates)
  --until STEP    stop after the step data or training (default: scores)
  --distil WORDS  options of hgkd distil-data, for a method that trains on the teacher's translations
  --dry-run       print the commands that would run, and run nothing
  OPTIONS         of fairseq-train, for this --method's model; they win over the recipe's. A teacher of another size:
                  --method teacher -- OPTIONS first
${more_usage:-}Environment: PYTHON, the Python with fairseq (default: .venv, which is made).
END
}

# ----------------------------------------------------------------------------------------------------------- options

# number OPTION TEXT: sets `value`
number() { value=$(whole_number "$2") || fail 2 "$1 $2: needs a whole number of at most 9 digits"; }

options() {
    local i names
    originals=()
    for ((i = 0; i < ${#files[@]}; i += 2)); do originals+=("${files[i]}"); done
    method_name=hkd-t seed=1 teacher="" dir="" from="" gpus="" nodes=1 torchrun=0 precision="" until=scores
    dry_run=0 extra=() distil=()
    while (($#)); do
        case $1 in
            -h | --help)
                usage
                exit 0
                ;;
            --dry-run) dry_run=1 ;;
            --torchrun) torchrun=1 ;;
            --)
                shift
                extra=("$@")
                break
                ;;
            --method | --seed | --teacher | --dir | --from | --gpus | --nodes | --precision | --average | --max-update | \
                --style | --until | --distil)
                [[ -n ${2:-} ]] || fail 2 "$1 needs a value"
                case $1 in
                    --method) method_name=$2 ;;
                    --seed) number "$@" && seed=$value ;;
                    --teacher) teacher=$2 ;;
                    --dir) dir=$2 ;;
                    --from) from=$2 ;;
                    --gpus) number "$@" && gpus=$value ;;
                    --nodes) number "$@" && nodes=$value ;;
                    --precision) precision=$2 ;;
                    --average) number "$@" && average=$value ;;
                    --max-update) number "$@" && updates=$value ;;
                    --style) style=$2 ;;
                    --until) until=$2 ;;
                    --distil) read -r -a distil <<<"$2" ;;
                esac
                shift
                ;;
            *) fail 2 "unknown argument $1: see --help" ;;
        esac
        shift
    done

    dir=${dir:-$root/runs/$name${style:+-$style}}
    [[ $dir == /* ]] || dir=$PWD/$dir
    [[ $dir != *:* ]] || fail 2 "--dir $dir: fairseq takes a ':' for the end of a path; choose a folder without one"
    [[ -z $style ]] || set_style
    if [[ $method_name != teacher ]]; then
        names=$(method_names) || exit
        [[ " $names " == *" $method_name "* ]] || fail 2 "--method $method_name: unknown; known are: teacher $names"
        mapfile -t method < <(methods "$method_name" --teacher "${teacher:-$dir/teacher/checkpoint_best.pt}")
        select=$(methods "$method_name" --data) || exit
    fi
    [[ -z $teacher || -f $teacher ]] || fail 2 "--teacher $teacher: no such file"
    [[ -z $from || -d $from ]] || fail 2 "--from $from: no such folder"
    ((average <= keep)) || fail 2 "--average $average: the last $keep epochs are kept; give at most $keep"
    ((updates > 0 && nodes > 0)) || fail 2 "--max-update and --nodes must be above 0"
    [[ $until =~ ^(data|training|scores)$ ]] || fail 2 "--until $until: must be data, training or scores"
    [[ ${precision:-fp16} =~ ^(fp16|bf16|fp32)$ ]] || fail 2 "--precision $precision: must be fp16, bf16 or fp32"
    [[ -z $from ]] || check_from
    if [[ -n ${PYTHON:-} ]]; then
        PYTHON=$(command -v "$PYTHON") || fail 2 "PYTHON names no program: give a Python with fairseq"
        BIN=$(cd "$(dirname "$PYTHON")" && pwd)
    else
        BIN=$root/.venv/bin
    fi
    [[ -n $gpus ]] || gpus=$(visible_gpus)
    place
}

check_from() {
    local file
    from=$(cd -- "$from" && pwd)
    for file in "${originals[@]}"; do
        [[ -f $from/$file ]] || fail 2 "--from $from: lacks $file: it must hold ${originals[*]}"
    done
}

set_style() { fail 2 "--style: this recipe has no styles"; }

# GPUs that a program started here would see; without a Python, so that --dry-run needs none.
visible_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^-]' || true
    else
        { nvidia-smi -L 2>/dev/null || true; } | wc -l
    fi
}

# Where and how training runs: `launch` before the command and `placement` among its options. The batch of one update
# stays batch_tokens: more GPUs take smaller shares of it, fewer of them take turns (--update-freq).
place() {
    local workers=$((gpus > 0 ? gpus * nodes : 1)) turns tokens
    turns=$(((batch_tokens + workers * gpu_tokens - 1) / (workers * gpu_tokens)))
    tokens=$((batch_tokens / (workers * turns)))
    # A batch must hold the longest sentence, and below this a GPU idles anyway.
    ((tokens >= 512)) || fail 2 "--gpus $gpus: too many for updates of $batch_tokens tokens: give at most" \
        "$((batch_tokens / 512 / nodes))"
    launch=() device=() placement=(--max-tokens "$tokens" --update-freq "$turns")
    if ((gpus == 0)); then
        device=(--cpu)
        precision=${precision:-fp32}
        # fairseq looks for a GPU where an update overflows, and the first ones do.
        [[ $precision != fp16 ]] || fail 2 "--precision fp16: needs a GPU; give bf16 or fp32"
        set -a && source "$root/scripts/cpu_memory.env" && set +a
    else
        placement+=(--distributed-world-size "$workers")
        precision=${precision:-fp16}
    fi
    [[ $precision == fp32 ]] || device+=("--$precision")
    if ((torchrun && workers > 1)); then
        # --distributed-world-size above must be given: by default it is the number of visible GPUs, and where that is 1
        # fairseq never looks at what torchrun tells its workers.
        ((nodes == 1)) || fail 2 "--torchrun: works on one machine; leave it out, and Slurm starts all of them"
        launch=("$BIN/torchrun" --standalone --nproc-per-node "$gpus" --no-python)
    fi
    if ((nodes > 1)); then
        [[ -n ${SLURM_JOB_ID:-} ]] || ((dry_run)) || fail 2 "--nodes $nodes: works in a Slurm job only: see slurm.sh"
        ((gpus > 0)) || fail 2 "--nodes $nodes: needs --gpus N, the GPUs of each machine"
        # One task a machine, in which fairseq starts a worker for each GPU; it asks Slurm who the others are.
        launch=(srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1)
        placement+=(--distributed-port 29500)
    fi
    placement+=("${device[@]}")
}

# ----------------------------------------------------------------------------------------------------------- running

# run LOG COMMAND...: the command with its output in LOG; with --dry-run, print it.
run() {
    local log=$1 words
    shift
    printf -v words '%q ' "$@"
    if ((dry_run)); then
        printf '%s\n' "${words% }"
        return
    fi
    printf '%s\n' "${words% }" >>"$dir/commands"
    "$@" >>"$log" 2>&1 ||
        fail 1 "$(basename "$1") failed ($(
            grep -E '(error|Error): ' "$log" | tail -n 1 || tail -n 1 "$log"
        )): $log has all it said"
}

# once FILE COMMAND...: FILE, from what the command writes, whole or not at all; not again if it is there.
once() {
    local file=$1
    shift
    [[ -f $file ]] && return
    "$@" >"$file.partial" || fail 1 "$(basename "$file") cannot be made"
    mv "$file.partial" "$file"
}

# -------------------------------------------------------------------------------------------------------------- data

# download FILE URL: to $original, in one piece; a download that was cut off goes on.
download() {
    local part=$original/$1.part
    [[ -f $original/$1 ]] && return
    say "downloading $2"
    if command -v curl >/dev/null; then
        curl --fail --silent --show-error --location --continue-at - --speed-limit 1000 --speed-time 30 \
            --output "$part" "$2"
    else
        wget --quiet --continue --tries=2 --timeout=30 --output-document="$part" "$2"
    fi || fail 3 "$2 cannot be had: check the network, or give a folder that holds ${originals[*]} with --from"
    case $1 in
        *gz) gzip --test "$part" || fail 1 "$part is damaged: remove it and start again" ;;
    esac
    mv "$part" "$original/$1"
}

# The original files, in $original, and their hashes in $dir/SHA256SUMS. Their publishers name none to compare with.
get_originals() {
    local i
    original=${from:-$dir/original}
    if [[ -z $from ]]; then
        mkdir -p "$original"
        for ((i = 0; i < ${#files[@]}; i += 2)); do download "${files[i]}" "${files[i + 1]}"; done
    fi
    (cd "$original" && sha256sum "${originals[@]}") >"$dir/SHA256SUMS"
}

# unpack ARCHIVE FOLDER MEMBER...: nothing but files and folders; tar itself keeps names with .. and links out of reach.
unpack() {
    local archive=$original/$1 folder=$2
    shift 2
    mkdir -p "$folder"
    tar -xzf "$archive" -C "$folder" "$@" 2>/dev/null || fail 1 "$archive is no archive that holds $*: get it anew"
    [[ -z $(find "$folder" ! -type f ! -type d -print -quit) ]] ||
        fail 1 "$archive holds links or devices, which no corpus has: get it anew"
}

# moses LANGUAGE STEP...: Moses' scripts in Python (sacremoses). Its `tokenize` escapes (&apos;), as the published
# preparations do. A carriage return would end a line for it, and shift the pairs.
moses() { tr '\r' ' ' | "$BIN/sacremoses" -q -l "$1" -j "$(nproc)" "${@:2}"; }

# each_line EXPRESSION: of Python, with the line in `line`
each_line() {
    PYTHONUTF8=1 "$PYTHON" -c "import sys
sys.stdin.reconfigure(newline='\n')
sys.stdout.writelines($1 for line in sys.stdin)"
}
lowercase() { each_line 'line.lower()'; }

# clean IN OUT OPTIONS...: clean_pairs.py on IN.SOURCE and IN.TARGET
clean() {
    "$PYTHON" "$here/clean_pairs.py" "$1.$source" "$1.$target" "$2.$source" "$2.$target" "${@:3}" || exit 1
}

# Sentences of a .sgm or .xml test set, one a line. Bytes (LC_ALL=C): text that is no UTF-8 must not end a line early.
segments() {
    LC_ALL=C grep '<seg id' "$1" | LC_ALL=C sed -E "s/^.*<seg id=\"[0-9]+\">\s*//; s/\s*<\/seg>.*$//; s/’/'/g"
}

learn_bpe() { cat "$dir/text/train.$source" "$dir/text/train.$target" | "$BIN/subword-nmt" learn-bpe -s "$merges"; }

# subword_nmt_pieces DIR: joint BPE of subword-nmt, the program that the published preparations use. Sentencepiece's BPE
# of the same size splits other words and counts white space: its lengths, and so its batches and lenpen, would not be
# theirs.
subword_nmt_pieces() {
    local split language
    mkdir -p "$1"
    once "$1/codes" learn_bpe
    for split in train valid test; do
        for language in "$source" "$target"; do
            once "$1/$split.$language" "$BIN/subword-nmt" apply-bpe -c "$1/codes" <"$dir/text/$split.$language"
        done
    done
} 2>>"$dir/prepare.log"

# empty_work_folder FOLDER: as work_folder, with nothing in it.
empty_work_folder() {
    work_folder "$1" && rm -rf "$partial" && work_folder "$1" || fail 1 "$1 cannot be made"
}

# Text, pieces and fairseq's binary data, each made once.
prepare() {
    local split partial=$dir/data-bin.partial
    if [[ ! -d $dir/text ]] && ! ((dry_run)); then
        say "$title; $terms"
        get_originals
        work_folder "$dir/text" || fail 1 "$dir/text cannot be made"
        # Leavings of a run that was killed are used only where they come from the same files.
        if ! cmp -s "$dir/SHA256SUMS" "$partial/SHA256SUMS"; then
            rm -rf "$partial"
            work_folder "$dir/text" || fail 1 "$dir/text cannot be made"
        fi
        cp "$dir/SHA256SUMS" "$partial/SHA256SUMS"
        make_text "$partial"
        for split in train valid test; do
            [[ $(wc -l <"$partial/$split.$source") == $(wc -l <"$partial/$split.$target") ]] ||
                fail 1 "$split: not as many lines in $source as in $target: are the original files whole?"
            say "$split: $(wc -l <"$partial/$split.$source") pairs"
        done
        finish "$dir/text"
        work_folder "$dir/pieces" && rm -rf "$partial" # of another text
    fi
    if [[ ! -d $dir/pieces ]] && ! ((dry_run)); then
        say "pieces (log: $dir/prepare.log)"
        work_folder "$dir/pieces" || fail 1 "$dir/pieces cannot be made"
        make_pieces "$partial"
        finish "$dir/pieces"
    fi
    if [[ ! -d $dir/data-bin ]]; then
        partial=$dir/data-bin.partial
        ((dry_run)) || empty_work_folder "$dir/data-bin"
        run "$dir/prepare.log" "$BIN/fairseq-preprocess" --source-lang "$source" --target-lang "$target" \
            --trainpref "$dir/pieces/train" --validpref "$dir/pieces/valid" --testpref "$dir/pieces/test" \
            "${dictionary[@]}" --destdir "$partial" --workers "$(nproc)"
        ((dry_run)) || finish "$dir/data-bin"
    fi
    data=$dir/data-bin
}

# distil_data TEACHER: the teacher's translations of the training set, four of a sentence so that all methods choose from
# the same ones, and the training data that the method makes of them ($select). Each once: what other options would have
# made is refused.
distil_data() {
    local translations=$dir/translations made device=() wanted
    ((gpus > 0)) || device=(--cpu)
    data=$dir/data-bin-$select
    made=$data.made wanted=$(printf '%s\n' "$1" "${distil[@]}" && hashes "$1")
    if [[ -d $data ]]; then
        [[ $(<"$made") == "$wanted" ]] ||
            fail 1 "$data was made by $(paste -sd' ' "$made"): remove it, or choose another --dir"
        return
    fi
    run "$dir/translate.log" "$BIN/hgkd" translate "$dir/data-bin" --teacher-path "$1" --output "$translations" \
        --nbest 4 "${search[@]}" "${device[@]}"
    ((dry_run)) || printf '%s\n' "$wanted" >"$made"
    run "$dir/translate.log" "$BIN/hgkd" distil-data "$translations" "$dir/data-bin" --output "$data" \
        --select "$select" "${distil[@]}"
}

# ---------------------------------------------------------------------------------------------------------- training

# set_settings SEED [OPTIONS]: the array `settings`, what fairseq-train's options say of the model.
set_settings() {
    settings=("${model[@]}" "${training[@]}" --max-update "$updates" --seed "$1"
        # The gated loss changes its meaning as the gate opens; plain cross-entropy is comparable over all methods.
        --best-checkpoint-metric nll_loss --keep-last-epochs "$keep" "${@:2}")
}

# settings_of RUN: all that decides what its model becomes, a line each.
settings_of() {
    printf '%s\n' "${settings[@]}" "${extra[@]}" "precision $precision"
    [[ $1 == teacher ]] || [[ -z $select && " ${settings[*]} " != *" --teacher-path "* ]] || hashes "$teacher"
}

# train RUN: `settings` and the options in `extra`; resumes by itself.
train() {
    local run=$dir/$1 wanted
    wanted=$(settings_of "$1")
    ! begun_otherwise "$run" "$wanted" ||
        fail 1 "$run was begun with other settings, see $run/settings: remove it, or choose another --dir"
    ((dry_run)) || { mkdir -p "$run" && lock "$run"; } || exit 1
    if recorded "$run" checkpoint_best.pt checkpoint_last.pt; then
        say "$1: trained before"
        return
    fi
    say "$1: training (log: $run/train.log)"
    if ! ((dry_run)); then
        printf '%s\n' "$wanted" >"$run/settings"
        rm -f "$run/recorded" "$run"/*/recorded # what was measured of another model
    fi
    run "$run/train.log" "${launch[@]}" "$BIN/fairseq-train" "$data" --user-dir "$root/hgkd_fairseq" --save-dir "$run" \
        "${placement[@]}" --no-progress-bar --log-format simple --log-interval 100 "${settings[@]}" "${extra[@]}"
    ((dry_run)) || record "$run" checkpoint_best.pt checkpoint_last.pt
}

# Plain cross-entropy WITHOUT label smoothing: a smoothed teacher distils much worse (Mueller et al. 2019). Ours, which
# is fairseq's to the rounding and takes less time and memory; fairseq's own task, so that any fairseq loads the teacher.
teacher_settings() { set_settings 1 --criterion hard_gate_kd --gate none; }

train_teacher() {
    teacher_settings
    train teacher
}

# The teacher that a method needs: trained now, or before, perhaps with options of its own after the recipe's.
need_teacher() {
    local extra=() wanted
    [[ -z $teacher ]] || return 0
    teacher=$dir/teacher/checkpoint_best.pt
    if recorded "$dir/teacher" checkpoint_best.pt checkpoint_last.pt; then
        teacher_settings
        wanted=$(printf '%s\n' "${settings[@]}")
        [[ $(<"$dir/teacher/settings")$'\n' == "$wanted"$'\n'* ]] ||
            fail 1 "$dir/teacher was trained with other settings: remove it, or choose another --dir"
    else
        train_teacher
    fi
}

# ----------------------------------------------------------------------------------------------- translating, scoring

# average_checkpoints RUN OUT: OUT/checkpoint.pt from the checkpoints of the run's last epochs. fairseq's own script for
# this, average_checkpoints.py, is in its repository but not in its package.
average_checkpoints() {
    local last
    if ((dry_run)); then
        last=("$1/checkpointLAST-$((average - 1)).pt:...:$1/checkpointLAST.pt")
    else
        mapfile -t last < <(find "$1" -name 'checkpoint[0-9]*.pt' | sort -V | tail -n "$average")
        ((${#last[@]} == average)) || fail 1 "--average $average: $1 has checkpoints of ${#last[@]} epochs:" \
            "give at most so many, or 0 for the best one"
        mkdir -p "$2"
    fi
    ((dry_run)) || rm -f "$2/checkpoint.pt" # of another run, or cut short
    run "$2/average.log" "$BIN/hgkd" export "$(IFS=: && echo "${last[*]}")" "$2/checkpoint.pt"
    ((dry_run)) || record "$2" checkpoint.pt
}

# bleu OUT: BLEU by sacreBLEU, whose line names how it was computed.
#   tokenised    tok:none on the tokens as they are, against the reference prepared the same way: what multi-bleu.perl
#                and fairseq-score compute (they do not smooth, which shows only where some order has no match at all)
#   detokenised  tok:13a, on text again: what sacreBLEU is for
bleu() {
    local out=$1 kind
    if ! ((dry_run)); then
        published_tokens <"$out/translations.txt" >"$out/test.hypothesis"
        published_tokens <"$dir/text/test.$target" >"$out/test.reference"
        [[ " ${scores[*]} " != *" detokenised "* ]] || detokenise <"$out/translations.txt" >"$out/test.text"
        rm -f "$out/bleu"
    fi
    for kind in "${scores[@]}"; do
        case $kind in
            tokenised) run "$out/bleu" "$BIN/sacrebleu" "$out/test.reference" -i "$out/test.hypothesis" \
                --tokenize none --force --format text --width 2 ;;
            detokenised) run "$out/bleu" "$BIN/sacrebleu" "$dir/text/reference.$target" -i "$out/test.text" \
                --format text --width 2 "${sacrebleu[@]}" ;;
        esac
    done
}

published_tokens() { cat; } # wmt14-en-de.sh splits compounds here
sacrebleu=()                # -lc where the text is lowercased

tokens() { [[ " ${scores[*]} " == *" tokenised "* ]]; } # whether text/ holds tokens
detokenise() { if tokens; then "$BIN/sacremoses" -q -l "$target" detokenize; else cat; fi; }

# evaluate RUN: translate the test set and score, in RUN or RUN/averageN.
evaluate() {
    local run=$dir/$1 out=$dir/$1 how=()
    if ((average)); then
        out=$run/average$average how=(--checkpoint "average$average/checkpoint.pt")
        recorded "$out" checkpoint.pt || average_checkpoints "$run" "$out"
    fi
    ! tokens || how+=(--tokenize none)
    ((gpus > 0)) || how+=(--cpu)
    say "$1: translating and scoring (in $out)"
    ((dry_run)) || rm -f "$out/scores"
    run "$out/scores" "$BIN/hgkd" score "$dir/data-bin" "$run" "${how[@]}" --reference "$dir/text/test.$target" \
        --generate "${generation[*]} ${device[*]}"
    bleu "$out"
    ((dry_run)) || summary
}

# What is known of all models of this folder.
summary() {
    local folder
    for folder in "$dir"/* "$dir"/*/average*; do
        # One that another recipe is scoring lacks some of them.
        [[ -f $folder/scores.json && -f $folder/bleu && -f $folder/scores ]] || continue
        printf '%s\n' "${folder#"$dir"/}"
        grep -h '^BLEU' "$folder/bleu" || true
        grep '^ECE.*mode:forced' "$folder/scores" || true
    done
}

# --------------------------------------------------------------------------------------------------------------- all

recipe() {
    options "$@"
    if ! ((dry_run)); then
        [[ -n ${PYTHON:-} ]] || source "$root/scripts/env.sh"
        mkdir -p -- "$dir" 2>/dev/null || fail 1 "--dir $dir cannot be made: name a folder to write to"
        lock "$dir" wait || exit 1 # another method's recipe may be making the data
        [[ -f $dir/recipe ]] || printf '%s\n' "$name${style:+ --style $style}" >"$dir/recipe"
        [[ $(<"$dir/recipe") == "$name${style:+ --style $style}" ]] ||
            fail 1 "$dir holds $(<"$dir/recipe"): choose another --dir"
    fi
    prepare
    unlock
    [[ $until != data ]] || return 0
    if [[ $method_name == teacher ]]; then
        run_name=teacher
        train_teacher
    else
        run_name=$method_name-$seed
        if [[ -n $select || " ${method[*]} " == *" --teacher-path "* ]]; then need_teacher; fi
        if [[ -n $select ]]; then
            ((dry_run)) || lock "$dir" wait || exit 1
            distil_data "$teacher"
        fi
        set_settings "$seed" --task translation_with_teacher --criterion hard_gate_kd "${method[@]}"
        train "$run_name"
    fi
    [[ $until != training ]] || return 0
    evaluate "$run_name"
}
