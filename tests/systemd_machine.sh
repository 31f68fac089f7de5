#!/bin/sh
# systemd_machine.sh WORK CGROUP
#
# Becomes a machine of its own whose PID 1 is this computer's systemd. Its file system is a copy-on-write view of /,
# kept in memory: nothing that happens inside reaches the real one. Its network is loopback alone, and systemd
# manages only what is below CGROUP, a cgroup v2 made for this machine. WORK is an empty directory to mount things on.
# Killing this process, or that which started it, ends the machine and all that ran in it.
set -eu
work=$1 cgroup=$2

case ${3:-outside} in
outside)
    exec setpriv --pdeathsig=KILL unshare --mount --pid --fork --kill-child --net --ipc --uts sh "$0" "$work" "$cgroup" inside
    ;;
inside)
    # Only now, because the new namespace takes the cgroup that this process is in for the root of all.
    echo 0 > "$cgroup/cgroup.procs"
    exec unshare --cgroup sh "$0" "$work" "$cgroup" boot
    ;;
esac

mount --make-rprivate /
mount -t tmpfs tmpfs "$work"
mkdir "$work/changes" "$work/scratch" "$work/root"
mount -t overlay -o "lowerdir=/,upperdir=$work/changes,workdir=$work/scratch" overlay "$work/root"
cd "$work/root"

mount -t proc proc proc
mount --bind proc/sys proc/sys
# Kernel settings and devices stay as they are: on seeing these read-only, systemd leaves out the units that set them.
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for node in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 "dev/${node%:*}" c 1 "${node#*:}"
done
mknod -m 666 dev/tty c 5 0
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp

# This computer's own services, file systems and installation of TensorNext are not wanted.
: > etc/fstab
rm -rf etc/systemd/system/*.wants
rm -rf etc/tensornext etc/systemd/system/tensornext*.d usr/local/lib/systemd/system/tensornext*
rm -rf opt/tensornext usr/local/bin/tnxd usr/local/bin/tnxctl

mkdir run/outside
pivot_root . run/outside
umount -l /run/outside
rmdir /run/outside
mount --make-rshared /  # as systemd has it where it is in no container: credentials reach services by that
# The kernel is shared: nothing in here loads a module or sets the clock.
container=test exec setpriv --bounding-set=-sys_module,-sys_time \
    /lib/systemd/systemd --system --unit=basic.target --show-status=no </dev/null
