"""Tensors in files: .npy (one), .npz (several, named), and "-" for standard input and output; strings also in .txt.

Nothing is ever unpickled. Any fault of a file becomes a FileProblem: one sentence with its name.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from tnxctl.cli.exits import FileProblem
from tnxctl.cli.text import tensor_name

if TYPE_CHECKING:
    from tnxctl.protocol.datatypes import Array

STANDARD = "-"
ARRAYS = (".npy", ".npz")
LINES = ".txt"
SUFFIXES = (*ARRAYS, LINES)

MOST_BYTES = 1 << 30
"""Most bytes of a file: four times the default limit of a message, since `--cast` may make it smaller."""

_NPY_MAGIC = b"\x93NUMPY"
_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")  # the second: an archive without members


def content(path: str) -> tuple[str, bytes]:
    """The name of a file for error sentences, and all of its bytes. Raises FileProblem if it cannot be read."""
    name = _name(path, "standard input")
    try:
        return name, _content(path, name)
    except OSError as error:
        raise FileProblem(f"cannot read {name}: {error.strerror or error}") from None


def is_tensors(content: bytes) -> bool:
    """Whether a file is in a format of numpy's, by its first bytes."""
    return content.startswith((*_ZIP_MAGIC, _NPY_MAGIC))


def parse(name: str, content: bytes) -> dict[str, Array]:
    """All tensors in such a file, little-endian or native.

    Returns:
        name -> array. The only tensor of a .npy file has the name "", the daemon's word for a model's only input.

    Raises:
        FileProblem: it is truncated or damaged, or holds Python objects.
    """
    return _read_npz(name, content) if content.startswith(_ZIP_MAGIC) else {"": _read_npy(name, content)}


@contextmanager
def destination(path: str | None) -> Iterator[Callable[[Mapping[str, Array]], None]]:
    """A function that writes named tensors to a file, which is open from the beginning: before there are any.

    They go to a .npz file, or a single one to a .npy file. "-", standard output, takes either, as the number says. The
    old content of the file stays until they come, and a file that was made for them goes again if they do not.

    A bfloat16 tensor is widened to float32, which holds its values exactly: the .npy format has no bfloat16. Strings
    get numpy's dtype `S`; in a .txt file, each has a line.

    Args:
        path: None: there is nothing to write, and nothing is done.

    Raises:
        FileProblem: the file cannot be written, at the beginning; later: several tensors for a .npy file, or there is
            no room for them.
    """
    if path is None:
        yield lambda _: None
        return
    if path == STANDARD:
        if sys.stdout is None:
            raise FileProblem("cannot write standard output: it is closed")
        yield _write_standard
        return
    with writable(path) as write:
        yield lambda tensors: write(_content_of(tensors, path))


@contextmanager
def writable(path: str) -> Iterator[Callable[[bytes | memoryview], None]]:
    """A function that writes the content of a file, which is open from the beginning: before there is any.

    What was in the file stays until it comes, and a file that was made for it goes again if it does not.

    Raises:
        FileProblem: the file cannot be written, at the beginning, or there is no room for the content.
    """
    made = written = False
    try:
        # Not emptied yet, as `open` would do it.
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0)
        try:
            handle, made = os.open(path, flags | os.O_EXCL, 0o666), True
        except FileExistsError:
            handle = os.open(path, flags, 0o666)
    except OSError as error:
        raise _cannot_write(path, error) from None
    stream = os.fdopen(handle, "wb")
    try:
        os.write(handle, b"")  # tells of a device that is full
    except OSError as error:
        stream.close()
        raise _cannot_write(path, error) from None

    def write(content: bytes | memoryview) -> None:
        nonlocal written
        try:
            if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                stream.truncate(0)
            stream.write(content)
            stream.flush()
        except OSError as error:
            raise _cannot_write(path, error) from None
        written = True

    try:
        yield write
    finally:
        with contextlib.suppress(OSError):  # no room, which `write` has said
            stream.close()
        if made and not written:
            with contextlib.suppress(OSError):
                os.remove(path)


def _write_standard(tensors: Mapping[str, Array]) -> None:
    try:
        stream = _standard_bytes(sys.stdout)
        stream.write(_content_of(tensors, STANDARD))
        stream.flush()
    except BrokenPipeError:
        raise  # the reader has enough: no problem of a file
    except OSError as error:
        raise _cannot_write(STANDARD, error) from None


def _cannot_write(path: str, error: OSError) -> FileProblem:
    return FileProblem(f"cannot write {_name(path, 'standard output')}: {error.strerror or error}")


def _content_of(tensors: Mapping[str, Array], path: str) -> memoryview:
    """The bytes of a file with these tensors."""
    import numpy as np

    from tnxctl.protocol.datatypes import ML_DTYPES, datatype_of

    if path.endswith(LINES):
        return memoryview(_lines_of(tensors, path))
    tensors = {
        key: _storable(key, array, path)
        if array.dtype.hasobject
        else array.astype(np.float32)
        if datatype_of(array.dtype) in ML_DTYPES
        else array
        for key, array in tensors.items()
    }
    if path.endswith(".npy") and len(tensors) != 1:
        raise FileProblem(
            f"cannot write {path}: the model gave {len(tensors)} outputs ({', '.join(map(tensor_name, tensors))}), "
            "a .npy file holds one: use .npz"
        )
    content = io.BytesIO()
    if path.endswith(".npz") or len(tensors) != 1:
        _write_npz(content, tensors)
    else:
        (array,) = tensors.values()
        np.lib.format.write_array(content, array, allow_pickle=False)
    return content.getbuffer()


def _lines_of(tensors: Mapping[str, Array], path: str) -> bytes:
    """The lines of a text file: a string for each row."""
    (array, *others) = tensors.values()
    if others or not array.dtype.hasobject:
        raise FileProblem(f"cannot write {path}: a .txt file holds one output of strings: use .npz")
    if array.size != (len(array) if array.ndim else 1):
        raise FileProblem(
            f"cannot write {path}: a line holds one string, and shape {list(array.shape)} has more: use .npy"
        )
    elements: list[bytes] = array.ravel().tolist()
    if any(b"\n" in element for element in elements):
        raise FileProblem(f"cannot write {path}: a string has a line break in it: use .npy")
    return b"".join(element + b"\n" for element in elements)


def _storable(key: str, array: Array, path: str) -> Array:
    """Strings in numpy's dtype `S`, which has one length for all: objects would have to be pickled."""
    elements: list[bytes] = array.ravel().tolist()
    longest = max(map(len, elements), default=0)
    if any(element.endswith(b"\0") for element in elements):
        raise FileProblem(
            f"cannot write {path}: in {tensor_name(key)}, a string ends with a zero byte, which numpy would drop"
        )
    if longest * len(elements) > MOST_BYTES:
        raise FileProblem(
            f"cannot write {path}: in {tensor_name(key)}, {len(elements)} strings would take {longest} bytes each, as "
            f"the longest of them: use .txt"
        )
    return array.astype(f"S{max(longest, 1)}")


def _content(path: str, name: str) -> bytes:
    """The bytes of a file or a pipe, such as a shell's <(...): of an endless device no more than a message may hold."""
    too_large = FileProblem(
        f"cannot read {name}: it has more than {MOST_BYTES} bytes, and no message has room for that"
    )
    if path == STANDARD:
        content = _standard_bytes(sys.stdin).read(MOST_BYTES + 1)
    else:
        with open(path, "rb") as stream:
            info = os.fstat(stream.fileno())
            if stat.S_ISREG(info.st_mode) and info.st_size > MOST_BYTES:
                raise too_large
            content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise too_large
    return content


def _name(path: str, standard: str) -> str:
    return standard if path == STANDARD else path


def _standard_bytes(stream: Any) -> IO[bytes]:
    """The binary layer of a standard stream, which is None in a process started without one."""
    if stream is None:
        raise OSError("it is closed")
    binary: IO[bytes] = stream.buffer
    return binary


def _read_npy(name: str, content: bytes) -> Array:
    import numpy as np

    stream = io.BytesIO(content)
    try:
        with warnings.catch_warnings(action="ignore"):  # about headers that Python 2 wrote; they read well
            array: Array = np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python text, so a bad one fails in many ways
        if "Object arrays" in str(error):
            raise FileProblem(f"cannot read {name}: it holds pickled Python objects, which are never loaded") from None
        raise FileProblem(f"cannot read {name}: {_first_line(error)}") from None
    left = len(content) - stream.tell()
    if left:
        raise FileProblem(f"cannot read {name}: {left} bytes follow the array, it should hold one array only")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _read_npz(name: str, content: bytes) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > MOST_BYTES:
                raise FileProblem(f"cannot read {name}: unpacked, it has more than {MOST_BYTES} bytes")
            for member in archive.namelist():
                tensors[member.removesuffix(".npy")] = _read_npy(f"{name} ({member})", archive.read(member))
    except FileProblem:
        raise
    except Exception as error:  # zipfile, zlib and the like: a damaged, encrypted or foreign archive
        raise FileProblem(f"cannot read {name}: {_first_line(error)}") from None
    if not tensors:
        raise FileProblem(f"cannot read {name}: it holds no tensors")
    return tensors


def _write_npz(stream: IO[bytes], tensors: Mapping[str, Array]) -> None:
    """Write as `numpy.savez` does, which cannot write a tensor called "file"."""
    import numpy as np

    with zipfile.ZipFile(stream, "w", allowZip64=True) as archive:
        for key, array in tensors.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0].rstrip(".")
    return f"{text[:200]}" if text else type(error).__name__
