"""BYTES tensors: what becomes one, frames and back, and text of them. `tests/test_served_strings.py` has the daemon."""

from __future__ import annotations

import math
import struct
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnxctl import Result
from tnxctl.casting import cast
from tnxctl.protocol import strings, wire
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.frames import view_tensors
from tnxctl.protocol.wire import BYTES, Limits, TensorSpec
from tnxctl.tensors import pack, to_wire, unpack

LIMITS = Limits()

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
elements = st.binary(max_size=12) | st.sampled_from([b"", b"\0", b"\xff" * 3, bytes(3000)])


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = draw(shapes)
    count = math.prod(shape)
    return strings.array_of(draw(st.lists(elements, min_size=count, max_size=count)), shape)


@settings(max_examples=200)
@given(st.lists(arrays(), min_size=1, max_size=3), st.booleans())
def test_what_is_packed_comes_back(given_arrays: list[np.ndarray], copy: bool) -> None:
    named = {f"x{index}": array for index, array in enumerate(given_arrays)}
    specs, frames, nbytes = pack(named, LIMITS, copy)
    assert nbytes == sum(frame.nbytes for frame in frames)
    outputs = unpack(specs, [frame.tobytes() for frame in frames], LIMITS)
    for name, array in named.items():
        assert outputs[name].dtype == object
        assert outputs[name].shape == array.shape
        assert outputs[name].flags.c_contiguous
        assert outputs[name].tolist() == array.tolist()
        assert all(type(element) is bytes for element in outputs[name].flat)


@settings(max_examples=300)
@given(st.data())
def test_damaged_frames_are_refused_or_are_what_they_say(data: st.DataObject) -> None:
    array = data.draw(arrays())
    frame = bytearray(strings.encode(array).tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(frame)))
        frame[at : at + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=5))
    spec = TensorSpec("t", BYTES, data.draw(st.just(array.shape) | shapes))
    said = ""
    try:
        (read,) = view_tensors([spec], [bytes(frame)], LIMITS)
    except InvalidArgument as error:
        said = error.message
    if said:
        assert "tensor 't'" in said
        assert said.isprintable()
    else:
        assert read.shape == spec.shape
        assert strings.encode(read).tobytes() == frame


def test_long_elements_and_short_ones_are_read_alike() -> None:
    for size in (1, 1023, 1024, 5000):
        (array,) = view_tensors(
            [TensorSpec("t", BYTES, (2,))], [struct.pack("<I", size) + bytes(size) + bytes(4)], LIMITS
        )
        assert array.tolist() == [bytes(size), b""]


def test_a_frame_of_many_lies_takes_no_more_memory_than_it_has() -> None:
    """Each element of a million would be half a megabyte of a frame, which is read once."""
    count = Limits().strings
    frame = struct.pack("<I", 1 << 19) * (1 << 18)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument, match="element"):
            view_tensors([TensorSpec("t", BYTES, (count,))], [frame], LIMITS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(frame) + 60 * count


def test_the_size_of_elements_includes_their_objects() -> None:
    array = strings.array_of([b"x" * size for size in range(300)], (3, 100))
    taken = sum(map(sys.getsizeof, array.flat)) + array.nbytes
    assert taken <= strings.nbytes_of(array) < taken + 16 * array.size
    assert strings.nbytes_of(np.zeros(3)) == 24


# --- what becomes one --------------------------------------------------------------------------------------------

WORDS = [[b"a", "wölf".encode()], [b"", b"b c"]]
TEXT = [["a", "wölf"], ["", "b c"]]


def taken(value: Any) -> Any:
    datatype, array = to_wire("x", value)
    assert datatype == BYTES
    assert array.flags.c_contiguous
    return array.tolist()


@pytest.mark.parametrize(
    "value",
    [
        TEXT,
        tuple(map(tuple, TEXT)),
        WORDS,
        [["a", "wölf".encode()], [b"", "b c"]],
        np.array(TEXT),
        np.array(TEXT, object),
        np.array(WORDS),
        np.array(WORDS, object),
        np.array(TEXT, ">U4"),
        np.array(TEXT, object, order="F"),
    ],
    ids=["str", "tuples", "bytes", "both", "U", "object str", "S", "object bytes", "big-endian", "Fortran"],
)
def test_strings_of_all_kinds_are_taken(value: Any) -> None:
    assert taken(value) == WORDS
    signature = wire.ModelInfo(name="m", version="1", status="ready", inputs=(TensorSpec("x", BYTES, (-1, 2)),))
    assert cast(value, signature)[""].tolist() == WORDS


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="numpy 1 has none")
def test_numpys_own_strings_are_taken() -> None:
    assert taken(np.array(TEXT, np.dtypes.StringDType())) == WORDS
    missing = np.array(["a", None], np.dtypes.StringDType(na_object=None))
    with pytest.raises(InvalidArgument, match="input 'x': row 1 is NoneType, not str or bytes"):
        to_wire("x", missing)


def test_one_string_is_a_scalar() -> None:
    assert [taken(value) for value in ("é", b"\0", np.str_("a"), np.array("a", object))] == [
        "é".encode(),
        b"\0",
        b"a",
        b"a",
    ]
    assert taken(strings.array_of([bytearray(b"a"), memoryview(b"b"), np.bytes_(b"c")], (3,))) == [b"a", b"b", b"c"]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (["a", 1], "row 1 is int, not str or bytes"),
        ([["a"], ["b", "c"]], "row 0 is a list: the lists differ in length or in depth"),
        (np.array(["a", None], object), "row 1 is NoneType"),
        (np.array([["a", 1.5]], object), "element [0, 1] of row 0 is float"),
        (["\ud800"], "row 0 has no UTF-8"),
        (np.array(1, object), "its element is int"),
    ],
)
def test_what_is_no_string_is_named(value: Any, why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        to_wire("x", value)
    assert caught.value.message.startswith("input 'x': ")
    assert why in caught.value.message


@pytest.mark.timeout(20)
def test_a_list_in_itself_is_no_string() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(InvalidArgument, match="list is not an array"):
        to_wire("x", value)


def test_numbers_are_not_made_strings_nor_strings_numbers() -> None:
    signature = wire.ModelInfo(
        name="m", version="1", status="ready", inputs=(TensorSpec("x", BYTES, (-1,)), TensorSpec("y", "FP32", (-1,)))
    )
    with pytest.raises(InvalidArgument, match="input 'x': dtype int64 holds no strings"):
        cast({"x": np.array([1])}, signature)
    with pytest.raises(InvalidArgument, match="input 'x': row 0 is int, not str or bytes"):
        cast({"x": [1, "a"]}, signature)
    with pytest.raises(InvalidArgument, match="input 'y': dtype <U1 holds no numbers"):
        cast({"y": ["1"]}, signature)
    assert cast({"x": []}, signature)["x"].tolist() == []


def test_the_inputs_as_they_are_now() -> None:
    array = np.array([b"a"], object)
    _, (frame,), _ = pack(array, LIMITS, copy=False)
    array[0] = b"b"
    assert frame.tobytes() == b"\1\0\0\0a"


def test_too_many_strings_and_too_many_bytes_are_not_sent() -> None:
    with pytest.raises(InvalidArgument, match="the inputs have 3 strings, more than the limit of 2"):
        pack({"x": ["a", "b"], "y": ["c"]}, Limits(strings=2), copy=False)
    with pytest.raises(InvalidArgument, match="the inputs have 1025 bytes, more than the limit of 1024"):
        pack("x" * 1021, Limits(message_bytes=1024), copy=False)


# --- text --------------------------------------------------------------------------------------------------------


def result(**outputs: np.ndarray) -> Result:
    timing = wire.Timing(*[0.0] * 8)
    return Result(
        outputs=outputs,
        model="m",
        version="1",
        device="cpu",
        reason="",
        batch_size=1,
        latency_ms=0.0,
        gpu_memory_mb=0.0,
        timing=timing,
    )


def test_text_of_a_result() -> None:
    words = strings.array_of([b"a", "é".encode(), b"", b"\0"], (2, 2))
    assert result(y=words).text().tolist() == [["a", "é"], ["", "\0"]]
    assert result(y=words, z=np.zeros(1)).text("y").tolist() == [["a", "é"], ["", "\0"]]


@pytest.mark.parametrize(
    ("outputs", "name", "why"),
    [
        ({"y": np.zeros(2, "f4")}, None, "the output is float32, and only BYTES can be text"),
        ({"y": strings.array_of([b"a", b"\xff"], (2,))}, "y", "output 'y': row 1 is not UTF-8: byte 0xff at 0"),
        ({"y": strings.array_of([b"\xc3", b"\xa9"], (2,))}, None, "row 0 is not UTF-8"),  # one character, cut in two
        ({"y": np.zeros(1)}, "z", "model 'm' has no output 'z', only ['y']"),
        ({"y": np.zeros(1), "z": np.zeros(1)}, None, "has 2 outputs"),
    ],
)
def test_what_is_no_text_is_named(outputs: dict[str, np.ndarray], name: str | None, why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        result(**outputs).text(name)
    assert why in caught.value.message
