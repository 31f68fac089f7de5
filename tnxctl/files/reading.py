"""Safe reading of files: kind and size are checked before the content is read.

A pipe in place of a file hangs its reader, a device may do anything, and a sparse file fills the memory.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from tnxctl.protocol.errors import FailedPrecondition
from tnxctl.protocol.wire import MIB

MOST_TEXT = MIB
"""Limit of settings, a manifest or an index, in bytes."""

MOST_CODE = 16 * MIB
"""Limit of a Python module, in bytes."""

# Windows has none of them.
_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0)

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


def kind(info: os.stat_result) -> str:
    """Kind of a path that is no file, in words."""
    return _KINDS.get(stat.S_IFMT(info.st_mode), "no file")


def open_file(path: Path, label: str, most: int | None = None) -> BufferedReader:
    """Open a file to read it.

    Args:
        label: what to call it in errors.
        most: limit of its size, in bytes; None sets no limit.

    Raises:
        FailedPrecondition: it is no file, or larger.
        OSError: it cannot be opened.
    """
    _check(os.stat(path), label, most)  # a device may do something as soon as it is opened
    descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    file = os.fdopen(descriptor, "rb")
    try:
        _check(os.fstat(descriptor), label, most)  # it may be another one by now
    except FailedPrecondition:
        file.close()
        raise
    return file


def read(path: Path, label: str, most: int = MOST_TEXT) -> bytes:
    """Content of a file of so many bytes at most. Raises as `open_file` does."""
    with open_file(path, label, most) as file:
        return read_open(file, label, most)


def read_open(file: BufferedReader, label: str, most: int) -> bytes:
    """Content of an open file.

    Raises:
        FailedPrecondition: it has more bytes than `most` by now.
    """
    content = file.read(most + 1)
    if len(content) > most:
        raise _too_large(label, len(content), most)
    return content


def _check(info: os.stat_result, label: str, most: int | None) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise FailedPrecondition(f"{label} is {kind(info)}, not a file")
    if most is not None and info.st_size > most:
        raise _too_large(label, info.st_size, most)


def _too_large(label: str, size: int, most: int) -> FailedPrecondition:
    return FailedPrecondition(f"{label} has {size} bytes, and {most} are the most that are read of such a file")
