"""Known hosts: what a client shows to a daemon and expects of it, and where that is found."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fixed_pairs import fixed_pair
from tnxctl import Client
from tnxctl.keys import known_hosts, lookup, pairs, places
from tnxctl.protocol.errors import AlreadyExists, InvalidArgument, NotFound

ALICE, BOB, DAEMON, OTHER = map(fixed_pair, ("alice", "bob", "gpu-box", "gpu-box"), (1, 1, 1, 2))
BOX, OTHER_BOX = "tcp://gpu-box:5555", "tcp://gpu-box:6000"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    places.pair_file("alice").parent.mkdir(parents=True)
    pairs.write(places.pair_file("alice"), ALICE)


def trust(endpoint: str = BOX, daemon: pairs.Pair = DAEMON, pair: str = "alice", *, replace: bool = False) -> None:
    known_hosts.trust(places.known_hosts(), endpoint, pairs.server_line(daemon), pair, replace=replace)


def test_without_known_hosts_no_keys_are_used() -> None:
    assert lookup.find(BOX) is None


def test_a_host_is_known_by_its_endpoint_alone() -> None:
    trust()
    found = lookup.find(BOX)
    assert found is not None
    assert (found.name, found.public, found.secret) == ALICE
    assert found.server == DAEMON.public
    assert ALICE.secret not in repr(found)
    assert lookup.find(OTHER_BOX) is None
    assert stat.S_IMODE(places.known_hosts().stat().st_mode) == 0o644


def test_a_changed_key_of_a_host_is_refused_until_it_is_replaced() -> None:
    trust()
    trust()
    with pytest.raises(AlreadyExists, match=rf"another key is known for {BOX}, .*: if the daemon was given a new one"):
        trust(daemon=OTHER)
    assert known_hosts.read(places.known_hosts())[BOX].server_key == DAEMON.public
    trust(daemon=OTHER, replace=True)
    assert known_hosts.read(places.known_hosts())[BOX].server_key == OTHER.public


def test_what_people_wrote_stays() -> None:
    trust(OTHER_BOX)
    path = places.known_hosts()
    path.write_text(f"# mine\n{path.read_text()}# the old one\n")
    trust()
    trust(OTHER_BOX, OTHER, replace=True)
    known_hosts.forget(path, BOX)
    assert "# mine" in path.read_text()
    assert "# the old one" in path.read_text()
    assert known_hosts.read(path) == {OTHER_BOX: known_hosts.KnownHost(OTHER.public, "alice")}
    with pytest.raises(NotFound, match=f"{BOX} is not known; it has {OTHER_BOX}"):
        known_hosts.forget(path, BOX)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (DAEMON.public, DAEMON.public[:-1], r":4: server_key: a key has 40 characters"),
        ('pair = "alice"', "", r":3: .*\.pair: is missing$"),
        ('pair = "alice"', 'pair = "../alice"', r":5: pair: '\.\./alice' is not a name"),
        ("pair =", "pairs =", r":5: .*\.pairs: unknown key, did you mean pair\?$"),
    ],
)
def test_a_mistake_is_named_with_its_line(before: str, after: str, sentence: str) -> None:
    trust()
    path = places.known_hosts()
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(InvalidArgument, match=sentence) as found:
        Client(BOX)
    assert found.value.message.startswith(f"{path}:")


def test_files_that_others_could_change_or_read_are_refused() -> None:
    trust()
    places.known_hosts().chmod(0o664)
    with pytest.raises(InvalidArgument, match=r"known_hosts\.toml is writable by others"):
        Client(BOX)
    places.known_hosts().chmod(0o644)
    places.pair_file("alice").chmod(0o644)
    with pytest.raises(InvalidArgument, match=r"alice\.key can be read by others"):
        Client(BOX)
    places.pair_file("alice").unlink()
    with pytest.raises(InvalidArgument, match=r"alice\.key: No such file"):
        Client(BOX)


def test_a_program_gives_what_the_files_do_not_say(tmp_path: Path) -> None:
    path = tmp_path / "bob.key"
    pairs.write(path, BOB)
    found = lookup.find(BOX, str(path), pairs.server_line(OTHER))
    assert found is not None
    assert (found.public, found.server) == (BOB.public, OTHER.public)
    assert lookup.find(BOX, "alice", DAEMON.public).public == ALICE.public  # type: ignore[union-attr]
    with pytest.raises(InvalidArgument, match=f"server_key is missing: {BOX} is not among the known hosts"):
        lookup.find(BOX, path)
    with pytest.raises(InvalidArgument, match="key is missing"):
        lookup.find(BOX, server_key=DAEMON.public)
    trust()
    assert lookup.find(BOX, path).server == DAEMON.public  # type: ignore[union-attr]
    assert lookup.find(BOX, server_key=OTHER.public).public == ALICE.public  # type: ignore[union-attr]
    for wrong in ("short", pairs.client_line(ALICE), "#" * 40, f"tnx-server {DAEMON.public}"):
        with pytest.raises(InvalidArgument, match=r"^server_key"):
            lookup.find(BOX, path, wrong)


@pytest.mark.parametrize(
    ("platform", "environment", "directory"),
    [
        ("linux", {}, "/home/ann/.config/tensornext"),
        ("linux", {"XDG_CONFIG_HOME": "/etc/ann"}, "/etc/ann/tensornext"),
        ("linux", {"XDG_CONFIG_HOME": "here"}, "/home/ann/.config/tensornext"),
        ("darwin", {}, "/home/ann/Library/Application Support/tensornext"),
        ("darwin", {"XDG_CONFIG_HOME": "/etc/ann"}, "/etc/ann/tensornext"),
        ("win32", {"APPDATA": "/roaming"}, "/roaming/tensornext"),
        ("win32", {}, "/home/ann/AppData/Roaming/tensornext"),
    ],
)
def test_the_users_directory(
    monkeypatch: pytest.MonkeyPatch, platform: str, environment: dict[str, str], directory: str
) -> None:
    for name in ("XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/ann", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(places.sys, "platform", platform)
    assert str(places.user_directory()) == directory


@pytest.mark.parametrize("use", [places.only_pair, places.pair_names])
def test_the_only_pair(use: Callable[[], object]) -> None:
    assert use() in ("alice", ["alice"])
    pairs.write(places.pair_file("bob"), BOB)
    assert places.pair_names() == ["alice", "bob"]
    with pytest.raises(InvalidArgument, match=r"alice, bob\?$"):
        places.only_pair()
    for name in ("alice", "bob"):
        places.pair_file(name).unlink()
    with pytest.raises(NotFound, match="tnxctl keys new NAME makes one"):
        places.only_pair()
