"""A model repository behind a real daemon: signals, verbs, splits, shadows, eviction, settings of its models."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Daemon
from dealer import Dealer
from model_repositories import HANGS_AT_7, ONE_ROW, SAYS, put, says
from tnxctl import Client
from tnxctl.protocol.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
    PermissionDenied,
)
from tnxctl.protocol.wire import Reload, encode

RunDaemon = Callable[..., Daemon]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model repository with one model, `net`, in version 1."""
    folder = tmp_path / "models"
    put(folder, "net", 1)
    return folder


def test_versions_come_and_go(run_daemon: RunDaemon, root: Path) -> None:
    daemon = run_daemon("--model-repository", str(root))
    with Client(daemon.endpoint, timeout=60) as client:
        assert says(client) == says(client, "") == says(client, "net@1") == 1
        put(root, "net", 2)
        report = client.reload()
        assert (report.loaded, report.unloaded, report.failed) == (("net@2",), ("net@1",), {})
        assert says(client) == says(client, "net@2") == 2
        with pytest.raises(FailedPrecondition, match="'net@1' is unloaded"):
            says(client, "net@1")
        with pytest.raises(NotFound, match="no version '7'; there are 1, 2"):
            says(client, "net@7")
        infos = {f"{info.name}@{info.version}": info for info in client.load("net@1")}
        assert {title: (info.status, info.traffic) for title, info in infos.items()} == {
            "net@1": ("ready", 0.0),
            "net@2": ("ready", 1.0),
        }
        client.route("net", {"1": 50, "2": 50})
        split = {says(client, route_key=str(number)) for number in range(40)}
        assert split == {1, 2}
        assert len({says(client, route_key="someone") for _ in range(10)}) == 1
        client.unload("net@2")
        assert {says(client, route_key=str(number)) for number in range(40)} == {1}
        client.unload("net")
        with pytest.raises(FailedPrecondition, match="unloaded"):
            says(client)
        assert client.health().status == "ready"


def test_a_repository_may_be_empty_at_first(run_daemon: RunDaemon, root: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    daemon = run_daemon("--model-repository", str(empty))
    with Client(daemon.endpoint, timeout=60) as client:
        assert client.health().status == "ready"
        assert client.models() == ()
        with pytest.raises(NotFound, match="publish one in the model repository, then tnxctl reload"):
            says(client, "")
        put(empty, "net", 1, more="warm_up = []")
        assert client.reload().loaded == ("net@1",)
        assert says(client, "") == 1
    assert daemon.stop() == 0
    assert f"{empty} has no model yet: publish one, then tnxctl reload" in daemon.log.read_text()


def test_sighup_without_a_repository_is_told_to_change_nothing(run_daemon: RunDaemon) -> None:
    daemon = run_daemon("--model", "digits")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.logged("SIGHUP changes nothing: there is no model repository")
    assert daemon.stop() == 0


def test_sighup_looks_again_and_tells_systemd(run_daemon: RunDaemon, root: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(60)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        daemon = run_daemon("--model-repository", str(root), environment=environment)

        def until(state: str) -> None:
            while state not in told.recv(4096).decode().splitlines():
                pass

        until("READY=1")
        put(root, "net", 2)
        (root / "broken").mkdir()
        daemon.process.send_signal(signal.SIGHUP)
        until("RELOADING=1")
        until("READY=1")
    with Client(daemon.endpoint, timeout=60) as client:
        assert says(client) == 2
        failed = [info for info in client.models() if info.status == "failed"]
        assert [info.name for info in failed] == ["broken"]
    daemon.logged("broken cannot be served")


def test_names_and_texts_that_are_no_utf8_and_files_that_choke_a_parser(run_daemon: RunDaemon, root: Path) -> None:
    os.mkdir(os.fsencode(root) + b"/caf\xe9")
    put(root, "loud", 1)
    (root / "loud" / "1" / "says.py").write_text("def make(): raise ValueError('\\udce9')\n")
    for name, text in (("deep", "a = " + "[" * 5000), ("long", "a = " + "9" * 5000)):
        put(root, name, 1)
        (root / name / "model.toml").write_text(text)
    daemon = run_daemon("--model-repository", str(root))
    with Client(daemon.endpoint, timeout=60) as client:
        failed = {info.name: info.error for info in client.health().models if info.status == "failed"}
        assert failed.keys() >= {"caf?", "loud", "deep", "long"}
        assert "not TOML" in failed["deep"]
        assert "not TOML" in failed["long"]
        with pytest.raises(FailedPrecondition, match="ValueError"):
            client.load("loud@1")
        assert client.reload().failed.keys() >= {"deep", "long"}
        assert says(client) == 1


def test_two_models_of_one_name(run_daemon: RunDaemon, root: Path) -> None:
    put(root, "digits", 1)
    daemon = run_daemon("--model-repository", str(root), "--model", "digits")
    with Client(daemon.endpoint, timeout=60) as client:
        errors = [info.error for info in client.models() if info.status == "failed"]
        assert errors == ["two models are called 'digits': the built-in one is served"]
        assert client.metadata("digits").format == "built-in"
        assert says(client) == 1


def test_admin_commands_are_refused_without_remote_control(run_daemon: RunDaemon, root: Path, tmp_path: Path) -> None:
    config = tmp_path / "tnxd.toml"
    config.write_text(f'model_repository = "{root}"\nremote_control = "off"\n')
    daemon = run_daemon("--config", str(config))
    with Client(daemon.endpoint, timeout=60) as client:
        for command in (
            client.reload,
            lambda: client.load("net"),
            lambda: client.unload("net"),
            lambda: client.route("net", {"1": 1}),
        ):
            with pytest.raises(PermissionDenied, match="remote_control"):
                command()
        assert says(client) == 1
        assert len(client.models()) == 1


def test_admin_commands_are_answered_when_the_daemon_stops(run_daemon: RunDaemon, root: Path) -> None:
    daemon = run_daemon("--model-repository", str(root))
    fifo = root / "fifo"
    os.mkfifo(fifo)
    put(root, "slow", 1, before="pass")
    (root / "slow" / "1" / "says.py").write_text(f"open({str(fifo)!r}).read()\n" + SAYS.format(before="pass"))
    with Dealer(daemon.endpoint) as dealer:
        for number in range(17):
            dealer.socket.send(encode(Reload(v=1, id=number)))
        with open(fifo, "wb"):  # opens as soon as the load is under way
            error = dealer.error()
            assert (error.id, error.code) == (16, "RESOURCE_EXHAUSTED")
            daemon.process.send_signal(signal.SIGTERM)
            errors = [dealer.error() for _ in range(16)]
    assert [(error.id, error.code) for error in errors] == [(number, "UNAVAILABLE") for number in range(16)]
    assert daemon.process.wait(60) == 0


@pytest.mark.slow
def test_what_is_evicted_comes_back_when_it_is_asked_for(run_daemon: RunDaemon, tmp_path: Path) -> None:
    root = tmp_path / "models"
    for name in ("a", "b"):
        put(root, name, 1, answer={"a": 1, "b": 2}[name])
        with (root / name / "1" / "says.py").open("a") as code:
            code.write(
                "\nclass Heavy(Says):\n    def __init__(self):\n        super().__init__()\n"
                "        self.register_buffer('weight', torch.ones(6 * 2**18), persistent=False)\nmake = Heavy\n"
            )
    config = tmp_path / "tnxd.toml"
    config.write_text(f'model_repository = "{root}"\n[memory]\ncpu_mb = 10\n')
    daemon = run_daemon("--config", str(config))
    with Client(daemon.endpoint, timeout=60) as client:
        for name, answer in [("a", 1), ("b", 2), ("a", 1), ("b", 2)]:
            assert says(client, name) == answer
            assert {info.name: info.status for info in client.models()} == {
                name: "ready",
                "ab".replace(name, ""): "evicted",
            }
        # Both are loaded at the start, where a makes room for b. What is refused while one leaves is counted, too.
        models = {model.name: model for model in client.stats().models}
        assert {name: (model.replies, model.evictions) for name, model in models.items()} == {"a": (2, 3), "b": (2, 2)}
        assert all(model.requests == 2 + model.errors["UNAVAILABLE"] for model in models.values())


def test_a_shadow_is_compared_and_answers_nobody(run_daemon: RunDaemon, root: Path) -> None:
    put(root, "net", 2, answer=1.5)
    daemon = run_daemon("--model-repository", str(root))
    with Client(daemon.endpoint, timeout=60) as client:
        for versions in (("1", "2"), ("2", "1")):
            with pytest.raises(FailedPrecondition, match="version 1 of 'net' is not loaded"):
                client.compare("net", *versions)
        client.load("net@1")
        client.route("net", {"1": 1}, shadow="2")
        with pytest.raises(FailedPrecondition, match="nothing to compare"):
            client.compare("net", "2", "1")
        while True:  # copies run when there is time
            assert says(client) == 1
            try:
                report = client.compare("net", "1", "2")
            except FailedPrecondition:
                continue
            if report.requests:
                break
        assert report.outputs[0].max_abs == 0.5
        assert report.errors == 0
        client.unload("net@2")
        assert says(client) == 1


def test_settings_of_a_model_hold_for_its_requests(run_daemon: RunDaemon, tmp_path: Path) -> None:
    root = tmp_path / "models"
    put(root, "urgent", 1, more="deadline_us = 0.001\npriority = 0")
    put(
        root,
        "stuck",
        1,
        before=HANGS_AT_7,
        more="time_limit_s = 1.0",
    )
    config = tmp_path / "tnxd.toml"
    config.write_text(f'model_repository = "{root}"\n[cpu]\nworkers = 2\ninline_limit_us = 0\n')
    daemon = run_daemon("--config", str(config))
    with Client(daemon.endpoint, timeout=60) as client:
        with pytest.raises(DeadlineExceeded):
            says(client, "urgent")
        assert says(client, "urgent", deadline=60.0) == 1
        with pytest.raises(Internal, match=r"'stuck@1' ran for over 1 s"):
            client.predict(ONE_ROW + 7, model="stuck")
        while True:
            try:
                assert says(client, "stuck") == 1
                break
            except Internal as error:  # the machine has held it up for as long
                assert "ran for over 1 s" in error.message  # noqa: PT017


def test_a_repository_that_is_none(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tnxd", "--bind", "tcp://127.0.0.1:*", "--model-repository", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert str(tmp_path / "nowhere") in ended.stderr
