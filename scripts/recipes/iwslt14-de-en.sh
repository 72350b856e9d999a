#!/usr/bin/env bash
# IWSLT14 De-En, with the data of fairseq's prepare-iwslt14.sh and the options of fairseq's README. See --help.
#
# Time and memory: not measured. Estimate for the teacher or Base: 6 x 39M parameters x 4,096 tokens x 50,000 updates
# = 4.8e16 operations, that is half an hour at 30 TFLOP/s, a realistic rate of a single GPU since 2018 in fp16. A
# distilled student takes about twice as long, according to its paper. GPU memory, estimated from the batch size: less
# than 16 GB. Disk: 5 GB for the checkpoints of each model. Published BLEU (tokenised): 34 to 35 with label smoothing.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

title="IWSLT14 German-English (TED talks)" terms="CC BY-NC-ND, as the talks"
source=de target=en
# The copy that fairseq's script downloads. The workshop's server does not exist any more.
files=(de-en.tgz http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz)

# As in fairseq's script: about 160,239 / 7,283 / 6,750 pairs. sacremoses and Moses differ in a few lines.
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

training_text() { # FILE LANGUAGE: remove the lines and tags that describe a talk, and tokenise
    sed -E '/<(url|talkid|keywords)>/d; s/<\/?(title|description)>//g' "$1" | moses "$2" tokenize
}

test_text() { # FOLDER LANGUAGE
    local set
    for set in TED.dev2010 TEDX.dev2012 TED.tst2010 TED.tst2011 TED.tst2012; do
        segments "$1/IWSLT14.$set.de-en.$2.xml" || return
    done
}

tokenised() { moses "$2" tokenize <"$1" | lowercase; } # FILE LANGUAGE

merges=10000 # as in fairseq's script
make_pieces() { subword_nmt_pieces "$1"; }
dictionary=() # one for each language, as in fairseq's README
scores=(tokenised detokenised) # published: the first; the second ignores case, because the text is lowercased
sacrebleu=(-lc)

# As in fairseq's README for this data, except label smoothing, which is a method here (ls-uniform).
model=(--arch transformer_iwslt_de_en --share-decoder-input-output-embed) # 6 + 6 layers of 512
training=(
    --optimizer adam --adam-betas '(0.9, 0.98)' # 0.98: usual for Transformers; gradients change fast during warm-up
    --clip-norm 0.0                             # no clipping
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000
    --dropout 0.3       # more than the usual 0.1: 160,000 pairs are few for 39M parameters
    --weight-decay 1e-4 # in Adam, as published, not decoupled
)
batch_tokens=4096 gpu_tokens=4096 # published on one GPU
updates=50000                     # about 50 epochs, as usual, after which Base is past its best
average=0                         # fairseq's README uses the best checkpoint
search=(--beam 5)
generation=(--batch-size 128 "${search[@]}")

recipe "$@"
