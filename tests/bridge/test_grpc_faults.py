"""gRPC where something is wrong: deadlines, clients that go, daemons that are away, limits, tokens, TLS, workers."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("grpc")

import grpc
from grpc_stubs import Stub

import fake_daemon
from bridges import Bridge, running_bridge
from conftest import Daemon
from fake_daemon import STATS, FakeDaemon, Outputs
from tnxctl.bridge.grpc.messages import ModelInferRequest, ModelStreamInferResponse, message_of
from tnxctl.cli.exits import Exit
from tnxctl.keys import tokens
from tnxctl.protocol import wire
from tnxctl.protocol.errors import TensorNextError
from tool import run

GRPC = ("--grpc", "127.0.0.1:0")

ARRIVAL_S = 60.0
"""Longest wait for a request to come to a daemon."""

PATIENCE_S = 60.0
"""Deadline of calls that have to succeed."""

LIMITS = {
    "connections": 4,
    "header_bytes": 16_384,
    "body_bytes": 1_000_000,
    "bodies_bytes": 1_500_000,
    "json_bytes": 50_000,
    "message_timeout_s": 1.0,
    "idle_timeout_s": 0.5,
    "body_rate": 10_000_000,
}


def request_of(model: str = "mlp", rows: int = 1, columns: int = 256) -> Any:
    request = ModelInferRequest(model_name=model)
    request.inputs.add(name="input", datatype="FP32", shape=[rows, columns])
    request.raw_input_contents.append(np.ones((rows, columns), np.float32).tobytes())
    return request


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of daemons that come and go."""
    return f"ipc://{tmp_path_factory.mktemp('fakes')}/tnx"


@pytest.fixture(scope="module")
def bridge(path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    with running_bridge(tmp_path_factory.mktemp("bridge"), path, *GRPC, "--timeout", "1s") as running:
        yield running


@pytest.fixture(scope="module")
def stub(bridge: Bridge) -> Iterator[Stub]:
    with Stub(bridge.grpc) as stub:
        yield stub


def error_of(call: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def await_ready(stub: Stub) -> None:
    """Ask until a daemon is ready: each has but a part of a second to say so, which passes on a busy machine."""
    while not stub.call("ServerReady", message_of("ServerReadyRequest", {}), timeout=PATIENCE_S).ready:
        pass


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TensorNextError.__subclasses__(), ids=lambda kind: kind.code)
def test_an_error_has_the_code_and_the_sentence_of_the_daemon(
    stub: Stub, path: str, kind: type[TensorNextError]
) -> None:
    def fail(request: wire.Predict, inputs: Outputs) -> Outputs:
        raise kind("so the daemon said – and \n more")

    # What may pass is asked for again until the deadline.
    with FakeDaemon(path, compute=fail):
        error = error_of(lambda: stub.call("ModelInfer", request_of(), timeout=PATIENCE_S))
    assert error.code() is grpc.StatusCode[kind.code]
    assert "so the daemon said – and \n more" in error.details()


def test_parameters_and_deadlines_reach_the_daemon(stub: Stub, path: str) -> None:
    request = request_of()
    request.parameters["priority"].uint64_param = 4
    request.parameters["timeout"].int64_param = 20_000_000
    request.parameters["device"].string_param = "cpu"
    request.parameters["route_key"].string_param = "alice"
    request.parameters["min_gpu_memory_mb"].double_param = 2.5
    with FakeDaemon(path) as daemon:
        stub.call("ModelInfer", request)
        stub.call("ModelInfer", request, timeout=10.0)
        stub.call("ModelInfer", request_of(), timeout=10.0)
        stub.call("ModelInfer", request_of(), timeout=1e9)
        first, both, second, longest = daemon.predicts
    assert (first.priority, first.device, first.route_key, first.min_gpu_memory_mb) == (3, "cpu", "alice", 2.5)
    assert 10e6 < first.deadline_us <= 20e6
    assert 0 < both.deadline_us < 11e6  # gRPC rounds what it sends
    assert 0 < second.deadline_us < 11e6
    assert longest.deadline_us == wire.MAX_DEADLINE_US


def test_a_deadline_that_passes_withdraws_the_request(stub: Stub, path: str) -> None:
    with FakeDaemon(path, delay_s=60.0) as daemon:
        error = error_of(lambda: stub.call("ModelInfer", request_of(), timeout=0.5))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert daemon.wait_for_requests(2, ARRIVAL_S)
        assert daemon.cancelled == [daemon.predicts[0].id]


def test_a_client_that_cancels_withdraws_its_request(stub: Stub, path: str) -> None:
    with FakeDaemon(path, delay_s=60.0) as daemon:
        future = stub.future("ModelInfer", request_of(), timeout=PATIENCE_S)
        assert daemon.wait_for_predicts(1, ARRIVAL_S)
        future.cancel()
        assert daemon.wait_for_requests(2, ARRIVAL_S)
        assert daemon.cancelled == [daemon.predicts[0].id]


def test_a_client_that_goes_away_withdraws_its_requests(bridge: Bridge, path: str) -> None:
    with FakeDaemon(path, delay_s=60.0) as daemon:
        with Stub(bridge.grpc) as leaving:
            futures = [leaving.future("ModelInfer", request_of(), timeout=PATIENCE_S) for _ in range(3)]
            assert daemon.wait_for_predicts(3, ARRIVAL_S)
        assert all(future.done() for future in futures)
        assert daemon.wait_for_requests(6, ARRIVAL_S)
        assert sorted(daemon.cancelled) == [request.id for request in daemon.predicts]


def stream(stub: Stub, requests: Iterator[Any], **options: Any) -> Any:
    return stub.channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=ModelInferRequest.SerializeToString,
        response_deserializer=ModelStreamInferResponse.FromString,
    )(requests, **options)


def test_a_stream_that_is_cancelled_withdraws_its_requests(stub: Stub, path: str) -> None:
    with FakeDaemon(path, delay_s=60.0) as daemon:
        responses = stream(stub, iter([request_of()] * 3), timeout=PATIENCE_S)
        assert daemon.wait_for_predicts(3, ARRIVAL_S)
        responses.cancel()
        assert daemon.wait_for_requests(6, ARRIVAL_S)
        assert sorted(daemon.cancelled) == [request.id for request in daemon.predicts]


def test_a_stream_asks_for_so_much_at_a_time(stub: Stub, path: str) -> None:
    count = 100
    with FakeDaemon(path) as daemon:
        answers = [*stream(stub, iter([request_of()] * count), timeout=PATIENCE_S)]
        assert len(daemon.predicts) == count
    assert not any(answer.error_message for answer in answers)
    assert len(answers) == count


# --- daemons that come and go ----------------------------------------------------------------------------------


def test_a_daemon_that_is_away_and_comes(stub: Stub, path: str) -> None:
    assert stub.call("ServerLive", message_of("ServerLiveRequest", {})).live
    assert not stub.call("ServerReady", message_of("ServerReadyRequest", {})).ready
    assert not stub.call("ModelReady", message_of("ModelReadyRequest", {"name": "mlp"})).ready
    error = error_of(lambda: stub.call("ModelInfer", request_of()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE, error.details()
    with FakeDaemon(path):
        assert stub.call("ModelInfer", request_of(), timeout=PATIENCE_S).model_name == "mlp"
        await_ready(stub)


def test_a_daemon_that_restarts_is_waited_for(stub: Stub, path: str) -> None:
    with FakeDaemon(path, delay_s=60.0) as daemon:
        future = stub.future("ModelInfer", request_of(), timeout=PATIENCE_S)
        assert daemon.wait_for_predicts(1, ARRIVAL_S)
    with FakeDaemon(path):
        assert future.result().model_name == "mlp"


def test_a_daemon_that_drains_is_not_ready(stub: Stub, path: str) -> None:
    with FakeDaemon(path, status="draining"):
        assert not stub.call("ServerReady", message_of("ServerReadyRequest", {})).ready


@pytest.mark.parametrize("gone_first", [False, True])
def test_what_is_about_one_of_several_daemons_is_asked_of_one_that_answers(tmp_path: Path, gone_first: bool) -> None:
    counts = (wire.VersionStats(name="mlp", version="1"),)
    stats = msgspec.structs.replace(fake_daemon.STATS, models=counts)
    with FakeDaemon(stats=lambda _: stats) as daemon:
        endpoints = (daemon.endpoint, f"ipc://{tmp_path}/gone")
        several = ",".join(reversed(endpoints) if gone_first else endpoints)
        with running_bridge(tmp_path, several, *GRPC, "--timeout", "8s") as bridge, Stub(bridge.grpc) as stub:
            await_ready(stub)
            assert stub.call("ServerMetadata", message_of("ServerMetadataRequest", {}), timeout=PATIENCE_S).version
            assert stub.call("ModelReady", message_of("ModelReadyRequest", {"name": "mlp"}), timeout=PATIENCE_S).ready
            for name in ("ModelMetadata", "ModelConfig", "ModelStatistics"):
                stub.call(name, message_of(f"{name}Request", {"name": "mlp"}), timeout=PATIENCE_S)
            index = stub.call("RepositoryIndex", message_of("RepositoryIndexRequest", {}), timeout=PATIENCE_S)
            assert index.models[0].name == "mlp"


# --- limits ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    """Bridge with little patience and little room."""
    options = [word for name, number in LIMITS.items() for word in ("--limit", f"{name}={number}")]
    with running_bridge(tmp_path_factory.mktemp("strict"), path, *GRPC, *options) as running:
        yield running


@pytest.fixture
def asked(strict: Bridge, path: str) -> Iterator[Stub]:
    """Client of that bridge, which has to serve in the end: as soon as calls of the test that are over have ended."""
    with Stub(strict.grpc) as stub:
        yield stub
        until = time.monotonic() + PATIENCE_S
        with FakeDaemon(path):
            while not served(stub):
                assert time.monotonic() < until, "the bridge still refuses calls, as if there were too many"
                time.sleep(0.02)  # between two tries: nothing tells of a call that ends


def served(stub: Stub) -> bool:
    """Whether a request gets its answer, and is not refused for the number of calls; nothing else is allowed."""
    try:
        assert stub.call("ModelInfer", request_of(), timeout=PATIENCE_S).model_name == "mlp"
    except grpc.RpcError as error:
        if (error.code(), error.details()) != (grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!"):
            raise
        return False
    return True


@pytest.mark.parametrize("nbytes", [1_000_000 + 2**20 + 1, 30_000_000])
def test_messages_that_are_too_large(asked: Stub, nbytes: int) -> None:
    error = error_of(lambda: asked.call("ModelInfer", bytes(nbytes)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in error.details()


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_messages_that_unpack_to_something_too_large(strict: Bridge, asked: Stub, compression: Any) -> None:
    before = peak_mb(strict.process.pid)
    error = error_of(lambda: asked.call("ModelInfer", bytes(60_000_000), compression=compression))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert peak_mb(strict.process.pid) < before + 30


def peak_mb(pid: int) -> float:
    """Most memory that a process ever had."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def test_small_parts_that_would_take_much_memory(asked: Stub) -> None:
    for message, code, sentence in (
        (b"\x2a\x00" * 10_000, "INVALID_ARGUMENT", "more than 8192 fields"),
        (b"\x12\xe0\xa7\x12" + b"x" * 300_000, "RESOURCE_EXHAUSTED", "300004 bytes beside raw contents"),
    ):
        error = error_of(lambda message=message: asked.call("ModelInfer", message))
        assert error.code() is grpc.StatusCode[code], error.details()
        assert sentence in error.details()
    error = error_of(lambda: asked.call("ModelMetadata", message_of("ModelMetadataRequest", {"name": "x" * 100_000})))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_more_bytes_than_all_requests_may_have(asked: Stub, path: str) -> None:
    with FakeDaemon(path, delay_s=60.0) as daemon:
        first = asked.future("ModelInfer", request_of(rows=800), timeout=PATIENCE_S)
        assert daemon.wait_for_predicts(1, ARRIVAL_S)
        error = error_of(lambda: asked.call("ModelInfer", request_of(rows=800), timeout=PATIENCE_S))
        first.cancel()
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(error.trailing_metadata()) == {"grpc-retry-pushback-ms": "1000"}


def test_more_calls_than_there_may_be(asked: Stub, path: str) -> None:
    with FakeDaemon(path, delay_s=60.0) as daemon:
        futures = [asked.future("ModelInfer", request_of(), timeout=PATIENCE_S) for _ in range(4)]
        assert daemon.wait_for_predicts(4, ARRIVAL_S)
        error = error_of(lambda: asked.call("ServerLive", message_of("ServerLiveRequest", {})))
        for future in futures:
            future.cancel()
        assert daemon.wait_for_requests(8, ARRIVAL_S)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_metadata_that_is_too_large(asked: Stub) -> None:
    metadata = [(f"x-{number}", "y" * 1000) for number in range(40)]
    error = error_of(lambda: asked.call("ModelInfer", request_of(), metadata=metadata))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def framed(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class Http2:
    """Raw connection that speaks as much of HTTP/2 as it takes to begin an RPC."""

    def __init__(self, address: str, path: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.frame(4, 0, 0, b"")
        headers = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
        headers["content-type"] = "application/grpc"
        fields = ((name.encode(), value.encode()) for name, value in headers.items())
        self.headers = b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in fields)
        self.frame(1, 4, 1, self.headers)

    def frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self.socket.sendall(framed(kind, flags, stream, payload))

    def received(self, *texts: bytes) -> bool:
        """Whether all of that comes before the connection ends."""
        data = b""
        while not all(text in data for text in texts):
            part = self.socket.recv(65_536)
            if not part:
                return False
            data += part
        return True


@pytest.mark.parametrize("sent", [b"", b"\0", b"\0\0\0\0\x64abc"])
def test_a_message_that_does_not_come(strict: Bridge, asked: Stub, sent: bytes) -> None:
    peer = Http2(strict.grpc, "/inference.GRPCInferenceService/ModelInfer")
    with peer.socket:
        if sent:
            peer.frame(0, 0, 1, sent)
        assert peer.received(b"grpc-status\x014", b"the request did not come whole within 1 s")


def test_an_rpc_without_a_message(strict: Bridge, asked: Stub) -> None:
    peer = Http2(strict.grpc, "/inference.GRPCInferenceService/ModelInfer")
    with peer.socket:
        peer.frame(0, 1, 1, b"")
        assert peer.received(b"grpc-status\x013", b"the request has no message")


def test_calls_that_are_reset_at_once(strict: Bridge, asked: Stub) -> None:
    """Others get their answers all the same, as `asked` finds."""
    peer = Http2(strict.grpc, "/inference.GRPCInferenceService/ModelInfer")
    cancel = struct.pack(">I", 8)

    with peer.socket, contextlib.suppress(ConnectionError):  # it may be ended
        for first in range(3, 100_000, 200):
            streams = range(first, first + 200, 2)
            peer.socket.sendall(
                b"".join(framed(1, 4, stream, peer.headers) + framed(3, 0, stream, cancel) for stream in streams)
            )


@pytest.mark.parametrize(
    "text", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 1000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000]
)
def test_what_is_no_grpc(strict: Bridge, asked: Stub, text: bytes) -> None:
    host, _, port = strict.grpc.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as peer:
        peer.sendall(text)
        try:
            while peer.recv(65_536):
                pass
        except ConnectionError:
            pass


def waiting(*requests: Any) -> Iterator[Any]:
    """Requests of a stream that has no further one, and does not end."""
    yield from requests
    queue.SimpleQueue[None]().get(timeout=PATIENCE_S)


def test_a_stream_without_a_request_is_ended(strict: Bridge, path: str) -> None:
    with FakeDaemon(path, delay_s=1.0), Stub(strict.grpc) as stub:
        for requests in ((), (request_of(),)):  # one that is computed takes longer than an idle stream may stay
            responses = stream(stub, waiting(*requests), timeout=PATIENCE_S)
            for _ in requests:
                assert next(responses).infer_response.model_name == "mlp"
            error = error_of(responses.__next__)
            assert (error.code().name, error.details()) == ("DEADLINE_EXCEEDED", "the stream had no request for 0.5 s")


HANGING_S = 600.0
"""Deadline of calls that hang on purpose: longer than a machine stands still."""

STILL = [("grpc.http2.bdp_probe", 0)]
"""Options of a client that takes no more of what it does not read than it has said at first: 64 KiB."""


def unread(channel: Any, name: str, *requests: Any) -> Any:
    """A call of an RPC, of which nothing has been read."""
    return channel.stream_stream(
        f"/inference.GRPCInferenceService/{name}", request_serializer=ModelInferRequest.SerializeToString
    )(iter(requests), timeout=HANGING_S)


def sized(count: int) -> Callable[[wire.Predict, Outputs], Outputs]:
    """A model whose output has so many elements of 4 bytes."""
    return lambda request, inputs: {"y": np.zeros(count, np.float32)}


def await_answer(stub: Stub, code: str, before: Callable[[], object] = lambda: None) -> None:
    """Ask until a request is answered with that code. Args: before: what is done before each."""
    until = time.monotonic() + ARRIVAL_S
    before()
    while stub.future("ModelInfer", request_of(), timeout=PATIENCE_S).code().name != code:
        assert time.monotonic() < until
        before()


@pytest.mark.parametrize("name", ["ModelInfer", "ModelStreamInfer"])
def test_answers_that_nobody_reads_count(path: str, tmp_path: Path, name: str) -> None:
    """1.2 MB each, and there is room for 1.5 MB."""
    with (
        FakeDaemon(path, compute=sized(300_000)),
        running_bridge(tmp_path, path, *GRPC, "--limit", "bodies_bytes=1500000") as bridge,
        grpc.insecure_channel(bridge.grpc, STILL) as channel,
        Stub(bridge.grpc) as stub,
    ):
        calls: list[Any] = []  # the room may go to the request that asks whether there is any
        await_answer(stub, "UNAVAILABLE", lambda: calls.append(unread(channel, name, request_of())))
        for call in calls:
            call.cancel()
        await_answer(stub, "OK")


@pytest.mark.parametrize(
    ("name", "requests", "elements"),
    [
        ("ModelInfer", 1, 300_000),  # an answer of which there is room for one
        ("ModelStreamInfer", 1, 300_000),
        ("ModelStreamInfer", 60, 2_500),  # short answers, which connections take until their buffers are full
    ],
)
def test_a_client_that_does_not_read_is_cut(
    strict: Bridge, asked: Stub, path: str, name: str, requests: int, elements: int
) -> None:
    with FakeDaemon(path, compute=sized(elements)), grpc.insecure_channel(strict.grpc, STILL) as channel:
        call = unread(channel, name, *[request_of()] * requests)
        assert call.code().name == "UNAVAILABLE", call.details()
        await_answer(asked, "OK")


# --- who gets in -----------------------------------------------------------------------------------------------


def test_tokens(daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    given = {role: tokens.add(path, role, role) for role in ("observe", "predict", "admin")}
    live, metadata = message_of("ServerLiveRequest", {}), message_of("ModelMetadataRequest", {"name": "mlp"})
    load = message_of("RepositoryModelLoadRequest", {"model_name": "mlp"})

    with running_bridge(tmp_path, daemon.endpoint, *GRPC, "--tokens", str(path)) as bridge, Stub(bridge.grpc) as stub:

        def code_of(name: str, request: Any, token: str) -> str:
            bearer = [("authorization", f"Bearer {token}")] if token else []
            future = stub.future(name, request, metadata=bearer, timeout=PATIENCE_S)
            return str(future.code().name)

        assert code_of("ServerLive", live, "") == "OK"
        for token in ("", "wrong"):
            assert code_of("ModelInfer", request_of(), token) == "UNAUTHENTICATED"
        assert code_of("ModelMetadata", metadata, given["observe"]) == "OK"
        assert code_of("ModelInfer", request_of(), given["observe"]) == "PERMISSION_DENIED"
        assert code_of("ModelInfer", request_of(), given["predict"]) == "OK"
        assert code_of("RepositoryModelLoad", load, given["predict"]) == "PERMISSION_DENIED"
        assert code_of("RepositoryModelLoad", load, given["admin"]) != "PERMISSION_DENIED"
        error = error_of(lambda: list(stream(stub, iter([request_of()]), timeout=PATIENCE_S)))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        log = bridge.log.read_text()
    assert "load 'mlp'" in log
    assert "admin at 127.0.0.1:" in log


ABOUT_ONE = {
    "ServerReady": {},
    "ServerMetadata": {},
    "ModelReady": {"name": "mlp"},
    "ModelMetadata": {"name": "mlp"},
    "ModelStatistics": {"name": "mlp"},
    "RepositoryIndex": {},
}
"""RPCs, and their requests, for which one daemon is asked, and not whichever of several is least busy."""


def test_what_is_about_one_daemon_is_asked_of_one_that_answers(tmp_path: Path) -> None:
    stats = msgspec.structs.replace(STATS, models=(wire.VersionStats(name="mlp", version="1"),))
    gone = f"ipc://{tmp_path}/gone"
    with FakeDaemon(stats=lambda _: stats) as fake:
        options = (*GRPC, "--timeout", "8s")
        with running_bridge(tmp_path, f"{gone},{fake.endpoint}", *options) as bridge, Stub(bridge.grpc) as stub:
            await_ready(stub)
            answers = {
                name: stub.call(name, message_of(f"{name}Request", fields)) for name, fields in ABOUT_ONE.items()
            }
    assert answers["ServerReady"].ready
    assert answers["ModelReady"].ready
    assert answers["ModelMetadata"].name == "mlp"


def make_certificate(certfile: Path, keyfile: Path) -> bytes:
    """Make a certificate for localhost, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and is not installed")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", keyfile, "-out", certfile],
        check=True, capture_output=True,
    )  # fmt: skip
    return certfile.read_bytes()


def test_tls_and_a_new_certificate(daemon: Daemon, tmp_path: Path) -> None:
    certfile, keyfile = tmp_path / "chain.pem", tmp_path / "key.pem"
    first = make_certificate(certfile, keyfile)
    options = (*GRPC, "--certfile", str(certfile), "--keyfile", str(keyfile))
    with running_bridge(tmp_path, daemon.endpoint, *options) as bridge:
        port = bridge.grpc.rpartition(":")[2]
        with Stub(f"localhost:{port}", grpc.ssl_channel_credentials(first)) as stub:
            assert stub.call("ModelInfer", request_of(), timeout=PATIENCE_S).model_name == "mlp"
            second = make_certificate(certfile, keyfile)
            bridge.process.send_signal(signal.SIGHUP)
            with Stub(f"localhost:{port}", grpc.ssl_channel_credentials(second)) as other:
                # It may connect before the bridge has read the signal, and then tries again.
                request = message_of("ServerLiveRequest", {})
                assert other.call("ServerLive", request, timeout=PATIENCE_S, wait_for_ready=True).live
            assert stub.call("ModelInfer", request_of(), timeout=PATIENCE_S).model_name == "mlp"
        with Stub(bridge.grpc) as plain:
            error = error_of(lambda: plain.call("ServerLive", message_of("ServerLiveRequest", {})))
            assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_other_addresses_than_loopback_need_tls(daemon: Daemon) -> None:
    result = run("bridge", "--host", daemon.endpoint, "--listen", "127.0.0.1:0", "--grpc", "0.0.0.0:0")
    assert result.exit_code == Exit.REFUSED
    assert "0.0.0.0:0 can be reached by others" in result.stderr


# --- processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "package"), [("grpc", "grpcio"), ("google.protobuf", "protobuf")])
def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as good as not installed
    result = run("bridge", "--listen", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
    assert f"--grpc needs {package}, which is not installed: pip install 'tensornext[http,grpc]'" in result.stderr
    assert result.exit_code


def test_an_address_that_somebody_has(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run("bridge", "--host", daemon.endpoint, "--listen", "127.0.0.1:0", "--grpc", address)
    assert f"cannot listen on {address}" in result.stderr


def test_workers_share_the_address(daemon: Daemon, tmp_path: Path) -> None:
    with running_bridge(tmp_path, daemon.endpoint, *GRPC, "--workers", "2") as bridge:
        for _ in range(8):
            with Stub(bridge.grpc) as stub:
                assert stub.call("ModelInfer", request_of(), timeout=PATIENCE_S).model_name == "mlp"
        children = Path(f"/proc/{bridge.process.pid}/task/{bridge.process.pid}/children").read_text().split()
        assert len(children) == 2
        ended = os.pidfd_open(int(children[0]))
        os.kill(int(children[0]), signal.SIGKILL)
        select.select([ended], [], [])
        os.close(ended)
        for _ in range(8):
            with Stub(bridge.grpc) as stub:
                assert (
                    stub.call("ModelInfer", request_of(), timeout=PATIENCE_S, wait_for_ready=True).model_name == "mlp"
                )


def test_a_bridge_that_ends_ends_streams(path: str, tmp_path: Path) -> None:
    """One without a request, and one whose request is answered before; none is waited for."""
    with (
        running_bridge(tmp_path, path, *GRPC, "--limit", "drain_timeout_s=3600") as bridge,
        Stub(bridge.grpc) as stub,
        FakeDaemon(path, delay_s=0.5) as daemon,
    ):
        left: queue.SimpleQueue[Any] = queue.SimpleQueue()
        idle = stream(stub, iter(left.get, None), timeout=PATIENCE_S)
        left.put(request_of())
        assert not next(idle).error_message
        busy = stream(stub, itertools.chain([request_of()], iter(left.get, None)), timeout=PATIENCE_S)
        assert daemon.wait_for_predicts(2, ARRIVAL_S)
        assert bridge.stop() == 0
        assert not next(busy).error_message
        for responses in (idle, busy):
            error = error_of(lambda responses=responses: next(responses))
            assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the bridge ends")
        left.put(None)
        left.put(None)


def test_a_bridge_that_ends_answers_what_is_under_way(path: str, tmp_path: Path) -> None:
    with (
        running_bridge(tmp_path, path, *GRPC) as bridge,
        Stub(bridge.grpc) as stub,
        FakeDaemon(path, delay_s=0.5) as daemon,
    ):
        future = stub.future("ModelInfer", request_of(), timeout=PATIENCE_S)
        assert daemon.wait_for_predicts(1, ARRIVAL_S)
        assert bridge.stop() == 0
        assert future.result().model_name == "mlp"
