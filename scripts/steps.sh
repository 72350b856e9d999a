# Sourced by scripts that can be interrupted and resumed: work folders, records of finished files, and locks.

MARK=.made-by-hgkd # file that marks a work folder created by these scripts

# work_folder FOLDER: set `partial` to a work folder in the same place, which `finish` renames to FOLDER in the end. It
# is FOLDER.partial, either new or left by an interrupted run. If FOLDER.partial exists and was not created by these
# scripts, or a process works in it, it is not touched, and another name is used. Status 1 if no folder can be created.
work_folder() {
    local held=0
    partial=$1.partial
    mkdir -p -- "$(dirname -- "$1")" || return 1
    if ! mkdir -- "$partial" 2>/dev/null; then
        if [[ ! -L $partial && -d $partial && -O $partial && -f $partial/$MARK ]]; then
            exec {work_lock}<"$partial"
            # Held by this script and the processes that it starts. Status 1: by another one; else there are no locks.
            flock -n "$work_lock" 2>/dev/null || held=$?
            ((held == 1)) || return 0
            exec {work_lock}<&-
        fi
        partial=$(mktemp -d -- "$1.XXXXXX") || return 1
        chmod "$(printf %o $((0777 & ~8#$(umask))))" "$partial"
    fi
    exec {work_lock}<"$partial"
    flock -n "$work_lock" 2>/dev/null || true
    : >"$partial/$MARK" # after the lock: another process takes over only a marked folder
}

# finish FOLDER: rename the work folder to FOLDER, as the last step, so that FOLDER is complete if it exists.
finish() {
    rm -f -- "$partial/$MARK"
    mv -T -- "$partial" "$1" && return
    [[ ! -d $1 ]] || echo "another run has made $1 meanwhile; start again" >&2
    if [[ $partial == "$1.partial" ]]; then : >"$partial/$MARK"; else rm -rf -- "$partial"; fi
    return 1
}

# record FOLDER FILE...: record the hashes of complete files. recorded FOLDER FILE...: status 0 if the files have the
# recorded hashes. An existing file may be incomplete if its program was killed or the disk was full.
record() { (cd "$1" && sha256sum -- "${@:2}") >>"$1/recorded"; }
recorded() {
    local folder=$1 file line
    for file in "${@:2}"; do
        line=$(grep -F -- "  $file" "$folder/recorded" 2>/dev/null | tail -n 1) || return 1
        (cd "$folder" && sha256sum --status --check - <<<"$line" 2>/dev/null) || return 1
    done
}

# hashes PATH[:PATH]: print the SHA-256 of each checkpoint on a line. Missing checkpoints are left out.
hashes() { tr ':' '\n' <<<"$1" | while IFS= read -r path; do sha256sum 2>/dev/null <"$path" || true; done; }

# begun_otherwise FOLDER TEXT: status 0 if FOLDER/settings exists and differs from TEXT, the settings of a run.
begun_otherwise() { [[ -s $1/settings && $(<"$1/settings") != "$2" ]]; }

# write FILE TEXT: write a line to a file in one step, unless the file has it already.
write() {
    [[ -f $1 && $(<"$1") == "$2" ]] && return
    printf '%s\n' "$2" >"$1.partial"
    mv -f -- "$1.partial" "$1"
}

# lock FOLDER [wait]: lock a folder. If another run, or a process that it has left, holds the lock, print a line that
# names the process, and return status 1, or with `wait` wait for the lock. Processes that this script starts later
# inherit the lock. It is released by unlock, or when the last of these processes has ended. A killed process that is
# still ending is waited for; it takes up to some seconds until its files are closed.
lock() {
    exec 9>>"$1/lock"
    "$PYTHON" -c '
import fcntl, os, signal, sys, time
ours, begin = os.fstat(9), time.monotonic()
while True:
    owners = []
    try:
        fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sys.exit()
    except OSError as error:
        if not isinstance(error, BlockingIOError):
            sys.exit(f"{sys.argv[1]} cannot be locked: {error.strerror}")
    for number in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            others = [os.stat(f"/proc/{number}/fd/{name}") for name in os.listdir(f"/proc/{number}/fd")]
            if int(number) not in (os.getpid(), os.getppid()) and any(os.path.samestat(ours, one) for one in others):
                with open(f"/proc/{number}/comm") as name:
                    owners.append(f"{number} ({name.read().strip()})")
        except OSError:  # it has ended, or is somebody else'\''s
            pass
    if time.monotonic() > begin + (1 if owners else 5): # a killed process is seen for a while
        break
    time.sleep(0.1)
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

# whole_number TEXT: print a whole number without leading zeros, with which bash would read it as octal. Status 1 if
# TEXT is not a whole number of at most 9 digits.
whole_number() { [[ $1 =~ ^0*([0-9]{1,9})$ ]] && printf '%s\n' "${BASH_REMATCH[1]}"; }
