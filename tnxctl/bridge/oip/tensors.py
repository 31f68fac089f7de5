"""Tensors of the Open Inference Protocol <-> the arrays of `tnxctl`. Both have the same datatypes, by the same names.

Binary tensors are views of the buffer that they came in. Values in JSON are taken only if the datatype holds them:
nothing wraps, is cut or becomes infinite.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np

from tnxctl.protocol import datatypes, strings
from tnxctl.protocol.datatypes import STORAGE, Array
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.fields import BYTES, TensorSpec
from tnxctl.protocol.frames import view_tensors
from tnxctl.protocol.limits import MAX_RANK, Limits, excerpt
from tnxctl.strings import to_bytes
from tnxctl.tensors import from_wire, to_wire

_MOST_CLASSIFIED = 1_000_000
"""Most elements of an output that is classified, as Triton has it: to sort more keeps the event loop too long."""

_BITS_CHECKED = 32
"""Bits of the largest integers whose range msgspec can check; numpy itself refuses what exceeds 64."""


class Encoded(NamedTuple):
    """One output, ready to be sent. Attributes: chunk: its bytes, contiguous; a view of the array but for BYTES."""

    datatype: str
    shape: tuple[int, ...]
    chunk: memoryview


def from_binary(name: str, datatype: str, shape: Sequence[int], buffer: memoryview, limits: Limits) -> Array:
    """The array of a binary tensor, without a copy: it looks into the buffer. BYTES alone is copied.

    Raises:
        InvalidArgument: datatype, shape and length of the buffer do not agree, the lengths in a BYTES tensor lie, or a
            limit does not hold; the sentence names the tensor.
    """
    (array,) = view_tensors((TensorSpec(name, datatype, tuple(shape)),), (buffer,), limits)
    return from_wire(datatype, array)


def from_json(name: str, datatype: str, shape: Sequence[int], data: object) -> Array:
    """The array of a tensor in JSON.

    Args:
        data: its elements, decoded: one list of all in C order, or lists nested as the shape says. Strings for BYTES,
            true and false for BOOL, numbers for all others.

    Raises:
        InvalidArgument: data, datatype and shape do not agree; the sentence names the tensor.
    """
    kind = _ELEMENTS.get(datatype)
    if kind is None:
        raise InvalidArgument(
            f"input {excerpt(name)}: unknown datatype {excerpt(datatype)}, known are {', '.join(STORAGE)}"
        )
    depth = _depth(data)
    try:
        array = _array(name, datatype, msgspec.convert(data, _nested(kind, depth)))
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"input {excerpt(name)}: its data is no {datatype}: {error}") from None
    except (ValueError, OverflowError, ArithmeticError) as error:  # ragged lists, or what is too large for a datatype
        raise InvalidArgument(f"input {excerpt(name)}: no {datatype} can be made of its data: {error}") from None
    shape = tuple(shape)
    if array.shape != shape and (depth > 1 or array.size != math.prod(shape)):
        raise InvalidArgument(
            f"input {excerpt(name)}: its data has the shape {[*array.shape]}, which is neither "
            f"{excerpt([*shape])} nor one list of all its elements"
        )
    try:
        return array.reshape(shape)
    except ValueError as error:  # a length of 0 beside others that no array can have
        raise InvalidArgument(f"input {excerpt(name)}: shape {excerpt([*shape])}: {error}") from None


def encoded(name: str, array: Array) -> Encoded:
    """An output in binary. Raises InvalidArgument: an element of a BYTES tensor is too long."""
    datatype, stored = to_wire(name, array)
    if datatype == BYTES:
        try:
            stored = strings.encode(stored)
        except ValueError as error:
            raise InvalidArgument(f"output {name!r}: {error}") from None
    return Encoded(datatype, array.shape, stored.reshape(-1).view(np.uint8).data)


def to_json(name: str, array: Array) -> tuple[str, msgspec.Raw]:
    """The datatype of an output, and its elements as one list in JSON, in C order.

    Numbers that are not finite are written NaN, Infinity and -Infinity, as Triton and Python's json write them, since
    JSON itself has nothing for them.

    Raises:
        InvalidArgument: an element of a BYTES tensor is not UTF-8, so that only binary data can hold it.
    """
    datatype = datatypes.datatype_of(array.dtype)
    assert datatype is not None, "a model's outputs have datatypes"
    if datatype == BYTES:
        fault = strings.not_text(array)
        if fault:
            raise InvalidArgument(f"output {name!r}: {fault}; ask for it with binary_data")
        return datatype, msgspec.Raw(msgspec.json.encode(strings.elements_of(strings.as_text(array))))
    if _ELEMENTS[datatype] is not float:
        return datatype, msgspec.Raw(msgspec.json.encode(array.ravel().tolist()))
    numbers = array.ravel() if datatype not in datatypes.ML_DTYPES else array.ravel().astype(np.float32)
    if np.isfinite(numbers).all():
        return datatype, msgspec.Raw(msgspec.json.encode(numbers.tolist()))
    return datatype, msgspec.Raw(json.dumps(numbers.tolist(), separators=(",", ":")).encode())


def classified(name: str, array: Array, classes: int, batches: bool) -> Array:
    """The largest elements of an output as a BYTES tensor of "value:index", the largest first, as Triton gives them.

    Args:
        classes: how many of each row; all if there are fewer.
        batches: whether axis 0 counts rows. Otherwise the whole output counts as one.

    Raises:
        InvalidArgument: the output has no numbers, or too many.
    """
    datatype = datatypes.datatype_of(array.dtype)
    if datatype in (BYTES, "BOOL"):
        raise InvalidArgument(f"output {name!r} is {datatype}, and only numbers can be classified")
    if array.size > _MOST_CLASSIFIED:
        raise InvalidArgument(
            f"output {name!r} has {array.size} elements, and at most {_MOST_CLASSIFIED} can be classified"
        )
    batches = batches and array.ndim > 0
    rows = array.shape[0] if batches else 1
    values = array.reshape(rows, math.prod(array.shape[1:]) if batches else array.size)
    last = values.shape[1] - 1
    ascending = np.argsort(values[:, ::-1], axis=1, kind="stable")  # backwards, so that of equals the first comes first
    order = last - ascending[:, ::-1][:, :classes]
    spell = str if array.dtype.kind in "iu" else "{:f}".format  # std::to_string
    found = [
        f"{spell(row[index])}:{index}".encode()
        for row, indices in zip(values.tolist(), order.tolist(), strict=True)
        for index in indices
    ]
    return strings.array_of(found, order.shape if batches else order.shape[1:])


def _element_type(datatype: str) -> Any:
    if datatype == BYTES:
        return str
    kind = STORAGE[datatype].kind
    if kind == "b":
        return bool
    if kind == "f" or datatype in datatypes.ML_DTYPES:
        return float
    if STORAGE[datatype].itemsize * 8 > _BITS_CHECKED:
        return int
    bounds = np.iinfo(STORAGE[datatype])
    return Annotated[int, msgspec.Meta(ge=int(bounds.min), le=int(bounds.max))]


_ELEMENTS = {datatype: _element_type(datatype) for datatype in STORAGE}


def _depth(data: object) -> int:
    """Depth of nested lists, going by the first elements; 1 at least, for what has to be a list."""
    depth = 0
    while isinstance(data, list) and depth < MAX_RANK:
        depth += 1
        data = data[0] if data else None
    return max(depth, 1)


def _nested(kind: Any, depth: int) -> Any:
    for _ in range(depth):
        kind = list[kind]
    return kind


def _array(name: str, datatype: str, data: list[Any]) -> Array:
    if datatype == BYTES:
        return to_bytes(f"input {excerpt(name)}", data)
    dtype = datatypes.dtype_of(datatype)
    if _ELEMENTS[datatype] is not float:
        return np.array(data, dtype)
    with np.errstate(over="raise"):
        return np.array(data, np.float64).astype(dtype, copy=False)
