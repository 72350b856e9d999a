#!/usr/bin/env bash
# IWSLT15 En-Vi on the set that Stanford preprocessed (Luong and Manning 2015), which all published results use:
# tokenised, cased, validated on tst2012, tested on tst2013. --help says the rest.
#
# Time and memory: not measured. By the estimate of iwslt14-de-en.sh, less data and fewer updates: 20 minutes on one GPU
# for the teacher or Base, twice that for a distilled student. 5 GB of disk for each model's checkpoints.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

title="IWSLT15 English-Vietnamese (TED talks)" terms="CC BY-NC-ND, as the talks"
source=en target=vi
files=()
for file in {train,tst2012,tst2013}.{en,vi}; do
    files+=("$file" "https://nlp.stanford.edu/projects/nmt/data/iwslt15.en-vi/$file")
done

# 133,317 / 1,553 / 1,268 pairs. Of the training pairs those go of which one side is empty, and those over 250 words,
# which no batch would hold.
make_text() {
    local out=$1 language
    clean "$original/train" "$out/train" --max 250
    for language in en vi; do
        spaced "$original/tst2012.$language" >"$out/valid.$language"
        spaced "$original/tst2013.$language" >"$out/test.$language"
    done
}

spaced() { each_line '" ".join(line.split()) + "\n"' <"$1"; } # FILE: single spaces, as `clean` leaves them

# Stanford's vocabularies are of words, with unknown ones. Transformers here use a BPE of some size between 4,000 and
# 32,000: no standard; this is IWSLT14's. Joint, for names and numbers.
merges=10000
make_pieces() { subword_nmt_pieces "$1"; }
dictionary=()
scores=(tokenised) # the only published one: nobody detokenises this set

# No published fairseq recipe is the standard; the data is of IWSLT14's kind and size, so its options, see there.
model=(--arch transformer_iwslt_de_en --share-decoder-input-output-embed)
training=(
    --optimizer adam --adam-betas '(0.9, 0.98)'
    --clip-norm 0.0
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000
    --dropout 0.3
    --weight-decay 1e-4
)
batch_tokens=4096 gpu_tokens=4096
updates=40000 # about 50 epochs
average=0     # as for IWSLT14
search=(--beam 5)
generation=(--batch-size 128 "${search[@]}")

recipe "$@"
