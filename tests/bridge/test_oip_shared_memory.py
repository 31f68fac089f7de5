"""System shared memory of the Open Inference Protocol: the real tritonclient over HTTP and gRPC, and lies."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tool
from bridges import Bridge, running_bridge
from conftest import Daemon
from tnxctl.bridge.bodies import Budget
from tnxctl.bridge.oip.shared_memory import Place, Regions
from tnxctl.protocol.errors import NotFound

pytest.importorskip("uvicorn")
pytest.importorskip("tritonclient.utils")
shm = pytest.importorskip("tritonclient.utils.shared_memory")

from tritonclient.utils import InferenceServerException  # noqa: E402

PREFIX = f"tnx-test-{os.getpid()}-"
X = np.random.default_rng(3).standard_normal((512, 256)).astype(np.float32)
OUT_BYTES = 512 * 128 * 4


@pytest.fixture(scope="module")
def served(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    folder = tmp_path_factory.mktemp("bridge")
    with running_bridge(
        folder, daemon.endpoint, "--grpc", "127.0.0.1:0", "--shared-memory", PREFIX, "--limit", "bodies_bytes=8388608"
    ) as bridge:
        yield bridge


@pytest.fixture(params=["http", "grpc"])
def triton(request: pytest.FixtureRequest, served: Bridge) -> Iterator[Any]:
    """A client of tritonclient, and the module that it is of."""
    module = pytest.importorskip(f"tritonclient.{request.param}")
    address = served.grpc if request.param == "grpc" else f"127.0.0.1:{served.port}"
    with module.InferenceServerClient(address) as client:
        yield client, module
        client.unregister_system_shared_memory()


@pytest.fixture
def regions() -> Iterator[Callable[[str, int], Any]]:
    """Makes regions, as a client does. They are removed at the end."""
    made = []

    def make(name: str, nbytes: int) -> Any:
        region = shm.create_shared_memory_region(name, f"/{PREFIX}{name}", nbytes)
        made.append(region)
        return region

    yield make
    for region in made:
        shm.destroy_shared_memory_region(region)


def test_inputs_and_outputs(triton: Any, regions: Callable[[str, int], Any]) -> None:
    client, module = triton
    assert "system_shared_memory" in str(client.get_server_metadata())
    source, target = regions("in", 64 + X.nbytes), regions("out", 128 + OUT_BYTES)
    shm.set_shared_memory_region(source, [X], offset=64)
    client.register_system_shared_memory("in", f"/{PREFIX}in", 64 + X.nbytes)
    client.register_system_shared_memory("out", f"/{PREFIX}out", 64 + OUT_BYTES, offset=64)
    plain = module.InferInput("input", X.shape, "FP32")
    plain.set_data_from_numpy(X)
    expected = client.infer("mlp", [plain]).as_numpy("output")
    placed = module.InferInput("input", X.shape, "FP32")
    placed.set_shared_memory("in", X.nbytes, offset=64)
    output = module.InferRequestedOutput("output")
    output.set_shared_memory("out", OUT_BYTES, offset=64)
    assert np.array_equal(client.infer("mlp", [placed]).as_numpy("output"), expected)
    for tensor in (plain, placed):
        target_bytes = shm.get_contents_as_numpy(target, np.uint8, [128 + OUT_BYTES], 0)
        target_bytes[:] = 0
        result = client.infer("mlp", [tensor], outputs=[output])
        told = result.get_output("output")
        assert [*(told["shape"] if isinstance(told, dict) else told.shape)] == [512, 128]
        assert np.array_equal(shm.get_contents_as_numpy(target, np.float32, [512, 128], 128), expected)
        assert not target_bytes[:128].any()


def test_regions_are_told_and_forgotten(triton: Any, regions: Callable[[str, int], Any]) -> None:
    client, _ = triton
    regions("one", 256)

    def told() -> set[str]:
        status = client.get_system_shared_memory_status()
        return {region["name"] for region in status} if isinstance(status, list) else {*status.regions}

    client.register_system_shared_memory("a", f"/{PREFIX}one", 128)
    client.register_system_shared_memory("b", f"/{PREFIX}one", 128, offset=128)
    assert told() == {"a", "b"}
    with pytest.raises(InferenceServerException, match="already in manager"):
        client.register_system_shared_memory("a", f"/{PREFIX}one", 128)
    client.unregister_system_shared_memory("a")
    assert told() == {"b"}
    with pytest.raises(InferenceServerException, match="unable to find shared memory region 'a'"):
        client.get_system_shared_memory_status("a")
    client.unregister_system_shared_memory()
    assert told() == set()


@pytest.mark.parametrize(
    ("key", "offset", "nbytes", "message"),
    [
        ("/other", 0, 64, "does not begin with"),
        ("/../PREFIXx", 0, 64, "does not begin with"),
        ("/PREFIX../../etc/passwd", 0, 64, "does not begin with"),
        ("/PREFIX\0", 0, 64, "does not begin with"),
        ("/PREFIXnone", 0, 64, "No such file"),
        ("/PREFIXlink", 0, 1, "unable to open"),
        ("/PREFIXpipe", 0, 0, "not within"),
        ("/PREFIXfile", 0, 65, "65 bytes from 0 on are not within the 64"),
        ("/PREFIXfile", 1 << 62, 64, "are not within"),
    ],
)
def test_what_may_not_be_registered(
    triton: Any, regions: Callable[[str, int], Any], key: str, offset: int, nbytes: int, message: str
) -> None:
    client, _ = triton
    regions("file", 64)
    link, pipe = Path(f"/dev/shm/{PREFIX}link"), Path(f"/dev/shm/{PREFIX}pipe")
    try:
        link.symlink_to("/etc/passwd")
        os.mkfifo(pipe)
        with pytest.raises(InferenceServerException, match=message):
            client.register_system_shared_memory("r", key.replace("PREFIX", PREFIX), nbytes, offset=offset)
    finally:
        link.unlink()
        pipe.unlink()


def test_lies_about_places(triton: Any, regions: Callable[[str, int], Any]) -> None:
    client, module = triton
    regions("in", 4096)
    client.register_system_shared_memory("in", f"/{PREFIX}in", 2048)
    output = module.InferRequestedOutput("output")
    for region, nbytes, offset, message in (
        ("in", 1024, 1025, "1024 bytes from 1025 on are not within the 2048"),
        ("in", 1 << 60, 0, "are not within"),
        ("in", 1020, 0, "takes 1024 bytes, its frame has 1020"),
        ("none", 1024, 0, "unable to find shared memory region 'none'"),
    ):
        tensor = module.InferInput("input", [1, 256], "FP32")
        tensor.set_shared_memory(region, nbytes, offset=offset)
        with pytest.raises(InferenceServerException, match=message):
            client.infer("mlp", [tensor])
    tensor = module.InferInput("input", [1, 256], "FP32")
    tensor.set_shared_memory("in", 1024)
    output.set_shared_memory("in", 511, offset=1024)
    with pytest.raises(
        InferenceServerException, match="output 'output' has 512 bytes, and its place in shared memory 511"
    ):
        client.infer("mlp", [tensor], outputs=[output])
    output.set_shared_memory("in", 512, offset=1024)
    client.infer("mlp", [tensor], outputs=[output])
    os.truncate(f"/dev/shm/{PREFIX}in", 100)
    with pytest.raises(InferenceServerException, match="shortened"):
        client.infer("mlp", [tensor])
    assert client.is_server_live()


def test_what_is_read_counts_for_the_memory_of_requests(served: Bridge, regions: Callable[[str, int], Any]) -> None:
    regions("large", 9 << 20)
    http = pytest.importorskip("tritonclient.http")
    with http.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        client.register_system_shared_memory("large", f"/{PREFIX}large", 9 << 20)
        tensor = http.InferInput("input", [9 << 10, 256], "FP32")
        tensor.set_shared_memory("large", 9 << 20)
        with pytest.raises(InferenceServerException, match="fill the 8388608 bytes"):
            client.infer("mlp", [tensor])
        tensor = http.InferInput("input", [1024, 256], "FP32")
        tensor.set_shared_memory("large", 1 << 20)
        for _ in range(12):  # each of which is let go
            client.infer("mlp", [tensor])
        client.unregister_system_shared_memory()


def test_names_of_regions(served: Bridge, regions: Callable[[str, int], Any]) -> None:
    """The bridge keeps them, so they are short; gRPC would take many MiB."""
    regions("file", 64)
    grpc = pytest.importorskip("tritonclient.grpc")
    with grpc.InferenceServerClient(served.grpc) as client:
        for name in ("", "n" * 256):
            with pytest.raises(InferenceServerException, match="a name has 1 to 255 characters"):
                client.register_system_shared_memory(name, f"/{PREFIX}file", 64)
        client.register_system_shared_memory("n" * 255, f"/{PREFIX}file", 64)
        client.unregister_system_shared_memory()


def test_regions_leave_descriptors_for_connections(
    daemon: Daemon, tmp_path: Path, regions: Callable[[str, int], Any]
) -> None:
    regions("file", 64)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # what most systems give a process
        bridging = running_bridge(tmp_path, daemon.endpoint, "--shared-memory", PREFIX)
        bridge = bridging.__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        body = json.dumps({"key": f"/{PREFIX}file", "byte_size": 64}).encode()
        path = "/v2/systemsharedmemory/region/{}/register"
        with bridge.connect() as peer:
            statuses = [peer.ask("POST", path.format(number), body).status for number in range(1024)]
        assert {*statuses} == {200, 409}
        assert bridge.ask("GET", "/v2/health/live").status == 200  # on a new connection
    finally:
        bridging.__exit__(None, None, None)


def test_outputs_go_to_no_other_region_of_that_name(regions: Callable[[str, int], Any]) -> None:
    """The region is another client's by the time of the answer, or the file has changed hands with the descriptor."""
    for name in ("mine", "theirs"):
        regions(name, 64)
    table = Regions(PREFIX, Budget(1 << 20))
    table.register("out", f"/{PREFIX}mine", 0, 64)
    target = table.target(Place("out", 0, 4), "y")
    table.unregister("out")
    for _ in range(2):
        with pytest.raises(NotFound, match="output 'y': its shared memory region was unregistered meanwhile"):
            table.write(target, "y", memoryview(b"data"))
        table.unregister()
        table.register("out", f"/{PREFIX}theirs", 0, 64)
    assert table.write(table.target(Place("out", 0, 9), "y"), "y", memoryview(b"data")).nbytes == 4
    table.unregister()


def test_odd_parameters(served: Bridge) -> None:
    for parameters in (
        {"shared_memory_region": 5},
        {"shared_memory_region": "r", "shared_memory_offset": -1},
        {"shared_memory_region": "r", "shared_memory_byte_size": "64"},
    ):
        body = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 256], "parameters": parameters}]}
        assert served.ask("POST", "/v2/models/mlp/infer", json.dumps(body).encode()).status == 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shared-memory", "x", "--workers", "2"), "goes with one worker"),
        (("--shared-memory", "x", "--listen", "0.0.0.0:0", "--insecure"), "can be reached by others"),
        (("--shared-memory", ""), "expected what names of files begin with"),
        (("--shared-memory", "a/b"), "expected what names of files begin with"),
    ],
)
def test_where_it_is_not_allowed(arguments: tuple[str, ...], message: str) -> None:
    found = tool.run("bridge", *arguments)
    assert found.exit_code != 0
    assert message in found.output
