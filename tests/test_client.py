"""Both shells against daemons on real sockets that echo, delay, reorder, babble, die and come back.

The first part runs over `Client`, over `AsyncClient`, and over `AsyncClient` on an event loop that
cannot watch a file descriptor. What only one of them can do follows.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import inspect
import itertools
import os
import socket
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
import zmq

from peers import (
    Die,
    FakeDaemon,
    Proxy,
    Reply,
    Request,
    backwards,
    die,
    echo,
    error,
    free_endpoint,
    health_report,
    in_turn,
    messages,
    model_info,
    reply_to,
    silence,
)
from tnxctl import AsyncClient, Client, driver
from tnxctl.protocol import errors, wire
from tnxctl.protocol.wire import Limits
from tnxctl.results import Result
from tnxctl.session import MAX_LOSSES

X = np.arange(6, dtype="f4").reshape(2, 3)
PATIENCE_S = 20.0  # for what must happen; never reached when all is well


class SyncShell:
    """`Client` behind the surface that the common tests use."""

    def __init__(self, endpoint: str, **options: Any) -> None:
        self.client = Client(endpoint, **{"timeout": PATIENCE_S, **options})
        self.predict = self.client.predict
        self.submit = self.client.submit
        self.health = self.client.health
        self.metadata = self.client.metadata
        self.close = self.client.close


class AsyncShell:
    """`AsyncClient` behind the same surface: its event loop runs in a thread of its own."""

    new_loop: Callable[[], asyncio.AbstractEventLoop] = staticmethod(asyncio.new_event_loop)

    def __init__(self, endpoint: str, **options: Any) -> None:
        self.client = AsyncClient(endpoint, **{"timeout": PATIENCE_S, **options})
        self._loop = self.new_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def submit(self, inputs: object, **options: Any) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(self.client.predict(inputs, **options), self._loop)

    def predict(self, inputs: object, **options: Any) -> Result:
        return self.submit(inputs, **options).result()

    def health(self, **options: Any) -> wire.HealthReport:
        return asyncio.run_coroutine_threadsafe(self.client.health(**options), self._loop).result()

    def metadata(self, model: str = "", **options: Any) -> wire.ModelInfo:
        return asyncio.run_coroutine_threadsafe(self.client.metadata(model, **options), self._loop).result()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.client.close(), self._loop).result()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class BlindLoop(asyncio.SelectorEventLoop):
    """A loop like the default one of Windows: it watches no file descriptor for others."""

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
        raise NotImplementedError

    def remove_reader(self, fd: Any) -> bool:
        raise NotImplementedError


class BlindAsyncShell(AsyncShell):
    new_loop = BlindLoop


Connect = Callable[..., SyncShell | AsyncShell]


@pytest.fixture(params=[SyncShell, AsyncShell, BlindAsyncShell], ids=["sync", "asyncio", "asyncio without add_reader"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of the shell under test, and closes them."""
    shells: list[SyncShell | AsyncShell] = []

    def make(endpoint: str, **options: Any) -> SyncShell | AsyncShell:
        shells.append(request.param(endpoint, **options))
        return shells[-1]

    yield make
    for shell in shells:
        shell.close()
        if isinstance(shell, AsyncShell):
            shell.stop()


def equal(result: Result, expected: Any) -> bool:
    return bool(np.array_equal(result.output, expected))


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


def test_a_cancelled_call_is_withdrawn(connect: Connect) -> None:
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


def test_what_is_answered_is_not_withdrawn(connect: Connect) -> None:
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


# --- time and connections ------------------------------------------------------------------------------------


def test_no_answer_in_time(connect: Connect) -> None:
    with FakeDaemon(in_turn(echo, silence, echo)) as daemon:
        tnx = connect(daemon.endpoint)
        tnx.predict(X)  # now the connection stands
        with pytest.raises(errors.DeadlineExceeded, match=r"did not answer predict within 100 ms") as caught:
            tnx.predict(X, timeout=0.1)
        assert daemon.endpoint in caught.value.message
        assert equal(tnx.predict(X), X)


@pytest.mark.parametrize("limit", ["timeout", "deadline"])
def test_what_is_late_is_withdrawn(connect: Connect, limit: str) -> None:
    with FakeDaemon(in_turn(echo, silence, silence, silence, echo)) as daemon:
        tnx = connect(daemon.endpoint)
        tnx.predict(X)
        daemon.received.get(timeout=PATIENCE_S)
        with pytest.raises(errors.DeadlineExceeded):
            tnx.predict(X, **{limit: 0.1})
        assert daemon.cancels.get(timeout=PATIENCE_S).id == daemon.received.get(timeout=PATIENCE_S).id
        with pytest.raises(errors.DeadlineExceeded):
            tnx.health(timeout=0.1)
        tnx.predict(X)
        assert daemon.cancels.empty()


def test_a_deadline_ends_the_wait(connect: Connect) -> None:
    with FakeDaemon(in_turn(echo, silence, echo)) as daemon:
        tnx = connect(daemon.endpoint)
        tnx.predict(X)
        daemon.received.get(timeout=PATIENCE_S)
        with pytest.raises(errors.DeadlineExceeded, match=r"did not answer predict within its deadline of 100 ms"):
            tnx.predict(X, deadline=0.1)
        header = daemon.received.get(timeout=PATIENCE_S).header
        assert isinstance(header, wire.Predict)
        assert header.deadline_us == 100_000.0
        assert equal(tnx.predict(X, deadline=PATIENCE_S), X)


def test_a_deadline_passes_without_a_connection(connect: Connect) -> None:
    tnx = connect(free_endpoint())
    said = ""
    while "nobody listens there" not in said:  # an attempt takes longer than that where the machine is busy
        with pytest.raises(errors.DeadlineExceeded, match=r"no connection within its deadline of 200 ms") as caught:
            tnx.predict(X, deadline=0.2)
        said = caught.value.message


def test_several_deadlines_at_once(connect: Connect) -> None:
    with FakeDaemon(in_turn(echo, silence)) as daemon:
        tnx = connect(daemon.endpoint)
        tnx.predict(X)
        futures = [tnx.submit(X, deadline=0.01 * (10 - i)) for i in range(10)]
        for future in futures:
            with pytest.raises(errors.DeadlineExceeded):
                future.result(PATIENCE_S)
        assert len({daemon.cancels.get(timeout=PATIENCE_S).id for _ in futures}) == len(futures)


def test_a_restart_takes_its_time_from_the_deadline(connect: Connect) -> None:
    with FakeDaemon(die) as daemon:
        tnx = connect(daemon.endpoint)
        future = tnx.submit(X, deadline=15.0)
        assert daemon.gone.wait(PATIENCE_S)
        daemon.start(echo)
        assert equal(future.result(), X)
        first, second = (daemon.received.get_nowait().header for _ in range(2))
    assert isinstance(first, wire.Predict)
    assert first == msgspec.structs.replace(second, deadline_us=first.deadline_us, sent_us=first.sent_us)
    assert first.sent_us < second.sent_us
    assert 0 < second.deadline_us < first.deadline_us < 15e6


def test_an_answer_too_late_is_dropped(connect: Connect) -> None:
    held: list[Request] = []

    def one_late(request: Request) -> list[tuple[bytes, Reply]]:
        if isinstance(request.header, wire.Health):  # the client asks whether anybody is there
            return []
        held.append(request)
        return [message for each in held for message in echo(each)] if len(held) == 2 else []

    with FakeDaemon(in_turn(echo, one_late)) as daemon:
        tnx = connect(daemon.endpoint)
        tnx.predict(X)
        with pytest.raises(errors.DeadlineExceeded):
            tnx.predict(X, timeout=0.1)
        assert equal(tnx.predict(X + 1), X + 1)


def test_the_timeout_of_the_client_is_the_default(connect: Connect) -> None:
    with FakeDaemon(in_turn(echo, silence)) as daemon:
        tnx = connect(daemon.endpoint, timeout=0.1)
        tnx.predict(X, timeout=PATIENCE_S)
        for call in (lambda: tnx.predict(X), tnx.health, tnx.metadata):
            with pytest.raises(errors.DeadlineExceeded, match=r"within 100 ms"):
                call()


def call_until_it_says(tnx: Any, reason: str) -> None:
    """Call in vain until that is the reason: an attempt takes longer than a call where the machine is busy."""
    said = ""
    while reason not in said:
        with pytest.raises(errors.Unavailable, match="no connection within 200 ms: ") as caught:
            tnx.predict(X, timeout=0.2)
        said = caught.value.message


def test_nobody_is_there(connect: Connect) -> None:
    endpoint = free_endpoint()
    tnx = connect(endpoint)
    call_until_it_says(tnx, f"{endpoint}: no connection within 200 ms: nobody listens there")
    with pytest.raises(errors.Unavailable, match="nobody listens there"):  # from then on
        tnx.predict(X, timeout=0.2)


def test_no_socket_file_is_there(connect: Connect, tmp_path: Path) -> None:
    call_until_it_says(connect(f"ipc://{tmp_path}/tnx.sock"), "nobody listens there")


def test_what_listens_there_is_silent(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        tnx = connect(f"127.0.0.1:{server.getsockname()[1]}")
        call_until_it_says(tnx, "did not finish the ZeroMQ handshake")


def test_what_listens_there_speaks_another_language(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        stop = threading.Event()

        def answer() -> None:
            while not stop.is_set():
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + bytes(100))

        thread = threading.Thread(target=answer)
        thread.start()
        call_until_it_says(connect(f"127.0.0.1:{server.getsockname()[1]}"), "handshake")
        stop.set()
        socket.create_connection(server.getsockname()).close()
        thread.join()


def test_the_daemon_comes_after_the_call(connect: Connect) -> None:
    endpoint = free_endpoint()
    tnx = connect(endpoint)
    with pytest.raises(errors.Unavailable):
        tnx.predict(X, timeout=0.2)
    future = tnx.submit(X)
    with FakeDaemon(echo, endpoint):
        assert equal(future.result(), X)


def test_the_daemon_dies_in_the_middle_and_comes_back(connect: Connect) -> None:
    with FakeDaemon(die) as daemon:
        tnx = connect(daemon.endpoint)
        future = tnx.submit(X)
        assert daemon.gone.wait(PATIENCE_S)
        daemon.start(echo)
        assert equal(future.result(), X)
        assert equal(tnx.predict(X + 1), X + 1)


def test_a_blocking_call_outlives_a_restart(connect: Connect) -> None:
    with FakeDaemon(die) as daemon:

        def restart() -> None:
            assert daemon.gone.wait(PATIENCE_S)
            daemon.start(echo)

        thread = threading.Thread(target=restart)
        thread.start()
        assert equal(connect(daemon.endpoint).predict(X), X)
        thread.join()


def test_everything_unanswered_is_sent_again(connect: Connect) -> None:
    seen = 0

    def answer_ten_and_die(request: Request) -> list[tuple[bytes, Reply]]:
        nonlocal seen
        seen += 1
        if seen > 20:
            raise Die
        return echo(request) if seen % 2 else []

    with FakeDaemon(answer_ten_and_die) as daemon:
        tnx = connect(daemon.endpoint)
        futures = [tnx.submit(np.array([i])) for i in range(100)]
        assert daemon.gone.wait(PATIENCE_S)
        daemon.start(echo)
        assert [future.result().output[0] for future in futures] == list(range(100))


def test_the_daemon_dies_and_stays_away(connect: Connect) -> None:
    with FakeDaemon(in_turn(echo, die)) as daemon:
        tnx = connect(daemon.endpoint)
        tnx.predict(X)
        with pytest.raises(errors.Unavailable, match=r"lost the connection and got none again within 400 ms: no"):
            tnx.predict(X, timeout=0.4)


def test_a_request_that_kills_is_given_up(connect: Connect) -> None:
    with FakeDaemon(die) as daemon:
        tnx = connect(daemon.endpoint)
        future = tnx.submit(X)
        for _ in range(2):
            assert daemon.gone.wait(PATIENCE_S)
            daemon.start()
        with pytest.raises(errors.Unavailable, match="broke 3 times while predict was under way"):
            future.result()
        daemon.start(echo)
        assert equal(tnx.predict(X), X)


def test_a_connection_that_carries_nothing_is_left_for_a_new_one(connect: Connect) -> None:
    with FakeDaemon(echo) as daemon, Proxy(daemon.endpoint) as proxy:
        tnx = connect(proxy.endpoint)
        assert equal(tnx.predict(X), X)
        proxy.swallow(1)
        with pytest.raises(errors.DeadlineExceeded):
            tnx.predict(X, timeout=0.1)
        assert equal(tnx.predict(X), X)
        assert proxy.accepted == 2


def test_a_long_call_outlives_a_connection_that_carries_nothing(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeDaemon(in_turn(echo, silence, echo)) as daemon, Proxy(daemon.endpoint) as proxy:
        tnx = connect(proxy.endpoint)
        tnx.predict(X)
        future = tnx.submit(X)
        for _ in range(2):
            daemon.received.get(timeout=PATIENCE_S)  # it has gone out, and is not answered
        proxy.swallow(1)
        with pytest.raises(errors.DeadlineExceeded):
            tnx.predict(X, timeout=0.1)
        assert equal(future.result(PATIENCE_S), X)
        assert proxy.accepted == 2
    assert f"{proxy.endpoint}: nothing comes over the connection" in caplog.text


def test_a_proxy_that_carries_nothing_at_all_is_named(connect: Connect) -> None:
    with FakeDaemon(echo) as daemon, Proxy(daemon.endpoint) as proxy:
        tnx = connect(proxy.endpoint)
        tnx.predict(X)
        proxy.swallow(1000)
        with pytest.raises(errors.DeadlineExceeded):
            tnx.predict(X, timeout=0.1)
        with pytest.raises(errors.Unavailable, match="no connection within 2 s: it accepts"):
            tnx.predict(X, timeout=2.0)


def test_a_restart_between_calls(connect: Connect) -> None:
    with FakeDaemon(echo) as daemon:
        tnx = connect(daemon.endpoint)
        for i in range(3):
            assert equal(tnx.predict(X + i), X + i)
            daemon.stop()
            daemon.start()
        assert equal(tnx.predict(X), X)


def test_close_ends_what_is_under_way_and_what_comes(connect: Connect) -> None:
    with FakeDaemon(silence) as daemon:
        tnx = connect(daemon.endpoint)
        futures = [tnx.submit(X) for _ in range(3)]
        for _ in futures:
            daemon.received.get(timeout=PATIENCE_S)
        tnx.close()
        tnx.close()
        for future in futures:
            with pytest.raises(errors.Cancelled, match="closed before predict was answered"):
                future.result(PATIENCE_S)
        with pytest.raises(errors.FailedPrecondition, match="closed"):
            tnx.predict(X)
        with pytest.raises(errors.FailedPrecondition, match="closed"):
            tnx.health()


def test_close_without_a_connection(connect: Connect) -> None:
    tnx = connect(free_endpoint())
    future = tnx.submit(X)
    tnx.close()
    with pytest.raises((errors.Cancelled, errors.FailedPrecondition)):
        future.result(PATIENCE_S)


# --- Client only ---------------------------------------------------------------------------------------------


@pytest.fixture
def tnx() -> Iterator[Client]:
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as client:
        yield client


def test_both_clients_take_the_same_arguments() -> None:
    for name in ("__init__", "predict", "health", "metadata", "close"):
        assert inspect.signature(getattr(Client, name)) == inspect.signature(getattr(AsyncClient, name))
    ours, theirs = (inspect.signature(function).parameters for function in (Client.predict, Client.submit))
    assert ours == theirs


def test_threads_get_their_own_replies(tnx: Client) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        for i in range(100):
            sent = np.array([number, i])
            result = tnx.predict(sent) if i % 3 else tnx.submit(sent).result()
            if not equal(result, sent):
                wrong.append((sent, result))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert tnx._session.idle


def test_threads_survive_restarts() -> None:
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        right = threading.Semaphore(0)
        stop = threading.Event()

        def work(number: int) -> None:
            while not stop.is_set():
                if equal(tnx.predict(np.array([number])), [number]):
                    right.release()

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            workers = [pool.submit(work, number) for number in range(4)]
            for _ in range(3):
                for _ in range(20):
                    assert right.acquire(timeout=PATIENCE_S)
                daemon.stop()
                daemon.start()
            stop.set()
            for worker in workers:
                worker.result(PATIENCE_S)


def test_close_while_threads_call() -> None:
    with FakeDaemon(echo) as daemon:
        tnx = Client(daemon.endpoint, timeout=PATIENCE_S)
        running = threading.Semaphore(0)

        def work() -> type[BaseException]:
            while True:
                try:
                    tnx.submit(X).result(PATIENCE_S)
                    tnx.predict(X)
                except (errors.Cancelled, errors.FailedPrecondition) as error:
                    return type(error)
                running.release()

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            workers = [pool.submit(work) for _ in range(8)]
            for _ in range(50):
                assert running.acquire(timeout=PATIENCE_S)
            tnx.close()
            for worker in workers:
                assert issubclass(worker.result(PATIENCE_S), errors.TensorNextError)


def test_a_lone_caller_needs_no_thread(tnx: Client) -> None:
    before = threading.active_count()
    for _ in range(10):
        tnx.predict(X)
    assert threading.active_count() == before


def test_submit_copies_its_inputs() -> None:
    with FakeDaemon(backwards(2)) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        buffer = np.zeros(100_000)
        first = tnx.submit(buffer)
        buffer[:] = 1
        second = tnx.submit({"x": buffer})
        buffer[:] = 2
        assert (first.result().output.max(), second.result().output.min()) == (0, 1)


def test_futures_are_ordinary_futures(tnx: Client) -> None:
    called: list[Future[Result]] = []
    futures = [tnx.submit(np.array([i])) for i in range(5)]
    futures[0].add_done_callback(called.append)
    done = {future.result().output[0] for future in concurrent.futures.as_completed(futures, PATIENCE_S)}
    assert done == set(range(5))
    assert called == [futures[0]]
    assert not futures[0].cancel()


def test_waiting_for_cancelled_futures_ends() -> None:
    with FakeDaemon(silence) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        futures = [tnx.submit(X) for _ in range(3)]
        for future in futures:
            assert future.cancel()
        done, pending = concurrent.futures.wait(futures, PATIENCE_S)
        assert (done, pending) == (set(futures), set())


def test_callbacks_may_call(tnx: Client) -> None:
    answers: Future[Result] = Future()

    def again(future: Future[Result]) -> None:
        answers.set_result(tnx.predict(future.result().output + 1))

    tnx.submit(X).add_done_callback(again)
    assert equal(answers.result(PATIENCE_S), X + 1)


def test_callbacks_may_close() -> None:
    with FakeDaemon(echo) as daemon:
        tnx = Client(daemon.endpoint, timeout=PATIENCE_S)
        closed = threading.Event()

        def close(future: Future[Result]) -> None:
            tnx.close()
            closed.set()

        tnx.submit(X).add_done_callback(close)
        assert closed.wait(PATIENCE_S)
        with pytest.raises(errors.FailedPrecondition):
            tnx.predict(X)


@pytest.mark.parametrize("thrown", [ValueError, SystemExit])
def test_callbacks_may_fail(tnx: Client, thrown: type[BaseException], caplog: pytest.LogCaptureFixture) -> None:
    def fail(future: Future[Result]) -> None:
        raise thrown

    future = tnx.submit(X)
    future.add_done_callback(fail)
    future.result()
    assert [tnx.submit(X).result().batch_size for _ in range(3)] == [1, 1, 1]


def test_a_callback_that_fails_keeps_no_other_future_from_its_end() -> None:
    def fail(future: Future[Result]) -> None:
        raise SystemExit

    with FakeDaemon(silence) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        futures = [tnx.submit(X) for _ in range(4)]
        for future in futures:
            future.add_done_callback(fail)
        for _ in range(MAX_LOSSES):  # then all are given up at once
            for _ in futures:
                daemon.received.get(timeout=PATIENCE_S)
            daemon.start()
        assert concurrent.futures.wait(futures, PATIENCE_S).not_done == set()


def test_a_callback_that_blocks_delays_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        entered, leave, left = threading.Event(), threading.Event(), threading.Event()

        def block(future: Future[Result]) -> None:
            entered.set()
            leave.wait(PATIENCE_S)
            left.set()

        try:
            tnx.submit(X).add_done_callback(block)
            assert entered.wait(PATIENCE_S)
            with pytest.raises(errors.DeadlineExceeded, match=r"a callback of a future keeps the reading thread busy"):
                tnx.predict(X, timeout=0.1)
            monkeypatch.setattr(driver, "_GRACE_S", 2 * PATIENCE_S)  # which is not for deadlines
            with pytest.raises(errors.DeadlineExceeded, match=r"its deadline of 100 ms"):
                tnx.predict(X, deadline=0.1)
            assert not left.is_set()
        finally:
            leave.set()
        assert equal(tnx.predict(X), X)


def test_a_call_interrupted_while_it_waits_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def poll(sources: list[tuple[Any, int]], timeout: int) -> list[tuple[Any, int]]:
        if daemon.received.empty():
            return zmq.zmq_poll(sources, 1)
        raise KeyboardInterrupt

    with FakeDaemon(in_turn(silence, echo)) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        with monkeypatch.context() as patch:
            patch.setattr(driver, "zmq_poll", poll)
            with pytest.raises(KeyboardInterrupt):
                tnx.predict(X)
        assert tnx._session.idle
        interrupted = daemon.received.get_nowait()
        assert daemon.cancels.get(timeout=PATIENCE_S).id == interrupted.id
        assert equal(tnx.predict(X), X)
        assert daemon.received.get_nowait().identity == interrupted.identity, "the connection goes on"


def test_a_call_interrupted_while_another_thread_drives_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeDaemon(silence) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        driven = tnx.submit(X)
        other = daemon.received.get(timeout=PATIENCE_S)
        interrupted: list[Request] = []

        def wait(signal: object, timeout: float) -> bool:
            interrupted.append(daemon.received.get(timeout=PATIENCE_S))
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(driver.Signal, "wait", wait)
            with pytest.raises(KeyboardInterrupt):
                tnx.predict(X)
        assert daemon.cancels.get(timeout=PATIENCE_S).id == interrupted[0].id != other.id
        assert not driven.done()


class Interrupt:
    """Does something, with Ctrl-C at the n-th of the places at which CPython looks for it.

    Those are the beginnings of functions and the returns of functions in C. It looks at each turn of a loop, too, but
    there is none here that calls nothing.

    Attributes:
        number: n. place: in words; "" if there are fewer.
    """

    def __init__(self, number: int) -> None:
        self.number = self._left = number
        self.place = ""

    def __call__(self, action: Callable[..., object], *args: object, **options: object) -> None:
        try:
            sys.setprofile(self._look)
            action(*args, **options)
        except BaseException:  # not always KeyboardInterrupt: `threading` makes a RuntimeError of some
            if not self.place:
                raise
        finally:
            sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_return") and argument is not sys.setprofile:
            self._left -= 1
            if self._left == 0:
                sys.setprofile(None)
                self.place = f"{event} in {frame.f_code.co_qualname}, line {frame.f_lineno}"
                raise KeyboardInterrupt


def interrupts() -> Iterator[Interrupt]:
    """One for each place in what is done with it, until that is done without coming to one."""
    for number in itertools.count(1):
        interrupt = Interrupt(number)
        yield interrupt
        if not interrupt.place:
            assert number > 20
            return


may_meet_finalizers = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""What is raised in a finalizer goes no further."""


@pytest.fixture
def elsewhere() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """A thread that no interrupt reaches."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool


@may_meet_finalizers
def test_a_lone_call_may_be_interrupted_anywhere(elsewhere: concurrent.futures.ThreadPoolExecutor) -> None:
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        for interrupt in interrupts():
            assert equal(tnx.predict(X), X)  # now the connection stands
            interrupt(tnx.predict, X)
            assert equal(elsewhere.submit(tnx.predict, X + 1).result(PATIENCE_S), X + 1), interrupt.place
        assert tnx._session.idle


@may_meet_finalizers
def test_a_call_may_be_interrupted_anywhere_as_it_connects_again(
    elsewhere: concurrent.futures.ThreadPoolExecutor,
) -> None:
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        for interrupt in interrupts():
            assert equal(tnx.predict(X), X)
            daemon.stop()
            daemon.start()
            interrupt(tnx.predict, X)
            assert equal(elsewhere.submit(tnx.predict, X + 1).result(PATIENCE_S), X + 1), interrupt.place


class Holding:
    """Answers requests for the model "held" together with the next for any other model."""

    def __init__(self, on_held: Callable[[], object] = lambda: None) -> None:
        self._on_held = on_held
        self._held: list[Request] = []

    def __call__(self, request: Request) -> list[tuple[bytes, Reply]]:
        self._held.append(request)
        if isinstance(request.header, wire.Predict) and request.header.model == "held":
            self._on_held()
            return []
        held, self._held = self._held, []
        return [message for each in held for message in echo(each)]


@may_meet_finalizers
def test_an_interrupted_call_harms_none_that_was_there(elsewhere: concurrent.futures.ThreadPoolExecutor) -> None:
    with FakeDaemon(Holding()) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        for interrupt in interrupts():
            others = [tnx.submit(X + number, model="held") for number in range(3)]
            interrupt(tnx.predict, X)  # with its answer come theirs
            assert equal(elsewhere.submit(tnx.predict, X + 3).result(PATIENCE_S), X + 3), interrupt.place
            for number, other in enumerate(others):
                assert equal(other.result(PATIENCE_S), X + number), interrupt.place


@may_meet_finalizers
def test_an_interrupted_call_harms_none_that_came_later(elsewhere: concurrent.futures.ThreadPoolExecutor) -> None:
    others: list[Future[Result]] = []
    holding = Holding(lambda: others.append(elsewhere.submit(tnx.predict, X + 1)))
    with FakeDaemon(holding) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        for interrupt in interrupts():
            interrupt(tnx.predict, X, model="held")
            others.append(elsewhere.submit(tnx.predict, X + 1))
            for other in others:
                assert equal(other.result(PATIENCE_S), X + 1), interrupt.place
        assert len(others) > interrupt.number + 10  # those came while the call was under way
        assert tnx._session.idle


@may_meet_finalizers
def test_submit_may_be_interrupted_anywhere(elsewhere: concurrent.futures.ThreadPoolExecutor) -> None:
    with FakeDaemon(echo) as daemon:
        for interrupt in interrupts():
            with Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
                interrupt(tnx.submit, X)
                assert equal(elsewhere.submit(tnx.predict, X + 1).result(PATIENCE_S), X + 1), interrupt.place
                assert equal(tnx.submit(X + 2).result(PATIENCE_S), X + 2), interrupt.place


@may_meet_finalizers
def test_close_may_be_interrupted_anywhere(elsewhere: concurrent.futures.ThreadPoolExecutor) -> None:
    with FakeDaemon(silence) as daemon:
        for interrupt in interrupts():
            tnx = Client(daemon.endpoint, timeout=PATIENCE_S)
            other = tnx.submit(X)
            daemon.received.get(timeout=PATIENCE_S)
            interrupt(tnx.close)
            elsewhere.submit(tnx.close).result(PATIENCE_S)
            with pytest.raises(errors.Cancelled):
                other.result(PATIENCE_S)
            with pytest.raises(errors.FailedPrecondition):
                tnx.predict(X)


def test_a_message_half_sent_ends_the_connection() -> None:
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        assert equal(tnx.predict(X), X)
        link = tnx._driver._link
        send = link._send

        def interrupted(call: Any) -> None:
            link._send = send  # type: ignore[method-assign]
            assert link.dealer is not None
            link.dealer.send(call.frames[0], zmq.SNDMORE)
            raise KeyboardInterrupt

        link._send = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            tnx.predict(X)
        assert equal(tnx.predict(X + 1), X + 1)
        assert daemon.received.qsize() == 2


def test_a_client_that_is_dropped_leaves_nothing() -> None:
    with FakeDaemon(echo) as daemon, warnings.catch_warnings():
        warnings.simplefilter("error")
        tnx = Client(daemon.endpoint, timeout=PATIENCE_S)
        tnx.submit(X).result()
        thread, core = tnx._driver._io_thread, weakref.ref(tnx._driver)
        assert thread is not None
        del tnx
        thread.join(PATIENCE_S)
        gc.collect()
        assert not thread.is_alive()
        assert core() is None


def test_futures_outlive_a_client_that_is_dropped() -> None:
    with FakeDaemon(backwards(3)) as daemon:
        tnx = Client(daemon.endpoint, timeout=PATIENCE_S)
        futures = [tnx.submit(np.array([i])) for i in range(3)]
        del tnx
        gc.collect()
        assert [future.result().output[0] for future in futures] == [0, 1, 2]


def test_a_failed_construction_leaves_nothing() -> None:
    with pytest.raises(errors.InvalidArgument):
        Client("localhost", timeout=0)
    gc.collect()  # an error in __del__ would show here


@pytest.mark.skipif(not hasattr(os, "fork"), reason="cannot fork here")
def test_a_forked_child_makes_its_own_client() -> None:
    script = """
import os, sys, numpy as np
from tnxctl import Client
x = np.ones(3)
tnx = Client(sys.argv[1], timeout=20.0)
tnx.submit(x).result()
child = os.fork()
if child == 0:
    with Client(sys.argv[1], timeout=20.0) as own:
        os._exit(7 if own.submit(x).result().output.sum() == 3 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
tnx.predict(x)
tnx.close()
"""
    with FakeDaemon(echo) as daemon:
        subprocess.run([sys.executable, "-c", script, daemon.endpoint], check=True, timeout=PATIENCE_S)


def test_a_program_may_end_with_calls_under_way() -> None:
    script = """
import sys, numpy as np
from tnxctl import Client
tnx = Client(sys.argv[1], timeout=1000.0)
future = tnx.submit(np.ones(3))
"""
    with FakeDaemon(silence) as daemon:
        subprocess.run(
            [sys.executable, "-W", "error", "-c", script, daemon.endpoint],
            check=True,
            timeout=PATIENCE_S,
            stderr=subprocess.DEVNULL,
        )


def test_importing_the_package_alone_imports_nothing_heavy() -> None:
    script = """
import sys, tnxctl
assert not {"numpy", "zmq", "msgspec", "asyncio"} & set(sys.modules), sorted(sys.modules)
tnxctl.Client, tnxctl.Result, tnxctl.NotFound
assert not {"asyncio", "torch", "ml_dtypes"} & set(sys.modules), sorted(sys.modules)
assert set(tnxctl.__all__) <= set(dir(tnxctl))
for name in tnxctl.__all__:
    getattr(tnxctl, name)
try:
    tnxctl.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE_S)


# --- AsyncClient only ----------------------------------------------------------------------------------------


def test_gather() -> None:
    async def main(endpoint: str) -> list[Result]:
        async with AsyncClient(endpoint, timeout=PATIENCE_S) as tnx:
            return await asyncio.gather(*(tnx.predict(np.array([i])) for i in range(300)))

    with FakeDaemon(echo) as daemon:
        results = asyncio.run(main(daemon.endpoint))
    assert [result.output[0] for result in results] == list(range(300))


def test_a_cancelled_task_forgets_its_call() -> None:
    async def main(daemon: FakeDaemon) -> None:
        async with AsyncClient(daemon.endpoint, timeout=PATIENCE_S) as tnx:
            with pytest.raises(TimeoutError) as caught:
                await asyncio.wait_for(tnx.predict(X), 0.2)
            assert not isinstance(caught.value, errors.DeadlineExceeded)
            assert tnx._session.idle
            assert daemon.cancels.get(timeout=PATIENCE_S).id == daemon.received.get_nowait().id
            daemon.answer = echo
            assert equal(await tnx.predict(X), X)

    with FakeDaemon(silence) as daemon:
        asyncio.run(main(daemon))


def test_a_client_belongs_to_one_loop() -> None:
    with FakeDaemon(echo) as daemon:
        tnx = AsyncClient(daemon.endpoint, timeout=PATIENCE_S)
        with asyncio.Runner() as runner:
            assert equal(runner.run(tnx.predict(X)), X)
            with asyncio.Runner() as other, pytest.raises(errors.FailedPrecondition, match="another event loop"):
                other.run(tnx.predict(X))
            assert equal(runner.run(tnx.predict(X)), X)
            runner.run(tnx.close())


def test_the_loop_stays_free_while_a_call_waits() -> None:
    async def main(endpoint: str) -> int:
        ticks = 0
        async with AsyncClient(endpoint, timeout=PATIENCE_S) as tnx:
            await tnx.predict(X)
            call = asyncio.create_task(tnx.predict(X, timeout=0.3))
            while not call.done():
                await asyncio.sleep(0)
                ticks += 1
            with pytest.raises(errors.DeadlineExceeded):
                call.result()
        return ticks

    with FakeDaemon(in_turn(echo, silence)) as daemon:
        assert asyncio.run(main(daemon.endpoint)) > 10


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, BlindLoop])
def test_an_async_client_that_is_dropped_leaves_nothing(loop_factory: Any) -> None:
    async def main(endpoint: str) -> None:
        tnx = AsyncClient(endpoint, timeout=PATIENCE_S)
        await tnx.predict(X)
        del tnx
        gc.collect()
        await asyncio.sleep(0)

    with FakeDaemon(echo) as daemon, asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main(daemon.endpoint))
    gc.collect()


def test_an_async_client_may_outlive_its_loop() -> None:
    async def main(tnx: AsyncClient) -> None:
        await tnx.predict(X)

    with FakeDaemon(echo) as daemon:
        tnx = AsyncClient(daemon.endpoint, timeout=PATIENCE_S)
        asyncio.run(main(tnx))
        del tnx
        gc.collect()
