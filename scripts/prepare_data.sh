#!/usr/bin/env bash
# Convert text to fairseq's binary data: prepare_data.sh TEXTDIR DATABIN [--vocab N] [--source LANG] [--target LANG]
#                                                                       [--style cased|paper] [--like OTHER]
#
# TEXTDIR holds {train,valid,test}.{de,en}, as get_data.sh writes them, and optionally valid1.{de,en}, a second
# validation subset for `--held-out valid1`. The script trains a joint sentencepiece BPE on train and encodes all files
# with it; fairseq-preprocess binarises them with one dictionary for both languages to DATABIN. DATABIN also gets
# sentencepiece.model and PREPARED (one line with the settings and a hash of the text). Generate with
# `fairseq-generate DATABIN ... --remove-bpe sentencepiece`.
#
#   --vocab N        pieces of the BPE, default 4000
#   --source, --target   languages, default de and en
#   --style cased    leave the text unchanged (default)
#   --style paper    tokenise with sacremoses and lowercase before the BPE, as in fairseq's recipe for IWSLT; the
#                    references of fairseq-generate are then tokenised and lowercased too
#   --like OTHER     use the pieces, dictionary and style of OTHER, a DATABIN of this script, for the student of a
#                    teacher that was trained on OTHER. With --vocab N, use N of its symbols: all characters and those
#                    pieces that are most frequent in train; the other pieces are split into these
#
# Exit status: 0 done (now, or before with the same settings), 2 usage error, 1 any other error.
# All files are written to DATABIN.partial, which is renamed to DATABIN in the end, so that DATABIN is complete if it
# exists. The next run replaces a DATABIN.partial that a killed run has left.
# Environment: PYTHON, a Python with sentencepiece and fairseq; default .venv/bin/python of this repository if it
# exists, else python3.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/steps.sh"

say() { printf 'prepare_data.sh: %s\n' "$*" >&2; }

# fail STATUS MESSAGE: print an error message and exit.
fail() {
    local status=$1
    shift
    say "$*"
    exit "$status"
}

usage() {
    cat <<END
usage: prepare_data.sh TEXTDIR DATABIN [--vocab N] [--source LANG] [--target LANG] [--style cased|paper] [--like OTHER]
  TEXTDIR          holds {train,valid,test}.LANG; get_data.sh makes such a folder
  DATABIN          the folder to make, for fairseq-train and fairseq-generate
  --vocab N        pieces of the joint sentencepiece BPE (default 4000)
  --source LANG    source language (default de)
  --target LANG    target language (default en)
  --style STYLE    cased: the text as it is (default); paper: tokenised and lowercased
  --like OTHER     pieces, dictionary and style of OTHER, a DATABIN made by this script: data for a student of its teacher;
                   with --vocab N, N of its symbols
END
}

textdir="" databin="" vocab="" source=de target=en style="" like=""
while (($#)); do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --vocab | --source | --target | --style | --like)
            [[ -n ${2:-} ]] || fail 2 "$1 needs a value"
            case $1 in
                --vocab) vocab=$2 ;;
                --source) source=$2 ;;
                --target) target=$2 ;;
                --style) style=$2 ;;
                --like) like=$2 ;;
            esac
            shift
            ;;
        -*) fail 2 "unknown option $1; known are: --vocab, --source, --target, --style, --like" ;;
        *)
            if [[ -z $textdir ]]; then
                textdir=$1
            elif [[ -z $databin ]]; then
                databin=$1
            else
                fail 2 "unexpected argument $1: give one TEXTDIR and one DATABIN"
            fi
            ;;
    esac
    shift
done
[[ -n $textdir && -n $databin ]] || fail 2 "TEXTDIR and DATABIN are needed"
[[ -z $like || -z $style ]] || fail 2 "--like $like has its own style: leave --style out"
[[ -n $like ]] || vocab=${vocab:-4000}
[[ -z $vocab || $vocab =~ ^[1-9][0-9]{0,8}$ ]] || fail 2 "--vocab $vocab: needs a number of pieces, such as 4000"
if [[ -n $like ]]; then
    [[ -f $like/PREPARED && -f $like/sentencepiece.model && -f $like/dict.$source.txt && -f $like/dict.$target.txt ]] ||
        fail 2 "--like $like: holds no data that prepare_data.sh made of $source and $target (PREPARED," \
            "sentencepiece.model, dict.$source.txt, dict.$target.txt): name the DATABIN of the teacher"
    style=$(sed -n 's/.* style=\([a-z]*\) .*/\1/p' "$like/PREPARED")
fi
style=${style:-cased}
[[ $style == cased || $style == paper ]] || fail 2 "--style $style: must be cased or paper"
[[ $source != "$target" ]] || fail 2 "--source and --target are both $source: give two languages"
while [[ $databin == ?*/ ]]; do databin=${databin%/}; done

splits=(train valid test)
[[ ! -f $textdir/valid1.$source ]] || splits+=(valid1)
texts=()
for split in "${splits[@]}"; do
    for language in "$source" "$target"; do
        [[ -f $textdir/$split.$language ]] ||
            fail 1 "TEXTDIR $textdir has no $split.$language: make it with get_data.sh, or name the languages with" \
                "--source and --target"
        texts+=("$textdir/$split.$language")
    done
done
# The hash of the text is one of the settings, because the same options give other data for another corpus.
hash=$(cat "${texts[@]}" | sha256sum)
pieces="vocab=$vocab"
if [[ -n $like ]]; then
    pieces=$(cat "$like/sentencepiece.model" "$like/dict.$source.txt" "$like/dict.$target.txt" | sha256sum)
    pieces="like=${pieces:0:12}${vocab:+ vocab=$vocab}"
fi
settings="$pieces source=$source target=$target style=$style text=${hash:0:12}"

if [[ -f $databin/PREPARED ]]; then
    prepared=$(<"$databin/PREPARED")
    [[ $prepared == "$settings" ]] ||
        fail 1 "$databin was prepared with other settings ($prepared, not $settings): remove it or choose another DATABIN"
    say "$databin is there already: $settings"
    exit 0
fi
[[ ! -e $databin && ! -L $databin ]] || fail 1 "$databin exists but has no file PREPARED: remove it or choose another DATABIN"

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$here/../.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi
PYTHON=$(command -v "$PYTHON") || fail 1 "PYTHON names no program: give a Python with sentencepiece and fairseq"
preprocess=$(dirname "$PYTHON")/fairseq-preprocess
[[ -x $preprocess ]] || preprocess=$(command -v fairseq-preprocess) ||
    fail 1 "no fairseq-preprocess beside PYTHON=$PYTHON, nor on PATH: name a Python with fairseq in PYTHON"

say "$settings"
work_folder "$databin" || fail 1 "$databin cannot be made"
trap '[[ -z $partial ]] || rm -rf -- "$partial"' EXIT
find "$partial" -mindepth 1 ! -name "$MARK" -delete # what a killed run has left
if [[ -n $like ]]; then
    model=(--model "$like/sentencepiece.model" ${vocab:+--vocab "$vocab"})
    dictionaries=(--srcdict "$like/dict.$source.txt" --tgtdict "$like/dict.$target.txt")
else
    model=(--vocab "$vocab")
fi
[[ -n $like && -z $vocab ]] || dictionaries=(--joined-dictionary --srcdict "$partial/pieces/dict.txt")
valid=$partial/pieces/valid
[[ ${splits[-1]} != valid1 ]] || valid+=,$partial/pieces/valid1
"$PYTHON" "$here/encode_text.py" "$textdir" "$partial/pieces" \
    "${model[@]}" --source "$source" --target "$target" --style "$style" || exit 1 # it has printed the error

say "fairseq-preprocess"
"$preprocess" --source-lang "$source" --target-lang "$target" "${dictionaries[@]}" \
    --trainpref "$partial/pieces/train" --validpref "$valid" --testpref "$partial/pieces/test" \
    --destdir "$partial" --workers 1 >"$partial/pieces/log" 2>&1 || {
    log=$partial/pieces/log partial="" # keep the folder with the log
    fail 1 "fairseq-preprocess failed ($(tail -n 1 "$log")): $log has all it said"
}

mv "$partial/pieces/sentencepiece.model" "$partial/sentencepiece.model"
rm -rf "$partial/pieces" "$partial/preprocess.log" # the log names removed folders
printf '%s\n' "$settings" >"$partial/PREPARED"
finish "$databin"
partial=""
say "done: $databin"
