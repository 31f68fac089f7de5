"""Inference requests of the Open Inference Protocol: what a body says, and the bodies that answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tnxctl.bridge.bodies import Budget
from tnxctl.bridge.oip import infer
from tnxctl.bridge.oip.shared_memory import Regions
from tnxctl.protocol.errors import InvalidArgument, TensorNextError, Unimplemented
from tnxctl.protocol.limits import Limits
from tnxctl.protocol.timings import Timing
from tnxctl.protocol.wire import ModelInfo, TensorSpec
from tnxctl.results import Result

X = {"name": "x", "datatype": "FP32", "shape": [1, 2]}
IN_JSON = {**X, "data": [1, 2]}
NONE = Regions(None, Budget(0))
BINARY = {**X, "parameters": {"binary_data_size": 8}}


def read(document: Any, binary: bytes = b"") -> infer.Inference:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return infer.read(text + binary, len(text), Limits(), NONE)


def result_of(outputs: Mapping[str, Any]) -> Result:
    return Result(
        outputs=dict(outputs),
        model="net",
        version="3",
        device="cpu",
        reason="",
        batch_size=1,
        latency_ms=1.0,
        gpu_memory_mb=0.0,
        timing=Timing(*[0.0] * 8),
    )


def test_json_and_binary_inputs_in_one_body() -> None:
    first, last = np.arange(2, dtype=np.float32), np.array([[7, 8]], np.uint8)
    request = {"id": "42", "inputs": [BINARY, {**IN_JSON, "name": "y"}, {"name": "z", "datatype": "UINT8"}]}
    request["inputs"][2] |= {"shape": [1, 2], "parameters": {"binary_data_size": 2}}  # type: ignore[index]
    inference = read(request, first.tobytes() + last.tobytes())
    assert inference.id == "42"
    assert {name: array.tolist() for name, array in inference.inputs.items()} == {
        "x": [[0, 1]],
        "y": [[1, 2]],
        "z": [[7, 8]],
    }
    assert (inference.arguments, inference.outputs, inference.binary) == ({}, (), False)


def test_parameters_become_arguments() -> None:
    parameters = {
        "priority": 1,
        "timeout": 250_000,
        "device": "cpu",
        "route_key": "k",
        "min_gpu_memory_mb": 5,
        "prefer_gpu": False,
        "sequence_id": 7,
        "sequence_start": True,
        "sequence_end": False,
        "mine": [1],
        "binary_data_output": True,
    }
    inference = read({"inputs": [IN_JSON], "parameters": parameters})
    assert inference.binary
    assert inference.arguments == {
        "priority": 0,
        "deadline": 0.25,
        "timeout": 0.25,
        "device": "cpu",
        "route_key": "k",
        "min_gpu_memory_mb": 5,
        "prefer_gpu": False,
    }
    assert infer.predict_arguments({"priority": 0, "timeout": 0}) == {}
    assert infer.predict_arguments({"priority": 4}) == {"priority": 3}


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"priority": 5}, "'priority' is 5: expected 1"),
        ({"priority": -1}, "'priority' is -1"),
        ({"priority": "1"}, "'priority' is '1'"),
        ({"priority": True}, "'priority' is True"),
        ({"timeout": 1.5}, "'timeout' is 1.5"),
        ({"timeout": 1 << 70}, "'timeout' is 11805"),
        ({"triton_x": 1}, "'triton_x': names that begin with 'triton_' are reserved"),
    ],
)
def test_parameters_with_impossible_values(parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        infer.predict_arguments(parameters)


def test_outputs_say_how_they_are_wanted() -> None:
    outputs = [
        {"name": "a"},
        {"name": "b", "parameters": {"binary_data": False}},
        {"name": "c", "parameters": {"classification": 3, "binary_data": True}},
    ]
    inference = read({"inputs": [IN_JSON], "outputs": outputs, "parameters": {"binary_data_output": True}})
    assert inference.outputs == (("a", True, 0, None), ("b", False, 0, None), ("c", True, 3, None))
    assert inference.classifies


@pytest.mark.parametrize(
    ("document", "binary", "error", "says"),
    [
        (b"", b"", InvalidArgument, "no inference request"),
        (b"not json", b"", InvalidArgument, "malformed"),
        (b"[]", b"", InvalidArgument, "Expected `object`"),
        (b'"\xff"', b"", InvalidArgument, "no inference request"),
        (b"{}", b"", InvalidArgument, "missing required field `inputs`"),
        (b'{"inputs": [{"data": ' + b"[" * 200_000, b"", InvalidArgument, "too deep"),
        (b'{"inputs": [], "x": NaN' + b"[" * 200_000, b"", InvalidArgument, "no inference request"),
        (b'{"x": NaN, "inputs": ' + b"[" * 200_000, b"", InvalidArgument, "too deep"),
        (b'{"inputs": [], "x": NaN, "id": "\\ud800"}', b"", InvalidArgument, "surrogates not allowed"),
        (b'{"inputs": [], "x": NaN, "id": "\xed\xa0\x80"}', b"", InvalidArgument, "no inference request"),
        (b'{"inputs": [], "x": NaN, "y": 1e400}', b"", InvalidArgument, "out of range: '1e400'"),
        ({"inputs": {}}, b"", InvalidArgument, "Expected `array`"),
        ({"inputs": [IN_JSON], "id": 7}, b"", InvalidArgument, r"`\$.id`"),
        ({"inputs": [IN_JSON], "parameters": []}, b"", InvalidArgument, r"`\$.parameters`"),
        ({"inputs": [{**IN_JSON, "shape": [-1, 2]}]}, b"", InvalidArgument, r">= 0 - at `\$.inputs\[0\].shape\[0\]`"),
        ({"inputs": [{**IN_JSON, "shape": [1.0, 2]}]}, b"", InvalidArgument, "Expected `int`"),
        ({"inputs": [{**IN_JSON, "shape": [1] * 65}]}, b"", InvalidArgument, "length <= 64"),
        ({"inputs": [X]}, b"", InvalidArgument, "'x': expected either data or a parameter binary_data_size"),
        ({"inputs": [{**IN_JSON, **BINARY}]}, bytes(8), InvalidArgument, "'x': expected either"),
        ({"inputs": [IN_JSON, IN_JSON]}, b"", InvalidArgument, "two inputs have the name 'x'"),
        ({"inputs": [BINARY]}, bytes(7), InvalidArgument, "binary_data_size of 8, and 7 bytes are left"),
        ({"inputs": [BINARY]}, bytes(9), InvalidArgument, "ends 1 bytes before the body does"),
        ({"inputs": [{**BINARY, "shape": [1, 3]}]}, bytes(8), InvalidArgument, r"takes 12 bytes, its frame has 8"),
        ({"inputs": [{**BINARY, "datatype": "FP31"}]}, bytes(8), InvalidArgument, "unknown datatype 'FP31'"),
        ({"inputs": [{**BINARY, "shape": [2**62, 2**62]}]}, bytes(8), InvalidArgument, "FP32"),
        ({"inputs": [{**BINARY, "shape": [0, 2**63 - 1]}]}, bytes(8), InvalidArgument, "takes 0 bytes"),
        ({"inputs": [{**X, "parameters": {"binary_data_size": -1}}]}, b"", InvalidArgument, "binary_data_size' is -1"),
        ({"inputs": [{**X, "parameters": {"binary_data_size": "8"}}]}, b"", InvalidArgument, "is '8'"),
        ({"inputs": [{**X, "parameters": {"binary_data_size": 2**64}}]}, b"", InvalidArgument, "is 18446"),
        ({"inputs": [{**X, "parameters": {"shared_memory_region": "r"}}]}, b"", Unimplemented, "'x' is in shared mem"),
        (
            {"inputs": [IN_JSON], "outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]},
            b"",
            Unimplemented,
            "'y' is in shared memory",
        ),
        (
            {"inputs": [IN_JSON], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]},
            b"",
            InvalidArgument,
            "'binary_data' is 1: expected true or false",
        ),
    ],
)
def test_bodies_that_are_no_request(document: Any, binary: bytes, error: type[TensorNextError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        read(document, binary)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ([5], "says that it has 5 bytes, and 4 are left"),
        ([2**32 - 1], "says that it has 4294967295 bytes"),
        ([3], "its 1 elements take 7 bytes, its frame has 8"),
    ],
)
def test_bytes_whose_lengths_lie(lengths: list[int], says: str) -> None:
    frame = b"".join(length.to_bytes(4, "little") for length in lengths) + b"text"
    tensor = {"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(frame)}}
    with pytest.raises(InvalidArgument, match=says):
        read({"inputs": [tensor]}, frame)


def test_numbers_that_are_not_finite_are_taken_as_triton_takes_them() -> None:
    text = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [3], "data": [NaN, Infinity, -Infinity]}]}'
    np.testing.assert_array_equal(read(text).inputs["x"], [np.nan, np.inf, -np.inf])


@pytest.mark.parametrize("text", ["", "-1", "101", "ten", "1.0", "0x5", "1_0", "٣", "+5", "9" * 30, "5 5", "1e1"])
def test_length_of_the_json_that_cannot_be(text: str) -> None:
    with pytest.raises(InvalidArgument, match="expected a number of bytes from 0 to 100, the length of the body"):
        infer.header_length(text, 100)


def test_length_of_the_json() -> None:
    assert [infer.header_length(text, 100) for text in (None, "0", "100", " 7 ")] == [100, 0, 100, 7]


def model(datatype: str, *shapes: tuple[int, ...], rows: int = 8) -> ModelInfo:
    inputs = tuple(TensorSpec(f"x{place}", datatype, shape) for place, shape in enumerate(shapes))
    return ModelInfo(name="net", version="3", status="ready", inputs=inputs, max_batch_size=rows)


def test_a_body_without_json_is_one_row_of_the_only_input() -> None:
    def raw(body: bytes, info: ModelInfo) -> Any:
        inference = infer.read_raw(body, info, Limits())
        assert inference.binary
        return inference.inputs["x0"].tolist()

    assert raw(bytes([1, 2]), model("INT8", (-1, 2))) == [[1, 2]]
    assert raw(bytes([1, 2, 3]), model("INT8", (-1, -1))) == [[1, 2, 3]]
    assert raw(bytes([1, 2]), model("INT8", (-1,), rows=0)) == [1, 2]
    assert raw(b"text", model("BYTES", (-1, 1))) == [[b"text"]]
    for body, info, says in (
        (b"ab", model("INT8", (-1, 2), (-1, 2)), "has 2 inputs"),
        (b"abc", model("INT8", (-1, 2)), "takes 2 bytes, its frame has 3"),
        (b"abc", model("INT16", (-1, -1)), "takes 2 bytes, its frame has 3"),
        (b"ab", model("INT8", (-1, -1, -1)), "whose shape no length tells"),
        (b"ab", model("BYTES", (-1, 2)), "is one element"),
    ):
        with pytest.raises(InvalidArgument, match=says):
            raw(body, info)


def test_answers_in_json_and_in_binary() -> None:
    outputs = {"a": np.array([[1.5, np.nan]], np.float32), "b": np.array([[True]]), "c": np.array([[1, 9]], np.int32)}
    wanted = (infer.Output("c", False, 1), infer.Output("a", True), infer.Output("b", False))
    answer = infer.answer(infer.Inference("7", {}, {}, wanted, False), result_of(outputs), NONE, batches=True)
    assert answer.binary
    assert json.loads(answer.chunks[0]) == {
        "id": "7",
        "model_name": "net",
        "model_version": "3",
        "outputs": [
            {"name": "c", "datatype": "BYTES", "shape": [1, 1], "data": ["9:1"]},
            {"name": "a", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}},
            {"name": "b", "datatype": "BOOL", "shape": [1, 1], "data": [True]},
        ],
    }
    assert bytes(answer.chunks[1]) == outputs["a"].tobytes()


def test_an_output_that_is_named_twice_is_answered_once() -> None:
    result = result_of({"a": np.zeros((1, 2), np.float32)})
    wanted = [infer.Output("a", False, 1), infer.Output("a", True)] * 1000
    assert [output for output, _ in infer.selected(result, wanted, True)] == [infer.Output("a", True)]


def test_all_outputs_are_answered_as_the_request_says() -> None:
    outputs = {"a": np.zeros((1, 2), np.float32), "b": np.zeros((1, 3), np.int8)}
    for binary in (False, True):
        answer = infer.answer(infer.Inference("", {}, {}, (), binary), result_of(outputs), NONE)
        assert answer.binary is binary
        document = json.loads(answer.chunks[0])
        assert "id" not in document
        assert ["data" in output for output in document["outputs"]] == [not binary] * 2


def test_an_output_that_the_model_has_not() -> None:
    with pytest.raises(InvalidArgument, match=r"model 'net' has no output 'z', only \['a'\]"):
        infer.answer(infer.Inference("", {}, {}, (infer.Output("z", True),), True), result_of({"a": np.zeros(1)}), NONE)
