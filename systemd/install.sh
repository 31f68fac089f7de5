#!/bin/sh
# install.sh install|uninstall
#
# Installs TensorNext as a service of this machine, upgrades it, or takes it away. `sudo make install` and
# `sudo make uninstall` run this script. PYTHON in the environment names the interpreter to use; otherwise the script
# picks one; TORCH there is cpu or cuda, the build of torch. Nothing is written to the source tree.
set -eu
umask 022  # the service runs as a user of its own, which has to read all of this

HOME_DIR=/opt/tensornext
COMMANDS='tnxd tnxctl'
LINKS=/usr/local/bin
CONFIG=/etc/tensornext/tnxd.toml
# Where systemd looks for what the administrator installed. /etc/systemd/system, which goes before it, stays free for
# changes made with `systemctl edit`, and /usr/lib/systemd/system belongs to the distribution's packages.
UNITS=/usr/local/lib/systemd/system
UNIT=$UNITS/tensornext.service
SOCKET=$UNITS/tensornext.socket  # holds the addresses while the service is replaced
BRIDGE=$UNITS/tensornext-http.service  # stays off until somebody enables it

SOURCE=$(cd "$(dirname "$0")/.." && pwd)

say() { echo "tensornext: $*"; }
fail() { echo "tensornext: $*" >&2; exit 1; }

# Prints the interpreter that "$1" really runs, behind symbolic links, virtual environments and the shims of version
# managers. Where the service could not use it, prints why not, and fails.
real_python() {
    "$1" - "$1" <<'EOF' 2>/dev/null
import os, sys

def refuse(reason):
    print("%s %s" % (sys.argv[1], reason))
    sys.exit(1)

if sys.version_info < (3, 11):
    refuse("is Python %d.%d" % sys.version_info[:2])
real = os.path.realpath(sys._base_executable)
for hidden in "/root", "/home", "/run/user", "/tmp", "/var/tmp":
    for path in real, os.path.realpath(sys.base_prefix):
        if path.startswith(hidden + "/"):
            refuse("is %s, and the service sees nothing in %s" % (real, hidden))
try:
    import ensurepip, venv
except ImportError:
    refuse("has no venv module (on Debian and Ubuntu: apt install python3-venv)")
print(real)
EOF
}

# Prints the interpreter to install with: PYTHON if that is set, else the first that will do.
choose_python() {
    refused=
    for candidate in ${PYTHON:-/usr/bin/python3 python3 python3.13 python3.12 python3.11}; do
        command -v "$candidate" >/dev/null || continue
        if answer=$(real_python "$candidate"); then
            echo "$answer"
            return
        fi
        refused="${refused:+$refused; }${answer:-$candidate does not run}"
    done
    fail "the service needs Python 3.11 or newer with venv, outside of home directories:" \
        "${refused:-there is no ${PYTHON:-python3}}"
}

is_ours() { [ "$(readlink "$LINKS/$1" || true)" = "$HOME_DIR/bin/$1" ]; }
service_state() { systemctl is-active tensornext || true; }
systemd_runs() { [ -d /run/systemd/system ]; }

install_environment() {
    python=$1
    if [ "$(readlink -f "$HOME_DIR/bin/python" || true)" != "$python" ]; then
        if [ -e "$HOME_DIR" ] && [ ! -e "$HOME_DIR/pyvenv.cfg" ]; then
            fail "$HOME_DIR exists and is not a virtual environment; move it away first"
        fi
        say "making a virtual environment in $HOME_DIR with $python"
        "$python" -m venv --clear "$HOME_DIR"
    fi
    # From a copy, because a build leaves its traces beside the sources.
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    (cd "$SOURCE" && cp -R pyproject.toml setup.cfg README.md LICENSE tnxctl tnxd "$copy")
    say 'installing packages; torch is large'
    torch=$("$HOME_DIR/bin/python" -B "$SOURCE/systemd/torch_build.py") || fail 'nothing was installed'
    PIP_CONSTRAINT=$SOURCE/constraints.txt PIP_BUILD_CONSTRAINT=$SOURCE/constraints.txt \
        PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
        "$HOME_DIR/bin/python" -m pip install --quiet $torch "${copy}[daemon,http]" ||
        fail 'pip could not install the packages'
    for name in $COMMANDS; do
        ln -sfn "$HOME_DIR/bin/$name" "$LINKS/$name"
    done
}

install_configuration() {
    if [ -e "$CONFIG" ]; then
        say "kept $CONFIG"
    else
        install -D -m 644 "$SOURCE/systemd/tnxd.toml" "$CONFIG"
    fi
}

# Whether the configuration has the address that tensornext.socket holds. A daemon that finds another one does not start.
fits_socket() {
    "$HOME_DIR/bin/tnxd" --config "$CONFIG" --check 2>/dev/null | grep -q '^bind = .*"tcp://127\.0\.0\.1:5555"'
}

# $1: the state of an earlier installation's service, or nothing on the first installation. A service that somebody
# has stopped stays stopped. $2: whether that installation had the socket, which then stays enabled or disabled.
start() {
    if [ "$2" = no ] && fits_socket; then
        systemctl --quiet enable tensornext.socket
    elif [ "$2" = no ]; then
        say "tensornext.socket is not enabled, since $CONFIG binds other addresses: see docs/operations.md, Restarts"
    fi
    case $1 in
    '')
        systemctl --quiet enable tensornext
        ;;
    inactive)
        units=tensornext
        if systemctl --quiet is-enabled tensornext.socket; then
            units='tensornext.socket tensornext'
        fi
        say "upgraded; the service was stopped and stays so: systemctl start $units"
        return
        ;;
    *)
        systemctl reset-failed tensornext
        ;;
    esac
    if systemctl --quiet is-enabled tensornext.socket && ! systemctl --quiet is-active tensornext.socket; then
        systemctl stop tensornext  # which has bound its addresses itself
        systemctl restart tensornext.socket || fail 'tensornext.socket cannot listen; systemctl status tensornext.socket'
    fi
    systemctl restart tensornext || fail 'the service does not start; journalctl -u tensornext says why'
    say 'the service runs: systemctl status tensornext, journalctl -u tensornext, tnxctl health'
}

install_all() {
    for name in $COMMANDS; do
        is_ours "$name" || [ ! -e "$LINKS/$name" ] || fail "$LINKS/$name belongs to something else; move it away first"
    done
    python=$(choose_python)
    previous= had_socket=no
    if [ -e "$UNIT" ] && systemd_runs; then
        previous=$(service_state)
        [ ! -e "$SOCKET" ] || had_socket=yes
    fi
    install_environment "$python"
    install_configuration
    install -D -m 644 -t "$UNITS" "$SOURCE/systemd/tensornext.service" "$SOURCE/systemd/tensornext.socket" \
        "$SOURCE/systemd/tensornext-http.service"
    if systemd_runs; then
        systemctl daemon-reload
        systemctl try-restart tensornext-http || say 'tensornext-http does not start; journalctl -u tensornext-http'
        start "$previous" "$had_socket"
    else
        say 'installed; systemd does not run here, so nothing was started:' \
            'systemctl enable --now tensornext.socket tensornext'
    fi
}

uninstall_all() {
    if [ -e "$UNIT" ]; then
        if systemd_runs; then
            if [ -e "$SOCKET" ]; then
                systemctl --quiet disable --now tensornext.socket  # first: it would start the service again
            fi
            systemctl --quiet disable --now tensornext
            if [ -e "$BRIDGE" ]; then
                systemctl --quiet disable --now tensornext-http
            fi
        else
            rm -f /etc/systemd/system/multi-user.target.wants/tensornext.service \
                /etc/systemd/system/multi-user.target.wants/tensornext-http.service \
                /etc/systemd/system/sockets.target.wants/tensornext.socket  # as much as that would do
        fi
        rm -f "$UNIT" "$SOCKET" "$BRIDGE"
        rmdir -p "$UNITS" 2>/dev/null || true  # only what is empty
        if systemd_runs; then
            systemctl daemon-reload
            # It forgets a failed unit only when told to.
            systemctl reset-failed tensornext.socket tensornext tensornext-http 2>/dev/null || true
        fi
        rm -rf /var/cache/tensornext /var/cache/private/tensornext  # CacheDirectory= of a service without a user
    fi
    for name in $COMMANDS; do
        if is_ours "$name"; then
            rm "$LINKS/$name"
        fi
    done
    if [ -e "$HOME_DIR/pyvenv.cfg" ]; then
        rm -rf "$HOME_DIR"
    fi
    say "removed; the configuration stays in $(dirname "$CONFIG")"
}

[ "$(id -u)" = 0 ] || fail "this needs root: sudo make ${1:-install}"
case ${1:-} in
install) install_all ;;
uninstall) uninstall_all ;;
*) fail "usage: install.sh install|uninstall" ;;
esac
