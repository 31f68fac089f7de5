"""Tensor frames of a message <-> numpy arrays, without a copy; `wire` has the headers before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tnxctl.protocol import strings
from tnxctl.protocol.datatypes import STORAGE, Array
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.fields import TensorSpec
from tnxctl.protocol.limits import MAX_DIM, Limits, excerpt

if TYPE_CHECKING:
    from typing_extensions import Buffer
else:
    Buffer = Any  # which is in collections.abc from Python 3.12 on: a name for who looks at signatures at run time

_BOOL = STORAGE["BOOL"]


def view_tensors(specs: Sequence[TensorSpec], frames: Sequence[Buffer], limits: Limits) -> tuple[Array, ...]:
    """Tensor frames as arrays of the declared shapes, without a copy: each array keeps its frame alive.

    Their dtypes are those of `STORAGE`: what numpy lacks comes as bit patterns. The arrays may be unaligned and must
    not be written. BYTES alone is copied, see `tnxctl.protocol.strings`.

    Raises:
        InvalidArgument: a count, datatype, rank, dimension, length or limit does not hold; the sentence names it.
    """
    if len(specs) != len(frames):
        raise InvalidArgument(f"the header announces {len(specs)} tensors, {len(frames)} tensor frames came")
    if len(specs) > limits.tensors:
        raise InvalidArgument(f"{len(specs)} tensors in one message, more than the limit of {limits.tensors}")
    room, elements = limits.message_bytes, limits.strings
    arrays = []
    for position, spec in enumerate(specs):
        dtype = STORAGE.get(spec.datatype)
        if dtype is None:
            raise InvalidArgument(
                f"{_called(spec.name)}: unknown datatype {excerpt(spec.datatype)}, known are {', '.join(STORAGE)}"
            )
        shape = spec.shape
        if len(shape) > limits.rank:  # first: the product of thousands of large dimensions takes long
            raise InvalidArgument(f"{_called(spec.name)}: rank {len(shape)} is more than the limit of {limits.rank}")
        size = dtype.itemsize * math.prod(shape)  # Python integers: no overflow, whatever the dimensions
        view = memoryview(frames[position])
        if dtype.hasobject:  # over a frame, such an array would take its bytes for pointers
            arrays.append(_strings(spec, view, room, elements, limits))
            room -= view.nbytes
            elements -= arrays[-1].size
            continue
        if size != view.nbytes or size > room:
            raise _tensor_error(spec, size, view.nbytes, room, limits)
        room -= size
        try:
            array: Array = np.ndarray(shape, dtype, view)
        except (ValueError, OverflowError, MemoryError) as error:
            if min(shape, default=0) < 0:  # two of them give a size that may well be right
                raise _tensor_error(spec, size, view.nbytes, room, limits) from None
            # Zero rows with another axis beyond numpy's range.
            raise InvalidArgument(f"{_called(spec.name)}: shape {excerpt(list(shape))}: {error}") from None
        if dtype is _BOOL and size and array.view(np.uint8).max() > 1:
            raise InvalidArgument(
                f"{_called(spec.name)}: byte {array.view(np.uint8).max()} is not a BOOL, which is 0 or 1"
            )
        arrays.append(array)
    return tuple(arrays)


def _strings(spec: TensorSpec, view: memoryview, room: int, most: int, limits: Limits) -> Array:
    """The array of a BYTES frame. Args: room: bytes left for the message. most: elements left for it."""
    count = math.prod(spec.shape)
    if min(spec.shape, default=0) < 0 or view.nbytes > room:
        raise _tensor_error(spec, view.nbytes, view.nbytes, room, limits)
    if count > most:
        raise InvalidArgument(
            f"{_called(spec.name)}: {count} elements (BYTES {excerpt(list(spec.shape))}) are more than the {most} that "
            f"are left of the limit of {limits.strings} strings for all tensors of a message"
        )
    try:
        return strings.decode(view, spec.shape)
    except (ValueError, OverflowError, MemoryError) as error:
        raise InvalidArgument(f"{_called(spec.name)}: BYTES {excerpt(list(spec.shape))}: {error}") from None


def _tensor_error(spec: TensorSpec, size: int, received: int, room: int, limits: Limits) -> InvalidArgument:
    name, shape = _called(spec.name), excerpt(list(spec.shape))
    for dim in spec.shape:
        if not 0 <= dim <= MAX_DIM:
            return InvalidArgument(f"{name}: dimension {dim} of shape {shape} is outside 0..{MAX_DIM}")
    if size > room:
        return InvalidArgument(
            f"{name}: {size} bytes ({spec.datatype} {shape}) are more than the {room} that are left "
            f"of the limit of {limits.message_bytes} bytes for all tensors of a message"
        )
    return InvalidArgument(f"{name}: {spec.datatype} {shape} takes {size} bytes, its frame has {received}")


def _called(name: str) -> str:
    """A tensor in error sentences; the only input of a model may have no name."""
    return f"tensor {excerpt(name)}" if name else "the tensor"
