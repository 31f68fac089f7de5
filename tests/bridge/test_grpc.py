"""gRPC end to end: tritonclient, sync and asyncio, and plain stubs, against a real bridge and a real daemon."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

grpc = pytest.importorskip("grpc")
tritongrpc = pytest.importorskip("tritonclient.grpc")

import tritonclient.grpc.aio as aio
from tritonclient.utils import InferenceServerException

import grpc_bridges
import python_models
from conftest import Daemon, serving_daemon
from grpc_bridges import Stub
from tnxctl.bridge.grpc.messages import ModelInferRequest
from tnxctl.bridge.grpc.tensors import CONTENTS
from tnxctl.protocol.datatypes import STORAGE, dtype_of

VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False],
    "UINT8": [0, 255],
    "UINT16": [1, 65535],
    "UINT32": [1, 2**32 - 1],
    "UINT64": [1, 2**64 - 1],
    "INT8": [-128, 127],
    "INT16": [-32768, 1],
    "INT32": [-(2**31), 2**31 - 1],
    "INT64": [-(2**63), 2**63 - 1],
    "FP16": [-1.5, float("inf")],
    "FP32": [0.1, -3e38],
    "FP64": [1e-300, 2.5],
    "BF16": [-2.5, 384.0],
    "BYTES": [b"", b"\xff\x00 and text"],
}
"""A row of each datatype."""

ECHO = """
class Model:
    def predict(self, **inputs):
        return {"same_" + name: value for name, value in inputs.items()}
"""


def signature(prefix: str) -> str:
    specs = (f'{{ name = "{prefix}{name}", datatype = "{name}", shape = [-1, 2] }}' for name in STORAGE)
    return f"[{', '.join(specs)}]"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    root = tmp_path_factory.mktemp("grpc")
    models = root / "models"
    python_models.put(
        models, ECHO, name="echo", signature=f"inputs = {signature('')}\noutputs = {signature('same_')}\n"
    )
    python_models.put(models, python_models.DOUBLES, name="double")
    python_models.put(models, python_models.DOUBLES, name="other")
    with serving_daemon(root / "log", "--model-repository", str(models)) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def address(serving: Daemon) -> Iterator[str]:
    with grpc_bridges.serving(serving.endpoint) as address:
        yield address


@pytest.fixture(scope="module")
def triton(address: str) -> Iterator[Any]:
    with tritongrpc.InferenceServerClient(address) as client:
        yield client


@pytest.fixture(scope="module")
def stub(address: str) -> Iterator[Stub]:
    with Stub(address) as stub:
        yield stub


def array(datatype: str) -> np.ndarray:
    values = VALUES[datatype]
    return np.array([values, values[::-1]], dtype_of(datatype))


def given(name: str, values: np.ndarray, datatype: str) -> Any:
    tensor = tritongrpc.InferInput(name, list(values.shape), datatype)
    # tritonclient makes BF16 of FP32 only.
    tensor.set_data_from_numpy(values.astype(np.float32) if datatype == "BF16" else values)
    return tensor


def rows(*values: float) -> list[Any]:
    return [given("x", python_models.rows(*values), "FP32")]


def raw_request(model: str = "double", **fields: Any) -> Any:
    """A request for one row of the model, with raw contents."""
    request = ModelInferRequest(model_name=model, **fields)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    request.raw_input_contents.append(np.ones(2, np.float32).tobytes())
    return request


# --- tritonclient ----------------------------------------------------------------------------------------------


def test_health(triton: Any) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("double")
    assert triton.is_model_ready("double", "1")
    assert not triton.is_model_ready("double", "2")
    assert not triton.is_model_ready("nobody")


def test_metadata_and_configuration(triton: Any) -> None:
    server = triton.get_server_metadata()
    assert (server.name, server.version) == ("tensornext", "0.1.0")
    model = triton.get_model_metadata("double")
    assert (model.name, [*model.versions]) == ("double", ["1"])
    assert [(tensor.name, tensor.datatype, [*tensor.shape]) for tensor in model.inputs] == [("x", "FP32", [-1, 2])]
    config = triton.get_model_config("double", "1", as_json=True)["config"]
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": ["2"]}]
    assert config["max_batch_size"] > 0
    datatypes = {tensor["data_type"] for tensor in triton.get_model_config("echo", as_json=True)["config"]["input"]}
    assert datatypes == {f"TYPE_{name}" for name in STORAGE if name != "BYTES"} | {"TYPE_STRING"}


def test_every_datatype(triton: Any) -> None:
    result = triton.infer("echo", [given(name, array(name), name) for name in STORAGE], request_id="nr. 7")
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("echo", "1", "nr. 7")
    assert [(output.name, output.datatype) for output in response.outputs] == [
        (f"same_{name}", name) for name in STORAGE
    ]
    for name in STORAGE:
        got = result.as_numpy(f"same_{name}")
        np.testing.assert_array_equal(got.astype(got.dtype if name != "BF16" else dtype_of(name)), array(name))


def test_outputs_are_those_that_are_asked_for(triton: Any) -> None:
    inputs = [given(name, array(name), name) for name in STORAGE]
    wanted = ["same_INT8", "same_BYTES"]
    result = triton.infer("echo", inputs, outputs=[tritongrpc.InferRequestedOutput(name) for name in wanted])
    assert [output.name for output in result.get_response().outputs] == wanted
    np.testing.assert_array_equal(result.as_numpy("same_INT8"), array("INT8"))
    classes = [tritongrpc.InferRequestedOutput("same_INT16", class_count=1)]
    assert triton.infer("echo", inputs, outputs=classes).as_numpy("same_INT16").tolist() == [[b"1:1"], [b"1:0"]]


def test_versions_parameters_and_compression(triton: Any) -> None:
    for options in (
        {"model_version": "1"},
        {"priority": 1, "timeout": 10_000_000},
        {"parameters": {"device": "cpu", "route_key": "a", "min_gpu_memory_mb": 0, "prefer_gpu": False, "mine": "x"}},
        {"sequence_id": 5, "sequence_start": True},
        {"client_timeout": 10.0},
        {"headers": {"x-request-id": "1"}},
        {"compression_algorithm": "gzip"},
        {"compression_algorithm": "deflate"},
    ):
        assert triton.infer("double", rows(3, 4), **options).as_numpy("y").tolist() == [[6, 6], [8, 8]]


def test_calls_without_waiting(triton: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    triton.async_infer("double", rows(1), lambda result, error: answers.put((result, error)))
    result, error = answers.get()
    assert error is None
    assert result.as_numpy("y").tolist() == [[2, 2]]
    triton.async_infer("nobody", rows(1), lambda result, error: answers.put((result, error)))
    result, error = answers.get()
    assert "nobody" in error.message()


def test_a_stream_answers_in_order_and_an_error_ends_nothing(triton: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    triton.start_stream(lambda result, error: answers.put((result, error)))
    try:
        for number in range(100):
            triton.async_stream_infer("double", rows(number), request_id=str(number))
        triton.async_stream_infer("nobody", rows(1), request_id="bad")
        triton.async_stream_infer("double", rows(5), request_id="last", enable_empty_final_response=True)
        for number in range(100):
            result, error = answers.get()
            assert error is None
            assert result.get_response().id == str(number)
            assert result.as_numpy("y").tolist() == [[2 * number, 2 * number]]
        assert "nobody" in answers.get()[1].message()
        response = answers.get()[0].get_response()
        assert response.id == "last"
        assert response.parameters["triton_final_response"].bool_param
    finally:
        triton.stop_stream()


def test_repository(triton: Any) -> None:
    assert [(model.name, model.version, model.state) for model in triton.get_model_repository_index().models] == [
        ("double", "1", "READY"),
        ("echo", "1", "READY"),
        ("other", "1", "READY"),
    ]
    triton.unload_model("other")
    assert not triton.is_model_ready("other")
    (entry,) = (model for model in triton.get_model_repository_index().models if model.name == "other")
    assert (entry.state, entry.reason) == ("UNAVAILABLE", "unloaded")
    triton.load_model("other")
    assert triton.is_model_ready("other")


def test_asyncio(address: str) -> None:
    async def ask() -> None:
        async with aio.InferenceServerClient(address) as client:
            assert await client.is_server_live()
            assert await client.is_model_ready("double")
            assert (await client.get_model_metadata("double")).platform
            assert (await client.get_model_config("double")).config.name == "double"
            answers = await asyncio.gather(*(client.infer("double", rows(number)) for number in range(50)))
            assert [answer.as_numpy("y")[0, 0] for answer in answers] == [2 * number for number in range(50)]
            result = await client.infer("echo", [given(name, array(name), name) for name in STORAGE])
            assert result.as_numpy("same_BYTES").tolist() == array("BYTES").tolist()
            with pytest.raises(InferenceServerException, match="nobody") as caught:
                await client.infer("nobody", rows(1))
            assert caught.value.status() == "StatusCode.NOT_FOUND"

            async def requests() -> Any:
                for number in range(3):
                    yield {"model_name": "double", "inputs": rows(number), "request_id": str(number)}

            streamed = [answer async for answer in client.stream_infer(requests())]
            assert [(result.get_response().id, error) for result, error in streamed] == [
                ("0", None), ("1", None), ("2", None)
            ]

    asyncio.run(ask())


# --- plain stubs -----------------------------------------------------------------------------------------------


def typed_request(**fields: Any) -> Any:
    """A request with every datatype that contents can hold, and the others as zero rows."""
    request = ModelInferRequest(model_name="echo", **fields)
    return request


def test_contents_by_datatype(stub: Stub, serving: Daemon) -> None:
    request = ModelInferRequest(model_name="typed")
    del request
    for datatype, field in CONTENTS.items():
        del datatype, field
