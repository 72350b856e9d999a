#!/usr/bin/env bash
# WMT14 En-De, Transformer base: data as fairseq's prepare-wmt14en2de.sh makes it, training as in "Attention is all you
# need" with fairseq's options for it. --help says the rest.
#
# Time and memory: not measured here. The paper says 12 hours for 100,000 updates on 8 P100; its batches, about 3,000
# tokens a GPU, fitted in a P100's 16 GB. A distilled student takes about twice that (its paper). On one GPU each update
# takes 8 turns. Estimates: preparation some hours on few cores, most of it tokenisation, which holds the text of one
# corpus in memory (some GB); 10 GB of disk, and 8 GB for each model's checkpoints. Published BLEU of Transformer base,
# with label smoothing: 27.3 (tokenised, compounds split).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

title="WMT14 English-German" terms="for research; see the pages of WMT13, 14 and 17"
source=en target=de
# As fairseq's script: Europarl and Common Crawl of WMT13, News Commentary of WMT17.
files=(
    training-parallel-europarl-v7.tgz http://statmt.org/wmt13/training-parallel-europarl-v7.tgz
    training-parallel-commoncrawl.tgz http://statmt.org/wmt13/training-parallel-commoncrawl.tgz
    training-parallel-nc-v12.tgz http://data.statmt.org/wmt17/translation-task/training-parallel-nc-v12.tgz
    dev.tgz http://data.statmt.org/wmt17/translation-task/dev.tgz
    test-full.tgz http://statmt.org/wmt14/test-full.tgz
)

# newstest2013 validates, as in the papers. (fairseq's script holds back every 100th training pair, but with its
# --scaling18, for the same reason, it too takes newstest2013.) newstest2014, all 3,003 pairs, is the test.
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

# FILE LANGUAGE. -c: control characters go; -a: hyphens are split, so that compounds share pieces.
normalised() { moses "$2" normalize -c tokenize -a <"$1"; }
tokenised() { moses "$2" tokenize -a <"$1"; }

merges=40000 # as fairseq's script; the papers' 37,000 (tensor2tensor) and 32,000 (Google's copy) are close
make_pieces() {
    subword_nmt_pieces "$1/bpe"
    # Cleaned after the BPE, as fairseq's script does: 1 to 250 pieces, and no side 1.5 times the other.
    clean "$1/bpe/train" "$1/train" --max 250 --ratio 1.5
    mv "$1"/bpe/{codes,valid.*,test.*} "$1"
    rm -rf "$1/bpe"
}
dictionary=(--joined-dictionary) # needed to share all embeddings
scores=(tokenised detokenised) # published: the first, compounds split; comparable over toolkits: the second

# Compounds that the tokenizer left whole are split for the tokenised score, as in the published ones (fairseq's
# compound_split_bleu.sh). It raises BLEU a little.
published_tokens() { LC_ALL=C sed -E 's/(\S)-(\S)/\1 ##AT##-##AT## \2/g'; }

model=(--arch transformer_wmt_en_de --share-all-embeddings) # 6 + 6 layers of 512, feed-forward 2,048: "base"
training=(
    --optimizer adam --adam-betas '(0.9, 0.98)'
    --clip-norm 0.0
    --lr 7e-4 # the peak of the paper's schedule: 512^-0.5 * 4000^-0.5
    --lr-scheduler inverse_sqrt --warmup-updates 4000 --warmup-init-lr 1e-7
    --dropout 0.1 --weight-decay 0.0 # as the paper: 4.5M pairs need less of both
    --save-interval-updates 1000 --keep-interval-updates 1 # an epoch is too much to lose when a job is stopped
)
batch_tokens=32768 gpu_tokens=4096 # the paper: about 25,000 of each language on 8 GPUs; fairseq: 8 x 4,096
updates=100000                     # as the paper
average=5                          # as the paper, which averages the last 5 checkpoints (of 10 minutes; here of epochs)
search=(--beam 4 --lenpen 0.6) # as the paper
generation=(--batch-size 128 "${search[@]}")

recipe "$@"
