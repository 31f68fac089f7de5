"""Shared memory of a daemon and one connection of a client on the same host: where tensors lie in it, in and out.

The daemon makes a segment for the connection, and its client says where everything goes: inputs are where a request
says, and the outputs in the space that the request names for them. Headers have spans of it in place of frames.

Neither side trusts what lies there, since the other may change it at any time. So the daemon copies inputs out of it
before anything looks at them, and writes outputs where only this client can miss what they overwrite.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import numpy as np

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.fields import Span

ALIGNMENT = 64
"""Bytes; a cache line, and as much as the widest vector instructions ask for."""


def aligned(nbytes: int) -> int:
    """The least multiple of `ALIGNMENT` that is not below a number of bytes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def total_bytes(sizes: Iterable[int]) -> int:
    """Bytes that tensors of these sizes take side by side."""
    return sum(map(aligned, sizes))


class Mapping:
    """Mapping of a whole segment into this process, for as long as this object lives.

    Args:
        descriptor: of the file in memory, of `nbytes` bytes, which nobody can shorten: a reader would get SIGBUS. It is
            not needed any more afterwards.

    Raises:
        OSError: it cannot be mapped.
    """

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self.memory = mmap.mmap(descriptor, nbytes)
        self.nbytes = nbytes
        self._bytes: Array = np.frombuffer(self.memory, np.uint8)

    @property
    def address(self) -> int:
        """Where it begins in the memory of this process."""
        address: int = self._bytes.__array_interface__["data"][0]
        return address

    def check(self, span: Span) -> None:
        """Check that a span lies within. Raises InvalidArgument."""
        if span.offset + span.nbytes > self.nbytes:
            raise InvalidArgument(
                f"{span.nbytes} bytes from {span.offset} on are not within the {self.nbytes} of the shared memory"
            )

    def read(self, span: Span) -> Array:
        """A copy of a span, as bytes, which the other side cannot change any more. Raises InvalidArgument."""
        self.check(span)
        return self._bytes[span.offset : span.offset + span.nbytes].copy()

    def write(self, offset: int, arrays: Iterable[Array]) -> tuple[Span, ...]:
        """Copy C-contiguous arrays to where there is room for them. Returns where each lies."""
        spans = []
        for array in arrays:
            nbytes = array.nbytes
            self._bytes[offset : offset + nbytes] = np.ndarray((nbytes,), np.uint8, array)
            spans.append(Span(offset, nbytes))
            offset += aligned(nbytes)
        return tuple(spans)
