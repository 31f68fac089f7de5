"""File of a recording: made in the one directory that the configuration allows, and whole up to the last record."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tnxctl.protocol.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from tnxctl.protocol.limits import excerpt

if TYPE_CHECKING:
    from typing_extensions import Buffer

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Pattern of the name of a file: of no path, and nothing that a shell or a log could take for something else."""

_MOST_PARTS = 1000  # of one call; IOV_MAX is 1,024


def check_name(name: str) -> None:
    """Check that a file may have a name. Raises InvalidArgument."""
    if not NAME.fullmatch(name):
        raise InvalidArgument(
            f"{excerpt(name)} is no name for a recording: up to 128 letters, digits, '.', '_' and '-', a letter or "
            "digit first; it lies in the daemon's record_directory"
        )


class RecordingFile:
    """New file for a recording, for its owner alone.

    Args:
        directory: that of the configuration. name: of the file, see `check_name`.
        beginning: records that it begins with.

    Attributes:
        path: of the file. size: bytes written so far.

    Raises:
        AlreadyExists: there is something of that name, be it a link that leads nowhere.
        FailedPrecondition: the file cannot be made, or not even its beginning be written: then there is none.
    """

    def __init__(self, directory: str, name: str, beginning: Sequence[Sequence[Buffer]] = ()) -> None:
        self.path = str(Path(directory) / name)
        self.size = 0
        try:
            parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                self._descriptor = os.open(name, flags, 0o600, dir_fd=parent)
                try:
                    self.write(beginning)
                except OSError:
                    self.close()
                    os.unlink(name, dir_fd=parent)  # else the name would be taken once there is room again
                    raise
            finally:
                os.close(parent)
        except FileExistsError:
            raise AlreadyExists(f"{self.path} is there already, and nothing is overwritten") from None
        except OSError as error:
            raise FailedPrecondition(f"cannot write {self.path}: {error.strerror or error}") from None

    def write(self, records: Sequence[Sequence[Buffer]]) -> None:
        """Write records, in as few calls as can be, and all of them or none.

        Raises:
            OSError: the disk takes no more.
        """
        parts = [part for record in records for part in record]
        left = sum([memoryview(part).nbytes for part in parts])
        end = self.size + left
        try:
            while left:
                written = os.writev(self._descriptor, parts[:_MOST_PARTS])
                left -= written
                if left:
                    parts = _after(parts, written)
        except OSError:
            os.ftruncate(self._descriptor, self.size)
            os.lseek(self._descriptor, self.size, os.SEEK_SET)
            raise
        self.size = end

    @property
    def is_gone(self) -> bool:
        """Whether somebody has removed it: then what is written can be read by nobody."""
        return os.fstat(self._descriptor).st_nlink == 0

    def close(self) -> None:
        """Close the file. Raises OSError: not all of it could be kept."""
        os.close(self._descriptor)


def _after(parts: list[Buffer], written: int) -> list[Buffer]:
    """Rest of parts after so many bytes."""
    for at, part in enumerate(parts):
        view = memoryview(part)
        if written < view.nbytes:
            return [view.cast("B")[written:], *parts[at + 1 :]]
        written -= view.nbytes
    return []
