"""gRPC end to end: tritonclient, sync and asyncio, and plain stubs, against a real bridge and a real daemon."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("tritonclient.grpc")

import grpc
import tritonclient.grpc as tritongrpc
import tritonclient.grpc.aio as aio
from grpc_stubs import Stub
from tritonclient.utils import InferenceServerException

import python_models
from bridges import running_bridge, until
from conftest import Daemon, serving_daemon
from tnxctl.bridge.grpc.messages import HEALTH, ModelInferRequest, ModelStreamInferResponse, message_of
from tnxctl.bridge.grpc.tensors import CONTENTS
from tnxctl.bridge.helper import LONG_BYTES
from tnxctl.protocol.datatypes import STORAGE, dtype_of
from tnxctl.protocol.limits import MIB

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


def signature(*datatypes: str) -> str:
    """The signature of a model that gives back a tensor of each datatype."""

    def specs(prefix: str) -> str:
        tables = (f'{{ name = "{prefix}{name}", datatype = "{name}", shape = [-1, 2] }}' for name in datatypes)
        return f"[{', '.join(tables)}]"

    return f"inputs = {specs('')}\noutputs = {specs('same_')}\n"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    root = tmp_path_factory.mktemp("grpc")
    models = root / "models"
    python_models.put(models, ECHO, name="echo", signature=signature(*STORAGE), settings="max_batch_size = 8")
    python_models.put(models, ECHO, name="typed", signature=signature(*CONTENTS))
    python_models.put(models, python_models.DOUBLES, name="double")
    python_models.put(models, python_models.DOUBLES, name="other")
    with serving_daemon(root / "log", "--model-repository", str(models)) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def address(serving: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_bridge(tmp_path_factory.mktemp("bridge"), serving.endpoint, "--grpc", "127.0.0.1:0") as bridge:
        yield bridge.grpc


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
    until(triton.is_server_ready, bool)
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


def test_statistics(triton: Any) -> None:
    def counts() -> tuple[int, int]:
        (model,) = triton.get_inference_statistics("double", "1").model_stats
        assert (model.name, model.version) == ("double", "1")
        return model.inference_count, model.inference_stats.success.count

    rows_before, requests_before = counts()
    triton.infer("double", rows(1, 2, 3))
    assert counts() == (rows_before + 3, requests_before + 1)
    assert {model.name for model in triton.get_inference_statistics().model_stats} >= {"double", "echo"}


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
        {"priority": 1, "timeout": 60_000_000},
        {"parameters": {"device": "cpu", "route_key": "a", "min_gpu_memory_mb": 0, "prefer_gpu": False, "mine": "x"}},
        {"sequence_id": 5, "sequence_start": True},
        {"client_timeout": 60.0},
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
        ("typed", "1", "READY"),
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
                ("0", None),
                ("1", None),
                ("2", None),
            ]

    asyncio.run(ask())


# --- plain stubs -----------------------------------------------------------------------------------------------


def typed_request(times: int) -> Any:
    """A request with a tensor of each datatype that contents can hold. Args: times: that its two rows are there."""
    request = ModelInferRequest(model_name="typed")
    for datatype, field in CONTENTS.items():
        tensor = request.inputs.add(name=datatype, datatype=datatype, shape=[2 * times, 2])
        getattr(tensor.contents, field).extend(array(datatype).ravel().tolist() * times)
    return request


@pytest.mark.parametrize("times", [1, 1000])  # the message is then longer than is read by the loop
def test_contents_of_every_datatype(stub: Stub, times: int) -> None:
    request = typed_request(times)
    assert (request.ByteSize() >= LONG_BYTES) == (times > 1)
    response = stub.call("ModelInfer", request)
    assert len(response.raw_output_contents) == len(CONTENTS)
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        assert not output.HasField("contents")
        if output.datatype != "BYTES":
            got = np.frombuffer(raw, dtype_of(output.datatype)).reshape(output.shape)
            np.testing.assert_array_equal(got, np.concatenate([array(output.datatype)] * times))
    request.parameters["binary_data_output"].bool_param = False
    response = stub.call("ModelInfer", request)
    assert not response.raw_output_contents
    assert [output.contents for output in response.outputs] == [tensor.contents for tensor in request.inputs]


def test_outputs_that_contents_cannot_hold_are_raw(stub: Stub) -> None:
    request = ModelInferRequest(model_name="echo")
    for name in STORAGE:
        request.inputs.add(name=name, datatype=name, shape=[0, 2])
        request.raw_input_contents.append(b"")
    request.parameters["binary_data_output"].bool_param = False
    response = stub.call("ModelInfer", request)
    assert len(response.raw_output_contents) == len(STORAGE)


def with_contents(field: str, *values: Any, datatype: str = "FP32", shape: tuple[int, ...] = (1, 2)) -> Any:
    request = ModelInferRequest(model_name="double")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=shape)
    getattr(tensor.contents, field).extend(values)
    return request


def changed(request: Any, **fields: Any) -> Any:
    """A request whose input has other fields, or that has other raw contents."""
    raw = fields.pop("raw", None)
    for name, value in fields.items():
        if name == "shape":
            del request.inputs[0].shape[:]
            request.inputs[0].shape.extend(value)
        else:
            setattr(request.inputs[0], name, value)
    if raw is not None:
        del request.raw_input_contents[:]
        request.raw_input_contents.extend(raw)
    return request


def with_parameter(name: str, **value: Any) -> Any:
    request = raw_request()
    for choice, content in value.items():
        setattr(request.parameters[name], choice, content)
    return request


def of_output(name: str, **parameters: str) -> Any:
    request = raw_request()
    output = request.outputs.add(name=name)
    for key, value in parameters.items():
        output.parameters[key].string_param = value
    return request


@pytest.mark.parametrize(
    ("request_", "code", "sentence"),
    [
        (raw_request("nobody"), "NOT_FOUND", "no model 'nobody'"),
        (raw_request(model_version="7"), "NOT_FOUND", "model 'double' has no version '7'"),
        (raw_request("../etc"), "INVALID_ARGUMENT", "'../etc' is not a model"),
        (raw_request("x" * 100_000), "INVALID_ARGUMENT", "header takes"),
        (changed(raw_request(), raw=[b"1234567"]), "INVALID_ARGUMENT", "'x': FP32 [1, 2] takes 8 bytes"),
        (changed(raw_request(), raw=[b"123456789"]), "INVALID_ARGUMENT", "its frame has 9"),
        (changed(raw_request(), raw=[bytes(8), b""]), "INVALID_ARGUMENT", "1 inputs and 2 raw_input_contents"),
        (changed(raw_request(), raw=[]), "INVALID_ARGUMENT", "input 'x': fp32_contents has 0 elements"),
        (changed(raw_request(), shape=[2**40, 2**40]), "INVALID_ARGUMENT", "'x'"),
        (changed(raw_request(), shape=[-1, -2]), "INVALID_ARGUMENT", "dimension -1"),
        (changed(raw_request(), shape=[1] * 100), "INVALID_ARGUMENT", "rank 100"),
        (changed(raw_request(), datatype="FP8"), "INVALID_ARGUMENT", "unknown datatype 'FP8'"),
        (changed(raw_request(), datatype="INT32"), "INVALID_ARGUMENT", "INT32"),
        (changed(raw_request(), name="z"), "INVALID_ARGUMENT", "'z'"),
        (
            changed(raw_request(), datatype="BYTES", shape=[2], raw=[b"\x01\0\0\0a\xff\xff\xff\xff"]),
            "INVALID_ARGUMENT",
            "element 1 of 2 says that it has 4294967295 bytes",
        ),
        (with_contents("fp32_contents", 1.0), "INVALID_ARGUMENT", "input 'x': fp32_contents has 1 elements"),
        (with_contents("fp64_contents", 1.0, 2.0), "INVALID_ARGUMENT", "in fp32_contents, not in fp64_contents"),
        (with_contents("int_contents", 1, 128, datatype="INT8"), "INVALID_ARGUMENT", "no INT8"),
        (with_contents("uint_contents", 1, 2, datatype="BF16"), "INVALID_ARGUMENT", "contents cannot hold BF16"),
        (with_contents("bytes_contents", b"a", datatype="BYTES"), "INVALID_ARGUMENT", "has 1 elements"),
        (with_contents("fp32_contents", 1.0, 2.0, shape=(-1, -2)), "INVALID_ARGUMENT", "each 0 or more"),
        (with_contents("fp32_contents", 1.0, shape=(1,) * 100), "INVALID_ARGUMENT", "up to 16 lengths"),
        (ModelInferRequest(model_name="double"), "INVALID_ARGUMENT", "0 inputs"),
        (of_output("z"), "INVALID_ARGUMENT", "has no output 'z', only ['y']"),
        (of_output("y", shared_memory_region="r"), "UNIMPLEMENTED", "shared memory"),
        (with_parameter("priority", uint64_param=5), "INVALID_ARGUMENT", "'priority' is 5"),
        (with_parameter("timeout", int64_param=-1), "INVALID_ARGUMENT", "'timeout' is -1"),
        (with_parameter("device", int64_param=1), "INVALID_ARGUMENT", "device 1"),
        (with_parameter("device", string_param="tpu:0"), "INVALID_ARGUMENT", "tpu:0"),
        (with_parameter("binary_data_output", string_param="no"), "INVALID_ARGUMENT", "true or false"),
        (with_parameter("triton_secret", bool_param=True), "INVALID_ARGUMENT", "reserved"),
        (b"\xff\xff\xff", "INVALID_ARGUMENT", "the message is damaged at byte 0"),
        (b"\x0a\x01\xff", "INVALID_ARGUMENT", "this is no inference.ModelInferRequest"),
    ],
)
def test_bad_input_is_a_status_and_a_sentence(stub: Stub, request_: Any, code: str, sentence: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.call("ModelInfer", request_)
    assert caught.value.code() is grpc.StatusCode[code], caught.value.details()
    assert sentence in caught.value.details()
    assert stub.call("ModelInfer", raw_request()).outputs[0].name == "y"


def long_request(elements: int = LONG_BYTES) -> Any:
    """A request whose contents do not fit its shape."""
    return with_contents("bytes_contents", *[b""] * elements, datatype="BYTES")


def changed_long(change: Callable[[Any], None]) -> bytes:
    """A long request, changed."""
    request = with_contents("fp32_contents", *[1.0] * LONG_BYTES, shape=(LONG_BYTES // 2, 2))
    change(request)
    return request.SerializeToString()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("request_", "code", "sentence"),
    [
        (long_request(), "INVALID_ARGUMENT", "'x': bytes_contents has 65536 elements, its shape is [1, 2]"),
        (changed_long(lambda r: r.raw_input_contents.append(bytes(8))), "INVALID_ARGUMENT", "'x' has contents beside"),
        (
            changed_long(
                lambda r: r.parameters["note"].CopyFrom(message_of("InferParameter", {"string_param": "x" * MIB}))
            ),
            "RESOURCE_EXHAUSTED",
            "bytes beside contents, and may have 1048576",
        ),
        (changed_long(lambda r: None) + b"\x0a\x01\xff", "INVALID_ARGUMENT", "this is no inference.ModelInferRequest"),
    ],
)
def test_bad_long_input_is_a_status_and_a_sentence(stub: Stub, request_: Any, code: str, sentence: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.call("ModelInfer", request_)
    assert (caught.value.code().name, sentence in caught.value.details()) == (code, True), caught.value.details()


def test_bad_long_input_of_a_stream_keeps_its_id(stub: Stub) -> None:
    request = long_request()
    request.id = "seven"
    (answer,) = stub.channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=ModelInferRequest.SerializeToString,
        response_deserializer=ModelStreamInferResponse.FromString,
    )(iter([request]))
    assert (answer.infer_response.id, "has 65536 elements" in answer.error_message) == ("seven", True)


def test_others_are_answered_while_long_contents_are_read(stub: Stub) -> None:
    future = stub.future("ModelInfer", long_request(2_000_000))
    for _ in range(30):
        assert stub.call("ServerLive", message_of("ServerLiveRequest", {})).live
        assert not future.done()
    assert "has 2000000 elements" in future.exception().details()


def test_two_forms_of_contents_are_not_mixed(stub: Stub) -> None:
    request = raw_request()
    request.inputs[0].contents.fp32_contents.extend([1.0, 2.0])
    with pytest.raises(grpc.RpcError, match="has contents beside raw_input_contents"):
        stub.call("ModelInfer", request)
    request = raw_request()
    request.inputs.append(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])
    with pytest.raises(grpc.RpcError, match="two inputs have the name 'x'"):
        stub.call("ModelInfer", request)


@pytest.mark.parametrize(
    ("name", "fields", "code", "sentence"),
    [
        ("ModelMetadata", {"name": "nobody"}, "NOT_FOUND", "no model 'nobody'"),
        ("ModelConfig", {"name": "double", "version": "9"}, "NOT_FOUND", "no version '9'"),
        ("RepositoryIndex", {"repository_name": "mine"}, "UNIMPLEMENTED", "one repository"),
        ("RepositoryModelLoad", {"model_name": "nobody"}, "NOT_FOUND", "nobody"),
        ("RepositoryModelLoad", {"model_name": "../up"}, "INVALID_ARGUMENT", "is not a model"),
        ("RepositoryModelLoad", {"parameters": {"config": {"string_param": "{}"}}}, "UNIMPLEMENTED", "'config'"),
        ("RepositoryModelUnload", {"parameters": {"unload_dependents": {"bool_param": True}}}, "UNIMPLEMENTED", "True"),
        ("SystemSharedMemoryStatus", {"name": "r"}, "NOT_FOUND", "region 'r'"),
        ("SystemSharedMemoryRegister", {"name": "r", "key": "/k"}, "UNIMPLEMENTED", "shared memory"),
        ("SystemSharedMemoryUnregister", {}, "UNIMPLEMENTED", "shared memory"),
        ("CudaSharedMemoryRegister", {"name": "r"}, "UNIMPLEMENTED", "shared memory"),
        ("CudaSharedMemoryUnregister", {}, "UNIMPLEMENTED", "shared memory"),
        ("TraceSetting", {}, "UNAVAILABLE", "tracing"),
        ("LogSettings", {}, "UNAVAILABLE", "logging"),
    ],
)
def test_other_calls_fail_with_a_status_and_a_sentence(
    stub: Stub, name: str, fields: dict[str, Any], code: str, sentence: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.call(name, message_of(f"{name}Request", fields))
    assert caught.value.code() is grpc.StatusCode[code], caught.value.details()
    assert sentence in caught.value.details()


def test_no_regions_of_shared_memory_are_told(triton: Any) -> None:
    assert not triton.get_system_shared_memory_status().regions
    assert not triton.get_cuda_shared_memory_status().regions


def test_an_rpc_that_nobody_knows(stub: Stub) -> None:
    for path in ("/inference.GRPCInferenceService/Nothing", "/no.Service/Check", "/"):
        with pytest.raises(grpc.RpcError) as caught:
            stub.channel.unary_unary(path)(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_health_as_kubernetes_asks_for_it(stub: Stub) -> None:
    check = stub.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=HEALTH.message("HealthCheckRequest").SerializeToString,
        response_deserializer=HEALTH.message("HealthCheckResponse").FromString,
    )
    for service in ("", "inference.GRPCInferenceService"):
        assert check(HEALTH.message("HealthCheckRequest")(service=service)).status == 1
    with pytest.raises(grpc.RpcError, match="no service 'other'"):
        check(HEALTH.message("HealthCheckRequest")(service="other"))


def test_a_long_sentence_is_cut_and_not_lost(stub: Stub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.call("ModelInfer", changed(raw_request(), name="\u00e9" * 1000))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
