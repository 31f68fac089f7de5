"""Memory of earlier requests, which changes nothing but the time."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from tnxctl.protocol.datatypes import STORAGE
from tnxctl.protocol.errors import InvalidArgument, TensorNextError
from tnxctl.protocol.frames import view_tensors
from tnxctl.protocol.wire import Limits, TensorSpec
from tnxd.models.model import BoundInputs, Model
from tnxd.serving.input_binding import InputBinder

LIMITS = Limits()
OUTPUTS = (TensorSpec("y", "FP32", (-1, 2)),)


def served(*inputs: TensorSpec, max_batch_size: int = 8) -> Model:
    return Model("net", "1", inputs, OUTPUTS, max_batch_size, factory=lambda: None)  # type: ignore[arg-type,return-value]


IMAGE = served(TensorSpec("x", "FP32", (-1, 3)))
TOKENS = served(TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("mask", "BOOL", (-1, -1)))
TABLE = served(TensorSpec("x", "FP32", (-1, -1)))
PAIR = served(TensorSpec("a", "UINT8", (-1, 2)), TensorSpec("b", "UINT16", (-1, -1)))
EITHER = replace(
    served(
        TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("mask", "FP32", (-1, -1)), TensorSpec("x", "FP32", (-1, 3))
    ),
    optional={"mask": np.array(1, np.float32), "x": None},
)
MODELS = [IMAGE, TABLE, TOKENS, PAIR, EITHER]

_SPECS = st.sampled_from(
    [
        (TensorSpec("x", "FP32", (1, 3)),),
        (TensorSpec("", "FP32", (1, 3)),),
        (TensorSpec("", "FP32", (2, 3)),),
        (TensorSpec("x", "FP32", (0, 3)),),
        (TensorSpec("x", "INT32", (1, 3)),),
        (TensorSpec("ids", "INT64", (1, 2)), TensorSpec("mask", "BOOL", (1, 2))),
        (TensorSpec("mask", "BOOL", (1, 2)), TensorSpec("ids", "INT64", (1, 2))),
        (TensorSpec("a", "UINT8", (1, 2)), TensorSpec("b", "UINT16", (1, 1))),
        (TensorSpec("b", "UINT16", (1, 1)), TensorSpec("a", "UINT8", (1, 2))),
        (TensorSpec("b", "UINT16", (1, 4)), TensorSpec("a", "UINT8", (1, 2))),
        (TensorSpec("ids", "INT64", (1, 2)),),
        (TensorSpec("ids", "INT64", (1, 2)), TensorSpec("mask", "FP32", (1, 2))),
        (TensorSpec("x", "FP32", (1, 3)), TensorSpec("ids", "INT64", (1, 3))),
        (),
    ]
)


TEXTS = served(TensorSpec("text", "BYTES", (-1,)), TensorSpec("x", "FP32", (-1, 1)))


def test_every_string_is_looked_at_every_time() -> None:
    """The layout of a request tells nothing about the lengths of strings in the next one."""
    binder = InputBinder()
    specs = (TensorSpec("text", "BYTES", (2,)), TensorSpec("x", "FP32", (2, 1)))
    for first, second in ((b"four", b"four"), (b"three", b"3 b"), (b"", b"8 of them")):
        frame = struct.pack("<I", len(first)) + first + struct.pack("<I", len(second)) + second
        bound = binder.bind(TEXTS, specs, [frame, bytes(8)], LIMITS)
        assert bound.arrays[0] is not None
        assert bound.arrays[0].tolist() == [first, second]
        assert bound.nbytes >= sys.getsizeof(first) + sys.getsizeof(second) + 16 + 8
    with pytest.raises(InvalidArgument, match="element 0 of 2"):
        binder.bind(TEXTS, specs, [b"\xff\0\0\0" + bytes(6), bytes(8)], LIMITS)


def test_text_is_held_against_utf8_where_the_model_wants_it() -> None:
    specs = (TensorSpec("text", "BYTES", (2,)), TensorSpec("x", "FP32", (2, 1)))
    frame = struct.pack("<I", 1) + b"a" + struct.pack("<I", 1) + b"\xff"
    assert InputBinder().bind(TEXTS, specs, [frame, bytes(8)], LIMITS).rows == 2
    with pytest.raises(InvalidArgument, match=r"input 'text' takes text: row 1 is not UTF-8: byte 0xff at 0"):
        InputBinder().bind(replace(TEXTS, text=("text",)), specs, [frame, bytes(8)], LIMITS)


@st.composite
def _requests(draw: st.DrawFn) -> tuple[Model, tuple[TensorSpec, ...], list[bytes]]:
    """Mostly what fits."""
    specs = draw(_SPECS)
    model = draw(st.sampled_from([model for model in MODELS if len(model.inputs) == len(specs)] + [EITHER]))
    lengths = [STORAGE[spec.datatype].itemsize * math.prod(spec.shape) for spec in specs]
    frames = [bytes([draw(st.sampled_from([0, 1, 1, 2]))] * length) for length in lengths]
    odd = draw(st.sampled_from(["", "", "", "one more", "one less", "longer", "shorter"]))
    if odd == "one more":
        frames.append(bytes(4))
    elif frames and odd == "one less":
        frames.pop()
    elif frames and odd:
        frames[-1] = frames[-1] + b"\0" if odd == "longer" else frames[-1][1:]
    return model, specs, frames


def seen(bound: BoundInputs) -> list[object]:
    arrays = [None if array is None else (array.dtype, array.shape, array.tobytes()) for array in bound.arrays]
    return [arrays, bound.rows, bound.group, bound.nbytes]


def outcome(bind: Callable[[], BoundInputs]) -> list[object]:
    try:
        return seen(bind())
    except TensorNextError as error:
        return [type(error), error.message]


@given(st.lists(_requests(), max_size=30))
def test_inputs_are_taken_as_if_each_request_were_the_first(
    requests: list[tuple[Model, tuple[TensorSpec, ...], list[bytes]]],
) -> None:
    binder = InputBinder()
    for model, specs, frames in requests:
        remembering = outcome(partial(binder.bind, model, specs, frames, LIMITS))
        assert remembering == outcome(lambda: model.bind(specs, view_tensors(specs, frames, LIMITS)))  # noqa: B023


def test_arrays_are_views_of_the_frames_and_keep_them_alive() -> None:
    binder = InputBinder()
    specs = (TensorSpec("x", "FP32", (1, 3)),)
    for number in range(3):
        frame = zmq.Frame(np.full(3, number, np.float32).tobytes())
        (array,) = binder.bind(IMAGE, specs, [frame], LIMITS).arrays
        assert array is not None
        assert np.shares_memory(array, np.frombuffer(frame, np.float32))
        del frame
        assert array.tolist() == [[number] * 3]


@pytest.mark.parametrize("length", [0, 8, 11, 13, 24])
def test_a_frame_of_another_length_is_refused_after_many_of_the_right_one(length: int) -> None:
    binder = InputBinder()
    specs = (TensorSpec("x", "FP32", (1, 3)),)
    for _ in range(3):
        binder.bind(IMAGE, specs, [bytes(12)], LIMITS)
    with pytest.raises(InvalidArgument, match=rf"takes 12 bytes, its frame has {length}"):
        binder.bind(IMAGE, specs, [bytes(length)], LIMITS)
    assert binder.bind(IMAGE, specs, [bytes(12)], LIMITS).rows == 1


def test_every_truth_value_is_looked_at() -> None:
    binder = InputBinder()
    specs = (TensorSpec("ids", "INT64", (1, 2)), TensorSpec("mask", "BOOL", (1, 2)))
    for _ in range(2):
        binder.bind(TOKENS, specs, [bytes(16), b"\0\1"], LIMITS)
    with pytest.raises(InvalidArgument, match="byte 2 is not a BOOL"):
        binder.bind(TOKENS, specs, [bytes(16), b"\1\2"], LIMITS)


def test_what_fills_an_input_is_each_requests_own() -> None:
    binder = InputBinder()
    specs = (TensorSpec("ids", "INT64", (1, 2)),)
    for _ in range(3):
        _, mask, x = binder.bind(EITHER, specs, [bytes(16)], LIMITS).arrays
        assert x is None
        assert mask is not None
        assert mask.tolist() == [[1, 1]]
        mask += 1
