"""Casting: inputs converted to the datatypes that a model takes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from tnxctl.protocol import datatypes
from tnxctl.protocol.datatypes import STORAGE, Array
from tnxctl.protocol.errors import InvalidArgument, Unimplemented
from tnxctl.protocol.wire import BYTES, ModelInfo
from tnxctl.strings import is_string_dtype, to_bytes
from tnxctl.tensors import called, is_array, to_numpy


def cast(inputs: object, model: ModelInfo, *, exact: bool = False) -> dict[str, Array]:
    """The inputs as arrays of the datatypes in the model's signature. Inputs that it does not name stay as they are.

    Args:
        inputs: one value, or a mapping of input names to values: arrays, tensors, DataFrames, lists, numbers, strings.
        exact: refuse what a datatype cannot hold. Otherwise it becomes what numpy makes of it: fractions are cut, large
            integers wrap. Floating-point numbers are rounded in any case.

    Raises:
        InvalidArgument: a value is no array of numbers, or of strings where the model takes BYTES; the sentence names
            the input.
        Unimplemented: the signature has a datatype from the future.
    """
    named = inputs if isinstance(inputs, Mapping) else {"": inputs}
    wanted = {spec.name: spec.datatype for spec in model.inputs}
    if len(model.inputs) == 1:
        wanted[""] = model.inputs[0].datatype
    return {name: _cast(name, value, wanted.get(name), exact) for name, value in named.items()}


def dtype_of(datatype: str) -> np.dtype[Any]:
    """The numpy dtype of a datatype's values. Raises Unimplemented: a datatype from the future."""
    if datatype not in STORAGE:
        raise Unimplemented(f"the model wants datatype {datatype}, known here are {', '.join(STORAGE)}")
    return datatypes.dtype_of(datatype)


def _cast(name: str, value: object, datatype: str | None, exact: bool) -> Array:
    if datatype == BYTES and not is_array(value):  # numpy would pad lists of strings to one length
        return to_bytes(called(name), value)
    array = to_numpy(name, value) if is_array(value) else _array_of_lists(name, value)
    if datatype is None:
        return array
    if datatype == BYTES:
        if array.size and not is_string_dtype(array.dtype):
            raise InvalidArgument(f"{called(name)}: dtype {array.dtype} holds no strings, and the model takes BYTES")
        return to_bytes(called(name), array)
    if array.dtype.kind in "USTM":  # numpy would read numbers out of text, and make them of dates
        raise InvalidArgument(f"{called(name)}: dtype {array.dtype} holds no numbers, and the model takes {datatype}")
    dtype = dtype_of(datatype)
    try:
        with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
            converted = array.astype(dtype, copy=False)
            changed = exact and _changes(array, converted)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"{called(name)}: no {datatype} can be made of {array.dtype}: {error}") from None
    if changed:
        at = np.argwhere(np.atleast_1d(array != converted))[0] if dtype.kind in "iub" else ()
        which = f"{np.atleast_1d(array)[tuple(at)]!s}" if len(at) else "a number that is too large"
        raise InvalidArgument(f"{called(name)} takes {datatype}, which cannot hold {which}")
    return converted


def _changes(array: Array, converted: Array) -> bool:
    """Whether a conversion did more to the values than to round them."""
    if converted.dtype.kind in "iub":
        return not np.array_equal(array, converted)
    return array.dtype.kind in "iuf" and bool((np.isfinite(array) & ~np.isfinite(converted.astype("f8"))).any())


def _array_of_lists(name: str, value: object) -> Array:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"{called(name)}: these lists are no array: {error}") from None
