"""Artifacts: what compilers have made of versions, kept by contents, so that a restart does not pay again."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxctl.protocol.wire import MIB
from tnxd.events import event
from tnxd.models.file_formats import FORMATS
from tnxd.models.repository import RepositorySource
from tnxd.models.trust import Guard, TrustedFiles

log = logging.getLogger(__name__)

_PREFIX = "tnxd-artifact-"

_FAILED = "failed.txt"
"""Why there is no artifact."""

_SUMS = "SHA256SUMS"
"""Digests of all files of an artifact. Code that a crash or a full disk cut short would end the process that loads it,
at every start anew."""

_FORM = "3"
"""Counted up when artifacts are written or read in another way."""

_MOST_BYTES = 8192 * MIB
"""Size of all artifacts that are kept: beyond it, the least recently used ones go."""


def key(source: RepositorySource, *parts: str) -> str:
    """The name of an artifact: a digest of the files of a version, of its settings, of this Python, and of `parts`.

    Raises:
        TensorNextError, OSError: the files cannot be read.
    """
    files = TrustedFiles.check(
        source.guard, source.directory, require_manifest=False, modules=FORMATS[source.format].has_modules
    )
    digest = hashlib.sha256(source.settings.served)
    for path in sorted(files.identities):
        with files.open(path) as file:
            digest.update(f"{os.path.relpath(path, files.shared)}\0".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update(repr((_FORM, sys.implementation.cache_tag, *parts)).encode())
    return digest.hexdigest()


def directory(setting: str) -> Path | None:
    """The directory that keeps artifacts, by the setting `cache_directory`; None: there is none. It is made.

    An artifact is code that this process will run, so the directory is held to what holds for models, and has to be
    this user's own.
    """
    if not setting:
        return None
    cache = Path(setting)
    if setting == "auto":
        service = os.environ.get("CACHE_DIRECTORY", "")  # set by systemd, see systemd.exec(5)
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        cache = Path(service or os.path.join(home, "tensornext"), "variants")
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        Guard.of(cache)
        if cache.stat().st_uid not in (os.geteuid(), 0):
            raise PermissionError(errno.EPERM, "it belongs to somebody else", str(cache))
        if not os.access(cache, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(cache))
    except (OSError, TensorNextError) as error:
        log.warning("what is compiled is not kept: %s", error, extra=event("cache_unusable", reason=str(error)))
        return None
    return cache


@contextlib.contextmanager
def folder(cache: Path | None, name: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """A folder with an artifact in it: that of the cache, or one that is made now.

    If the block raises for an artifact of the cache, which may be damaged, that one is thrown away.

    Args:
        cache: see `directory`. None: the folder goes at the end of the block.
        make: writes the artifact into an empty folder. A FailedPrecondition of it is kept as well.

    Raises:
        FailedPrecondition: it cannot be made, now or when it was tried before.
    """
    kept = None if cache is None else cache / name
    if kept is not None and kept.is_dir() and not _is_whole(kept):
        log.warning("%s is damaged, and is made again", kept, extra=event("artifact_damaged", file=str(kept)))
        shutil.rmtree(kept, ignore_errors=True)
    if kept is not None and kept.is_dir():
        with contextlib.suppress(OSError):
            os.utime(kept)
        _check(kept)
        try:
            yield kept
        except Exception:
            shutil.rmtree(kept, ignore_errors=True)
            raise
        return
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as made:
        try:
            make(Path(made))
        except FailedPrecondition as error:
            Path(made, _FAILED).write_text(error.message, encoding="utf-8")
        if kept is not None:
            _keep(Path(made), kept)
        _check(Path(made))
        yield Path(made)


def _check(folder: Path) -> None:
    failed = folder / _FAILED
    if failed.exists():
        raise FailedPrecondition(failed.read_text(encoding="utf-8"))


def _keep(made: Path, kept: Path) -> None:
    """Copy an artifact into the cache, all of it or nothing."""
    parent = kept.parent
    try:
        sums = [f"{_digest(path)}  {path.relative_to(made)}\n" for path in sorted(made.rglob("*")) if path.is_file()]
        Path(made, _SUMS).write_text("".join(sums))
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as place:
            shutil.copytree(made, Path(place, "whole"))
            Path(place, "whole").rename(kept)
        _shrink(parent)
    except OSError as error:  # a full disk, or another daemon was faster
        about = event("artifact_not_kept", file=str(kept), reason=error.strerror)
        log.info("%s is not kept: %s", kept, error.strerror, extra=about)


def _is_whole(kept: Path) -> bool:
    """Whether all files of an artifact are there as they were written; others may have been added."""
    try:
        lines = [line.partition("  ") for line in Path(kept, _SUMS).read_text().splitlines()]
        return bool(lines) and all(_digest(kept / name) == digest for digest, _, name in lines)
    except (OSError, ValueError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shrink(cache: Path) -> None:
    found = sorted(
        ((entry.stat().st_mtime, entry) for entry in cache.iterdir() if entry.is_dir()), key=lambda item: -item[0]
    )
    total = 0
    for _, entry in found:
        total += sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
        if total > _MOST_BYTES:
            shutil.rmtree(entry, ignore_errors=True)
