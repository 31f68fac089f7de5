"""Keys as files: pairs, lines, and the list of whom a daemon lets in. Nothing half-written, nobody in by mistake."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from fixed_pairs import fixed_pair
from tnxctl.files import tomledit, writing
from tnxctl.keys import authorized, guards, lines, pairs
from tnxctl.protocol.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

ALICE, BOB = fixed_pair("alice"), fixed_pair("bob@laptop")

LISTED = f"""\
# Who may use the big machine.

[keys.alice]             # since March
key = "{ALICE.public}"
role = "predict"
# ask her before this grows
max_requests = 256
max_mb = 1.5
rate = 500
share = 2

# Bob is on leave.
[keys."bob@laptop"]
key = "{BOB.public}"
role = "admin"
"""


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    path = tmp_path / "authorized_keys.toml"
    path.write_text(LISTED)
    path.chmod(0o644)
    return path


# --- pairs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_a_secret_is_its_owners_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "alice.key"
    before = os.umask(umask)
    try:
        pairs.write(path, ALICE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["alice.key"]
    assert pairs.read(path) == ALICE


def test_a_secret_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "alice.key"
    pairs.write(path, ALICE)
    with pytest.raises(FileExistsError) as found:
        pairs.write(path, pairs.new("alice"))
    assert found.value.filename == str(path)
    assert pairs.read(path) == ALICE
    assert os.listdir(tmp_path) == ["alice.key"]


def test_a_secret_needs_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(writing.os, "link", refuse)
    path = tmp_path / "alice.key"
    pairs.write(path, ALICE)
    with pytest.raises(FileExistsError):
        pairs.write(path, pairs.new("alice"))
    assert pairs.read(path) == ALICE
    assert os.listdir(tmp_path) == ["alice.key"]


def test_a_library_without_curve_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs.write(tmp_path / "alice.key", ALICE)
    monkeypatch.setattr(zmq, "has", lambda capability: False)
    for use in (lambda: pairs.new("alice"), lambda: pairs.read(tmp_path / "alice.key")):
        with pytest.raises(FailedPrecondition, match="built without CURVE"):
            use()


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A limit of the size of files stands for the disk: the write fails after some of it, as there."""
    program = (
        "import resource, signal, sys; from pathlib import Path; from tnxctl.keys import pairs\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); pair = pairs.new('alice')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "try: pairs.write(Path(sys.argv[1]), pair)\n"
        "except OSError as error: print(error.strerror)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "alice.key")], capture_output=True, text=True, timeout=60
    )
    assert (ended.stdout, ended.stderr) == ("File too large\n", "")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "alice.key"
    pairs.write(path, ALICE)
    path.chmod(mode)
    with pytest.raises(
        InvalidArgument, match=rf"alice\.key can be read by others .*mode {mode:o}.*: chmod 600 .*alice"
    ):
        pairs.read(path)


def test_a_credential_of_systemd_may_show_its_acl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "server.key"
    pairs.write(path, ALICE)
    path.chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert pairs.read(path) == ALICE
    path.chmod(0o444)
    with pytest.raises(InvalidArgument, match="by others"):
        pairs.read(path)
    path.chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "elsewhere"))
    with pytest.raises(InvalidArgument, match="by others"):
        pairs.read(path)


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="needs root")
def test_a_file_of_somebody_else_is_refused(tmp_path: Path, listed: Path) -> None:
    path = tmp_path / "alice.key"
    pairs.write(path, ALICE)
    os.chown(path, 12345, -1)
    with pytest.raises(InvalidArgument, match=r"alice\.key belongs to user 12345"):
        pairs.read(path)
    os.chown(listed, 12345, -1)
    with pytest.raises(InvalidArgument, match=r"authorized_keys\.toml belongs to user 12345"):
        authorized.read(listed)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", r"expected one line, tnx-secret NAME KEY, and found nothing"),
        ("# only this\n", r"found nothing"),
        (f"tnx-secret a {ALICE.secret}\ntnx-secret b {BOB.secret}\n", r"found 2 lines"),
        (f"\ntnx-secret alice {ALICE.secret[:-1]}\n", r":2: a key has 40 characters of Z85, not 39$"),
        (f"tnx-secret alice {ALICE.secret}0", r":1: a key has 40 characters of Z85, not 41$"),
        (f"tnx-secret alice {ALICE.secret[:-1]}~", r":1: not a key: it has characters that Z85 does not have"),
        (f"tnx-secret alice {'#' * 40}", r":1: not a key: .*, or not in this order"),
        (f"tnx-secret al/ice {ALICE.secret}", r":1: 'al/ice' is not a name: a letter, then"),
        (
            f"tnx-client alice {ALICE.public}",
            r":1: expected the secret of a pair: .*, not the line that tnxctl keys new",
        ),
        ("tnx-secret alice", r":1: expected the secret of a pair"),
    ],
)
def test_a_secret_that_is_none_is_refused_by_its_line(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "alice.key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(InvalidArgument, match=sentence) as found:
        pairs.read(path)
    assert str(path) in found.value.message
    assert ALICE.secret[:-1] not in found.value.message


def test_a_pipe_is_no_secret(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "alice.key", 0o600)
    with pytest.raises(InvalidArgument, match="is a named pipe, not a file"):
        pairs.read(tmp_path / "alice.key")


def test_the_public_key_follows_from_the_secret() -> None:
    public, secret = zmq.curve_keypair()
    assert zmq.curve_public(secret) == public
    assert ALICE.secret not in repr(ALICE)


def test_a_line_of_another_kind_is_named() -> None:
    assert lines.parse(pairs.client_line(ALICE), lines.CLIENT, "line") == ("alice", ALICE.public)
    with pytest.raises(
        InvalidArgument, match=r"line: expected the line that tnxctl keys new prints: .*, not the line that"
    ):
        lines.parse(pairs.server_line(ALICE), lines.CLIENT, "line")
    with pytest.raises(InvalidArgument, match=r"with its key in one word$"):
        lines.parse("rubbish", lines.CLIENT, "line")


# --- whom a daemon lets in -----------------------------------------------------------------------------------


def test_the_list_is_by_the_bytes_of_the_keys(listed: Path) -> None:
    found = authorized.read(listed)
    assert [(each.name, each.role) for each in found.values()] == [("alice", "predict"), ("bob@laptop", "admin")]
    alice, bob = found.values()
    assert (alice.max_requests, alice.max_bytes, alice.rate, alice.share) == (256, 1_572_864, 500.0, 2.0)
    assert (bob.max_requests, bob.max_bytes, bob.rate, bob.share) == (None, None, None, 1.0)
    assert [lines.decode(each.key, "") for each in found.values()] == list(found)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (
            'role = "predict"',
            'role = "root"',
            r":5: keys\.alice\.role: expected one of admin, observe, predict, not 'root'$",
        ),
        ('role = "predict"\n', "", r":3: keys\.alice\.role: is missing$"),
        ("max_requests", "max_request", r":7: keys\.alice\.max_request: unknown key, did you mean max_requests\?$"),
        ("max_requests = 256", "max_requests = 0", r":7: keys\.alice\.max_requests: .*, not 0$"),
        ("rate = 500", 'rate = "500"', r":9: keys\.alice\.rate: .*, not '500'$"),
        (ALICE.public, ALICE.public[1:], r":4: keys\.alice\.key: a key has 40 characters of Z85, not 39$"),
        (ALICE.public, "#" * 40, r":4: keys\.alice\.key: not a key"),
        (BOB.public, ALICE.public, r":14: bob@laptop has the key of alice: one key, one name$"),
        ('[keys."bob@laptop"]', "[keys.alice]", r": not TOML: Cannot declare .*alice.* twice \(at line 13"),
        ('[keys."bob@laptop"]', "[keys.10-0-0-1]", r":13: keys: '10-0-0-1' is not a name"),
        ('[keys."bob@laptop"]', "[key.bob]", r":13: key: unknown key, did you mean keys\?$"),
        ("share = 2", "share = 2 2", r": not TOML: .*at line 10"),
    ],
)
def test_one_mistake_lets_nobody_in_and_is_named_with_its_line(
    listed: Path, before: str, after: str, sentence: str
) -> None:
    assert before in LISTED
    listed.write_text(LISTED.replace(before, after))
    with pytest.raises(InvalidArgument, match=sentence) as found:
        authorized.read(listed)
    assert found.value.message.startswith(f"{listed}:")


def test_ten_thousand_keys_are_no_burden() -> None:
    """Lines are looked for where there is a mistake, and not for each key."""
    tables = [
        f'[keys.client{number}]\nkey = "{z85.encode(number.to_bytes(32)).decode()}"\nrole = "predict"\n'
        for number in range(10_000)
    ]
    assert len(authorized.parse("\n".join(tables), "file")) == 10_000


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_list_that_others_could_change_is_refused(listed: Path, mode: int) -> None:
    listed.chmod(mode)
    with pytest.raises(InvalidArgument, match=r"writable by others than its owner .*: chmod go-w"):
        authorized.read(listed)
    listed.chmod(0o644)
    listed.parent.chmod(0o777)
    with pytest.raises(InvalidArgument, match=rf"{listed.parent} is writable by others"):
        authorized.read(listed)
    listed.parent.chmod(0o1777)
    assert authorized.read(listed)


def test_a_list_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"authorized_keys\.toml: No such file"):
        authorized.read(tmp_path / "authorized_keys.toml")


def test_allowing_and_revoking_keep_what_people_wrote(listed: Path) -> None:
    carol = pairs.new("carol")
    authorized.allow(listed, pairs.client_line(carol), "observe")
    assert listed.read_text() == f'{LISTED}\n[keys.carol]\nkey = "{carol.public}"\nrole = "observe"\n'
    assert authorized.revoke(listed, "alice").key == ALICE.public
    text = listed.read_text()
    for comment in ("# Who may use the big machine.", "# ask her before this grows", "# Bob is on leave."):
        assert comment in text
    assert [each.name for each in authorized.read(listed).values()] == ["bob@laptop", "carol"]
    authorized.revoke(listed, "bob@laptop")
    authorized.revoke(listed, "carol")
    assert authorized.read(listed) == {}
    assert os.listdir(listed.parent) == [listed.name]


def test_a_list_is_made_where_there_is_none(tmp_path: Path) -> None:
    path = tmp_path / "authorized_keys.toml"
    assert authorized.allow(path, pairs.client_line(ALICE), "predict").name == "alice"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [each.name for each in authorized.read(path).values()] == ["alice"]


def test_nobody_is_let_in_twice(listed: Path) -> None:
    for line, sentence in (
        (pairs.client_line(ALICE), "alice is let in already, with the role predict"),
        (pairs.client_line(ALICE._replace(name="eve")), "this is the key of alice"),
        (pairs.client_line(fixed_pair("alice", 2)), "alice has another key there: tnxctl keys revoke alice first"),
    ):
        with pytest.raises(AlreadyExists, match=sentence):
            authorized.allow(listed, line, "admin")
    with pytest.raises(NotFound, match=r"lets no 'eve' in; it has alice, bob@laptop"):
        authorized.revoke(listed, "eve")
    authorized.allow(listed, pairs.client_line(ALICE), "predict")
    assert listed.read_text() == LISTED


@pytest.mark.parametrize(
    "text",
    [
        f'keys = {{ alice = {{ key = "{ALICE.public}", role = "admin" }} }}\n',
        f'[keys]\nalice.key = "{ALICE.public}"\nalice.role = "admin"\n',
        f'[keys]\nalice = {{ key = "{ALICE.public}", role = "admin" }}\n',
    ],
)
def test_a_list_in_another_style_is_read_but_not_spoilt(listed: Path, text: str) -> None:
    listed.write_text(text)
    assert [each.role for each in authorized.read(listed).values()] == ["admin"]
    with pytest.raises(FailedPrecondition, match=r"are not headed \[keys\.NAME\]: change it by hand"):
        authorized.revoke(listed, "alice")
    assert listed.read_text() == text


def test_a_mistake_is_not_built_upon(listed: Path) -> None:
    listed.write_text(LISTED.replace('"predict"', '"root"'))
    with pytest.raises(InvalidArgument, match="root"):
        authorized.allow(listed, pairs.client_line(pairs.new("carol")), "observe")
    assert "carol" not in listed.read_text()


def test_a_full_disk_leaves_the_list_as_it_was(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        authorized.revoke(listed, "alice")
    assert listed.read_text() == LISTED
    assert os.listdir(listed.parent) == [listed.name]


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "authorized_keys.toml"
    names = [f"client{number}" for number in range(12)]
    threads = [
        threading.Thread(target=authorized.allow, args=(path, pairs.client_line(pairs.new(name)), "predict"))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(each.name for each in authorized.read(path).values()) == sorted(names)


def test_a_list_behind_a_link_stays_behind_it(listed: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.toml"
    link.symlink_to(listed.name)
    authorized.revoke(link, "alice")
    assert link.is_symlink()
    assert len(authorized.read(listed)) == 1


# --- edits of TOML -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_tables_go_and_the_rest_stays(ending: str) -> None:
    text = f'a = 1\n[x."y z"] # one\r\nb = 2\n# three\n[[x.list]]\nc = [\n  "[x]",\n]\n[ x . "w" ]\nd = 4{ending}'
    assert tomledit.remove_table(text, ("x", "y z")) == text.replace('[x."y z"] # one\r\nb = 2\n', "")
    assert tomledit.line_of(text, ("x", "w", "d")) == 10
    assert tomledit.line_of(text, ("x", "w", "gone")) == 9
    assert tomledit.line_of(text, ("nothing",)) == 0


def test_a_table_is_added_on_lines_of_its_own() -> None:
    assert tomledit.append_table("", ("a", "b.c"), {"n": 1, "s": 'x"\\'}) == '[a."b.c"]\nn = 1\ns = "x\\"\\\\"\n'
    assert tomledit.append_table("a = 1", ("b",), {}) == "a = 1\n\n[b]\n"


@pytest.mark.parametrize("check", [guards.read_secret, guards.read_list])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, check: Callable[[Path], str]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xff\xfe")
    path.chmod(0o600)
    with pytest.raises(InvalidArgument, match="not UTF-8"):
        check(path)
