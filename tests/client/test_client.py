"""Both clients against daemons on real sockets that echo, delay, reorder and babble.

Each test runs over `Client`, over `AsyncClient`, and over `AsyncClient` on an event loop that cannot watch a file
descriptor.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest

from peers import (
    PATIENCE_S,
    FakeDaemon,
    Reply,
    Request,
    X,
    backwards,
    echo,
    equal,
    error,
    free_endpoint,
    health_report,
    in_turn,
    messages,
    model_info,
    reply_to,
    silence,
)
from shells import SHELLS, Connect, connecting
from tnxctl import AsyncClient, Client
from tnxctl.protocol import errors, wire
from tnxctl.protocol.wire import Limits


@pytest.fixture(params=SHELLS.values(), ids=SHELLS)
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    yield from connecting(request.param)


# --- calls and what comes back -------------------------------------------------------------------------------


def test_outputs_can_be_written_to_whatever_their_size(connect: Connect) -> None:
    with FakeDaemon(echo) as daemon:
        tnx = connect(daemon.endpoint)
        for rows in (1, 100_000, 100_000, 1, 1):  # the size of one answer foretells that of the next, rightly or not
            x = np.arange(rows * 4, dtype="f4").reshape(rows, 4)
            output = tnx.predict(x).output
            assert np.array_equal(output, x)
            output += 1
            assert np.array_equal(output, x + 1)


def test_predict(connect: Connect) -> None:
    with FakeDaemon(echo) as daemon:
        tnx = connect(daemon.endpoint)
        result = tnx.predict(
            X, model="digits", prefer_gpu=False, min_gpu_memory_mb=100.0, device="cuda:1", deadline=15.0, priority=0
        )
        header = daemon.received.get_nowait().header
    assert header == wire.Predict(
        v=1,
        id=header.id,
        inputs=(wire.TensorSpec("", "FP32", (2, 3)),),
        model="digits",
        prefer_gpu=False,
        min_gpu_memory_mb=100.0,
        device="cuda:1",
        deadline_us=header.deadline_us,
        sent_us=header.sent_us,
        priority=0,
    )
    assert 0 < header.deadline_us < 15e6  # connecting took some of it
    assert equal(result, X)
    assert (result.model, result.version, result.device, result.reason) == ("digits", "1", "cpu", "a test")
    assert (result.batch_size, result.latency_ms, result.gpu_memory_mb) == (1, 0.5, 0.0)
    assert (result.timing.compute_us, result.timing.total_us) == (5.0, 28.0)
    assert (result.predicted_us, result.actual_us) == (25.0, 20.0)


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.array(3, "i8"), id="no axes"),
        pytest.param(np.zeros((0, 256), "f4"), id="no rows"),
        pytest.param(np.array([True, False]), id="BOOL"),
        pytest.param(np.array([np.nan, np.inf, -0.0], "f2"), id="NaN and Inf"),
        pytest.param(np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3), id="BF16"),
        pytest.param(np.arange(24, dtype="u2").reshape(4, 6)[::2, ::3], id="strided"),
        pytest.param(np.arange(1 << 20, dtype="f4").reshape(1024, -1), id="4 MiB"),
    ],
)
def test_arrays_come_back_as_they_went(connect: Connect, array: np.ndarray[Any, Any]) -> None:
    with FakeDaemon(echo) as daemon:
        output = connect(daemon.endpoint).predict(array).output
    assert (output.dtype, output.shape) == (array.dtype, array.shape)
    assert output.tobytes() == array.tobytes()


def test_named_inputs_and_outputs(connect: Connect) -> None:
    inputs = {"image": X, "mask": np.array([True]), "nothing": np.zeros((0, 4), "f8")}
    with FakeDaemon(echo) as daemon:
        result = connect(daemon.endpoint).predict(inputs)
    assert list(result.outputs) == ["image", "mask", "nothing"]
    for name, array in inputs.items():
        np.testing.assert_array_equal(result.outputs[name], array)


def test_health_and_metadata(connect: Connect) -> None:
    with FakeDaemon(echo) as daemon:
        tnx = connect(daemon.endpoint)
        report = tnx.health()
        assert report == health_report(report.id)
        assert tnx.metadata() == model_info("mlp")
        assert tnx.metadata("digits") == model_info("digits")


@pytest.mark.parametrize("cls", [errors.NotFound, errors.ResourceExhausted, errors.Internal])
def test_errors_of_the_daemon(connect: Connect, cls: type[errors.TensorNextError]) -> None:
    with FakeDaemon(in_turn(error(cls.code, "model 'x' is no more"), echo)) as daemon:
        tnx = connect(daemon.endpoint)
        with pytest.raises(cls, match="model 'x' is no more"):
            tnx.predict(X, model="x")
        assert equal(tnx.predict(X), X)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"inputs": np.zeros(2, ">f4")}, ">f4"),
        ({"inputs": np.zeros(2, object)}, "object"),
        ({"inputs": [1.0]}, "list"),
        ({"inputs": {}}, "0 inputs"),
        ({"inputs": np.zeros(1025, "u1")}, "1025 bytes.*1024"),
        ({"inputs": X, "timeout": 0}, "timeout 0"),
        ({"inputs": X, "timeout": float("nan")}, "timeout nan"),
        ({"inputs": X, "deadline": float("nan")}, "deadline nan"),
        ({"inputs": X, "deadline": 0.0}, r"deadline 0\.0"),
        ({"inputs": X, "deadline": 1e9}, "deadline 1000000000.0"),
        ({"inputs": X, "priority": 4}, "priority 4"),
        ({"inputs": X, "device": None}, "device None"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(
    connect: Connect, arguments: dict[str, Any], named: str
) -> None:
    with FakeDaemon(echo) as daemon:
        tnx = connect(daemon.endpoint, limits=Limits(message_bytes=1024))
        with pytest.raises(errors.InvalidArgument, match=named):
            tnx.predict(**arguments)
        tnx.predict(X)
        assert daemon.received.qsize() == 1


def test_bad_endpoints_and_timeouts_are_refused(connect: Connect) -> None:
    for endpoint, options in (("http://x", {}), ("x:0", {}), ("x", {"timeout": -1})):
        with pytest.raises(errors.InvalidArgument):
            Client(endpoint, **options)  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidArgument):
            AsyncClient(endpoint, **options)  # type: ignore[arg-type]


def test_host_names(connect: Connect) -> None:
    with FakeDaemon(echo) as daemon:
        assert equal(connect(daemon.endpoint.replace("127.0.0.1", "localhost")).predict(X), X)


def test_a_host_name_that_does_not_resolve(connect: Connect) -> None:
    with pytest.raises(errors.Unavailable, match=r"resolve|still under way"):  # a slow resolver has not said yet
        connect("no-such-host.invalid").predict(X, timeout=0.2)


def test_ipc(connect: Connect, tmp_path: Path) -> None:
    with FakeDaemon(echo, f"ipc://{tmp_path}/tnx.sock") as daemon:
        assert equal(connect(daemon.endpoint).predict(X), X)


def test_ipv6(connect: Connect) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with FakeDaemon(echo, "tcp://[::1]:*") as daemon:
        assert equal(connect(daemon.endpoint.removeprefix("tcp://")).predict(X), X)


# --- many at once --------------------------------------------------------------------------------------------


def test_replies_in_another_order_reach_their_calls(connect: Connect) -> None:
    with FakeDaemon(backwards(50)) as daemon:
        tnx = connect(daemon.endpoint)
        futures = [tnx.submit(np.full(3, i)) for i in range(50)]
        assert [future.result().output[0] for future in futures] == list(range(50))


def test_a_thousand_calls_at_once(connect: Connect) -> None:
    with FakeDaemon(echo) as daemon:
        tnx = connect(daemon.endpoint)
        futures = [tnx.submit(np.array([i])) for i in range(1000)]
        assert [future.result().output[0] for future in futures] == list(range(1000))


def test_large_and_small_calls_at_once(connect: Connect) -> None:
    arrays = [np.full(size, i, "u1") for i, size in enumerate(20 * [0, 10, 70_000, 600_000])]
    with FakeDaemon(echo) as daemon:
        tnx = connect(daemon.endpoint)
        futures = [tnx.submit(array) for array in arrays]
        for future, array in zip(futures, arrays, strict=True):
            assert equal(future.result(), array)


def test_a_cancelled_call_is_dropped_and_its_late_reply_too(connect: Connect) -> None:
    held: list[Request] = []

    def hold_the_first(request: Request) -> list[tuple[bytes, Reply]]:
        if not held:
            held.append(request)
            return []
        return [*echo(held[0]), *echo(request)]

    with FakeDaemon(hold_the_first) as daemon:
        tnx = connect(daemon.endpoint)
        future = tnx.submit(X)
        daemon.received.get(timeout=PATIENCE_S)
        assert future.cancel()
        assert equal(tnx.predict(X + 1), X + 1)
        assert tnx.client._session.idle


def test_a_cancelled_call_is_cancelled_at_the_daemon(connect: Connect) -> None:
    def withdrawn(request: Request) -> list[tuple[bytes, Reply]]:
        late = wire.ErrorReply(v=1, id=cancel.id, code="CANCELLED", message="withdrawn")
        return [(request.identity, [wire.encode(late)]), *echo(request)]

    with FakeDaemon(silence) as daemon:
        tnx = connect(daemon.endpoint)
        future = tnx.submit(X)
        request = daemon.received.get(timeout=PATIENCE_S)
        assert future.cancel()
        cancel = daemon.cancels.get(timeout=PATIENCE_S)
        assert (cancel.identity, cancel.header) == (request.identity, wire.Cancel(v=1, id=request.id))
        daemon.answer = withdrawn
        assert equal(tnx.predict(X + 1), X + 1)
        assert daemon.cancels.empty()


def test_an_answered_call_is_not_cancelled(connect: Connect) -> None:
    with FakeDaemon(echo) as daemon:
        tnx = connect(daemon.endpoint)
        future = tnx.submit(X)
        future.result()
        assert not future.cancel()
        tnx.predict(X)
        assert daemon.cancels.empty()


def test_cancelling_without_a_connection(connect: Connect) -> None:
    endpoint = free_endpoint()
    tnx = connect(endpoint)
    future = tnx.submit(X)
    assert future.cancel()
    with pytest.raises(errors.Unavailable):  # which comes after the cancelling, that other threads carry out
        tnx.predict(X, timeout=0.01)
    with FakeDaemon(echo, endpoint) as daemon:
        assert equal(tnx.predict(X + 1), X + 1)
        assert daemon.received.qsize() == 1
        assert daemon.cancels.empty()


# --- replies that should not be ------------------------------------------------------------------------------


STRAY: dict[str, Callable[[Request], Reply]] = {
    "random bytes": lambda request: [os.urandom(100)],
    "an empty frame": lambda request: [b""],
    "a delimiter": lambda request: [b"", *reply_to(request)],
    "200,000 levels": lambda request: [200_000 * b"\x91"],
    "a thousand frames": lambda request: 1000 * [b"x"],
    "an unknown id": lambda request: reply_to(request, id=request.id + 999),
    "an error for nobody": lambda request: [wire.encode(wire.ErrorReply(v=1, id=None, code="INTERNAL", message="?"))],
}


@pytest.mark.parametrize("stray", STRAY.values(), ids=STRAY)
def test_messages_for_nobody_are_dropped(connect: Connect, stray: Callable[[Request], Reply]) -> None:
    with FakeDaemon(messages(stray, reply_to, stray, reply_to)) as daemon:
        tnx = connect(daemon.endpoint)
        for i in range(3):
            assert equal(tnx.predict(X + i), X + i)
        assert daemon.received.qsize() == 3


def version_2(request: Request) -> Reply:
    return [msgspec.msgpack.encode({**msgspec.msgpack.decode(reply_to(request)[0]), "v": 2}), *request.tensors]


MALFORMED: dict[str, tuple[Callable[[Request], Reply], str]] = {
    "no frame": (lambda request: reply_to(request)[:1], "0 tensor frames"),
    "a frame too many": (lambda request: [*reply_to(request), b""], "2 tensor frames"),
    "100,000 frames too many": (lambda request: [*reply_to(request), *100_000 * [b""]], "tensor frames"),
    "a truncated frame": (lambda request: [reply_to(request)[0], b"abc"], "its frame has 3"),
    "another version": (version_2, "protocol version 2"),
    "another verb": (lambda request: [wire.encode(health_report(request.id))], "HealthReport"),
    "no such datatype": (lambda r: reply_to(r, outputs=(wire.TensorSpec("a", "FP8", (24,)),)), "FP8"),
}


@pytest.mark.parametrize(("reply", "named"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_reply_is_an_internal_error(
    connect: Connect, reply: Callable[[Request], Reply], named: str
) -> None:
    with FakeDaemon(in_turn(messages(reply), echo)) as daemon:
        tnx = connect(daemon.endpoint)
        with pytest.raises(errors.Internal, match=named):
            tnx.predict(X)
        assert equal(tnx.predict(X), X)


def test_a_reply_beyond_the_limits_does_not_arrive(connect: Connect) -> None:
    def huge(request: Request) -> Reply:
        return [reply_to(request)[0], bytes(17 << 20)]

    with FakeDaemon(in_turn(*3 * [messages(huge)], echo)) as daemon:
        tnx = connect(daemon.endpoint, limits=Limits(message_bytes=1 << 20))
        with pytest.raises(errors.Unavailable, match=r"broke 3 times.*it closed the connection"):
            tnx.predict(X)
        assert equal(tnx.predict(X), X)
