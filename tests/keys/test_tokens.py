"""The file with bearer tokens: taken whole or not at all, mistakes named with their line."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tnxctl.keys import tokens
from tnxctl.protocol.errors import AlreadyExists, InvalidArgument, NotFound

HASH = "ab" * 32

LISTED = f"""\
# Of the dashboards.
[tokens.alice]
sha256 = "{HASH}"
role = "observe"  # no more
"""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[tokens.alice", "not TOML"),
        ("[token.alice]\n", "file:1: token: unknown key, did you mean tokens?"),
        (f'[tokens.alice]\nsha256 = "{HASH}"\n', "file:1: tokens.alice.role: is missing"),
        ('[tokens.alice]\nrole = "observe"\n', "file:1: tokens.alice.sha256: is missing"),
        (
            f'[tokens.alice]\nsha256 = "{HASH}"\nrole = "root"\n',
            "file:3: tokens.alice.role: expected one of admin, observe, predict, not 'root'",
        ),
        ('[tokens.alice]\nsha256 = "abc"\nrole = "observe"\n', "file:2: tokens.alice.sha256: expected 64 digits"),
        (f'[tokens."a b"]\nsha256 = "{HASH}"\nrole = "observe"\n', "file:1: tokens: 'a b' is not a name"),
        (f'[tokens.alice]\nsha256 = "{HASH}"\nrole = "observe"\nrate = 1\n', "file:4: tokens.alice.rate: unknown key"),
        (
            f'{LISTED}[tokens.bob]\nsha256 = "{HASH}"\nrole = "admin"\n',
            "file:6: bob has the token of alice: one token, one name",
        ),
    ],
)
def test_mistakes_are_named_with_their_line(text: str, sentence: str) -> None:
    with pytest.raises(InvalidArgument) as found:
        tokens.parse(text, "file")
    assert sentence in found.value.message


def test_edits_keep_what_people_wrote(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(LISTED)
    made = tokens.add(path, "bob", "predict")
    assert path.read_text().startswith(LISTED)
    assert tokens.read(path)[tokens.digest(made)] == ("bob", tokens.digest(made), "predict")
    with pytest.raises(AlreadyExists, match="bob has a token there"):
        tokens.add(path, "bob", "predict")
    assert tokens.remove(path, "bob").name == "bob"
    with pytest.raises(NotFound, match=r"'bob' has no token there; it has alice"):
        tokens.remove(path, "bob")
    assert "# Of the dashboards." in path.read_text()


def test_a_file_that_others_could_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    tokens.add(path, "alice", "admin")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.chmod(0o666)
    with pytest.raises(InvalidArgument, match="is writable by others"):
        tokens.read(path)


def test_tokens_differ(tmp_path: Path) -> None:
    assert len({tokens.add(tmp_path / "tokens.toml", f"n{number}", "observe") for number in range(20)}) == 20
