#!/usr/bin/env bash
# WMT14 En-De, Transformer base, with the data of fairseq's prepare-wmt14en2de.sh, trained as in "Attention is all you
# need" with the corresponding options of fairseq. See --help.
#
# Time and memory: not measured. The paper reports 12 hours for 100,000 updates on 8 P100 GPUs with 16 GB, with
# batches of about 3,000 tokens per GPU. A distilled student takes about twice as long, according to its paper. On one
# GPU, each update accumulates 8 batches. Estimates: preparation takes some hours on few cores, mostly for
# tokenisation, which keeps the text of one corpus in memory (some GB). Disk: 10 GB for the data, and 8 GB for the
# checkpoints of each model. Published BLEU of Transformer base, with label smoothing: 27.3 (tokenised, compounds
# split).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

title="WMT14 English-German" terms="for research; see the pages of WMT13, 14 and 17"
source=en target=de
# As in fairseq's script: Europarl and Common Crawl of WMT13, News Commentary of WMT17.
files=(
    training-parallel-europarl-v7.tgz http://statmt.org/wmt13/training-parallel-europarl-v7.tgz
    training-parallel-commoncrawl.tgz http://statmt.org/wmt13/training-parallel-commoncrawl.tgz
    training-parallel-nc-v12.tgz http://data.statmt.org/wmt17/translation-task/training-parallel-nc-v12.tgz
    dev.tgz http://data.statmt.org/wmt17/translation-task/dev.tgz
    test-full.tgz http://statmt.org/wmt14/test-full.tgz
)

# Validation is on newstest2013, as in the papers. (fairseq's script uses every 100th training pair by default, and
# newstest2013 with --scaling18.) The test set is newstest2014, with all 3,003 pairs.
make_text() {
    local out=$1 raw=$1/unpacked language side corpus
    unpack training-parallel-europarl-v7.tgz "$raw" training/europarl-v7.de-en.{de,en}
    unpack training-parallel-commoncrawl.tgz "$raw" commoncrawl.de-en.{de,en}
    unpack training-parallel-nc-v12.tgz "$raw" training/news-commentary-v12.de-en.{de,en}
    unpack dev.tgz "$raw" dev/newstest2013.{de,en}
    unpack test-full.tgz "$raw" test-full/newstest2014-deen-{src.en,ref.de}.sgm
    for language in en de; do
        side=src
        [[ $language == en ]] || side=ref
        for corpus in training/europarl-v7 commoncrawl training/news-commentary-v12; do
            once "$out/${corpus##*/}.$language" normalised "$raw/$corpus.de-en.$language" "$language"
        done
        cat "$out"/{europarl-v7,commoncrawl,news-commentary-v12}."$language" >"$out/train.$language"
        once "$out/valid.$language" normalised "$raw/dev/newstest2013.$language" "$language"
        once "$out/reference.$language" segments "$raw/test-full/newstest2014-deen-$side.$language.sgm"
        once "$out/test.$language" tokenised "$out/reference.$language" "$language"
    done
    rm -rf "$out"/{unpacked,europarl-v7.*,commoncrawl.*,news-commentary-v12.*}
}

# Arguments: FILE LANGUAGE. -c removes control characters; -a splits at hyphens, so that compounds share pieces.
normalised() { moses "$2" normalize -c tokenize -a <"$1"; }
tokenised() { moses "$2" tokenize -a <"$1"; }

merges=40000 # as in fairseq's script; 37,000 (tensor2tensor) and 32,000 (Google's data) in papers are close
make_pieces() {
    subword_nmt_pieces "$1/bpe"
    # Pairs are cleaned after BPE, as in fairseq's script: 1 to 250 pieces, and a ratio of at most 1.5.
    clean "$1/bpe/train" "$1/train" --max 250 --ratio 1.5
    mv "$1"/bpe/{codes,valid.*,test.*} "$1"
    rm -rf "$1/bpe"
}
dictionary=(--joined-dictionary) # needed to share all embeddings
scores=(tokenised detokenised) # published: the first, with split compounds; comparable between toolkits: the second

# For tokenised BLEU, compounds that the tokeniser did not split are split, as in published results (fairseq's
# compound_split_bleu.sh). This increases BLEU slightly.
published_tokens() { LC_ALL=C sed -E 's/(\S)-(\S)/\1 ##AT##-##AT## \2/g'; }

model=(--arch transformer_wmt_en_de --share-all-embeddings) # 6 + 6 layers of 512, feed-forward 2,048: "base"
training=(
    --optimizer adam --adam-betas '(0.9, 0.98)'
    --clip-norm 0.0
    --lr 7e-4 # the peak of the paper's schedule: 512^-0.5 * 4000^-0.5
    --lr-scheduler inverse_sqrt --warmup-updates 4000 --warmup-init-lr 1e-7
    --dropout 0.1 --weight-decay 0.0 # as in the paper: 4.5M pairs need less of both
    --save-interval-updates 1000 --keep-interval-updates 1 # so that an interrupted job does not lose a whole epoch
)
batch_tokens=32768 gpu_tokens=4096 # paper: about 25,000 of each language on 8 GPUs; fairseq: 8 x 4,096
updates=100000                     # as in the paper
average=5                          # as in the paper, whose last 5 checkpoints are 10 minutes apart (here: epochs)
search=(--beam 4 --lenpen 0.6) # as in the paper
generation=(--batch-size 128 "${search[@]}")

recipe "$@"
