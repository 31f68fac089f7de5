"""Trust in a model repository: which users could have written to it, and whether it is unchanged. Models are code.

Trusted are root, the user that the daemon runs as, and the owner of the repository's root: everything in it must belong
to one of them, and only the owner may write to it. The same holds for the directories above, where a sticky bit (as
/tmp has it) is enough: it keeps others from replacing what is not theirs. Write permission by an ACL shows in the
group's bits and counts. Symbolic links are followed by hand, every directory on their way is checked, and they must not
lead out of the repository.

What a load reads is guaranteed to be what was checked: every file's identity, size and times of change are recorded
when it is checked and hashed, and compared whenever it is read, before and after. That is no protection against root
or the owner, who are trusted, but against reading half of an update.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

from tnxctl.files.reading import MOST_TEXT, kind, open_file, read_open
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument, PermissionDenied

MANIFEST = "SHA256SUMS"

EXAMPLE = "example.npz"
"""Values to warm a model up with, in the directory of a version or of its model."""

_MAX_LINKS = 40  # as many as Linux follows in one path
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MANIFEST_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)")


def hidden(name: str) -> bool:
    """Whether an entry of a directory is none of the repository's."""
    return name.startswith(".") or name == "__pycache__"


@dataclass(frozen=True)
class Guard:
    """Guard of a repository: the users that it trusts, and the check that no others can write to it.

    Attributes:
        root: the repository, resolved. owners: user ids that may own what is in it.
    """

    root: Path
    owners: frozenset[int]

    @classmethod
    def of(cls, root: Path) -> Guard:
        """The guard of a repository.

        Raises:
            InvalidArgument: there is no such directory.
            PermissionDenied: somebody else may write to it, or to a directory on the way.
        """
        try:
            resolved = root.resolve(strict=True)
            info = resolved.stat()
        except (OSError, RuntimeError) as error:
            raise InvalidArgument(f"model repository {root}: {getattr(error, 'strerror', None) or error}") from None
        if not stat.S_ISDIR(info.st_mode):
            raise InvalidArgument(f"model repository {root} is not a directory")
        guard = cls(resolved, frozenset({0, os.geteuid(), info.st_uid}))
        guard.resolve(root.absolute())
        return guard

    def label(self, path: Path) -> str:
        """The name of a path in errors: relative to the repository, if it is in there."""
        return str(path.relative_to(self.root)) if path != self.root and path.is_relative_to(self.root) else str(path)

    def resolve(self, path: Path) -> Path:
        """An absolute path without symbolic links.

        Raises:
            PermissionDenied: it leads out of the repository, or somebody else may write to a part of it.
            OSError: it does not exist, or cannot be looked at.
        """
        inside = path.is_relative_to(self.root) and path != self.root
        waiting = list(reversed(path.parts[1:]))
        current, links = Path("/"), 0
        self._check(current, current.stat())
        while waiting:
            part = waiting.pop()
            if part == "..":
                current = current.parent
                continue
            current /= part
            info = current.lstat()
            if not stat.S_ISLNK(info.st_mode):
                self._check(current, info)
                continue
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            if info.st_uid not in self.owners:
                raise self._wrong_owner(current, info)
            target = Path(os.readlink(current))
            waiting += reversed(target.parts[1:] if target.is_absolute() else target.parts)
            current = Path("/") if target.is_absolute() else current.parent
        if inside and not current.is_relative_to(self.root):
            raise PermissionDenied(f"{self.label(path)} leads out of the model repository, to {current}")
        return current

    def _check(self, path: Path, info: os.stat_result) -> None:
        if info.st_uid not in self.owners:
            raise self._wrong_owner(path, info)
        above = not path.is_relative_to(self.root)
        if info.st_mode & _OTHERS_MAY_WRITE and not (above and info.st_mode & stat.S_ISVTX):
            raise PermissionDenied(
                f"{self.label(path)} is writable by others than its owner "
                f"(mode {stat.S_IMODE(info.st_mode):o}), and models are code: chmod go-w {path}"
            )

    def _wrong_owner(self, path: Path, info: os.stat_result) -> PermissionDenied:
        return PermissionDenied(
            f"{self.label(path)} belongs to user {info.st_uid}, who is neither root, "
            f"nor the daemon's user, nor the owner of the model repository"
        )

    def tree(self, directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
        """Every file below a directory that is not hidden, checked, sorted by path. Raises as `resolve` does."""
        for entry in sorted(self.resolve(directory).iterdir()):
            if hidden(entry.name):
                continue
            try:
                resolved = self.resolve(entry)
                info = resolved.stat()
            except FileNotFoundError:
                raise FailedPrecondition(
                    f"{self.label(entry)}: a link that leads nowhere, or removed meanwhile"
                ) from None
            if stat.S_ISDIR(info.st_mode):
                if entry.is_symlink():
                    raise PermissionDenied(f"{self.label(entry)}: a link to a directory, in a version")
                yield from self.tree(entry)
            elif stat.S_ISREG(info.st_mode):
                yield entry, info
            else:
                raise PermissionDenied(f"{self.label(entry)} is {kind(info)}, not a file")


def identity(info: os.stat_result) -> tuple[int, ...]:
    """Identity of the contents of a file, which cannot be written without a new time of change."""
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


@dataclass(frozen=True)
class TrustedFiles:
    """The files of one version, as they were when they were checked.

    Attributes:
        directory: of the version. shared: of the model. code: directories where its Python modules may be.
        identities: of every file, by path.
    """

    guard: Guard
    directory: Path
    shared: Path
    code: tuple[Path, ...]
    identities: Mapping[Path, tuple[int, ...]] = field(repr=False)

    @classmethod
    def check(cls, guard: Guard, directory: Path, *, require_manifest: bool, modules: bool) -> TrustedFiles:
        """Check everything that loading a version may read, and its manifest if there is one.

        Raises:
            PermissionDenied: somebody else may write to it, or the manifest is missing, or does not match.
            FailedPrecondition: a file went away meanwhile.
            OSError: something cannot be read.
        """
        shared = guard.resolve(directory.parent)
        directory, code, files = contents(guard, directory, require_manifest=require_manifest, modules=modules)
        trusted = cls(guard, directory, shared, code, {path: identity(info) for path, info in files.items()})
        sums = directory / MANIFEST
        if sums in files:
            trusted._hold_against(sums)
        return trusted

    @property
    def example(self) -> Path | None:
        """The file with values to warm up with; None: there is none."""
        places = (self.directory / EXAMPLE, self.shared / EXAMPLE)
        return next((path for path in places if path in self.identities), None)

    def label(self, name: str) -> str:
        """The name of a file of the version in errors."""
        return self.guard.label(self.directory / name)

    @contextmanager
    def open(self, path: Path) -> Iterator[BufferedReader]:
        """Open a file that was checked.

        Raises:
            FailedPrecondition: it is not what was checked: replaced, or written to before the end of the with block.
        """
        label = self.guard.label(path)
        expected = self.identities.get(path)
        if expected is None:
            raise FailedPrecondition(f"{label} is missing")
        changed = FailedPrecondition(f"{label} changed while it was loaded: load it again")
        try:
            opened = open_file(self.guard.resolve(path), label)
        except FileNotFoundError:  # another version is being put into its place
            raise changed from None
        with opened as file:
            if identity(os.fstat(file.fileno())) != expected:
                raise changed
            yield file
            if identity(os.fstat(file.fileno())) != expected:
                raise changed

    def check_unchanged(self) -> None:
        """Check that all files are what was checked: for code that reads them itself. Raises FailedPrecondition."""
        for path, expected in self.identities.items():
            try:
                same = identity(self.guard.resolve(path).stat()) == expected
            except OSError:
                same = False
            if not same:
                raise FailedPrecondition(f"{self.guard.label(path)} changed while it was loaded: load it again")

    def _hold_against(self, sums: Path) -> None:
        """Compare every file with the manifest, both ways."""
        label = self.guard.label(sums)
        with self.open(sums) as file:
            text = read_open(file, label, MOST_TEXT).decode("utf-8", "replace")
        expected: dict[Path, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            found = _MANIFEST_LINE.fullmatch(line)
            if found is None:
                raise PermissionDenied(f"{label}: line {number} is not one that sha256sum writes: {line[:80]!r}")
            expected[self.directory / found["name"].removeprefix("./")] = found["digest"].lower()
        present = self.identities.keys() - {sums}
        for path in sorted(present - expected.keys()):
            raise PermissionDenied(f"{label} does not list {os.path.relpath(path, self.directory)}")
        for path in sorted(expected.keys() - present):
            raise PermissionDenied(f"{label} lists {os.path.relpath(path, self.directory)}, which is not there")
        for path in sorted(present):
            with self.open(path) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != expected[path]:
                raise PermissionDenied(f"{self.guard.label(path)} has SHA-256 {digest}, {label} says {expected[path]}")


def contents(
    guard: Guard, directory: Path, *, require_manifest: bool, modules: bool
) -> tuple[Path, tuple[Path, ...], dict[Path, os.stat_result]]:
    """Files that a load of a version may read: its directory, resolved; those with Python modules; all files, checked.

    Args:
        require_manifest: whether a version without one is refused.
        modules: whether its format uses Python modules. Where there is no manifest, they may be in the model's
            directory, too, as may be an example.

    Raises:
        PermissionDenied: somebody else may write to it, or the manifest is missing.
        FailedPrecondition: a file went away meanwhile.
        OSError: something cannot be read.
    """
    shared = guard.resolve(directory.parent)
    directory = guard.resolve(directory)
    files = dict(guard.tree(directory))
    code: tuple[Path, ...] = (directory,) if modules else ()
    if directory / MANIFEST not in files:
        if require_manifest:
            raise PermissionDenied(f"{guard.label(directory / MANIFEST)} is missing, and the daemon requires one")
        if modules:
            code += (shared,)
            files.update(_shared_modules(guard, shared))
        example = shared / EXAMPLE
        if directory / EXAMPLE not in files and os.path.lexists(example):
            files[example] = _file(guard, example)
    return directory, code, files


def _file(guard: Guard, path: Path) -> os.stat_result:
    info = guard.resolve(path).stat()
    if not stat.S_ISREG(info.st_mode):
        raise PermissionDenied(f"{guard.label(path)} is not a file")
    return info


def _shared_modules(guard: Guard, directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Python modules and packages that all versions of a model share."""
    for entry in sorted(directory.iterdir()):
        if hidden(entry.name):
            continue
        if entry.suffix == ".py":
            info = guard.resolve(entry).stat()
            if not stat.S_ISREG(info.st_mode):
                raise PermissionDenied(f"{guard.label(entry)} is {kind(info)}, not a file")
            yield entry, info
        elif (entry / "__init__.py").is_file():
            yield from guard.tree(entry)
