"""Strings of any kind as BYTES tensors: arrays of str or bytes, numpy's own string dtypes, lists.

`tnxctl.protocol.strings` says what a BYTES tensor is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.strings import OBJECT, Array, array_of, elements_of, place_of

_PLAIN = {bytes}

_MOST_AXES = 64
"""Most axes of an array of numpy."""


def holds_strings(value: object) -> bool:
    """Whether a value is a string or a blob, or lists that begin with one."""
    for _ in range(_MOST_AXES):  # a list may be its own first element
        if not isinstance(value, list | tuple) or not value:
            break
        value = value[0]
    return isinstance(value, str | bytes)


def is_string_dtype(dtype: np.dtype[Any]) -> bool:
    """Whether a numpy array may hold strings: dtype object, `S`, `U`, or `StringDType` of numpy 2."""
    return dtype.kind in "OSUT"


def to_bytes(called: str, value: object) -> Array:
    """An array of strings, or lists of them, as a BYTES tensor. A `str` becomes UTF-8.

    numpy's `S` drops the zero bytes at the end of each element; nothing else changes a blob.

    Args:
        called: what to call it in errors. value: an array of a dtype with strings, a string, or lists of them.

    Raises:
        InvalidArgument: an element is no string, or the lists differ in length; the sentence names the element.
    """
    try:
        array = np.asarray(value, OBJECT)
    except ValueError as error:
        raise InvalidArgument(f"{called}: these lists are no array: {error}") from None
    elements = elements_of(array)
    if set(map(type, elements)) <= _PLAIN:
        return np.asarray(array, order="C")
    return array_of(
        [
            element if type(element) is bytes else _to_bytes(called, element, index, array.shape)
            for index, element in enumerate(elements)
        ],
        array.shape,
    )


def _to_bytes(called: str, element: object, index: int, shape: tuple[int, ...]) -> bytes:
    if isinstance(element, str):
        try:
            return element.encode()
        except UnicodeEncodeError as error:  # a lone surrogate
            raise InvalidArgument(f"{called}: {place_of(index, shape)} has no UTF-8: {error.reason}") from None
    if isinstance(element, bytes | bytearray | memoryview):
        return bytes(element)
    if isinstance(element, list | tuple):
        raise InvalidArgument(f"{called}: {place_of(index, shape)} is a list: the lists differ in length or in depth")
    raise InvalidArgument(
        f"{called}: {place_of(index, shape)} is {type(element).__name__}, not str or bytes (objects that are numbers, "
        f"as in a DataFrame of mixed columns, become an array of those by .astype(np.float32))"
    )
