"""Both clients and the time: timeouts, deadlines, daemons that die and come back, connections that break.

Each test runs over `Client`, over `AsyncClient`, and over `AsyncClient` on an event loop that cannot watch a file
descriptor; over the first two also with libzmq's channel, which clients without keys have elsewhere than on Linux.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from peers import (
    PATIENCE_S,
    Die,
    FakeDaemon,
    Proxy,
    Reply,
    Request,
    X,
    call_until_it_says,
    die,
    echo,
    equal,
    free_endpoint,
    in_turn,
    silence,
)
from shells import SHELLS, Connect, connecting
from tnxctl.channels import opening
from tnxctl.connection import Connection
from tnxctl.protocol import errors, wire

WAYS = {name: (shell, opening.HAS_STREAMS) for name, shell in SHELLS.items()} | {
    f"{name} by libzmq": (SHELLS[name], False) for name in ("sync", "asyncio") if opening.HAS_STREAMS
}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def connect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    shell, has_streams = request.param
    monkeypatch.setattr(opening, "HAS_STREAMS", has_streams)
    yield from connecting(shell)


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have silence raise no doubt about a connection: else it is given up after a second, and calls fail with that."""
    monkeypatch.setattr(Connection, "suspect", lambda *_: None)


def test_no_answer_in_time(connect: Connect) -> None:
    with FakeDaemon(in_turn(echo, silence, echo)) as daemon:
        tnx = connect(daemon.endpoint)
        tnx.predict(X)  # now the connection stands
        with pytest.raises(errors.DeadlineExceeded, match=r"did not answer predict within 100 ms") as caught:
            tnx.predict(X, timeout=0.1)
        assert daemon.endpoint in caught.value.message
        assert equal(tnx.predict(X), X)


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("limit", ["timeout", "deadline"])
def test_a_late_call_is_cancelled(connect: Connect, limit: str) -> None:
    with FakeDaemon(in_turn(echo, silence, silence, echo)) as daemon:
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


@pytest.mark.usefixtures("trusting")
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
    assert (first.attempt, second.attempt) == (1, 2)
    assert first == msgspec.structs.replace(second, deadline_us=first.deadline_us, sent_us=first.sent_us, attempt=1)
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


@pytest.mark.usefixtures("trusting")
def test_the_timeout_of_the_client_is_the_default(connect: Connect) -> None:
    with FakeDaemon(in_turn(echo, silence)) as daemon:
        tnx = connect(daemon.endpoint, timeout=0.1)
        tnx.predict(X, timeout=PATIENCE_S)
        for call in (lambda: tnx.predict(X), tnx.health, tnx.metadata):
            with pytest.raises(errors.DeadlineExceeded, match=r"within 100 ms"):
                call()


def test_nobody_is_there(connect: Connect) -> None:
    endpoint = free_endpoint()
    tnx = connect(endpoint)
    call_until_it_says(tnx, f"{endpoint}: no connection within 200 ms: nobody listens there")
    with pytest.raises(errors.Unavailable, match="nobody listens there"):  # from then on
        tnx.predict(X, timeout=0.2)


def test_no_socket_file_is_there(connect: Connect, tmp_path: Path) -> None:
    call_until_it_says(connect(f"ipc://{tmp_path}/tnx.sock"), "nobody listens there")


def test_a_silent_listener_is_named(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        tnx = connect(f"127.0.0.1:{server.getsockname()[1]}")
        call_until_it_says(tnx, "did not finish the ZeroMQ handshake")


def test_a_listener_of_another_protocol_is_named(connect: Connect) -> None:
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
        reason = "does not speak ZeroMQ" if opening.HAS_STREAMS else "handshake"  # all that libzmq tells
        call_until_it_says(connect(f"127.0.0.1:{server.getsockname()[1]}"), reason)
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
        with pytest.raises(errors.Unavailable, match=r"lost the connection and got none again within 1 s: "):
            tnx.predict(X, timeout=1.0)
        call_until_it_says(tnx, "nobody listens there")


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
        said = ""
        while "within 2 s: it accepts" not in said:  # it takes longer where the machine is busy
            with pytest.raises((errors.DeadlineExceeded, errors.Unavailable)) as caught:
                tnx.predict(X, timeout=2.0)
            said = caught.value.message
        assert isinstance(caught.value, errors.Unavailable)


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
