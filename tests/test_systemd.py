"""The service as an administrator meets it: installed by `make install`, run by a real systemd, and taken away.

The machine is made once and installed once, and the tests go on with it in their order: to start the service for each
would take longer than all they do.
"""

from __future__ import annotations

import grp
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import systemd_machine
from model_repositories import put
from systemd_machine import Machine, eventually
from tnxctl.keys import pairs

SOURCE = Path(__file__).parent.parent
COPY = "/usr/src/tensornext"
CONFIG = "etc/tensornext/tnxd.toml"
DROP_IN = "run/systemd/system/tensornext.service.d/test.conf"
UNITS = ("tensornext.socket", "tensornext")
TCP, IPC = "tcp://127.0.0.1:5555", "ipc:///run/tensornext.sock"
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")

INSTALL_TIMEOUT = 500.0
"""Seconds for `make install`: it downloads torch where pip has not got it yet."""

RESTARTS_TIMEOUT = 60.0
"""Seconds for a restart under load, on a busy machine."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(INSTALL_TIMEOUT + 60)]


def make(machine: Machine, *arguments: str, check: bool = True) -> str:
    """Run make in the copy of the source tree, with the network and the pip settings of the caller."""
    settings = {name: value for name, value in os.environ.items() if re.match(r"PIP_|\w+_proxy$", name, re.I)}
    settings["PIP_COMPILE"] = "0"  # most of torch's modules are never imported
    return machine.run(
        "make", "-C", COPY, *arguments, timeout=INSTALL_TIMEOUT, check=check, network=True, environment=settings
    )


def show(machine: Machine, name: str) -> str:
    """One of systemd's properties of the service."""
    return machine.run("systemctl", "show", "--value", "--property", name, "tensornext")


def journal(machine: Machine) -> str:
    """All that the service has written, and what systemd wrote of it."""
    machine.run("journalctl", "--sync")
    return machine.run("journalctl", "--output=cat", "--unit=tensornext")


def under_load(machine: Machine, *arguments: str, timeout: float) -> None:
    """Run clients that check all answers, while the service is restarted. Fails if any of them notices.

    They run from the source tree, since an upgrade replaces what is installed.
    """
    program = f"{COPY}/tests/restart/restarts.py"
    command = ("/opt/tensornext/bin/python", program, "--systemd", *arguments)
    machine.run(*command, timeout=timeout, environment={"PYTHONPATH": COPY})


def restarted(machine: Machine, before: str) -> bool:
    """True if a new process, other than that with the process id `before`, has become ready."""
    return show(machine, "ActiveState") == "active" and show(machine, "MainPID") not in ("0", before)


def override(machine: Machine, settings: str) -> None:
    """Change settings of the unit as `systemctl edit` does. Those of a running service change when it starts again."""
    drop_in = machine.root / DROP_IN
    drop_in.parent.mkdir(parents=True, exist_ok=True)
    drop_in.write_text(f"[Service]\n{settings}\n")
    machine.run("systemctl", "daemon-reload")


def installed_files(machine: Machine) -> set[str]:
    """Files and links, no directories, where programs, their settings and their data are kept.

    Without the manual pages that this computer's own `man` may just be formatting: they show through.
    """
    places = ("/etc", "/opt", "/usr/local", "/var/cache", "/var/lib")
    pages = ("-path", "/var/cache/man", "-prune")
    return set(machine.run("find", *places, "-xdev", *pages, "-o", "-not", "-type", "d", "-print").splitlines())


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    if reason := systemd_machine.missing():
        pytest.skip(reason)
    if not shutil.which("make"):
        pytest.skip("needs make")
    usable = "import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))"
    if subprocess.run(["/usr/bin/python3", "-c", usable], capture_output=True).returncode != 0:
        pytest.skip("needs Python 3.11 or newer with venv in /usr/bin/python3")
    with systemd_machine.booted() as machine:
        shutil.copytree(SOURCE, machine.root / COPY[1:], ignore=NOT_SOURCE)
        yield machine


@pytest.fixture(scope="module")
def before_install(machine: Machine) -> set[str]:
    return installed_files(machine)


@pytest.fixture(scope="module")
def installed(machine: Machine, before_install: set[str]) -> Machine:
    make(machine, "install")
    imports = "import torch.fx.experimental.symbolic_shapes"  # keeps the bytecode of what the daemon imports
    machine.run("/opt/tensornext/bin/python", "-c", imports, timeout=INSTALL_TIMEOUT)
    return machine


@pytest.fixture
def restored(installed: Machine) -> Iterator[Machine]:
    """The machine with the service installed. A test may change its settings."""
    config = installed.root / CONFIG
    original = config.read_text()
    yield installed
    config.write_text(original)
    if (installed.root / DROP_IN).exists():
        (installed.root / DROP_IN).unlink()
        installed.run("systemctl", "daemon-reload")
    installed.run("systemctl", "reset-failed", "tensornext", check=False)  # the last test has removed it


@pytest.fixture
def service(restored: Machine) -> Machine:
    """The same with the service running, for most tests with the settings it was installed with."""
    restored.run("systemctl", "start", *UNITS)
    return restored


def test_it_runs_at_once_and_after_a_boot(service: Machine) -> None:
    for unit in UNITS:
        assert service.run("systemctl", "is-active", unit) == "active"
        assert service.run("systemctl", "is-enabled", unit) == "enabled"
    said = journal(service)
    assert re.search(rf"^tnxd \S+ ready on {TCP}, {IPC}; devices: .*; models: mlp", said, re.M)
    assert "is not kept" not in said  # the cache is the service's own


def test_it_is_active_only_when_it_is_ready_on_tcp_and_ipc(service: Machine) -> None:
    endpoints = (TCP, "ipc:///run/tensornext/tnxd")
    (service.root / CONFIG).write_text(f"bind = {list(endpoints)}\n")
    service.run("systemctl", "restart", "tensornext")
    invocation = f"_SYSTEMD_INVOCATION_ID={show(service, 'InvocationID')}"
    said = f" ready on {', '.join(endpoints)}, {IPC};"
    while said not in service.run("journalctl", "--output=cat", invocation):  # the journal takes its time
        assert show(service, "ActiveState") == "active"
    for endpoint in (*endpoints, IPC):
        service.run("tnxctl", "health", "--host", endpoint)


def test_nobody_notices_that_it_is_restarted(service: Machine) -> None:
    under_load(service, "--times", "2", timeout=3 * RESTARTS_TIMEOUT)


@pytest.mark.timeout(3600)
def test_nobody_notices_that_it_is_restarted_a_hundred_times(service: Machine) -> None:
    under_load(service, "--times", "100", timeout=100 * RESTARTS_TIMEOUT)


def test_without_the_socket_unit_a_restart_is_a_pause(service: Machine) -> None:
    service.run("systemctl", "disable", "--now", "tensornext.socket")
    try:
        service.run("systemctl", "restart", "tensornext")
        under_load(service, "--times", "1", "--host", TCP, timeout=2 * RESTARTS_TIMEOUT)
    finally:
        service.run("systemctl", "stop", "tensornext")
        service.run("systemctl", "enable", "--now", "tensornext.socket")


def test_who_connects_starts_it_unless_both_units_are_stopped(service: Machine) -> None:
    service.run("systemctl", "stop", "tensornext")
    service.run("tnxctl", "predict", "--timeout", "60")
    assert show(service, "ActiveState") == "active"
    service.run("systemctl", "stop", *UNITS)
    assert "nobody listens there" in service.run("tnxctl", "health", check=False)
    assert show(service, "ActiveState") == "inactive"


def test_systemd_finds_no_fault_in_the_units(service: Machine) -> None:
    assert service.run("systemd-analyze", "verify", "tensornext.service", "tensornext.socket") == ""


def test_it_is_not_root_and_sees_no_home(service: Machine) -> None:
    pid = show(service, "MainPID")
    process = service.root / "proc" / pid
    assert process.stat().st_uid != 0
    assert service.run("nsenter", f"--target={pid}", "--mount", "ls", "/root", "/home").split() == ["/home:", "/root:"]


def test_an_interpreter_that_the_service_cannot_see_is_refused(service: Machine) -> None:
    service.run("cp", "-L", "/usr/bin/python3", "/root/python3")
    output = make(service, "install", "PYTHON=/root/python3", check=False)
    assert "/root/python3 is /root/python3, and the service sees nothing in /root" in output
    assert show(service, "ActiveState") == "active"


def test_a_daemon_that_dies_or_hangs_is_replaced(service: Machine) -> None:
    assert (show(service, "RestartUSec"), show(service, "WatchdogUSec")) == ("2s", "30s")  # too long to wait for
    override(service, "RestartSec=100ms\nWatchdogSec=2s\nLimitCORE=0")
    for signal in ("KILL", "STOP"):
        before = show(service, "MainPID")
        service.run("kill", f"-{signal}", before)
        eventually(lambda before=before: restarted(service, before), "the service runs again")
        service.run("tnxctl", "health")
    assert "Watchdog timeout" in journal(service)


def test_it_keeps_to_the_cores_and_the_memory_that_its_unit_allows(service: Machine) -> None:
    controllers = (service.root / "sys/fs/cgroup/cgroup.controllers").read_text().split()
    if not {"cpu", "memory"} <= set(controllers):
        pytest.skip("this computer has the controllers cpu and memory in cgroup v1")
    override(service, "CPUQuota=100%\nMemoryMax=3G")
    service.run("systemctl", "restart", "tensornext")
    device = json.loads(service.run("tnxctl", "health", "--json"))["devices"][0]
    assert device["description"].startswith("1 core,")
    assert device["memory_total_mb"] == 3 * 1024
    assert 0 < device["memory_free_mb"] < 3 * 1024


def test_an_upgrade_restarts_the_service_and_keeps_the_configuration(service: Machine) -> None:
    before = show(service, "MainPID")
    with (service.root / COPY[1:] / "tnxd/__init__.py").open("a") as module:
        module.write("\n# newer, of the same version\n")
    with (service.root / CONFIG).open("a") as config:
        config.write("\n# mine\n")
    done = "/run/upgraded"
    with ThreadPoolExecutor() as pool:
        load = pool.submit(under_load, service, "--until", done, timeout=INSTALL_TIMEOUT)
        try:
            make(service, "install")
        finally:
            service.run("touch", done)
        load.result()
    assert restarted(service, before)
    assert (service.root / CONFIG).read_text().endswith("\n# mine\n")
    service.run("grep", "-r", "--include=__init__.py", "newer, of the same version", "/opt/tensornext/lib")


def test_it_stops_without_being_killed_and_stays_so_over_an_upgrade(service: Machine) -> None:
    service.run("systemctl", "stop", "tensornext")
    assert (show(service, "Result"), show(service, "ExecMainStatus")) == ("success", "0")
    make(service, "install")
    assert show(service, "ActiveState") == "inactive"


def test_a_reload_serves_what_is_new_and_tells_what_failed(service: Machine) -> None:
    models = service.root / "srv/models"
    put(models, "net", 1)
    (service.root / CONFIG).write_text('model_repository = "/srv/models"\n')
    service.run("systemctl", "restart", "tensornext")
    before = show(service, "MainPID")
    put(models, "net", 2)
    service.run("systemctl", "reload", "tensornext")
    assert "net version 2 (default): ready" in service.run("tnxctl", "metadata", "net")
    (models / "net" / "3").mkdir()
    refused = service.run("systemctl", "reload", "tensornext", check=False)
    assert "failed" in refused
    assert "net/3" in journal(service)
    assert "net version 2 (default): ready" in service.run("tnxctl", "metadata", "net")
    assert (show(service, "ActiveState"), show(service, "MainPID")) == ("active", before)


@pytest.fixture
def keys(service: Machine) -> Iterator[dict[str, pairs.Pair]]:
    """Pairs of the daemon and of alice, whose key may connect, in files of root's; the service asks for keys."""
    made = {name: pairs.new(name) for name in ("tnxd", "alice")}
    directory = service.root / "etc/tensornext"
    for name, pair in made.items():
        pairs.write(directory / f"{name}.key", pair)
    authorized = directory / "authorized_keys.toml"
    authorized.write_text(f'[keys.alice]\nkey = "{made["alice"].public}"\nrole = "predict"\n')
    (service.root / CONFIG).write_text(
        f'bind = ["{TCP}", "ipc:///run/tensornext/tnxd"]\n[keys]\nauthorized = "/etc/tensornext/authorized_keys.toml"\n'
    )
    yield made
    for path in (directory / "tnxd.key", directory / "alice.key", authorized):
        path.unlink(missing_ok=True)


def ask_with_key(machine: Machine, server: str, verb: str) -> str:
    """Answer that a client inside gets over tcp with alice's key: the role of whoami, say, or the name of an error."""
    program = (
        "import sys; from tnxctl import Client, TensorNextError\n"
        "with Client('127.0.0.1', key='/etc/tensornext/alice.key', server_key=sys.argv[1], timeout=60) as client:\n"
        "    try: print(getattr(client, sys.argv[2])())\n"
        "    except TensorNextError as error: print(error.code)\n"
    )
    return machine.run("/opt/tensornext/bin/python", "-c", program, server, verb)


def test_the_secret_of_the_daemon_comes_from_systemd(service: Machine, keys: dict[str, pairs.Pair]) -> None:
    """Its user cannot read the file. Root is admin on ipc, and what is revoked is cut off by `systemctl reload`."""
    service.run("systemctl", "restart", "tensornext", check=False)
    assert show(service, "ExecMainStatus") == "2"
    assert "LoadCredential=tnxd.key:PATH" in journal(service)
    override(
        service, "LoadCredential=tnxd.key:/etc/tensornext/tnxd.key\nEnvironment=TNX_HOST=ipc:///run/tensornext/tnxd"
    )
    service.run("systemctl", "restart", "tensornext")
    pid = show(service, "MainPID")
    user = str((service.root / "proc" / pid).stat().st_uid)
    refused = service.run(
        "setpriv", f"--reuid={user}", "--clear-groups", "cat", "/etc/tensornext/tnxd.key", check=False
    )
    assert "Permission denied" in refused
    assert json.loads(service.run("tnxctl", "whoami", "--host", IPC, "--json"))["role"] == "admin"
    assert "name='alice', by='key', role='predict'" in ask_with_key(service, keys["tnxd"].public, "whoami")
    assert ask_with_key(service, keys["tnxd"].public, "reload") == "PERMISSION_DENIED"
    (service.root / "etc/tensornext/authorized_keys.toml").write_text("")
    service.run("systemctl", "reload", "tensornext")
    assert ask_with_key(service, keys["tnxd"].public, "health") == "UNAUTHENTICATED"
    (service.root / "etc/tensornext/authorized_keys.toml").write_text("[keys.alice]\n")
    assert "failed" in service.run("systemctl", "reload", "tensornext", check=False)
    assert "authorized_keys.toml" in journal(service)
    assert show(service, "MainPID") == pid


def test_members_of_the_sockets_group_may_predict(service: Machine) -> None:
    """The service is in a user namespace of its own, where it sees these users as nobody."""
    path = service.root / IPC.removeprefix("ipc:///")
    users = grp.getgrnam("users").gr_gid
    os.chown(path, 0, users)  # as SocketGroup= does

    def whoami(*groups: str) -> str:
        tool = ("/usr/local/bin/tnxctl", "whoami", "--host", IPC, "--timeout", "5", "--json")
        return service.run("setpriv", "--reuid=4711", "--regid=4711", *groups, *tool, check=False)

    assert json.loads(whoami(f"--groups={users}"))["role"] == "predict"
    path.chmod(0o666)  # as a careless administrator might do
    assert '"UNAUTHENTICATED"' in whoami("--clear-groups")
    path.chmod(0o660)


SHARES = """
import sys
import numpy as np
from tnxctl import Client
with Client(sys.argv[1], shared_memory=True) as tnx:
    first = tnx.predict(np.ones((256, 256), np.float32), timeout=60).output
    tnx.health()
    second = tnx.predict(np.ones((256, 256), np.float32)).output
    print(tnx.shares_memory, np.array_equal(first, second))
"""


def test_it_shares_memory_with_root_and_with_members_of_the_sockets_group(service: Machine) -> None:
    """From within the sandbox of the unit, where all other users look like nobody."""
    (service.root / CONFIG).write_text("[clients]\nshared_memory_mb = 256\n")
    service.run("systemctl", "restart", "tensornext")
    path = service.root / IPC.removeprefix("ipc:///")
    users = grp.getgrnam("users").gr_gid
    os.chown(path, 0, users)
    ask = ("/opt/tensornext/bin/python", "-c", SHARES, IPC)
    for user in ((), ("setpriv", "--reuid=4711", "--regid=4711", f"--groups={users}")):
        assert service.run(*user, *ask, timeout=120).splitlines()[-1] == "True True"


def test_the_bridge_is_off_until_it_is_enabled_and_serves_then(service: Machine) -> None:
    unit = "tensornext-http"
    assert service.run("systemctl", "is-enabled", unit, check=False) == "disabled"
    service.run("systemctl", "restart", "tensornext")  # which may have had the settings of another test until now
    service.run("systemctl", "enable", "--now", unit)
    ask = ("curl", "--silent", "--show-error", "http://127.0.0.1:8000/health")
    eventually(lambda: '"status":"ready"' in service.run(*ask), "it serves")
    drop_in = service.root / f"run/systemd/system/{unit}.service.d/test.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text('[Service]\nEnvironment="OPTIONS=--workers 2 --tokens /etc/tensornext/tokens.toml"\n')
    token = service.run("tnxctl", "keys", "token", "alice", "--role", "observe").splitlines()[-1]
    try:
        service.run("systemctl", "daemon-reload")
        service.run("systemctl", "restart", unit)
        assert "a token is asked for here" in service.run(*ask)
        known = ("--header", f"Authorization: Bearer {token}")
        eventually(lambda: '"status":"ready"' in service.run(*ask, *known), "it serves who has a token")
        service.run("tnxctl", "keys", "untoken", "alice")
        service.run("systemctl", "reload", unit)
        eventually(lambda: "not known" in service.run(*ask, *known), "the token is not known any more")
        assert "MainPID=0" not in service.run("systemctl", "show", "--property", "MainPID", unit)
        service.run("systemctl", "stop", unit)
        assert "Result=success" in service.run("systemctl", "show", "--property", "Result", unit)
        (service.root / "etc/tensornext/tokens.toml").write_text("[tokens")
        assert service.run("systemctl", "start", unit, check=False)
        assert "tokens.toml: not TOML" in service.run("journalctl", "--output=cat", f"--unit={unit}")
        assert "NRestarts=0" in service.run("systemctl", "show", "--property", "NRestarts", unit)
    finally:
        (service.root / "etc/tensornext/tokens.toml").unlink()
        drop_in.unlink()
        service.run("systemctl", "daemon-reload")
        service.run("systemctl", "reset-failed", unit, check=False)


def test_a_wrong_configuration_is_named_and_not_tried_again(restored: Machine) -> None:
    with (restored.root / CONFIG).open("a") as config:
        config.write("\nlains = 3\n")
    restored.run("systemctl", "restart", "tensornext", check=False)
    assert show(restored, "ActiveState") == "failed"
    assert show(restored, "ExecMainStatus") == "2"
    assert "lains" in journal(restored)


def test_an_address_that_only_systemd_has_is_named_and_not_tried_again(restored: Machine) -> None:
    (restored.root / CONFIG).write_text('bind = ["tcp://127.0.0.1:7777"]\n')
    restored.run("systemctl", "start", "tensornext.socket")
    restored.run("systemctl", "restart", "tensornext", check=False)
    assert (show(restored, "ActiveState"), show(restored, "ExecMainStatus")) == ("failed", "2")
    assert f"systemd holds {TCP} for the daemon, and bind has tcp://127.0.0.1:7777" in journal(restored)


def test_the_removal_leaves_the_configuration_only(service: Machine, before_install: set[str]) -> None:
    make(service, "uninstall")
    assert installed_files(service) - before_install == {f"/{CONFIG}"}
    assert show(service, "LoadState") == "not-found"
    assert not (service.root / "run/tensornext.sock").exists()
