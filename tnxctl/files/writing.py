"""Safe writing of files: whole or not at all, by one writer at a time, and with the mode that is asked for.

A new content is written beside the file and takes its name once it is on the disk. A full disk leaves the file as it
was, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

if os.name == "posix":
    import fcntl
else:
    fcntl = None  # type: ignore[assignment]


def write(path: Path, content: str, mode: int, *, replace: bool) -> None:
    """Write a file.

    Args:
        mode: its permissions, whatever the umask.
        replace: take the place of a file that is there.

    Raises:
        FileExistsError: there is one, and it is not to be replaced.
        OSError: it cannot be written. What was there still is.
    """
    beside = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            if hasattr(os, "fchmod"):
                os.fchmod(descriptor, mode)
            if replace:
                _keep_owner(path, descriptor)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        if replace:
            os.replace(beside, path)
        else:
            _name(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
    _sync_directory(path.parent)


def _name(beside: Path, path: Path) -> None:
    """Give a file its name. Raises FileExistsError if there is one of that name."""
    with contextlib.suppress(OSError):  # there is one, or the file system has no hard links
        os.link(beside, path)
        return
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    os.rename(beside, path)


def _keep_owner(path: Path, descriptor: int) -> None:
    """Give a new file to the owner of the one whose place it takes, if there is one."""
    if os.name != "posix":
        return
    with contextlib.suppress(FileNotFoundError):
        before, now = path.stat(), os.fstat(descriptor)
        if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
            os.fchown(descriptor, before.st_uid, before.st_gid)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other writers of a file out, in this process and in others. Where there is no flock, nobody is kept out."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    """Have the new name survive a loss of power, where the system and the file system can."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
