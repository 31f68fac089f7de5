"""Guards of key files: who else than their owner could read or change them. Windows has rights of another kind.

A secret belongs to its owner alone. A list of keys may be read by anybody, but nobody else may write to it, nor, where
strangers are let in by it, to a directory above, where a sticky bit is enough (as /tmp has it).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tnxctl.files import reading
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument

_OTHERS_MAY_READ = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

_MOST = 64 * 1024  # of a file with a secret: one line and comments

MOST_KEYS = 16 * 1024 * 1024
"""Limit of a list of keys, in bytes."""


def read_secret(path: Path) -> str:
    """Content of a file that its owner alone can read.

    Raises:
        InvalidArgument: it cannot be read, belongs to somebody else than root and this user, or others can read it.
    """

    def check(info: os.stat_result) -> None:
        _check_owner(path, info)
        # systemd lets its service in by an ACL, which shows in the bits of the group. The directory is the service's.
        shared = stat.S_IRWXO | stat.S_IWGRP if _is_credential(path) else _OTHERS_MAY_READ
        if info.st_mode & shared:
            raise InvalidArgument(
                f"{path} can be read by others than its owner (mode {stat.S_IMODE(info.st_mode):o}): "
                f"chmod 600 {path}, and make a new pair if somebody may have read it"
            )

    return _read(path, check, _MOST)


def read_settings(path: Path) -> str:
    """Content of a file that nobody but its owner can change.

    Raises:
        InvalidArgument: it cannot be read, belongs to somebody else than root and this user, or others could change it.
    """
    return _read(path, partial(_check_unwritable, path), MOST_KEYS)


def read_list(path: Path) -> str:
    """Content of a file that nobody but its owner can change, nor put another one into its place.

    Raises:
        InvalidArgument: as `read_settings`, or for a directory above.
    """

    def check(info: os.stat_result) -> None:
        _check_unwritable(path, info)
        for above in {*path.absolute().parents, *path.resolve().parents}:
            _check_unwritable(above, above.stat(), sticky=True)

    return _read(path, check, MOST_KEYS)


def _read(path: Path, check: Callable[[os.stat_result], None], most: int) -> str:
    try:
        with reading.open_file(path, str(path), most) as file:
            if os.name == "posix":
                check(os.fstat(file.fileno()))
            return reading.read_open(file, str(path), most).decode()
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}") from None
    except FailedPrecondition as error:
        raise InvalidArgument(error.message) from None
    except UnicodeDecodeError:
        raise InvalidArgument(f"{path}: not UTF-8") from None


def _check_owner(path: Path, info: os.stat_result) -> None:
    if info.st_uid not in (0, os.geteuid()):
        raise InvalidArgument(
            f"{path} belongs to user {info.st_uid}, who is neither root nor the user of this process ({os.geteuid()})"
        )


def _check_unwritable(path: Path, info: os.stat_result, *, sticky: bool = False) -> None:
    _check_owner(path, info)
    if info.st_mode & _OTHERS_MAY_WRITE and not (sticky and info.st_mode & stat.S_ISVTX):
        raise InvalidArgument(
            f"{path} is writable by others than its owner (mode {stat.S_IMODE(info.st_mode):o}), "
            f"who could put keys into it: chmod go-w {path}"
        )


def _is_credential(path: Path) -> bool:
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    return bool(directory) and path.resolve().parent == Path(str(directory)).resolve()
