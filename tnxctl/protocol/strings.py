"""Strings and blobs: BYTES tensors, in memory and in frames.

**In memory** a BYTES tensor is a numpy array of dtype object, C-contiguous, and each element is a `bytes`. That holds
everywhere: in the client, in the daemon, and for what a model gets and returns.

**In a frame** its elements follow each other in C order, each as its length (4 bytes, unsigned, little-endian) and then
its bytes: the layout of the Open Inference Protocol, so that a bridge to it copies frames as they are. A table of
lengths before one buffer is quicker for a thousand strings and slower for one: docs/performance.md has the figures.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

OBJECT: np.dtype[Any] = np.dtype(object)
"""numpy dtype that holds it. Never make such an array over a buffer: numpy would take what is in it for pointers."""

_LENGTH = struct.Struct("<I")

LENGTH_BYTES = _LENGTH.size
"""Bytes of a frame that an element takes beside its own."""

_OVERHEAD = 56  # of CPython on 64 bits: 8 of the array, 33 of the object, and what rounds it up to 16

# From this mean length on, elements are copied one by one. Shorter ones are quicker to cut out of one copy of all.
_LONG = 1024


def array_of(elements: Sequence[Any], shape: tuple[int, ...]) -> Array:
    """An array of these elements, in C order. numpy by itself would look into sequences among them."""
    array = np.empty(len(elements), OBJECT)
    array[:] = elements
    return array.reshape(shape)


def elements_of(array: Array) -> list[Any]:
    """The elements of an array in C order."""
    elements: list[Any] = array.ravel().tolist()
    return elements


def encode(array: Array) -> Array:
    """The frame of a BYTES tensor, as an array of bytes.

    Raises:
        ValueError: an element has 4 GiB or more.
    """
    elements = elements_of(array)
    parts: list[bytes] = [b""] * (2 * len(elements))
    try:
        parts[::2] = map(_LENGTH.pack, map(len, elements))
    except struct.error:
        raise ValueError(f"an element of {max(map(len, elements))} bytes is too long, at most are 4294967295") from None
    parts[1::2] = elements
    return np.frombuffer(b"".join(parts), np.uint8)


def decode(frame: memoryview, shape: tuple[int, ...]) -> Array:
    """The BYTES tensor of a frame.

    It takes some 60 bytes for each element beside its own, and the frame once more for a moment. No length that lies
    makes it take more.

    Args:
        frame: contiguous bytes. shape: of which no length is negative.

    Raises:
        ValueError: lengths in the frame do not add up; the sentence names the element. Or numpy has no such shape.
    """
    count, size = math.prod(shape), frame.nbytes
    if LENGTH_BYTES * count > size:
        raise ValueError(
            f"{count} elements take at least {LENGTH_BYTES * count} bytes, {LENGTH_BYTES} for the length of each, "
            f"and its frame has {size}"
        )
    array = np.empty(shape, OBJECT)
    short = size < _LONG * count
    data: Any = frame.tobytes() if short else frame
    unpack = _LENGTH.unpack_from
    elements = []
    at = 0
    try:
        for _ in range(count):
            start = at + LENGTH_BYTES
            at = start + unpack(data, at)[0]
            elements.append(data[start:at])
    except struct.error:  # an element before this one ends beyond the frame
        at = -1
    if at != size:
        raise ValueError(_fault(frame, count))
    array.reshape(-1)[:] = elements if short else [element.tobytes() for element in elements]
    return array


def _fault(frame: memoryview, count: int) -> str:
    """Mistake in the lengths in a frame, in words."""
    at = 0
    for index in range(count):
        left = frame.nbytes - at - LENGTH_BYTES
        if left < 0:
            return f"its frame ends before the length of element {index} of {count}"
        (length,) = _LENGTH.unpack_from(frame, at)
        if length > left:
            return f"element {index} of {count} says that it has {length} bytes, and {left} are left of its frame"
        at += LENGTH_BYTES + length
    return f"its {count} elements take {at} bytes, its frame has {frame.nbytes}"


def nbytes_of(array: Array) -> int:
    """Bytes of memory that a tensor of any datatype takes: for BYTES, those of its elements and of their objects."""
    if not array.dtype.hasobject:
        return array.nbytes
    elements = elements_of(array)
    return sum(map(len, elements)) + _OVERHEAD * len(elements)


def odd_type(array: Array) -> str:
    """The name of a type among the elements of an object array that is not `bytes`; "": there is none."""
    odd = set(map(type, elements_of(array))) - {bytes}
    return odd.pop().__name__ if odd else ""


def not_text(array: Array) -> str:
    """The first element of a BYTES tensor that is not UTF-8, in words; "": all are."""
    elements = elements_of(array)
    try:
        # All at once: no character goes on behind a zero, which is one itself.
        b"\0".join(elements).decode()
    except UnicodeDecodeError:
        for index, element in enumerate(elements):
            try:
                element.decode()
            except UnicodeDecodeError as error:
                what = place_of(index, array.shape)
                return f"{what} is not UTF-8: byte {element[error.start]:#04x} at {error.start}, {error.reason}"
    return ""


def place_of(index: int, shape: tuple[int, ...]) -> str:
    """An element in error sentences: its row, and its place where a row has several. Args: index: in C order."""
    if not shape:
        return "its element"
    place = [int(axis) for axis in np.unravel_index(index, shape)]
    return f"row {place[0]}" if math.prod(shape[1:]) == 1 else f"element {place} of row {place[0]}"


def as_text(array: Array) -> Array:
    """The elements of a BYTES tensor decoded as UTF-8: an object array of `str`. Raises UnicodeDecodeError."""
    return array_of([element.decode() for element in elements_of(array)], array.shape)
