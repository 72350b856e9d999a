# Sourced by the recipes of this folder: prepares data, trains a model and scores it, with the settings of a recipe.
#
# A recipe sets and explains
#   title terms            description of the data, and its terms of use
#   source target          languages
#   files=(FILE URL ...)   original files and where to download them
#   make_text DIR          function that converts $original to DIR/{train,valid,test}.{SOURCE,TARGET}, tokenised, and
#                          writes DIR/reference.TARGET if BLEU is computed on untokenised text
#   make_pieces DIR        function that converts $dir/text to DIR/{train,valid,test}.{SOURCE,TARGET} in pieces
#   dictionary=()          options of fairseq-preprocess for the dictionaries
#   scores=()              tokenised, detokenised or both, see `bleu` below. With tokenised, text/ holds tokens
#   model=() training=()   options of fairseq-train
#   batch_tokens           target tokens per update, over all GPUs, whatever their number
#   gpu_tokens             target tokens per batch, on one GPU, at most
#   updates average        number of updates; number of checkpoints to average, or 0 for the best one
#   search=()              options of the beam search for fairseq-generate and hgkd translate
#   generation=()          all options of fairseq-generate
# and calls `recipe "$@"`.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
name=$(basename "$0" .sh)
style="" more_usage=""
keep=10 # number of last epochs whose checkpoints are kept, and so the maximum of --average
source "$root/scripts/steps.sh"

say() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

# fail STATUS MESSAGE: 2 for a usage error, 3 if the data is not available, 1 for any other error.
fail() {
    local status=$1
    shift
    printf '%s.sh: %s\n' "$name" "$*" >&2
    exit "$status"
}

# methods ARGUMENTS...: run `hgkd methods` with any Python, so that --dry-run does not need .venv.
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

# number OPTION TEXT: set `value` to the number in TEXT.
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
    while [[ $dir == ?*/ ]]; do dir=${dir%/}; done # one name for a folder: it is part of the settings that are compared
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

# visible_gpus: print the number of GPUs that are visible here. It does not use Python, so that --dry-run needs none.
visible_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | awk '/^ *-/ { exit } NF { found++ } END { print found + 0 }' # as CUDA reads it
    else
        { nvidia-smi -L 2>/dev/null || true; } | wc -l
    fi
}

# place: set `launch`, the prefix of the training command, and `placement`, its options. An update always has up to
# batch_tokens tokens: with more GPUs, each gets a smaller batch; with fewer, gradients are accumulated (--update-freq).
place() {
    local workers=$((gpus > 0 ? gpus * nodes : 1)) turns tokens
    turns=$(((batch_tokens + workers * gpu_tokens - 1) / (workers * gpu_tokens)))
    tokens=$((batch_tokens / (workers * turns)))
    # A batch must be able to hold the longest sentence, and smaller batches would not use a GPU efficiently.
    ((tokens >= 512)) || fail 2 "--gpus $gpus: too many for updates of $batch_tokens tokens: give at most" \
        "$((batch_tokens / 512 / nodes))"
    launch=() device=() placement=(--max-tokens "$tokens" --update-freq "$turns")
    if ((gpus == 0)); then
        device=(--cpu)
        precision=${precision:-fp32}
        # fairseq keeps the fp32 parameters of --fp16 on a GPU.
        [[ $precision != fp16 ]] || fail 2 "--precision fp16: needs a GPU; give bf16 or fp32"
        set -a && source "$root/scripts/cpu_memory.env" && set +a
    else
        placement+=(--distributed-world-size "$workers")
        precision=${precision:-fp16}
    fi
    [[ $precision == fp32 ]] || device+=("--$precision")
    if ((torchrun && workers > 1)); then
        # --distributed-world-size must be set, as above. By default it is the number of visible GPUs, and if that is 1,
        # fairseq ignores the environment variables of torchrun.
        ((nodes == 1)) || fail 2 "--torchrun: works on one machine; leave it out, and Slurm starts all of them"
        launch=("$BIN/torchrun" --standalone --nproc-per-node "$gpus" --no-python)
    fi
    if ((nodes > 1)); then
        [[ -n ${SLURM_JOB_ID:-} ]] || ((dry_run)) || fail 2 "--nodes $nodes: works in a Slurm job only: see slurm.sh"
        ((gpus > 0)) || fail 2 "--nodes $nodes: needs --gpus N, the GPUs of each machine"
        # One task per machine, in which fairseq starts a worker for each GPU. It gets the addresses from Slurm.
        launch=(srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1)
        placement+=(--distributed-port 29500)
    fi
    placement+=("${device[@]}")
}

# ----------------------------------------------------------------------------------------------------------- running

# run LOG COMMAND...: run a command and append its output to LOG, or with --dry-run, print the command.
run() {
    local log=$1 words before
    shift
    printf -v words '%q ' "$@"
    if ((dry_run)); then
        printf '%s\n' "${words% }"
        return
    fi
    printf '%s\n' "${words% }" >>"$dir/commands"
    before=$(stat --format %s "$log" 2>/dev/null || echo 0) # the log may hold the errors of earlier runs
    "$@" >>"$log" 2>&1 ||
        fail 1 "$(basename "$1") failed ($(
            tail -c "+$((before + 1))" "$log" | grep -E '(error|Error): ' | tail -n 1 || tail -n 1 "$log"
        )): $log has all it said"
}

# once FILE COMMAND...: write a command's output to FILE atomically, unless FILE exists.
once() {
    local file=$1
    shift
    [[ -f $file ]] && return
    "$@" >"$file.partial" || fail 1 "$(basename "$file") cannot be made"
    mv "$file.partial" "$file"
}

# -------------------------------------------------------------------------------------------------------------- data

# download FILE URL: download to $original/FILE atomically, unless it exists. An interrupted download is resumed.
download() {
    local part=$original/$1.part
    [[ -f $original/$1 ]] && return
    say "downloading $2"
    if command -v curl >/dev/null; then
        curl --fail --silent --show-error --location --continue-at - --speed-limit 1000 --speed-time 30 \
            --output "$part" "$2"
    else
        wget --quiet --continue --tries=2 --timeout=30 --output-document="$part" "$2"
    fi || {
        (($? != 23)) || fail 1 "$part cannot be written: is the disk full?" # by curl's exit status
        fail 3 "$2 cannot be had: check the network, or give a folder that holds ${originals[*]} with --from"
    }
    case $1 in
        *gz) gzip --test "$part" || fail 1 "$part is damaged: remove it and start again" ;;
    esac
    mv "$part" "$original/$1"
}

# get_originals: set `original` to the folder of the original files, after downloading them if necessary, and write
# their hashes to $dir/SHA256SUMS. The publishers give no hashes to compare them with.
get_originals() {
    local i
    original=${from:-$dir/original}
    if [[ -z $from ]]; then
        mkdir -p "$original"
        for ((i = 0; i < ${#files[@]}; i += 2)); do download "${files[i]}" "${files[i + 1]}"; done
    fi
    (cd "$original" && sha256sum "${originals[@]}") >"$dir/SHA256SUMS"
}

# unpack ARCHIVE FOLDER MEMBER...: unpack members of an archive and fail if they are not files or folders. tar itself
# does not write outside of FOLDER.
unpack() {
    local archive=$original/$1 folder=$2
    shift 2
    mkdir -p "$folder"
    tar -xzf "$archive" -C "$folder" "$@" 2>/dev/null || fail 1 "$archive is no archive that holds $*: get it anew"
    [[ -z $(find "$folder" ! -type f ! -type d -print -quit) ]] ||
        fail 1 "$archive holds links or devices, which no corpus has: get it anew"
}

# moses LANGUAGE STEP...: filter text with sacremoses, the Python version of Moses' scripts. `tokenize` escapes special
# characters (&apos;), as in published data. Carriage returns are replaced because sacremoses takes them for line ends.
moses() { tr '\r' ' ' | "$BIN/sacremoses" -q -l "$1" -j "$(nproc)" "${@:2}"; }

# each_line EXPRESSION: filter text with a Python expression of `line`.
each_line() {
    PYTHONUTF8=1 "$PYTHON" -c "import sys
sys.stdin.reconfigure(newline='\n')
sys.stdout.writelines($1 for line in sys.stdin)"
}
lowercase() { each_line 'line.lower()'; }

# clean IN OUT OPTIONS...: run clean_pairs.py on IN.SOURCE and IN.TARGET.
clean() {
    "$PYTHON" "$here/clean_pairs.py" "$1.$source" "$1.$target" "$2.$source" "$2.$target" "${@:3}" || exit 1
}

# segments FILE: print the sentences of a .sgm or .xml test set, one per line. Text is processed as bytes (LC_ALL=C),
# because sed would not match all of a line with invalid UTF-8.
segments() {
    LC_ALL=C grep '<seg id' "$1" | LC_ALL=C sed -E "s/^.*<seg id=\"[0-9]+\">\s*//; s/\s*<\/seg>.*$//; s/’/'/g"
}

learn_bpe() { cat "$dir/text/train.$source" "$dir/text/train.$target" | "$BIN/subword-nmt" learn-bpe -s "$merges"; }

# subword_nmt_pieces DIR: train a joint BPE with subword-nmt, as published recipes do, and encode all files.
# Sentencepiece's BPE of the same size splits words differently and counts white space, so that sentence lengths would
# differ, and with them batches and the effect of the length penalty.
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

# empty_work_folder FOLDER: call work_folder and empty the work folder.
empty_work_folder() {
    work_folder "$1" && rm -rf "$partial" && work_folder "$1" || fail 1 "$1 cannot be made"
}

# prepare: make text, pieces and fairseq's binary data, unless they exist, and set `data`.
prepare() {
    local split text partial=$dir/data-bin.partial
    if [[ ! -d $dir/text ]] && ! ((dry_run)); then
        say "$title; $terms"
        get_originals
        work_folder "$dir/text" || fail 1 "$dir/text cannot be made"
        # Files of an interrupted run are used only if they were made from the same original files.
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
        text=$partial
        work_folder "$dir/pieces" && rm -rf "$partial" # made from an earlier text
        partial=$text
        finish "$dir/text"
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

# distil_data TEACHER: translate the training set with the teacher, make the method's training data from the
# translations ($select), and set `data`. There are four translations per sentence, so that all methods choose from
# the same ones. Existing data is used if it was made by the same teacher with the same options, and refused
# otherwise.
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
    ((dry_run)) || write "$made" "$wanted"
    run "$dir/translate.log" "$BIN/hgkd" distil-data "$translations" "$dir/data-bin" --output "$data" \
        --select "$select" "${distil[@]}"
}

# ---------------------------------------------------------------------------------------------------------- training

# set_settings SEED [OPTIONS]: set the array `settings` to the options of fairseq-train that determine the model.
set_settings() {
    settings=("${model[@]}" "${training[@]}" --max-update "$updates" --seed "$1"
        # The gated loss changes its meaning as the gate opens; plain cross-entropy is comparable over all methods.
        --best-checkpoint-metric nll_loss --keep-last-epochs "$keep" "${@:2}")
}

# settings_of RUN: print everything that determines the trained model, one item per line.
settings_of() {
    printf '%s\n' "${settings[@]}" "${extra[@]}" "precision $precision"
    [[ $1 == teacher || -z $select ]] || ((!${#distil[@]})) || printf '%s\n' "${distil[@]}"
    [[ $1 == teacher ]] || [[ -z $select && " ${settings[*]} " != *" --teacher-path "* ]] || hashes "$teacher"
}

# train RUN: train a model with `settings` and the options in `extra`, or resume its training.
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
        write "$run/settings" "$wanted"
        rm -f "$run/recorded" "$run"/*/recorded # scores of an earlier model
    fi
    run "$run/train.log" "${launch[@]}" "$BIN/fairseq-train" "$data" --user-dir "$root/hgkd_fairseq" --save-dir "$run" \
        "${placement[@]}" --no-progress-bar --log-format simple --log-interval 100 "${settings[@]}" "${extra[@]}"
    ((dry_run)) || record "$run" checkpoint_best.pt checkpoint_last.pt
}

# The teacher is trained with plain cross-entropy, without label smoothing, which makes distillation much less
# effective (Mueller et al. 2019). This package's implementation equals fairseq's up to rounding and needs less time
# and memory. The task is fairseq's own, so that the teacher can be loaded without this package.
teacher_settings() { set_settings 1 --criterion hard_gate_kd --gate none; }

train_teacher() {
    teacher_settings
    train teacher
}

# need_teacher: set `teacher`, and train it if necessary. A teacher that exists may have been trained with further
# options after the recipe's.
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

# average_checkpoints RUN OUT: average the checkpoints of the last epochs to OUT/checkpoint.pt. fairseq's script for
# this, average_checkpoints.py, is not part of its package.
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
    ((dry_run)) || rm -f "$2/checkpoint.pt" # of an earlier run, or incomplete
    run "$2/average.log" "$BIN/hgkd" export "$(IFS=: && echo "${last[*]}")" "$2/checkpoint.pt"
    ((dry_run)) || record "$2" checkpoint.pt
}

# bleu OUT: compute BLEU with sacreBLEU and write it to OUT/bleu with its signature.
#   tokenised    tok:none, on tokens, with a reference that was tokenised in the same way, as multi-bleu.perl and
#                fairseq-score compute it (without smoothing, which matters only if an n-gram order has no matches)
#   detokenised  tok:13a, on detokenised text, the standard use of sacreBLEU
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

published_tokens() { cat; } # filter before tokenised BLEU; wmt14-en-de.sh splits compounds in it
sacrebleu=()                # further options for detokenised BLEU; -lc if the text is lowercased

tokens() { [[ " ${scores[*]} " == *" tokenised "* ]]; } # status 0 if text/ holds tokens
detokenise() { if tokens; then "$BIN/sacremoses" -q -l "$target" detokenize; else cat; fi; }

# evaluate RUN: translate the test set and compute all scores, in RUN or in RUN/averageN.
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

# summary: print the scores of all models in $dir.
summary() {
    local folder
    for folder in "$dir"/* "$dir"/*/average*; do
        # Files are missing while another recipe is scoring a model.
        [[ -f $folder/scores.json && -f $folder/bleu && -f $folder/scores ]] || continue
        printf '%s\n' "${folder#"$dir"/}"
        grep -h '^BLEU' "$folder/bleu" || true
        grep '^ECE.*mode:forced' "$folder/scores" || true
    done
}

# -------------------------------------------------------------------------------------------------------------- main

recipe() {
    options "$@"
    if ! ((dry_run)); then
        [[ -n ${PYTHON:-} ]] || source "$root/scripts/env.sh"
        mkdir -p -- "$dir" 2>/dev/null || fail 1 "--dir $dir cannot be made: name a folder to write to"
        lock "$dir" wait || exit 1 # a recipe for another method may be making the data
        [[ -s $dir/recipe ]] || write "$dir/recipe" "$name${style:+ --style $style}"
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
