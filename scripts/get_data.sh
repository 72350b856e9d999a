#!/usr/bin/env bash
# Fetch a parallel corpus as plain text: get_data.sh NAME DIR [--from FOLDER]
#
# DIR gets train.de train.en valid.de valid.en test.de test.en, one sentence per line, and SOURCE: one line with the
# name of the corpus, its origin and its terms of use.
#
#   multi30k-de-en          29,000 / 1,014 / 1,000 pairs. Taken from --from FOLDER or $HGKD_DATA, a folder that holds
#                           train.de.gz and so on, or has a subfolder multi30k with these files. Otherwise downloaded.
#   libreoffice-help-de-en  about 31,000 / 1,000 / 1,000 pairs from the packages libreoffice-help-de and
#                           libreoffice-help-en-us. Taken from --from FOLDER, which holds the two .deb files or their
#                           unpacked content (usr/share/libreoffice/help). Otherwise downloaded with apt-get, without
#                           root.
#
# Exit status: 0 done (now or before), 2 usage error, 3 the source is not available (so that a caller can try another
# corpus), 1 any other error, such as a wrong hash.
#
# All files are written to DIR.partial, which is renamed to DIR in the end, so that DIR is complete if it exists. After
# an interruption, complete downloads of Multi30K in DIR.partial are used again. (If DIR.partial exists and was not
# created by this script, it is not touched, and another name is used.)
#
# Environment:
#   HGKD_DATA             see multi30k-de-en
#   HGKD_MULTI30K_URL     address of a mirror: a folder with the six .gz files of Multi30K
#   HGKD_MULTI30K_SHA256  for a mirror of another revision: a file with the expected hashes in the format of sha256sum.
#                         The numbers of pairs are then not checked, but must be the same for both languages
#   PYTHON                Python 3.11 or newer, which aligns the LibreOffice help; default python3
set -euo pipefail

NAMES="multi30k-de-en, libreoffice-help-de-en"
GIVE_UP=12 # seconds without 1,000 new bytes after which a source is considered unreachable
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/steps.sh"

say() { printf 'get_data.sh: %s\n' "$*" >&2; }

# fail STATUS MESSAGE: print an error message and exit.
fail() {
    local status=$1
    shift
    say "$*"
    exit "$status"
}

# ------------------------------------------------------------------------------------------------------ downloading

child="" partial=""
trap '[[ -z $child ]] || kill "$child" 2>/dev/null || true
    [[ -z $partial || $partial == "$dir.partial" ]] || rm -rf -- "$partial"' EXIT

# run_unless_stalled FOLDER COMMAND...: run a command, and kill it if FOLDER stops growing. Return its status, or 124 if
# it was killed. The time limits of curl, wget, Python and apt-get apply to each address of a host and to each file, and
# do not limit the total time.
run_unless_stalled() {
    local folder=$1 size=0 now since=$SECONDS status=0
    shift
    "$@" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.1
        now=$(du -sb "$folder" 2>/dev/null || true)
        now=${now%%[!0-9]*}
        if ((${now:-0} >= size + 1000)); then
            size=$now since=$SECONDS
        elif ((SECONDS - since >= GIVE_UP)); then
            kill "$child" 2>/dev/null || true
            wait "$child" 2>/dev/null || true
            child=""
            return 124
        fi
    done
    wait "$child" || status=$?
    child=""
    return "$status"
}

# download URL FILE: download with curl, wget or Python, whichever is installed.
download() {
    rm -f "$2"
    if command -v curl >/dev/null; then
        run_unless_stalled "$partial" curl --fail --silent --show-error --location --output "$2" "$1"
    elif command -v wget >/dev/null; then
        run_unless_stalled "$partial" wget --quiet --tries=1 --output-document="$2" "$1"
    else
        run_unless_stalled "$partial" python3 -c '
import shutil, sys, urllib.request
try:
    with urllib.request.urlopen(sys.argv[1]) as answer, open(sys.argv[2], "wb") as file:
        shutil.copyfileobj(answer, file, 4096)
except OSError as error:
    sys.exit(str(error))
' "$1" "$2"
    fi
}

# --------------------------------------------------------------------------------------------------- multi30k-de-en

MULTI30K_URL=https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d/data/task1/raw
MULTI30K_HOME="data/task1/raw of the repository multi30k/dataset"
MULTI30K_TERMS="for research and education, non-commercial"
MULTI30K_SHA256="\
726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6  train.de.gz
d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f  train.en.gz
f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a  val.de.gz
14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28  val.en.gz
9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8  test_2016_flickr.de.gz
611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9  test_2016_flickr.en.gz"

multi30k() {
    local folder="" url=${HGKD_MULTI30K_URL:-$MULTI30K_URL} origin
    local -A sha256=() file_of=([train]=train [valid]=val [test]=test_2016_flickr)
    local -A pairs_of=([train]=29000 [valid]=1014 [test]=1000)
    local split language sum name gz lines_de lines_en
    url=${url%/}

    if [[ -n $from ]]; then
        folder=$(multi30k_folder "$from") ||
            fail 2 "--from $from: no train.de.gz there, nor in its subfolder multi30k: name the folder that holds it"
    elif [[ -n ${HGKD_DATA:-} ]]; then
        folder=$(multi30k_folder "$HGKD_DATA") ||
            say "HGKD_DATA=$HGKD_DATA has no train.de.gz, nor multi30k/train.de.gz: downloading"
    fi
    origin=${folder:-$url}

    if [[ -n ${HGKD_MULTI30K_SHA256:-} ]]; then
        [[ -f $HGKD_MULTI30K_SHA256 ]] ||
            fail 2 "HGKD_MULTI30K_SHA256=$HGKD_MULTI30K_SHA256: no such file; unset it to expect the known hashes"
        MULTI30K_SHA256=$(<"$HGKD_MULTI30K_SHA256")
        pairs_of=()
    fi
    while read -r sum name; do
        [[ -z $sum ]] || sha256[${name#\*}]=$sum # sha256sum puts a star before the name of a binary file
    done <<<"$MULTI30K_SHA256"

    say "Multi30K, $MULTI30K_TERMS; from $origin"
    work_folder "$dir" || fail 1 "$dir cannot be made"
    for split in train valid test; do
        for language in de en; do
            name=${file_of[$split]}.$language.gz
            gz=$partial/$name
            [[ -n ${sha256[$name]:-} ]] || fail 2 "HGKD_MULTI30K_SHA256=$HGKD_MULTI30K_SHA256: no line for $name: add it"
            if [[ -f $gz && $(sha256_of "$gz") == "${sha256[$name]}" ]]; then
                say "$name: here already"
            elif [[ -n $folder ]]; then
                say "$name: copying"
                [[ -r $folder/$name ]] || fail 2 "$folder/$name cannot be read: the folder needs all six files"
                cp -- "$folder/$name" "$gz"
            else
                say "$name: downloading"
                download "$url/$name" "$gz" || {
                    (($? != 23)) || fail 1 "$gz cannot be written: is the disk full?" # by curl's exit status
                    fail 3 "$url/$name cannot be had: check the network, or give a folder with the files with --from"
                }
            fi
            if [[ $(sha256_of "$gz") != "${sha256[$name]}" ]]; then
                if [[ -n $folder ]]; then
                    fail 1 "$folder/$name: wrong sha256: replace it with the one from $MULTI30K_HOME"
                fi
                fail 1 "$name: wrong sha256 of what $url gave: run this again, and if it stays, use --from FOLDER"
            fi
            gzip -dc "$gz" >"$partial/$split.$language"
        done
        lines_de=$(wc -l <"$partial/$split.de") lines_en=$(wc -l <"$partial/$split.en")
        if [[ $lines_de != "$lines_en" || $lines_de != "${pairs_of[$split]:-$lines_de}" ]]; then
            fail 1 "${file_of[$split]}: $lines_de German and $lines_en English lines, not ${pairs_of[$split]:-the same}:" \
                "get the files anew from $MULTI30K_HOME"
        fi
        say "$split: $lines_de pairs"
    done
    finish_text "Multi30K task 1, German-English, raw text, from $origin; $MULTI30K_TERMS"
}

# multi30k_folder FOLDER: print FOLDER or FOLDER/multi30k, whichever has the files.
multi30k_folder() {
    local folder
    for folder in "$1" "$1/multi30k"; do
        if [[ -f $folder/train.de.gz ]]; then
            printf '%s\n' "$folder"
            return
        fi
    done
    return 1
}

sha256_of() {
    local sum
    sum=$(sha256sum <"$1")
    printf '%s\n' "${sum%% *}"
}

# ------------------------------------------------------------------------------------------- libreoffice-help-de-en

libreoffice_help() {
    local python=${PYTHON:-python3} tree="" debs=() origin package found folder
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail 1 "PYTHON=$python is no Python 3.11 or newer: name one in PYTHON"

    say "LibreOffice help, MPL-2.0; from ${from:-the packages libreoffice-help-de and libreoffice-help-en-us}"
    work_folder "$dir" || fail 1 "$dir cannot be made"
    if [[ -n $from ]]; then
        origin=$from
        for folder in "$from" "$from/usr/share/libreoffice/help"; do
            if [[ -d $folder/de && -d $folder/en-US ]]; then tree=$folder; fi
        done
    else
        origin="the packages"
        download_packages
    fi
    if [[ -z $tree ]]; then
        for package in libreoffice-help-de libreoffice-help-en-us; do
            found=("${from:-$partial}/$package"_*.deb)
            [[ ${#found[@]} == 1 && -f ${found[0]} ]] ||
                fail 2 "--from $from: needs libreoffice-help-de_*.deb and libreoffice-help-en-us_*.deb, one of each, or the" \
                    "folders de and en-US of usr/share/libreoffice/help"
            debs+=("${found[0]}")
        done
        command -v dpkg >/dev/null ||
            fail 3 "no dpkg here to unpack ${debs[0]##*/}: unpack it elsewhere and name the tree with --from"
        rm -rf "$partial/tree"
        for package in "${debs[@]}"; do
            say "unpacking ${package##*/}"
            dpkg -x "$package" "$partial/tree" || fail 1 "$package cannot be unpacked: get it anew"
            origin+=" ${package##*/}"
        done
        tree=$partial/tree/usr/share/libreoffice/help
        # dpkg does not write outside of the tree, but pages could still be links or devices, which must not be read.
        found=$(find "$partial/tree" -name '*.html' ! -type f ! -type d -print -quit)
        [[ -z $found ]] || fail 1 "${found#"$partial/tree/"} in the packages is no file but a link or device: get them anew"
    fi
    say "aligning (half a minute)"
    "$python" "$here/align_libreoffice.py" "$tree" "$partial" || exit 1 # it has printed the error
    finish_text "LibreOffice help, German-English, aligned by scripts/align_libreoffice.py, from $origin; MPL-2.0"
}

download_packages() {
    local packages=(libreoffice-help-de libreoffice-help-en-us) log=$partial/apt.log
    local apt=(apt-get --quiet --option Acquire::Retries=0 --option Acquire::http::Timeout=10)
    command -v apt-get >/dev/null ||
        fail 3 "no apt-get here to download ${packages[*]}: get the two .deb files elsewhere and use --from FOLDER"
    if ! apt-cache show "${packages[@]}" >/dev/null 2>&1; then
        [[ $(id -u) == 0 ]] ||
            fail 3 "apt knows no package ${packages[*]}: run \`apt-get update\` as root first, or use --from FOLDER"
        say "apt-get update"
        run_unless_stalled /var/lib/apt/lists "${apt[@]}" update >"$log" 2>&1 || true # one source may fail: check again
        apt-cache show "${packages[@]}" >/dev/null 2>&1 ||
            fail 3 "apt knows no package ${packages[*]} after \`apt-get update\`: check the network and apt's sources," \
                "or use --from FOLDER"
    fi
    say "apt-get download ${packages[*]}"
    rm -f "$partial"/*.deb # apt-get would keep a file of another version
    # apt-get downloads to the current folder. env, unlike a subshell, becomes apt-get, which the trap then kills.
    run_unless_stalled "$partial" env --chdir="$partial" "${apt[@]}" download "${packages[@]}" >"$log" 2>&1 ||
        fail 3 "apt-get cannot download ${packages[*]} ($(tail -n 1 "$log")): check the network, run" \
            "\`apt-get update\`, or use --from FOLDER"
}

# -------------------------------------------------------------------------------------------------------------- main

# finish_text LINE: remove all files but the text, write LINE to SOURCE, and rename the folder to DIR.
finish_text() {
    rm -rf -- "$partial"/{train,val,test_2016_flickr}.{de,en}.gz "$partial"/libreoffice-help-*.deb "$partial/tree" \
        "$partial/apt.log"
    printf '%s: %s\n' "$name_of_set" "$1" >"$partial/SOURCE"
    finish "$dir"
    say "done: $dir"
}

usage() {
    cat <<END
usage: get_data.sh NAME DIR [--from FOLDER]
  NAME           one of: $NAMES
  DIR            the folder to make: {train,valid,test}.{de,en} and SOURCE
  --from FOLDER  take the data from FOLDER, download nothing
The head of this script says more.
END
}

name_of_set="" dir="" from=""
while (($#)); do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --from)
            [[ -n ${2:-} ]] || fail 2 "--from needs a folder"
            from=$2
            [[ -d $from ]] || fail 2 "--from $from: no such folder"
            shift
            ;;
        -*) fail 2 "unknown option $1: only --from FOLDER is known" ;;
        *)
            if [[ -z $name_of_set ]]; then
                name_of_set=$1
            elif [[ -z $dir ]]; then
                dir=$1
            else
                fail 2 "unexpected argument $1: give one NAME and one DIR"
            fi
            ;;
    esac
    shift
done
case $name_of_set in
    multi30k-de-en | libreoffice-help-de-en) ;;
    "") fail 2 "NAME and DIR are missing; NAME is one of: $NAMES" ;;
    *) fail 2 "unknown NAME $name_of_set; known are: $NAMES" ;;
esac
[[ -n $dir ]] || fail 2 "DIR is missing: give the folder to make"
while [[ $dir == ?*/ ]]; do dir=${dir%/}; done
[[ $from != -* ]] || from=./$from

if [[ -f $dir/SOURCE ]]; then
    read -r source <"$dir/SOURCE" || true
    case $source in
        "$name_of_set:"*) ;;
        multi30k-de-en:* | libreoffice-help-de-en:*)
            fail 1 "$dir holds ${source%%:*}, not $name_of_set: choose another DIR"
            ;;
    esac
    say "$dir is there already: ${source//[[:cntrl:]]/?}"
    exit 0
fi
[[ ! -e $dir && ! -L $dir ]] || fail 1 "$dir exists but has no file SOURCE: remove it or choose another DIR"

case $name_of_set in
    multi30k-de-en) multi30k ;;
    libreoffice-help-de-en) libreoffice_help ;;
esac
