"""Editing of the TOML files with keys, by one writer at a time: what comes out is compared with what is meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from tnxctl.files import tomledit, writing
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument, NotFound

T = TypeVar("T")


class _Named(Protocol):
    @property
    def name(self) -> str: ...


K = TypeVar("K")
N = TypeVar("N", bound=_Named)


def edit(
    path: Path,
    read: Callable[[Path], str],
    parse: Callable[[str, str], T],
    change: Callable[[str, T], tuple[str, T]],
    headers: str,
) -> None:
    """Rewrite a file, which is made where there is none.

    Args:
        read: reads its text, and raises where it is not to be trusted.
        parse: text, label -> what it holds.
        change: text, what it holds -> the new text, and what that is meant to hold.
        headers: how the tables have to be headed, for errors.

    Raises:
        FailedPrecondition: it is written in another style of TOML, so that the change goes wrong.
        OSError: it cannot be written. It is as it was then.
        Whatever the functions raise.
    """
    path = path.resolve()  # a link stays one
    with writing.locked(path):
        exists = path.exists()
        text = read(path) if exists else ""
        edited, meant = change(text, parse(text, str(path)))
        try:
            right = parse(edited, str(path)) == meant
        except InvalidArgument:
            right = False
        if not right:
            raise FailedPrecondition(f"{path}: its tables are not headed {headers}: change it by hand")
        writing.write(path, edited, path.stat().st_mode & 0o777 if exists else 0o644, replace=True)


def remove(
    path: Path,
    read: Callable[[Path], str],
    parse: Callable[[str, str], dict[K, N]],
    table: str,
    name: str,
    missing: str,
) -> N:
    """Remove the table `[TABLE.NAME]`, as `edit` does. Returns what it held.

    Args:
        read, parse: as of `edit`.
        missing: says that there is none of that name, for errors.

    Raises:
        NotFound: there is none. As `edit`.
    """
    gone: list[N] = []

    def change(text: str, found: dict[K, N]) -> tuple[str, dict[K, N]]:
        gone.extend(each for each in found.values() if each.name == name)
        if not gone:
            names = ", ".join(sorted(each.name for each in found.values())) or "nobody"
            raise NotFound(f"{path}: {missing}; it has {names}")
        left = {key: each for key, each in found.items() if each.name != name}
        return tomledit.remove_table(text, (table, name)), left

    edit(path, read, parse, change, f"[{table}.NAME]")
    return gone[0]
