"""Channel between the daemon and a process of a model: arrays in shared memory, and messages about them. No torch.

Each side writes to a region of its own and reads the other's. A message is a length and a msgspec struct; the arrays
that it is about lie below each other in the sender's region, until the next message. Nothing is ever unpickled.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from tnxctl.protocol import strings
from tnxctl.protocol.datatypes import STORAGE, Array
from tnxctl.protocol.errors import Internal
from tnxctl.protocol.wire import TensorSpec

_ALIGNMENT = 64
_SMALLEST = 1 << 16
_MOST_MESSAGE = 1 << 26
_LENGTH = struct.Struct("<I")
_SIZE, _BYTE = np.dtype(np.int64), np.dtype(np.uint8)

OUT_OF_MEMORY = 75
"""Exit code of a process that has run out of memory. It may hold on to it: so it ends."""

CUT_OFF = 76
"""Exit code of a process that cannot hear the daemon any more: it has closed the socket, or the daemon is gone."""

Shapes = tuple[tuple[int, ...] | None, ...]
"""Shape of each array, in the order of the signature; None for one that is not there."""


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The process has loaded its model. Attributes: defaults: arguments for inputs -> whether they have a default."""

    defaults: dict[str, bool]


class Ask(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A batch is to be run. Attributes: shapes: of its inputs. size: of the region that they lie in, in bytes."""

    shapes: Shapes
    size: int


class Answer(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Outputs of a batch. Attributes: as in `Ask`."""

    shapes: Shapes
    size: int


class Failure(msgspec.Struct, frozen=True, tag=True):
    """The model raised.

    Attributes:
        kind: name of the class of the exception; "": it is one of `tnxctl.protocol.errors`, as where the outputs, or
            the class Model, are not what they have to be.
        text: its message. full: whether memory ran out: the process ends.
        code: of an error of `tnxctl.protocol.errors`.
    """

    kind: str
    text: str
    full: bool = False
    code: str = Internal.code


Reply = Loaded | Answer | Failure


class Region:
    """Shared memory that one side writes and the other reads. The writer makes it grow; it never shrinks.

    Args:
        descriptor: of a file in memory, see `create`.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory: mmap.mmap | None = None
        self.size = 0

    @staticmethod
    def create(name: str) -> int:
        """The descriptor of a new file in memory, which nobody can shorten: a reader would get SIGBUS."""
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        return descriptor

    def write(self, arrays: Sequence[Array | None]) -> Shapes:
        """Copy arrays into the region, which grows if it has to. Returns their shapes.

        A BYTES array lies there as two: the size of its frame, see `tnxctl.protocol.strings`, and that.

        Raises:
            ValueError: an element of a BYTES array has 4 GiB or more.
        """
        plain: list[Array] = []
        for array in arrays:
            if array is not None and array.dtype.hasobject:
                frame = strings.encode(array)
                plain += np.array([frame.nbytes], _SIZE), frame
            elif array is not None:
                plain.append(array)
        needed = sum([_aligned(array.nbytes) for array in plain])
        if needed > self.size:
            size = max(1 << (needed - 1).bit_length(), _SMALLEST)
            os.ftruncate(self._descriptor, size)
            self.map(size)
        at = 0
        for array in plain:
            if array.nbytes:
                np.copyto(self._view(array.shape, array.dtype, at), array)
                at += _aligned(array.nbytes)
        return tuple([None if array is None else array.shape for array in arrays])

    def read(self, specs: Sequence[TensorSpec], shapes: Shapes) -> Iterator[Array | None]:
        """Arrays in the region, as views of it; of BYTES, copies.

        Raises:
            ValueError: they would not lie within it, or the lengths of strings do not add up.
        """
        at = 0
        for spec, shape in zip(specs, shapes, strict=True):
            if shape is None:
                yield None
                continue
            dtype = STORAGE[spec.datatype]
            if dtype.hasobject:
                size = int(self._view((1,), _SIZE, at)[0])
                at += _aligned(_SIZE.itemsize)
                yield strings.decode(self._view((size,), _BYTE, at).data, shape)
                at += _aligned(size)
                continue
            yield self._view(shape, dtype, at)
            at += _aligned(math.prod(shape) * dtype.itemsize)

    def map(self, size: int) -> None:
        """Map the region, which has grown to so many bytes. Arrays that were read stay where they are."""
        if size > self.size:
            self._memory = mmap.mmap(self._descriptor, size)
            self.size = size

    def _view(self, shape: tuple[int, ...], dtype: np.dtype[Any], at: int) -> Array:
        count = math.prod(shape)
        if not count:
            return np.empty(shape, dtype)
        if self._memory is None:
            raise ValueError("nothing was written")
        return np.frombuffer(self._memory, dtype, count, at).reshape(shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def send(link: socket.socket, message: msgspec.Struct | bytes) -> None:
    """Send a message. Raises OSError: the other side is gone."""
    content = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
    link.sendall(_LENGTH.pack(len(content)) + content)


def receive(link: socket.socket, ended: int = -1, limit_s: float = math.inf) -> bytes:
    """The next message.

    Args:
        ended: descriptor that becomes readable when the other side has ended; -1: none.

    Raises:
        EOFError: the other side is gone.
        TimeoutError: it did not answer in time.
    """
    until = time.monotonic() + limit_s
    size = _LENGTH.unpack(_exactly(link, _LENGTH.size, ended, until))[0]
    if size > _MOST_MESSAGE:
        raise EOFError
    return _exactly(link, size, ended, until)


def _exactly(link: socket.socket, size: int, ended: int, until: float) -> bytes:
    parts = []
    while size:
        _wait(link, ended, until)
        try:
            part = link.recv(size)
        except OSError:
            raise EOFError from None
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _wait(link: socket.socket, ended: int, until: float) -> None:
    """Wait until something can be received. What was sent before an end counts."""
    poll = select.poll()
    poll.register(link, select.POLLIN)
    if ended >= 0:
        poll.register(ended, select.POLLIN)
    left = until - time.monotonic()
    events = dict(poll.poll(None if left == math.inf else max(left, 0.0) * 1e3))
    if not events:
        raise TimeoutError
    if link.fileno() not in events:
        raise EOFError
