"""Artifacts: kept whole, or made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.models.formats import artifacts


class Maker:
    """Writes an artifact. Attributes: times: how often it did."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, folder: Path) -> None:
        self.times += 1
        (folder / "below").mkdir()
        (folder / "below/code.so").write_bytes(bytes(1000))
        (folder / "order").write_text("first")


def content(cache: Path, make: Callable[[Path], None]) -> list[int]:
    """Sizes of the files of the artifact that is found, or made."""
    with artifacts.folder(cache, "name", make) as folder:
        return [(folder / name).stat().st_size for name in ("below/code.so", "order")]


def cut_short(kept: Path) -> None:
    (kept / "below/code.so").write_bytes(bytes(999))


def change(kept: Path) -> None:
    (kept / "order").write_text("other")


def lose(kept: Path) -> None:
    (kept / "order").unlink()


def lose_sums(kept: Path) -> None:
    (kept / "SHA256SUMS").unlink()


def empty_sums(kept: Path) -> None:
    (kept / "SHA256SUMS").write_bytes(b"")


def garble_sums(kept: Path) -> None:
    (kept / "SHA256SUMS").write_bytes(b"\xff\x00\n\n")


@pytest.mark.parametrize("damage", [cut_short, change, lose, lose_sums, empty_sums, garble_sums])
def test_a_damaged_artifact_is_made_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    make = Maker()
    assert content(tmp_path, make) == content(tmp_path, make) == [1000, 5]
    assert make.times == 1
    damage(tmp_path / "name")
    assert content(tmp_path, make) == content(tmp_path, make) == [1000, 5]
    assert make.times == 2


def test_files_that_are_added_later_do_no_harm(tmp_path: Path) -> None:
    make = Maker()
    content(tmp_path, make)
    (tmp_path / "name/below/more").write_text("unpacked")
    content(tmp_path, make)
    assert make.times == 1


def test_a_failure_is_kept_whole_too(tmp_path: Path) -> None:
    made = []

    def refuse(folder: Path) -> None:
        made.append(folder)
        raise FailedPrecondition("it is too round")

    for _ in range(2):
        with pytest.raises(FailedPrecondition, match="too round"):
            content(tmp_path, refuse)
    assert len(made) == 1
    (tmp_path / "name/failed.txt").write_text("")
    with pytest.raises(FailedPrecondition, match="too round"):
        content(tmp_path, refuse)
