#!/usr/bin/env bash
# IWSLT15 En-Vi, with the data that Stanford preprocessed (Luong and Manning 2015) and all published results use:
# tokenised and cased, validation on tst2012, test on tst2013. See --help.
#
# Time and memory: not measured. The estimate of iwslt14-de-en.sh gives, for fewer updates, 20 minutes on one GPU for
# the teacher or Base, and twice as much for a distilled student. Disk: 5 GB for the checkpoints of each model.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

title="IWSLT15 English-Vietnamese (TED talks)" terms="CC BY-NC-ND, as the talks"
source=en target=vi
files=()
for file in {train,tst2012,tst2013}.{en,vi}; do
    files+=("$file" "https://nlp.stanford.edu/projects/nmt/data/iwslt15.en-vi/$file")
done

# 133,317 / 1,553 / 1,268 pairs. Training pairs are dropped if a side is empty, or longer than 250 words, which does not
# fit into a batch.
make_text() {
    local out=$1 language
    clean "$original/train" "$out/train" --max 250
    for language in en vi; do
        spaced "$original/tst2012.$language" >"$out/valid.$language"
        spaced "$original/tst2013.$language" >"$out/test.$language"
    done
}

spaced() { each_line '" ".join(line.split()) + "\n"' <"$1"; } # FILE: reduce white space, as `clean` does

# Stanford's vocabularies consist of words, with unknown words. Published Transformers use BPE with different sizes,
# from 4,000 to 32,000; this is that of IWSLT14. It is joint because of names and numbers.
merges=10000
make_pieces() { subword_nmt_pieces "$1"; }
dictionary=()
scores=(tokenised) # the only published score for this data

# There is no standard recipe for fairseq. The data is similar to IWSLT14, so the options are the same; see there.
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
