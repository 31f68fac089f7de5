"""Conversion of arrays of any library to the content of frames and back: datatype, C-contiguous little-endian memory.

torch is never imported here: a torch tensor can only come from a program that has imported it already.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnxctl.protocol.datatypes import DATATYPES, ML_DTYPES, STORAGE, Array, datatype_of, dtype_of
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.frames import view_tensors
from tnxctl.protocol.strings import encode
from tnxctl.protocol.wire import BYTES, Limits, TensorSpec
from tnxctl.strings import holds_strings, is_string_dtype, to_bytes


def to_wire(name: str, value: object) -> tuple[str, Array]:
    """The datatype of `value` and its elements as a C-contiguous array of the dtype that STORAGE gives.

    Taken are numpy arrays and scalars, torch tensors (from a GPU: copied to the host) and everything else
    with `__array__` or `__dlpack__`, of any shape. bfloat16 is taken as an `ml_dtypes` array or a torch
    tensor. The array shares the memory of `value` where that is contiguous host memory already.
    Arrays of strings (dtype object, `S`, `U`, `StringDType`), `str`, `bytes` and lists of them become BYTES.
    Other lists and Python numbers are refused, because numpy would make FP64 or INT64 of them, which is seldom meant.

    Raises:
        InvalidArgument: no array, or a dtype that has no datatype; the sentence names the input and the dtype.
    """
    array = value if type(value) is np.ndarray else to_numpy(name, value)
    datatype = DATATYPES.get(array.dtype)
    if datatype is None:
        if is_string_dtype(array.dtype):
            return BYTES, to_bytes(called(name), array)
        datatype = datatype_of(array.dtype)
        if datatype is None:
            raise _dtype_error(name, array.dtype)
        array = array.view(STORAGE[datatype])
    if not array.flags.c_contiguous:
        array = np.asarray(array, order="C")  # not ascontiguousarray: that makes an axis for an array that has none
    return datatype, array


def from_wire(datatype: str, array: Array) -> Array:
    """The array of a frame as a user expects it: what travels as bit patterns gets a dtype of `ml_dtypes`."""
    return array.view(dtype_of(datatype)) if datatype in ML_DTYPES else array


def is_array(value: object) -> bool:
    """Whether a value has a conversion to an array of its own."""
    return hasattr(value, "__array__") or hasattr(value, "__dlpack__")


def to_numpy(name: str, value: object) -> Array:
    """A numpy array of an array of any library, of whatever dtype. Raises InvalidArgument, which names the input."""
    torch: Any = sys.modules.get("torch")
    try:
        if torch is not None and isinstance(value, torch.Tensor):
            return _torch_to_numpy(torch, value)
        if isinstance(value, np.ma.MaskedArray):
            raise InvalidArgument(f"{called(name)}: a masked array would lose its mask, use .filled() or .data")
        if hasattr(value, "__array__"):
            return np.asarray(value)
        if hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
        if holds_strings(value):
            return to_bytes(called(name), value)
    except InvalidArgument:
        raise
    except Exception as error:  # whatever a foreign library raises for what it cannot export
        raise InvalidArgument(f"{called(name)}: this {_type_name(value)} gives no array: {error}") from error
    raise InvalidArgument(
        f"{called(name)}: {_type_name(value)} is not an array (it has neither __array__ nor __dlpack__): "
        f"np.asarray(x, dtype=np.float32) makes one of lists and numbers, in the datatype that the model takes, and "
        f"Client.cast does that by the model's signature"
    )


def _torch_to_numpy(torch: Any, tensor: Any) -> Array:
    """`force` detaches, copies from a device and resolves lazy conjugation. What numpy lacks goes as bit patterns."""
    for datatype, name in ML_DTYPES.items():
        if tensor.dtype is getattr(torch, name):
            patterns = getattr(torch, f"int{8 * tensor.dtype.itemsize}")
            return tensor.view(patterns).numpy(force=True).view(dtype_of(datatype))  # type: ignore[no-any-return]
    return tensor.numpy(force=True)  # type: ignore[no-any-return]


def _dtype_error(name: str, dtype: np.dtype[Any]) -> InvalidArgument:
    if DATATYPES.get(dtype.newbyteorder("<")) is not None:
        return InvalidArgument(
            f"{called(name)}: dtype {dtype.str} is big-endian, use .astype({dtype.newbyteorder('<').str!r})"
        )
    return InvalidArgument(f"{called(name)}: dtype {dtype} has no datatype on the wire; known are {', '.join(STORAGE)}")


def called(name: str) -> str:
    """An input as error sentences call it; the only one of a model may have no name."""
    return f"input {name!r}" if name else "the input"


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def pack(inputs: object, limits: Limits, copy: bool) -> tuple[tuple[TensorSpec, ...], list[Array], int]:
    """Specs, frames and total bytes of the inputs that a user gave to `predict`.

    Args:
        inputs: one array, or a mapping of names to arrays.
        copy: whether the frames must not share memory with what was given.

    Raises:
        InvalidArgument: an array that cannot be sent, or more bytes than the limits allow.
    """
    named = inputs if isinstance(inputs, Mapping) else {"": inputs}
    if not named:
        raise InvalidArgument("0 inputs, expected at least 1")  # and the daemon says if that is too many for the model
    specs = []
    arrays = []
    nbytes = elements = 0
    for name, value in named.items():
        if not isinstance(name, str):
            raise InvalidArgument(f"input name {name!r} is not a string")
        datatype, array = to_wire(name, value)
        specs.append(TensorSpec(name, datatype, array.shape))
        if datatype == BYTES:
            elements += array.size
            array = _encoded(name, array)
        elif copy:
            array = array.copy()
        arrays.append(array)
        nbytes += array.nbytes
    if elements and elements > limits.strings:
        raise InvalidArgument(f"the inputs have {elements} strings, more than the limit of {limits.strings}")
    if nbytes > limits.message_bytes:
        raise InvalidArgument(f"the inputs have {nbytes} bytes, more than the limit of {limits.message_bytes}")
    return tuple(specs), arrays, nbytes


def _encoded(name: str, array: Array) -> Array:
    try:
        return encode(array)
    except ValueError as error:
        raise InvalidArgument(f"{called(name)}: {error}") from None


def unpack(specs: Sequence[TensorSpec], frames: Sequence[bytes], limits: Limits) -> dict[str, Array]:
    """Outputs by name. Raises InvalidArgument if the frames are not what the specs say."""
    arrays = view_tensors(specs, frames, limits)
    outputs = {spec.name: from_wire(spec.datatype, array) for spec, array in zip(specs, arrays, strict=True)}
    if len(outputs) != len(arrays):
        raise InvalidArgument(f"several outputs have the same name: {[spec.name for spec in specs]}")
    return outputs
