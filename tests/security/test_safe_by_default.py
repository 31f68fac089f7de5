"""Safe by default: without keys nobody on another host gets in, unless that is said to be meant."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from keyed import listed
from tnxctl.keys import pairs
from tnxctl.protocol.errors import InvalidArgument
from tnxd import keys
from tnxd.config import CREDENTIAL, Config, load

WAYS_OUT = ("tnxctl keys server", "tnxctl keys new NAME", "insecure = true")


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://0.0.0.0:5555",
        "tcp://*:5555",
        "tcp://192.0.2.7:5555",
        "tcp://[::]:5555",
        "tcp://[2001:db8::1]:5555",
        "tcp://[::ffff:192.0.2.7]:5555",
        "tcp://eth0:5555",
        "192.0.2.7:5555",
    ],
)
def test_an_address_that_others_reach_needs_keys_or_a_word(endpoint: str) -> None:
    config = load(None, {"bind": ["tcp://127.0.0.1:5555", endpoint]})
    with pytest.raises(InvalidArgument) as caught:
        keys.check_exposure(config, config.bind)
    for words in (*WAYS_OUT, endpoint):
        assert words in caught.value.message
    for meant in ({"insecure": True}, {"keys": {"authorized": "/etc/tensornext/authorized_keys.toml"}}):
        keys.check_exposure(load(None, {"bind": [endpoint], **meant}), [endpoint])


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://127.0.0.1:5555", "tcp://127.8.8.8:1", "tcp://[::1]:5555", "tcp://[::ffff:127.0.0.1]:1", "ipc:///run/x"],
)
def test_loopback_and_ipc_need_nothing(endpoint: str) -> None:
    config = load(None, {"bind": [endpoint]})
    keys.check_exposure(config, config.bind)
    assert keys.load(config) == (None, "")
    assert not [*keys.warnings(load(None, {"bind": [endpoint], "insecure": True}), config.bind)]


def tnxd(*arguments: object, **variables: str) -> tuple[int, str]:
    """Exit code and stderr of a daemon that does not start."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TNXD_")}
    done = subprocess.run(
        [sys.executable, "-m", "tnxd", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment | variables,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("more", [(), ("--check",)])
def test_a_start_without_keys_is_refused_in_one_sentence(more: tuple[str, ...]) -> None:
    code, said = tnxd("--bind", "0.0.0.0:5555", *more)
    assert code == 2
    assert said.startswith("tnxd: bind: tcp://0.0.0.0:5555 can be reached from other hosts")
    assert said.count("\n") == 1
    for words in WAYS_OUT:
        assert words in said


def test_the_word_may_be_a_flag_or_a_variable() -> None:
    """Warning that such a daemon gives at its start: `tests/faults/test_fault_strangers.py`."""
    for arguments, variables in ((["--insecure"], {}), ([], {"TNXD_INSECURE": "1"})):
        assert tnxd("--bind", "0.0.0.0:5555", "--check", *arguments, **variables) == (0, "")


# --- keys that are not as they should be -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Directory with a pair of the daemon, and a list of one key."""
    pairs.write(tmp_path / "tnxd.key", pairs.new("daemon"))
    (tmp_path / "authorized_keys.toml").write_text(listed({"alice": pairs.new("alice")}, {"alice": "predict"}))
    return tmp_path


def configured(folder: Path, **changes: str) -> Config:
    settings = {"authorized": str(folder / "authorized_keys.toml"), "secret": str(folder / "tnxd.key"), **changes}
    return load(None, {"bind": ["tcp://0.0.0.0:5555"], "keys": settings})


def test_keys_are_read_at_the_start(folder: Path) -> None:
    ring, secret = keys.load(configured(folder))
    assert ring is not None
    assert [entry.name for entry in ring.by_key.values()] == ["alice"]
    assert secret == pairs.read(folder / "tnxd.key").secret


def test_the_secret_may_be_a_credential_of_systemd(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "credentials").mkdir()
    (folder / "tnxd.key").rename(folder / "credentials" / CREDENTIAL)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder / "credentials"))
    assert keys.load(configured(folder, secret=""))[1]


@pytest.mark.parametrize(
    ("damage", "changes", "said"),
    [
        (lambda folder: None, {"secret": ""}, "keys.secret: is missing: `tnxctl keys server`"),
        (lambda folder: None, {"authorized": ""}, "keys.secret is of no use without keys.authorized"),
        (lambda folder: (folder / "tnxd.key").unlink(), {}, "tnxd.key: No such file"),
        (lambda folder: (folder / "tnxd.key").chmod(0o640), {}, "tnxd.key can be read by others"),
        (lambda folder: (folder / "tnxd.key").write_text("nonsense"), {}, "tnxd.key"),
        (lambda folder: (folder / "authorized_keys.toml").unlink(), {}, "authorized_keys.toml: No such file"),
        (lambda folder: (folder / "authorized_keys.toml").chmod(0o666), {}, "writable by others"),
        (lambda folder: (folder / "authorized_keys.toml").write_text("[keys.a]\n"), {}, "authorized_keys.toml"),
    ],
)
def test_a_start_with_bad_keys_is_refused(
    folder: Path, damage: Callable[[Path], None], changes: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    damage(folder)
    with pytest.raises(InvalidArgument) as caught:
        keys.load(configured(folder, **changes))
    assert said in caught.value.message


def test_a_start_with_bad_keys_ends_with_2_and_a_sentence(folder: Path) -> None:
    (folder / "authorized_keys.toml").write_text('[keys.alice]\nkey = "short"\nrole = "predict"\n')
    (folder / "tnxd.toml").write_text(
        f'[keys]\nauthorized = "{folder}/authorized_keys.toml"\nsecret = "{folder}/tnxd.key"\n'
    )
    code, said = tnxd("--config", folder / "tnxd.toml")
    assert code == 2
    assert said.startswith(f"tnxd: {folder}/authorized_keys.toml:2: ")
    assert said.count("\n") == 1
