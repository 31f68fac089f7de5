#!/bin/sh
# fresh_machine.sh [USER ...]
#
# Runs `make demo` and `make test` as a newcomer does, on a machine that has nothing but Debian, Python and make: in a
# root directory that debootstrap fills, with a clean environment, as root and as an ordinary user. `make test-fresh`
# runs this script. In the environment: SUITES names Debian's releases, TESTS what pytest shall run, WORK where the
# roots are made, and WORK/SUITE is taken as it is if it is there. pip is set up as on this computer: its settings
# become /etc/pip.conf in the root, and local directories that they name are to be seen there, read-only.
set -eu

SUITES=${SUITES:-bookworm trixie}
TESTS=${TESTS:-}
SOURCE=$(cd "$(dirname "$0")/.." && pwd)

say() { echo "fresh machine: $*"; }

# What runs inside the new mount namespace: "$1" is the root directory, the rest are users.
inside() {
    root=$1
    shift
    mount --make-rprivate /
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t tmpfs -o mode=755 tmpfs "$root/dev"
    for node in null:3 zero:5 full:7 random:8 urandom:9; do
        mknod -m 666 "$root/dev/${node%:*}" c 1 "${node#*:}"
    done
    ln -s /proc/self/fd "$root/dev/fd"
    mkdir "$root/dev/pts" "$root/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=666 devpts "$root/dev/pts"
    ln -s pts/ptmx "$root/dev/ptmx"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mkdir -p "$root/etc"
    for file in /etc/resolv.conf /etc/hosts; do
        [ ! -e "$file" ] || cat "$file" > "$root$file"
    done
    # Sorted as it is, the environment comes first, and wins.
    python3 -m pip config list | awk '{ key = $0; sub(/=.*/, "", key); sub(/.*\./, "", key) } !seen[key]++' |
        settings "$root" > "$root/etc/pip.conf"
    for user; do
        chroot "$root" id "$user" >/dev/null 2>&1 || chroot "$root" useradd --create-home "$user"
        home=$(chroot "$root" sh -c "echo ~$user")
        # A space in the path, which is nothing out of the ordinary either.
        checkout="$home/a checkout"
        rm -rf "$root$checkout"
        mkdir "$root$checkout"
        (cd "$SOURCE" && git -c safe.directory='*' ls-files -z --cached --others --exclude-standard |
            tar --create --ignore-failed-read --null --files-from -) |
            tar --extract --no-same-owner --directory "$root$checkout"
        chroot "$root" chown -R "$user:" "$checkout"
        for goal in demo test; do
            say "make $goal as $user with $(chroot "$root" python3 --version)"
            chroot "$root" setpriv --reuid "$user" --regid "$user" --init-groups \
                env -i "HOME=$home" "USER=$user" LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin \
                make --directory "$checkout" "$goal" "TESTS=$TESTS"
        done
        rm -rf "$root$checkout" "$root$home/.cache"  # with a CUDA build of torch, gigabytes
    done
}

# Turns the lines of `pip config list` into a configuration file, and mounts the directories and copies the files that
# they name below the root directory "$1".
settings() {
    echo '[global]'
    while IFS= read -r line; do
        key=${line%%=*}
        value=${line#*=\'}
        value=${value%\'}
        echo "${key##*.} = $value"
        for word in $value; do
            path=${word#file://}
            case $path in
            /*) ;;
            *) continue ;;
            esac
            # The links of an index may lead out of it, to the files beside it.
            [ "$path" = "$word" ] || path=$(dirname "$path")
            if [ -d "$path" ]; then
                mkdir -p "$1$path"
                mount --bind -o ro "$path" "$1$path"
            elif [ -f "$path" ]; then
                mkdir -p "$(dirname "$1$path")"
                cp "$path" "$1$path"
            fi
        done
    done
}

if [ "${1:-}" = --inside ]; then
    shift
    inside "$@"
    exit
fi

[ "$(id -u)" = 0 ] || { say 'skipped: it needs root, for debootstrap and chroot'; exit; }
command -v debootstrap >/dev/null || { say 'skipped: it needs debootstrap (apt install debootstrap)'; exit; }

made=
if [ -z "${WORK:-}" ]; then
    WORK=$(mktemp -d)
    made=$WORK
    # Its mounts are those of a namespace that is gone by then.
    trap 'rm -rf --one-file-system "$made"' EXIT
fi
for suite in $SUITES; do
    if [ ! -e "$WORK/$suite/bin/sh" ]; then
        say "making a root directory of Debian $suite"
        debootstrap --variant=minbase --include=ca-certificates,make,python3-venv "$suite" "$WORK/$suite" \
            > "$WORK/$suite.log" 2>&1 || { tail "$WORK/$suite.log" >&2; exit 1; }
    fi
    TESTS=$TESTS unshare --mount --pid --fork --kill-child sh "$0" --inside "$WORK/$suite" ${*:-root somebody}
done
