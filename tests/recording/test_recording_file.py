"""Files of recordings: where they may lie, and what is left of them when the disk takes no more."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tnxctl.protocol.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from tnxd.recording import recording_file
from tnxd.recording.recording_file import RecordingFile, check_name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        ".",
        "../x",
        "/etc/x",
        "a/b",
        "a\\b",
        ".hidden",
        "-x",
        "a\0b",
        "a\nb",
        "x" * 129,
        "x" * 300,
        "ä",
        "a b",
        "a:b",
    ],
)
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(InvalidArgument, match="no name for a recording"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "Monday-1.mcap", "2026_11_29", "x" * 128])
def test_plain_names_are_taken(name: str) -> None:
    check_name(name)


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        file = RecordingFile(str(tmp_path), "a")
    finally:
        os.umask(before)
    file.close()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/tmp/nowhere-at-all")])
def test_nothing_is_overwritten_or_followed(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(AlreadyExists, match="nothing is overwritten"):
        RecordingFile(str(tmp_path), "a")
    assert not Path("/tmp/nowhere-at-all").exists()


def test_a_directory_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"cannot write .*/gone/a: No such file or directory"):
        RecordingFile(str(tmp_path / "gone"), "a")


def halting(most: int) -> Callable[[int, Sequence[bytes]], int]:
    """`os.writev` for a disk that takes little at a time."""
    really = os.write

    def writev(descriptor: int, parts: Sequence[bytes]) -> int:
        return really(descriptor, b"".join(parts)[:most])

    return writev


@pytest.mark.parametrize("most", [1, 7, 4096])
def test_short_writes_are_gone_on_with(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_file.os, "writev", halting(most))
    file = RecordingFile(str(tmp_path), "a")
    file.write([[b"one", b"", b"two"], [b"three"] * 3])
    file.close()
    assert (tmp_path / "a").read_bytes() == b"onetwo" + b"three" * 3
    assert file.size == 21


def test_more_parts_than_a_call_takes(tmp_path: Path) -> None:
    file = RecordingFile(str(tmp_path), "a")
    file.write([[b"%04d" % number] for number in range(5000)])
    file.close()
    assert (tmp_path / "a").read_bytes() == b"".join(b"%04d" % number for number in range(5000))


def test_a_full_disk_leaves_what_was_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RecordingFile(str(tmp_path), "a")
    file.write([[b"whole"]])
    calls = [halting(3), None]

    def writev(descriptor: int, parts: Sequence[bytes]) -> int:
        call = calls.pop(0)
        if call is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return call(descriptor, parts)

    monkeypatch.setattr(recording_file.os, "writev", writev)
    with pytest.raises(OSError, match="No space left"):
        file.write([[b"half"]])
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"whole"
    file.write([[b", again"]])
    file.close()
    assert (tmp_path / "a").read_bytes() == b"whole, again"
