#!/usr/bin/env bash
# IWSLT14 De-En as published with fairseq: its prepare-iwslt14.sh, and the options of its README. --help says the rest.
#
# Time and memory: nobody has measured this recipe yet. Estimate for the teacher or Base: 6 x 39M parameters x 4,096
# tokens x 50,000 updates = 4.8e16 operations, half an hour at 30 TFLOP/s, which is a fair share of what one fp16 GPU of
# 2018 and later gives; a distilled student takes about twice that (its paper). Memory: an estimate, by the size of the
# batches below 16 GB. 5 GB of disk for each model's checkpoints. Published BLEU (tokenised): 34 to 35 with label
# smoothing.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

title="IWSLT14 German-English (TED talks)" terms="CC BY-NC-ND, as the talks"
source=de target=en
# The copy that fairseq's script downloads; the workshop's own server is gone.
files=(de-en.tgz http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz)

# As fairseq's script: about 160,239 / 7,283 / 6,750 pairs. sacremoses and Moses differ in a few lines.
make_text() {
    local out=$1 talks=$1/unpacked/de-en language
    unpack de-en.tgz "$out/unpacked" de-en
    for language in de en; do
        once "$out/tok.$language" training_text "$talks/train.tags.de-en.$language" "$language"
    done
    clean "$out/tok" "$out/clean" --max 175 --ratio 1.5
    for language in de en; do
        lowercase <"$out/clean.$language" >"$out/all.$language"
        awk 'NR % 23 == 0' "$out/all.$language" >"$out/valid.$language"
        awk 'NR % 23 != 0' "$out/all.$language" >"$out/train.$language"
        once "$out/reference.$language" test_text "$talks" "$language"
        once "$out/test.$language" tokenised "$out/reference.$language" "$language"
    done
    rm -rf "$out"/{unpacked,tok.*,clean.*,all.*}
}

training_text() { # FILE LANGUAGE: without the lines and tags that describe a talk
    sed -E '/<(url|talkid|keywords)>/d; s/<\/?(title|description)>//g' "$1" | moses "$2" tokenize
}

test_text() { # FOLDER LANGUAGE
    local set
    for set in TED.dev2010 TEDX.dev2012 TED.tst2010 TED.tst2011 TED.tst2012; do
        segments "$1/IWSLT14.$set.de-en.$2.xml" || return
    done
}

tokenised() { moses "$2" tokenize <"$1" | lowercase; } # FILE LANGUAGE

merges=10000 # as fairseq's script
make_pieces() { subword_nmt_pieces "$1"; }
dictionary=() # one for each language, as fairseq's README
scores=(tokenised detokenised) # published: the first. The second ignores case, which the text no longer has
sacrebleu=(-lc)

# All as in fairseq's README for this data, but for label smoothing, which is a method here (ls-uniform).
model=(--arch transformer_iwslt_de_en --share-decoder-input-output-embed) # 6 + 6 layers of 512
training=(
    --optimizer adam --adam-betas '(0.9, 0.98)' # 0.98: the Transformer's, whose gradients change fast in the warm-up
    --clip-norm 0.0                             # no clipping
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000
    --dropout 0.3       # more than the usual 0.1: 160,000 pairs are few for 39M parameters
    --weight-decay 1e-4 # in Adam, as published, not decoupled
)
batch_tokens=4096 gpu_tokens=4096 # published on one GPU
updates=50000                     # about 50 epochs, the usual number, by which Base is past its best
average=0                         # the README translates with the best checkpoint
search=(--beam 5)
generation=(--batch-size 128 "${search[@]}")

recipe "$@"
