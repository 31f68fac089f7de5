"""`tnxctl keys`, from the first pair to a key that is gone again."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import get_args

import pytest

from tnxctl.cli import keys as command
from tnxctl.cli.exits import Exit
from tnxctl.keys import authorized, known_hosts, pairs, places, tokens
from tnxctl.protocol.roles import Role
from tool import fields, run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "tensornext"


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    return tmp_path / "etc" / "tensornext"


def test_what_the_help_needs_is_as_it_is_elsewhere() -> None:
    assert command.ROLES == get_args(authorized.Role) == tuple(role.title for role in Role)
    assert Path(command.SERVICE_DIRECTORY) == places.SERVICE_DIRECTORY


def test_from_a_new_pair_to_a_trusted_host(home: Path, etc: Path) -> None:
    made = run("keys", "new", "alice")
    assert made.exit_code == Exit.OK
    assert stat.S_IMODE((home / "keys").stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "keys" / "alice.key").stat().st_mode) == 0o600
    line = made.stdout.removesuffix("\n")
    assert line == pairs.client_line(pairs.read(home / "keys" / "alice.key"))
    assert f"tnxctl keys allow '{line}'" in made.stderr

    allowed = run("keys", "allow", line, "--role", "admin", "--directory", etc)
    assert allowed.stdout == f"alice has the role admin, by {etc}/authorized_keys.toml\n"
    (alice,) = authorized.read(etc / "authorized_keys.toml").values()
    assert (alice.name, alice.role) == ("alice", "admin")

    shown = run("keys", "server", "--directory", etc)
    again = run("keys", "server", "--directory", etc)
    assert shown.stdout == again.stdout == pairs.server_line(pairs.read(etc / "tnxd.key")) + "\n"
    assert "A new pair is in" in shown.stderr
    assert "A new pair" not in again.stderr

    trusted = run("keys", "trust", "gpu-box", "-", stdin=shown.stdout.encode())
    assert trusted.exit_code == Exit.OK
    (host,) = known_hosts.read(home / "known_hosts.toml").items()
    assert host == ("tcp://gpu-box:5555", (pairs.read(etc / "tnxd.key").public, "alice"))

    listed = run("keys", "list", "--directory", etc)
    for word in ("alice", alice.key, "tcp://gpu-box:5555", host[1].server_key, "admin"):
        assert word in listed.stdout
    assert pairs.read(home / "keys" / "alice.key").secret not in listed.stdout
    document = fields(run("keys", "list", "--directory", etc, "--json"))
    assert {name: len(rows) for name, rows in document.items()} == {
        "pairs": 1,
        "known_hosts": 1,
        "authorized": 1,
        "tokens": 0,
    }
    assert pairs.read(home / "keys" / "alice.key").secret not in str(document)

    assert run("keys", "revoke", "alice", "--directory", etc).exit_code == Exit.OK
    assert authorized.read(etc / "authorized_keys.toml") == {}
    assert run("keys", "forget", "gpu-box").exit_code == Exit.OK
    assert known_hosts.read(home / "known_hosts.toml") == {}


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("new", "al/ice"), Exit.REFUSED, "'al/ice' is not a name"),
        (("new", "alice"), Exit.FILE, "alice.key is there already, and a secret is never replaced"),
        (("allow", "tnx-client", "alice"), Exit.REFUSED, "expected the line that tnxctl keys new prints"),
        (("allow", "tnx-client bob short"), Exit.REFUSED, "a key has 40 characters of Z85, not 5"),
        (("allow", "line", "--role", "root"), Exit.USAGE, "'root' is not one of"),
        (("revoke", "eve"), Exit.REFUSED, "there is no such file"),
        (("trust", "gpu-box", "line", "--pair", "eve"), Exit.REFUSED, "eve.key: No such file"),
        (("trust", "gpu box", "line"), Exit.REFUSED, "'gpu box' is not a host name"),
        (("forget", "gpu-box"), Exit.REFUSED, "tcp://gpu-box:5555 is not known; it has none"),
    ],
)
def test_mistakes_are_sentences(etc: Path, arguments: tuple[str, ...], code: Exit, sentence: str) -> None:
    run("keys", "new", "alice")
    where = ("--directory", etc) if arguments[0] in ("allow", "revoke") else ()
    done = run("keys", *arguments, *where)
    assert done.exit_code == code
    assert sentence in done.stderr
    assert done.stdout == ""


def test_tokens_of_the_bridge(etc: Path) -> None:
    made = fields(run("keys", "token", "alice", "--role", "admin", "--directory", etc, "--json"))
    printed = run("keys", "token", "bob", "--directory", etc)
    assert "bob has the role predict at tnxctl bridge --tokens" in printed.stderr
    found = tokens.read(etc / "tokens.toml")
    for token, name, role in ((made["token"], "alice", "admin"), (printed.stdout.strip(), "bob", "predict")):
        assert found[tokens.digest(token)][::2] == (name, role)
        assert token not in (etc / "tokens.toml").read_text()
        assert len(token) > 40
    listed = run("keys", "list", "--directory", etc)
    assert "alice" in listed.stdout
    assert made["token"] not in listed.stdout

    again = run("keys", "token", "alice", "--directory", etc)
    assert again.exit_code == Exit.REFUSED
    assert "tnxctl keys untoken alice first" in again.stderr
    assert run("keys", "untoken", "eve", "--directory", etc).exit_code == Exit.REFUSED
    gone = run("keys", "untoken", "alice", "--directory", etc)
    assert gone.stdout == f"alice is gone from {etc}/tokens.toml\n"
    assert [each.name for each in tokens.read(etc / "tokens.toml").values()] == ["bob"]


def test_a_changed_key_of_a_host_needs_a_word(etc: Path) -> None:
    run("keys", "new", "alice")
    old, new = (pairs.server_line(pairs.new("gpu-box")) for _ in range(2))
    run("keys", "trust", "gpu-box", old)
    done = run("keys", "trust", "gpu-box", new)
    assert done.exit_code == Exit.REFUSED
    assert "--replace takes its place; if not, somebody else answers there" in done.stderr
    assert run("keys", "trust", "gpu-box", new, "--replace").exit_code == Exit.OK


def test_a_list_goes_on_after_a_mistake(home: Path, etc: Path) -> None:
    for name in ("alice", "bob"):
        run("keys", "new", name)
    (home / "keys" / "alice.key").chmod(0o644)
    done = run("keys", "list", "--directory", etc)
    assert done.exit_code == Exit.REFUSED
    assert "bob" in done.stdout
    assert "alice.key can be read by others" in done.stderr


def test_nothing_to_list(etc: Path) -> None:
    assert run("keys", "list", "--directory", etc).stdout == "There are no keys.\n"


def test_a_directory_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("")
    done = run("keys", "server", "--directory", tmp_path / "etc" / "tensornext")
    assert done.exit_code == Exit.FILE
    assert f"cannot write {tmp_path}/etc/tensornext/tnxd.key: " in done.stderr


@pytest.mark.parametrize("arguments", [("new", "carol"), ("server",), ("list",)])
def test_json_is_one_document(etc: Path, arguments: tuple[str, ...]) -> None:
    where = ("--directory", etc) if arguments[0] != "new" else ()
    done = run("keys", *arguments, *where, "--json")
    assert fields(done)
    assert done.stderr == ""
    assert os.linesep not in fields(done).get("line", "")
