"""Tensors of the Open Inference Protocol: every datatype, in JSON and in binary, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tnxctl.bridge.oip import tensors
from tnxctl.protocol import strings
from tnxctl.protocol.datatypes import STORAGE, Array, dtype_of
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.limits import Limits

VALUES: dict[str, Any] = {
    "BOOL": [True, False, True, True, False, False],
    "BYTES": ["wolf", "wölf", "", "a\0b", "日本", '"'],
    **{name: [0, 1, 2, 3, 100, 127] for name in STORAGE if STORAGE[name].kind in "iu"},
    **{name: [0.5, -1.0, 2.0, 0.0, 96.0, -0.25] for name in ("FP16", "FP32", "FP64", "BF16")},
}
"""Six values of each datatype."""


def array_of(datatype: str, shape: tuple[int, ...] = (2, 3)) -> Array:
    if datatype == "BYTES":
        return strings.array_of([text.encode() for text in VALUES["BYTES"]], shape)
    return np.array(VALUES[datatype], dtype_of(datatype)).reshape(shape)


@pytest.mark.parametrize("datatype", STORAGE)
@pytest.mark.parametrize("nested", [False, True])
def test_json_of_every_datatype_comes_and_goes(datatype: str, nested: bool) -> None:
    values = VALUES[datatype]
    array = tensors.from_json("x", datatype, (2, 3), [values[:3], values[3:]] if nested else values)
    assert array.dtype == dtype_of(datatype)
    np.testing.assert_array_equal(array, array_of(datatype))
    name, text = tensors.to_json("x", array)
    assert (name, json.loads(bytes(text))) == (datatype, values)


@pytest.mark.parametrize("datatype", STORAGE)
def test_binary_of_every_datatype_comes_and_goes_as_views(datatype: str) -> None:
    datatype_, shape, chunk = tensors.encoded("x", array_of(datatype))
    assert (datatype_, shape) == (datatype, (2, 3))
    body = bytearray(b"{}") + chunk
    array = tensors.from_binary("x", datatype, (2, 3), memoryview(body)[2:], Limits())
    assert array.dtype == dtype_of(datatype)
    np.testing.assert_array_equal(array, array_of(datatype))
    if datatype != "BYTES":
        assert np.shares_memory(array.view(np.uint8), np.frombuffer(body, np.uint8))


def test_an_output_is_sent_without_a_copy() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    chunk = tensors.encoded("y", array).chunk
    assert np.shares_memory(np.frombuffer(chunk, np.uint8), array)
    assert len(chunk) == 24


@pytest.mark.parametrize("datatype", STORAGE)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
def test_tensors_without_elements(datatype: str, shape: tuple[int, ...]) -> None:
    empty = np.empty(shape, dtype_of(datatype))
    assert len(tensors.encoded("x", empty).chunk) == 0
    assert bytes(tensors.to_json("x", empty)[1]) == b"[]"
    assert tensors.from_json("x", datatype, shape, []).shape == shape
    assert tensors.from_binary("x", datatype, shape, memoryview(b""), Limits()).shape == shape


def test_nested_lists_may_be_empty() -> None:
    assert tensors.from_json("x", "FP32", (2, 0), [[], []]).shape == (2, 0)


def test_scalars_are_lists_of_one() -> None:
    assert tensors.from_json("x", "FP32", (), [2.5]).shape == ()
    assert bytes(tensors.to_json("x", np.array(2.5))[1]) == b"[2.5]"


def test_what_is_not_finite_is_written_as_triton_writes_it() -> None:
    for dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16):
        text = bytes(tensors.to_json("y", np.array([1.5, np.nan, np.inf, -np.inf], dtype))[1])
        assert text == b"[1.5,NaN,Infinity,-Infinity]"
    values = tensors.from_json("x", "FP32", (3,), [math.nan, math.inf, -math.inf])
    np.testing.assert_array_equal(values, [np.nan, np.inf, -np.inf])


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "says"),
    [
        ("FP32", (2, 3), [1, 2, 3, 4, 5], r"shape \[5\], which is neither \[2, 3\]"),
        ("FP32", (2, 3), [[1, 2], [3, 4], [5, 6]], r"shape \[3, 2\], which is neither \[2, 3\]"),
        ("FP32", (6,), [[1, 2, 3], [4, 5, 6]], r"shape \[2, 3\], which is neither \[6\]"),
        ("FP32", (2**31, 2**31, 0, 2**31), [], "array is too big"),
        ("FP32", (2, 2), [[1, 2], [3]], "inhomogeneous"),
        ("FP32", (2, 2), [[1, 2], 3], "Expected `array`, got `int`"),
        ("FP32", (1,), 1.0, "Expected `array`, got `float`"),
        ("FP32", (1,), {"a": 1}, "Expected `array`, got `object`"),
        ("FP32", (2,), [1, "2"], r"Expected `float`, got `str` - at `\$\[1\]`"),
        ("FP32", (2,), [1, None], "Expected `float`, got `null`"),
        ("FP32", (2,), [1, True], "Expected `float`, got `bool`"),
        ("FP32", (1,), [1e39], "overflow"),
        ("FP16", (1,), [65536], "overflow"),
        ("BF16", (1,), [1e300], "overflow"),
        ("FP64", (1,), [10**400], "out of range"),
        ("INT8", (1,), [128], "<= 127"),
        ("UINT8", (1,), [-1], ">= 0"),
        ("UINT16", (1,), [65536], "<= 65535"),
        ("INT32", (1,), [2**31], "<= 2147483647"),
        ("INT64", (1,), [2**63], "too large|too big"),
        ("UINT64", (1,), [2**64], "too large|too big"),
        ("UINT64", (1,), [-1], "out of bounds|negative"),
        ("INT64", (1,), [1.5], "Expected `int`, got `float`"),
        ("INT64", (1,), [True], "Expected `int`, got `bool`"),
        ("BOOL", (1,), [1], "Expected `bool`, got `int`"),
        ("BYTES", (1,), [1], "Expected `str`, got `int`"),
        ("BYTES", (1,), [["a", "b"]], r"shape \[1, 2\]"),
        ("BYTES", (2,), [["a"], ["b", "c"]], "a list|inhomogeneous|no array"),
        ("COMPLEX", (1,), [1], "unknown datatype 'COMPLEX', known are BOOL"),
        ("FP32", (10**18, 10**18), [1], "shape"),
    ],
)
def test_data_that_is_no_such_tensor_is_refused(datatype: str, shape: tuple[int, ...], data: Any, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says) as caught:
        tensors.from_json("the name", datatype, shape, data)
    assert "input 'the name'" in caught.value.message


def test_bytes_that_are_no_text_cannot_be_json() -> None:
    with pytest.raises(InvalidArgument, match=r"output .y.: row 1 is not UTF-8.*binary_data"):
        tensors.to_json("y", strings.array_of([b"a", b"\xff"], (2,)))


def test_classes_are_the_largest_of_each_row() -> None:
    values = np.array([[1, 5, 10, 4], [7, 7, 0, -1]], np.float32)
    found = tensors.classified("y", values, 2, True)
    assert found.tolist() == [[b"10.000000:2", b"5.000000:1"], [b"7.000000:0", b"7.000000:1"]]
    assert tensors.classified("y", values, 9, True).shape == (2, 4)
    assert tensors.classified("y", values, 1, False).tolist() == [b"10.000000:2"]
    assert tensors.classified("y", np.array([3, 250], np.uint8), 1, False).tolist() == [b"250:1"]
    assert tensors.classified("y", np.array([[1, 2]], ml_dtypes.bfloat16), 1, True).tolist() == [[b"2.000000:1"]]
    assert tensors.classified("y", np.zeros((0, 4), np.float32), 2, True).shape == (0, 2)


def test_strings_have_no_classes() -> None:
    with pytest.raises(InvalidArgument, match="output 'y' is BYTES"):
        tensors.classified("y", strings.array_of([b"a"], (1,)), 1, True)
