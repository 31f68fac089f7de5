"""Open Inference Protocol over HTTP: the real tritonclient against a real bridge and a real daemon."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import python_models
from bridges import Bridge, running_bridge, until
from conftest import serving_daemon
from tnxctl import Client
from tnxctl.protocol.datatypes import STORAGE, Array, dtype_of

httpclient = pytest.importorskip("tritonclient.http")
pytest.importorskip("uvicorn")
aioclient = pytest.importorskip("tritonclient.http.aio")
utils = pytest.importorskip("tritonclient.utils")

REFUSED = utils.InferenceServerException

IN_JSON = json.dumps(
    {
        "inputs": [
            {"name": name, "datatype": "INT32", "shape": [1, 16], "data": [*range(16)]} for name in ("INPUT0", "INPUT1")
        ]
    }
).encode()

ADDSUB = """
class Model:
    def predict(self, INPUT0, INPUT1):
        return {"OUTPUT0": INPUT0 + INPUT1, "OUTPUT1": INPUT0 - INPUT1}
"""

ADDSUB_SIGNATURE = """
max_batch_size = 8
inputs = [
    { name = "INPUT0", datatype = "INT32", shape = [-1, 16] },
    { name = "INPUT1", datatype = "INT32", shape = [-1, 16] },
]
outputs = [
    { name = "OUTPUT0", datatype = "INT32", shape = [-1, 16] },
    { name = "OUTPUT1", datatype = "INT32", shape = [-1, 16] },
]
"""

ECHO = f"""
class Model:
    def predict(self, {", ".join(STORAGE)}):
        return {{{", ".join(f'"{name}_out": {name}' for name in STORAGE)}}}
"""

ECHO_SIGNATURE = "".join(
    f'[[{side}]]\nname = "{name}{suffix}"\ndatatype = "{name}"\nshape = [-1, 3]\n'
    for side, suffix in (("inputs", ""), ("outputs", "_out"))
    for name in STORAGE
)

FIXED_SIGNATURE = """
max_batch_size = 0
inputs = [{ name = "x", datatype = "FP32", shape = [-1] }]
outputs = [{ name = "y", datatype = "FP32", shape = [-1] }]
"""

DOUBLES = """
class Model:
    def predict(self, x):
        return {"y": x * 2}
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("oip")
    models = root / "models"
    python_models.put(models, ADDSUB, name="simple", signature=ADDSUB_SIGNATURE)
    python_models.put(models, ECHO, name="echo", signature=ECHO_SIGNATURE)
    python_models.put(models, DOUBLES, name="fixed", signature=FIXED_SIGNATURE)
    python_models.put(models, DOUBLES, name="double", settings='versions = "all"')
    second = models / "double" / "2"
    second.mkdir()
    (second / "model.py").write_text(DOUBLES.replace("2", "4"))
    with serving_daemon(root / "log", "--model-repository", str(models)) as running:
        yield running.endpoint


@pytest.fixture(scope="module")
def bridge(daemon: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    with running_bridge(tmp_path_factory.mktemp("bridge"), daemon) as running:
        yield running


@pytest.fixture
def triton(bridge: Bridge) -> Iterator[Any]:
    with httpclient.InferenceServerClient(f"127.0.0.1:{bridge.port}") as client:
        yield client


def told(bridge: Bridge, path: str) -> tuple[int, Any]:
    """Status and JSON document of the answer to a GET."""
    answer = bridge.ask("GET", path)
    return answer.status, answer.document


def given(name: str, array: Array, datatype: str, binary: bool = True) -> Any:
    tensor = httpclient.InferInput(name, [*array.shape], datatype)
    if datatype == "BF16":  # older versions want floats, newer ones what ml_dtypes has
        array = array.astype(utils.triton_to_np_dtype("BF16"))
    return tensor.set_data_from_numpy(array, binary_data=binary)


def addends(rows: int = 1, binary: bool = True) -> list[Any]:
    first = np.arange(16 * rows, dtype=np.int32).reshape(rows, 16)
    return [given("INPUT0", first, "INT32", binary), given("INPUT1", np.ones((rows, 16), np.int32), "INT32", binary)]


def samples(rows: int) -> dict[str, Array]:
    """An array for each datatype."""
    numbers = np.arange(3 * rows).reshape(rows, 3)
    texts = np.array([f"wölf {number}\0".encode() for number in numbers.ravel()], object).reshape(rows, 3)
    return {name: texts if name == "BYTES" else numbers.astype(dtype_of(name)) for name in STORAGE}


def plain(array: Array) -> list[Any]:
    """Values whatever the dtype: tritonclient gives BF16 as float32, what is empty as float64, JSON as str."""
    if array.dtype == object:
        return [element if type(element) is bytes else element.encode() for element in array.ravel().tolist()]
    return array.astype(np.float64).ravel().tolist()


# --- health and documents --------------------------------------------------------------------------------------


def test_health_and_metadata(triton: Any) -> None:
    assert triton.is_server_live()
    until(triton.is_server_ready, bool)
    assert triton.is_model_ready("simple")
    assert triton.is_model_ready("double", "2")
    assert not triton.is_model_ready("double", "3")
    assert not triton.is_model_ready("nothing")
    server = triton.get_server_metadata()
    assert server["name"] == "tensornext"
    assert "statistics" in server["extensions"]
    assert triton.get_model_metadata("double")["versions"] == ["1", "2"]
    metadata = triton.get_model_metadata("simple", "1")
    assert metadata["inputs"][1] == {"name": "INPUT1", "datatype": "INT32", "shape": [-1, 16]}
    config = triton.get_model_config("simple")
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (8, [16])
    assert triton.get_model_config("fixed")["max_batch_size"] == 0


def test_health_bodies_are_those_of_kserve(bridge: Bridge) -> None:
    assert told(bridge, "/v2/health/live") == (200, {"live": True})
    until(lambda: told(bridge, "/v2/health/ready"), lambda found: found == (200, {"ready": True}))
    assert told(bridge, "/v2/models/simple/ready") == (200, {"name": "simple", "ready": True})


def test_documents_of_the_unknown(triton: Any) -> None:
    for call in (triton.get_model_metadata, triton.get_model_config, triton.get_inference_statistics):
        with pytest.raises(REFUSED, match="nothing") as caught:
            call("nothing")
        assert caught.value.status() == "404"
        with pytest.raises(REFUSED, match="9") as caught:
            call("simple", "9")
        assert caught.value.status() == "404"


def test_statistics_grow(triton: Any) -> None:
    def counted() -> Any:
        (entry,) = triton.get_inference_statistics("simple")["model_stats"]
        return entry

    before = counted()
    triton.infer("simple", addends(rows=3))
    after = counted()
    assert after["inference_count"] - before["inference_count"] == 3
    assert after["execution_count"] - before["execution_count"] == 1
    for part in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert after["inference_stats"][part]["count"] - before["inference_stats"][part]["count"] == 1
    assert after["inference_stats"]["success"]["ns"] > before["inference_stats"]["success"]["ns"]
    names = {entry["name"] for entry in triton.get_inference_statistics()["model_stats"]}
    assert {"simple", "echo", "double"} <= names
    (entry,) = triton.get_inference_statistics("double", "2")["model_stats"]
    assert entry["version"] == "2"


# --- inference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 0])
@pytest.mark.parametrize("binary", [True, False])
def test_every_datatype_comes_back(triton: Any, rows: int, binary: bool) -> None:
    values = samples(rows)
    inputs = [
        given(name, array, name, binary or name in ("FP16", "BF16")) for name, array in values.items()
    ]  # which tritonclient does not send as JSON
    outputs = [httpclient.InferRequestedOutput(f"{name}_out", binary_data=binary) for name in values]
    result = triton.infer("echo", inputs, outputs=outputs)
    for name, array in values.items():
        answer = result.as_numpy(f"{name}_out")
        assert (answer.shape, plain(answer)) == (array.shape, plain(array)), name
        assert result.get_output(f"{name}_out")["datatype"] == name
        assert ("data" in result.get_output(f"{name}_out")) is not binary


def test_half_floats_are_taken_as_json_as_well(bridge: Bridge) -> None:
    inputs = [
        {"name": name, "datatype": name, "shape": [1, 3], "data": ["a", "b", "c"] if name == "BYTES" else [[0, 1, 1]]}
        for name in STORAGE
        if name != "BOOL"
    ]
    inputs.append({"name": "BOOL", "datatype": "BOOL", "shape": [1, 3], "data": [True, False, True]})
    answer = bridge.ask("POST", "/v2/models/echo/infer", json.dumps({"inputs": inputs}).encode())
    assert answer.status == 200
    data = {output["datatype"]: output["data"] for output in answer.document["outputs"]}
    assert data["FP16"] == data["BF16"] == [0.0, 1.0, 1.0]


def test_outputs_are_all_in_binary_if_none_is_asked_for(triton: Any) -> None:
    for binary in (True, False):
        result = triton.infer("simple", addends(binary=binary), request_id="the id")
        assert result.as_numpy("OUTPUT0").tolist() == [[*range(1, 17)]]
        assert result.as_numpy("OUTPUT1").tolist() == [[*range(-1, 15)]]
        response = result.get_response()
        assert (response["id"], response["model_name"], response["model_version"]) == ("the id", "simple", "1")
        assert all("binary_data_size" in output["parameters"] for output in response["outputs"])


def test_outputs_are_selected(triton: Any) -> None:
    outputs = [httpclient.InferRequestedOutput("OUTPUT1", binary_data=False)]
    response = triton.infer("simple", addends(), outputs=outputs).get_response()
    assert [output["name"] for output in response["outputs"]] == ["OUTPUT1"]
    with pytest.raises(REFUSED, match="no output 'OUTPUT9', only") as caught:
        triton.infer("simple", addends(), outputs=[httpclient.InferRequestedOutput("OUTPUT9")])
    assert caught.value.status() == "400"


def test_versions_are_in_the_path(triton: Any) -> None:
    x = np.ones((1, 2), np.float32)
    for version, factor in (("1", 2), ("2", 4), ("", 4)):
        result = triton.infer("double", [given("x", x, "FP32")], model_version=version)
        assert result.as_numpy("y").tolist() == [[factor, factor]]
        assert result.get_response()["model_version"] == (version or "2")
    with pytest.raises(REFUSED) as caught:
        triton.infer("double", [given("x", x, "FP32")], model_version="7")
    assert caught.value.status() == "404"


def test_classes_of_an_output(triton: Any) -> None:
    outputs = [httpclient.InferRequestedOutput("OUTPUT0", class_count=2)]
    result = triton.infer("simple", addends(rows=2), outputs=outputs)
    assert result.as_numpy("OUTPUT0").tolist() == [[b"16:15", b"15:14"], [b"32:15", b"31:14"]]
    outputs = [httpclient.InferRequestedOutput("y", class_count=1)]
    result = triton.infer("fixed", [given("x", np.array([1, 3, 2], np.float32), "FP32")], outputs=outputs)
    assert result.as_numpy("y").tolist() == [b"6.000000:1"]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("rows", [1, 8])
def test_bodies_are_compressed_both_ways(triton: Any, bridge: Bridge, coding: str, rows: int) -> None:
    result = triton.infer(
        "simple", addends(rows), request_compression_algorithm=coding, response_compression_algorithm=coding
    )
    assert result.as_numpy("OUTPUT0").tolist() == (np.arange(16 * rows).reshape(rows, 16) + 1).tolist()
    answer = bridge.ask("POST", "/v2/models/simple/infer", IN_JSON, Accept_Encoding=coding)
    assert answer.headers["content-encoding"] == coding
    unpack = gzip.decompress if coding == "gzip" else zlib.decompress
    assert json.loads(unpack(answer.body))["model_name"] == "simple"


def test_an_answer_is_not_compressed_for_a_library_that_offers_all_that_it_knows(bridge: Bridge) -> None:
    answer = bridge.ask("POST", "/v2/models/simple/infer", IN_JSON, Accept_Encoding="gzip, deflate, br")
    assert answer.status == 200
    assert "content-encoding" not in answer.headers


def test_parameters_reach_the_daemon(triton: Any) -> None:
    parameters = {"device": "cpu", "route_key": "k", "min_gpu_memory_mb": 1.5, "prefer_gpu": False, "mine": "7"}
    for priority in range(5):
        triton.infer("simple", addends(), priority=priority, timeout=30_000_000, parameters=parameters)
    for changed, says in (
        ({"parameters": {"device": "cuda:9"}}, "cuda:9"),
        ({"parameters": {"device": 7}}, "device 7: expected a string"),
        ({"parameters": {"min_gpu_memory_mb": -1}}, "min_gpu_memory_mb -1"),
        ({"priority": 5}, "'priority' is 5"),
        ({"timeout": 10**12}, "deadline"),
    ):
        with pytest.raises(REFUSED, match=says) as caught:
            triton.infer("simple", addends(), **changed)
        assert caught.value.status() == "400"
    with pytest.raises(REFUSED) as caught:
        triton.infer("simple", addends(), timeout=1)
    assert caught.value.status() == "504"


def test_sequences_say_nothing_to_a_model_without_state(triton: Any) -> None:
    triton.infer("simple", addends(), sequence_id=7, sequence_start=True, sequence_end=True)


def test_what_the_daemon_refuses(triton: Any) -> None:
    for inputs, says in (
        (addends()[:1], "INPUT1"),
        ([given("INPUT0", np.zeros((1, 16), np.float32), "FP32"), addends()[1]], "INT32"),
        ([given("INPUT0", np.zeros((1, 8), np.int32), "INT32"), addends()[1]], "16"),
        ([*addends(), given("more", np.zeros((1, 1), np.int32), "INT32")], "more"),
    ):
        with pytest.raises(REFUSED, match=says) as caught:
            triton.infer("simple", inputs)
        assert caught.value.status() == "400"
    with pytest.raises(REFUSED, match="nothing") as caught:
        triton.infer("nothing", addends())
    assert caught.value.status() == "404"


def test_a_body_without_json_is_one_row(bridge: Bridge) -> None:
    body = np.float32([3, 4]).tobytes()
    answer = bridge.ask("POST", "/v2/models/double/versions/1/infer", body, Inference_Header_Content_Length="0")
    assert answer.status == 200
    length = int(answer.headers["inference-header-content-length"])
    assert json.loads(answer.body[:length])["outputs"][0]["shape"] == [1, 2]
    assert np.frombuffer(answer.body[length:], np.float32).tolist() == [6, 8]


def test_the_asyncio_client(bridge: Bridge) -> None:
    async def run() -> None:
        async with aioclient.InferenceServerClient(f"127.0.0.1:{bridge.port}") as client:
            assert await client.is_server_live()
            while not await client.is_server_ready():  # the bridge gives the daemon a second
                pass
            assert await client.is_model_ready("simple")
            assert (await client.get_model_metadata("simple"))["name"] == "simple"
            assert (await client.get_model_config("simple"))["max_batch_size"] == 8
            assert (await client.get_model_repository_index())[0]["state"] == "READY"
            assert (await client.get_inference_statistics("simple"))["model_stats"]
            results = await asyncio.gather(*(client.infer("simple", addends(rows)) for rows in range(1, 9)))
            for rows, result in enumerate(results, 1):
                assert result.as_numpy("OUTPUT0").shape == (rows, 16)
            for coding in ("gzip", "deflate"):
                result = await client.infer("simple", addends(), response_compression_algorithm=coding)
                assert result.as_numpy("OUTPUT1").tolist() == [[*range(-1, 15)]]
            with pytest.raises(REFUSED, match="nothing"):
                await client.infer("nothing", addends())

    asyncio.run(run())


# --- the model repository --------------------------------------------------------------------------------------


def test_models_are_listed_unloaded_and_loaded(triton: Any, daemon: str) -> None:
    def states() -> dict[tuple[str, str], str]:
        return {(entry["name"], entry["version"]): entry["state"] for entry in triton.get_model_repository_index()}

    assert states() == dict.fromkeys(
        [("double", "1"), ("double", "2"), ("echo", "1"), ("fixed", "1"), ("simple", "1")], "READY"
    )
    triton.unload_model("fixed")
    try:
        assert states()["fixed", "1"] == "UNAVAILABLE"
        assert not triton.is_model_ready("fixed")
        with pytest.raises(REFUSED, match="fixed"):
            triton.infer("fixed", [given("x", np.zeros(1, np.float32), "FP32")])
        with Client(daemon, timeout=60.0) as tnx:
            assert {info.status for info in tnx.models() if info.name == "fixed"} == {"unloaded"}
    finally:
        triton.load_model("fixed")
    assert triton.is_model_ready("fixed")
    for call in (triton.load_model, triton.unload_model):
        with pytest.raises(REFUSED, match="nothing") as caught:
            call("nothing")
        assert caught.value.status() == "404"


def test_a_load_brings_no_model_of_its_own(triton: Any) -> None:
    for options in ({"config": "{}"}, {"config": "{}", "files": {"file:1/model.py": b"import os"}}):
        with pytest.raises(REFUSED, match="model repository") as caught:
            triton.load_model("simple", **options)
        assert caught.value.status() == "501"
    with pytest.raises(REFUSED, match="unload_dependents") as caught:
        triton.unload_model("simple", unload_dependents=True)
    assert caught.value.status() == "501"
    assert triton.is_model_ready("simple")


def test_the_index_of_what_is_ready(bridge: Bridge) -> None:
    assert len(bridge.ask("POST", "/v2/repository/index", b'{"ready": true}').document) == 5
    for body in (b'{"ready": "yes"}', b"[]", b"[" * 100_000, b"\xff"):
        answer = bridge.ask("POST", "/v2/repository/index", body)
        assert (answer.status, bool(answer.error)) == (400, True)


# --- what is not supported -------------------------------------------------------------------------------------


def test_shared_memory_tracing_and_logging_are_answered_as_triton_without_them(triton: Any, bridge: Bridge) -> None:
    assert triton.get_system_shared_memory_status() == []
    assert triton.get_cuda_shared_memory_status() == []
    for call, status in (
        (lambda: triton.register_system_shared_memory("r", "/r", 64), "501"),
        (lambda: triton.register_cuda_shared_memory("r", b"", 0, 64), "501"),
        (lambda: triton.unregister_system_shared_memory(), "501"),
        (lambda: triton.unregister_cuda_shared_memory("r"), "501"),
        (lambda: triton.get_system_shared_memory_status("r"), "404"),
        (lambda: triton.get_trace_settings(), "503"),
        (lambda: triton.get_trace_settings("simple"), "503"),
        (lambda: triton.update_trace_settings(settings={}), "503"),
        (lambda: triton.get_log_settings(), "503"),
        (lambda: triton.update_log_settings({}), "503"),
    ):
        with pytest.raises(REFUSED) as caught:
            call()
        assert caught.value.status() == status
    tensor = httpclient.InferInput("INPUT0", [1, 16], "INT32")
    tensor.set_shared_memory("r", 64)
    with pytest.raises(REFUSED, match="shared memory") as caught:
        triton.infer("simple", [tensor, addends()[1]])
    assert caught.value.status() == "501"
    assert bridge.ask("POST", "/v2/models/simple/generate").status == 404
    assert bridge.ask("GET", "/v2/models/simple/infer").status == 405


# --- bad input -------------------------------------------------------------------------------------------------


def bomb(mib: int) -> bytes:
    """A body of zeros as gzip, without its end: blocks that depend on none before them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    first, second = (packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + second * (mib - 1)


def bad_requests() -> Iterator[tuple[str, int, bytes, dict[str, str]]]:
    body, length = httpclient.InferenceServerClient.generate_request_body(addends())
    key = "Inference_Header_Content_Length"
    yield "larger than the body", 400, body, {key: str(len(body) + 1)}
    yield "negative", 400, body, {key: "-1"}
    yield "not a number", 400, body, {key: "many"}
    yield "too short", 400, body, {key: str(length - 1)}
    yield "left out", 400, body, {}
    yield "cut", 400, body[:-1], {key: str(length)}
    yield "too long", 400, body + b"x", {key: str(length)}
    yield "no json", 400, b"\xff\xfe", {}
    yield "empty", 400, b"", {}
    yield "deep", 400, b'{"inputs": [{"data": ' + b"[" * 200_000, {}
    yield "no such coding", 415, body, {"Content_Encoding": "br"}
    yield "not gzip", 400, body, {"Content_Encoding": "gzip"}
    yield "cut gzip", 400, gzip.compress(body)[:-9], {"Content_Encoding": "gzip", key: str(length)}
    yield "gzip and more", 400, gzip.compress(body) + bytes(100_000), {"Content_Encoding": "gzip", key: str(length)}
    yield "empty gzip", 400, b"", {"Content_Encoding": "gzip"}
    yield "bomb", 413, bomb(257), {"Content_Encoding": "gzip"}
    texts = {"name": "x", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": 8}}
    text = json.dumps({"inputs": [texts]}).encode()
    yield "lies", 400, text + b"\xff\xff\xff\xfftext", {key: str(len(text))}


def test_bad_requests_are_refused_and_the_next_one_on_the_connection_works(bridge: Bridge) -> None:
    good, length = httpclient.InferenceServerClient.generate_request_body(addends())
    with bridge.connect() as peer:
        for name, status, body, headers in bad_requests():
            answer = peer.ask("POST", "/v2/models/simple/infer", body, **headers)
            assert (answer.status, len(answer.error) > 10) == (status, True), (name, answer)
            assert len(answer.error) < 300, name
            answer = peer.ask("POST", "/v2/models/simple/infer", good, Inference_Header_Content_Length=str(length))
            assert answer.status == 200, name


def test_a_daemon_that_is_not_there(tmp_path: Path) -> None:
    limits = ("--timeout", "0.2s", "--limit", f"json_bytes={len(IN_JSON)}")
    with running_bridge(tmp_path, f"ipc://{tmp_path}/nothing", *limits) as lonely:
        assert told(lonely, "/v2/health/live") == (200, {"live": True})
        assert told(lonely, "/v2/health/ready") == (503, {"ready": False})
        answer = lonely.ask("GET", "/v2/models/simple")
        assert (answer.status, bool(answer.error)) == (503, True)
        for body, status in ((IN_JSON, 503), (IN_JSON + b" ", 413)):
            answer = lonely.ask("POST", "/v2/models/simple/infer", body)
            assert (answer.status, bool(answer.error)) == (status, True)
