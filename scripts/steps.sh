# Sourced by the scripts that may be killed and started again: folders to work in, records of what is finished, a lock.

MARK=.made-by-hgkd # in a folder to work in, which nobody else has made then

# work_folder FOLDER: sets `partial` to a folder beside it, to be renamed to FOLDER once it is whole. That is
# FOLDER.partial, new or left by a run that was killed; where somebody else has such a folder, it is left alone and another
# name is taken. Status 1 where none can be made.
work_folder() {
    partial=$1.partial
    mkdir -p -- "$(dirname -- "$1")" || return 1
    if ! mkdir -- "$partial" 2>/dev/null; then
        [[ ! -L $partial && -d $partial && -O $partial && -f $partial/$MARK ]] && return
        partial=$(mktemp -d -- "$1.XXXXXX") || return 1
        chmod "$(printf %o $((0777 & ~8#$(umask))))" "$partial"
    fi
    : >"$partial/$MARK"
}

# finish FOLDER: the folder that work_folder has made becomes FOLDER, as the last step: a FOLDER that exists is whole.
finish() {
    rm -f -- "$partial/$MARK"
    mv -T -- "$partial" "$1"
}

# record FOLDER FILE...: these files of the folder are whole. recorded FOLDER FILE...: whether they are what was recorded,
# byte for byte. That a file exists proves nothing: a program may have been killed while it wrote, or a disk been full.
record() { (cd "$1" && sha256sum -- "${@:2}") >>"$1/recorded"; }
recorded() {
    local folder=$1 file line
    for file in "${@:2}"; do
        line=$(grep -F -- "  $file" "$folder/recorded" 2>/dev/null | tail -n 1) || return 1
        (cd "$folder" && sha256sum --status --check - <<<"$line" 2>/dev/null) || return 1
    done
}

# hashes PATH[:PATH]: SHA-256 of checkpoints, a line each; nothing of those that are not there.
hashes() { tr ':' '\n' <<<"$1" | while IFS= read -r path; do sha256sum <"$path" 2>/dev/null || true; done; }

# begun_otherwise FOLDER TEXT: whether a run was begun in the folder with other settings, which FOLDER/settings holds.
begun_otherwise() { [[ -f $1/settings && $(<"$1/settings") != "$2" ]]; }

# lock FOLDER [wait]: status 1, and one line that names the owner, where another run works in the folder, or what it has
# left running; with `wait`, the line and then the lock, once that has ended. The lock is this script's and that of all it
# starts from now on: it ends with the last of them, or by unlock.
lock() {
    exec 9>>"$1/lock"
    "$PYTHON" -c '
import fcntl, os, signal, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
    sys.exit()
except OSError as error:
    if not isinstance(error, BlockingIOError):
        sys.exit(f"{sys.argv[1]} cannot be locked: {error.strerror}")
ours, owners = os.fstat(9), []
for number in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else ()):
    try:
        others = [os.stat(f"/proc/{number}/fd/{name}") for name in os.listdir(f"/proc/{number}/fd")]
        if int(number) not in (os.getpid(), os.getppid()) and any(os.path.samestat(ours, one) for one in others):
            with open(f"/proc/{number}/comm") as name:
                owners.append(f"{number} ({name.read().strip()})")
    except OSError:  # it has ended, or is somebody else'\''s
        pass
who = "process " + ", ".join(owners[:3]) if owners else "a process of another user or machine"
found = f"{sys.argv[1]} is being worked on by {who}"
if "wait" not in sys.argv[2:]:
    sys.exit(f"{found}: wait until it has ended, or end it")
print(f"waiting: {found}", file=sys.stderr)
signal.signal(signal.SIGINT, signal.SIG_DFL)
fcntl.flock(9, fcntl.LOCK_EX)
' "$@"
}
unlock() { exec 9>&-; }

# whole_number TEXT: without leading zeros, which would make it octal; status 1 where it is none of at most 9 digits
whole_number() { [[ $1 =~ ^0*([0-9]{1,9})$ ]] && printf '%s\n' "${BASH_REMATCH[1]}"; }
