"""Clients of several daemons: real sockets, daemons that refuse, drain, die, hang and come back.

Each test runs over `Client`, over `AsyncClient`, and over `AsyncClient` on an event loop that cannot watch a file
descriptor.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from peers import (
    PATIENCE_S,
    FakeDaemon,
    Proxy,
    Reply,
    Request,
    X,
    die,
    echo,
    equal,
    error,
    free_endpoint,
    in_turn,
    messages,
    model_info,
    silence,
)
from shells import SHELLS, AsyncShell, Connect, SyncShell, connecting
from tnxctl import Client
from tnxctl.protocol import errors, wire
from tnxctl.results import Result


@pytest.fixture(params=SHELLS.values(), ids=SHELLS)
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    yield from connecting(request.param)


@pytest.fixture
def daemons() -> Iterator[list[FakeDaemon]]:
    """Two that answer, and that may be told to do otherwise."""
    with ExitStack() as stack:
        yield [stack.enter_context(FakeDaemon(echo)) for _ in range(2)]


def endpoints(daemons: list[FakeDaemon]) -> list[str]:
    return [daemon.endpoint for daemon in daemons]


def counts(daemons: list[FakeDaemon]) -> list[int]:
    return [daemon.received.qsize() for daemon in daemons]


def gather(tnx: SyncShell | AsyncShell, count: int) -> list[Result]:
    """So many calls at a time."""
    return [future.result() for future in [tnx.submit(X) for _ in range(count)]]


def call(tnx: SyncShell | AsyncShell, verb: str, *arguments: Any) -> Any:
    """Any other call."""
    done = getattr(tnx.client, verb)(*arguments)
    return done if isinstance(tnx, SyncShell) else asyncio.run_coroutine_threadsafe(done, tnx._loop).result()


def drains(after_us: float) -> Any:
    return messages(
        lambda request: [
            wire.encode(
                wire.ErrorReply(
                    v=1, id=request.id, code="UNAVAILABLE", message="the daemon is draining", retry_after_us=after_us
                )
            )
        ]
    )


def test_calls_are_spread(connect: Connect, daemons: list[FakeDaemon]) -> None:
    tnx = connect(endpoints(daemons))
    while not all(counts(daemons)):  # until both connections stand
        gather(tnx, 4)
    before = counts(daemons)
    assert all(equal(result, X) for result in gather(tnx, 100))
    assert all(now - then >= 30 for now, then in zip(counts(daemons), before, strict=True))


def test_one_after_the_other_and_each_gets_its_own(connect: Connect, daemons: list[FakeDaemon]) -> None:
    tnx = connect(endpoints(daemons))
    for number in range(50):
        assert equal(tnx.predict(X + number), X + number)


def test_where_nobody_listens_is_passed_over(connect: Connect) -> None:
    with FakeDaemon(echo) as daemon:
        tnx = connect([free_endpoint(), daemon.endpoint])
        assert all(equal(result, X) for result in gather(tnx, 20))
        assert daemon.received.qsize() == 20


def test_a_daemon_that_dies_is_passed_over_and_comes_back(connect: Connect, daemons: list[FakeDaemon]) -> None:
    first, second = daemons
    tnx = connect(endpoints(daemons))
    assert all(equal(result, X) for result in gather(tnx, 10))
    first.stop()
    assert all(equal(result, X) for result in gather(tnx, 50))
    first.start()
    second.stop()
    assert all(equal(result, X) for result in gather(tnx, 50))


def test_what_a_daemon_dies_of_is_sent_to_the_other(connect: Connect, daemons: list[FakeDaemon]) -> None:
    first, second = daemons
    tnx = connect([first.endpoint, second.endpoint])
    assert all(equal(result, X) for result in gather(tnx, 10))
    first.start(die)
    while not first.gone.is_set():
        assert all(equal(result, X) for result in gather(tnx, 4))


def test_a_daemon_that_drains_is_passed_over(connect: Connect, daemons: list[FakeDaemon]) -> None:
    first, second = daemons
    first.answer = drains(60e6)
    tnx = connect(endpoints(daemons))
    assert all(equal(result, X) for _ in range(10) for result in gather(tnx, 5))
    assert first.received.qsize() <= 5
    assert second.received.qsize() == 50


def test_both_drain_for_a_moment(connect: Connect, daemons: list[FakeDaemon]) -> None:
    for daemon in daemons:
        daemon.answer = in_turn(drains(1e3), drains(1e3), echo)
    tnx = connect(endpoints(daemons))
    assert all(equal(result, X) for result in gather(tnx, 20))


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "NOT_FOUND", "FAILED_PRECONDITION"])
def test_a_daemon_without_room_or_model_is_passed_over(connect: Connect, daemons: list[FakeDaemon], code: str) -> None:
    daemons[0].answer = error(code, "not here")
    tnx = connect(endpoints(daemons))
    assert all(equal(tnx.predict(X), X) for _ in range(50))
    daemons[1].answer = error(code, "nor here")
    with pytest.raises(errors.from_code(code, "").__class__, match="here"):
        tnx.predict(X)


def test_an_error_is_told_once_and_not_moved(connect: Connect, daemons: list[FakeDaemon]) -> None:
    for daemon in daemons:
        daemon.answer = error("INTERNAL", "the model has failed")
    tnx = connect(endpoints(daemons))
    with pytest.raises(errors.Internal, match="the model has failed"):
        tnx.predict(X)
    assert sum(counts(daemons)) == 1


def test_nobody_is_there_in_time(connect: Connect) -> None:
    addresses = [free_endpoint(), free_endpoint()]
    tnx = connect(addresses)
    said = ""
    while not all(f"{address}: nobody listens there" in said for address in addresses):
        # An attempt takes longer than that where the machine is busy.
        with pytest.raises(errors.Unavailable, match=r"none of 2 daemons answered predict within 200 ms") as caught:
            tnx.predict(X, timeout=0.2)
        said = caught.value.message
    with pytest.raises(errors.DeadlineExceeded, match="deadline of 200 ms"):
        tnx.predict(X, deadline=0.2)


def test_a_host_that_carries_nothing_any_more_is_passed_over(connect: Connect, daemons: list[FakeDaemon]) -> None:
    with Proxy(daemons[0].endpoint) as proxy:
        tnx = connect([proxy.endpoint, daemons[1].endpoint])
        while not daemons[0].received.qsize():
            gather(tnx, 4)
        proxy.swallow(1000)
        outcomes = []
        for _ in range(20):  # what it has swallowed is late, and then nothing goes there any more
            try:
                outcomes.append(equal(tnx.predict(X, timeout=5.0), X))
            except errors.DeadlineExceeded:
                outcomes.append(False)
        assert outcomes.count(False) <= 1
        assert all(outcomes[-10:])


def test_metadata_may_come_from_any(connect: Connect, daemons: list[FakeDaemon]) -> None:
    daemons[0].answer = error("NOT_FOUND", "there is no model")
    tnx = connect(endpoints(daemons))
    for _ in range(10):
        assert call(tnx, "metadata", "mlp") == model_info("mlp")


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("health", ()),
        ("models", ()),
        ("load", ("m",)),
        ("unload", ("m",)),
        ("route", ("m", {})),
        ("reload", ()),
        ("compare", ("m", 1, 2)),
        ("whoami", ()),
        ("clients", ()),
        ("kick", ("name",)),
        ("keys", ()),
    ],
)
def test_a_verb_about_one_daemon_is_refused(connect: Connect, verb: str, arguments: tuple[Any, ...]) -> None:
    tnx = connect(["gpu-1", "gpu-2"])
    with pytest.raises(errors.InvalidArgument) as caught:
        call(tnx, verb, *arguments)
    assert caught.value.message == (
        f"{verb} is about one daemon, and this client is of 2: make one for the daemon that you mean, such as "
        "Client('tcp://gpu-1:5555')"
    )


def test_a_slow_request_is_hedged(connect: Connect, daemons: list[FakeDaemon]) -> None:
    tnx = connect(endpoints(daemons), hedge=True, timeout=PATIENCE_S)  # a machine that stands still uses up 5 s
    for _ in range(10):
        gather(tnx, 10)
    slow, held, withdrawn = daemons[0], list[int](), set[int]()
    won_before = tnx.client.traffic.hedges_won

    def has_won() -> bool:
        return tnx.client.traffic.hedges_won > won_before

    def hangs(request: Request) -> list[tuple[bytes, Reply]]:
        """One at a time, until a copy has won: one that hangs may be a copy itself, which its original withdraws."""
        if (held and has_won()) or not withdrawn.issuperset(held):
            return echo(request)
        held.append(request.id)
        return silence(request)

    slow.answer = hangs
    futures: set[Future[Result]] = set()
    while not (held and withdrawn.issuperset(held) and has_won()):  # others go on, since copies are a share of all
        futures |= {tnx.submit(X) for _ in range(8 - len(futures))}
        done, futures = wait(futures, return_when=FIRST_COMPLETED)
        assert all(equal(future.result(), X) for future in done)
        withdrawn |= {slow.cancels.get().id for _ in range(slow.cancels.qsize())}
    assert all(equal(future.result(), X) for future in futures)
    traffic = tnx.client.traffic
    assert traffic.hedged <= 0.05 * (sum(traffic.endpoints.values()) - traffic.hedged)


def test_a_client_shows_all_its_endpoints() -> None:
    with Client(["gpu-1", "ipc:///run/tnx"]) as tnx:
        assert repr(tnx) == "<Client of tcp://gpu-1:5555,ipc:///run/tnx, timeout 5 s>"
        assert tnx.traffic is not None
        assert tnx.traffic.endpoints == {"tcp://gpu-1:5555": 0, "ipc:///run/tnx": 0}
    with Client("gpu-1") as tnx:
        assert tnx.traffic is None


def test_threads_share_it(daemons: list[FakeDaemon]) -> None:
    right = []

    def ask(tnx: Client, number: int) -> None:
        inputs = np.full((2, 3), number, np.float32)
        right.extend(equal(tnx.predict(inputs), inputs) for _ in range(20))

    with Client(endpoints(daemons), timeout=PATIENCE_S) as tnx:
        threads = [threading.Thread(target=ask, args=(tnx, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        daemons[0].stop()
        for thread in threads:
            thread.join()
    assert right == [True] * 160


def test_what_is_under_way_fails_when_it_is_closed(daemons: list[FakeDaemon]) -> None:
    came = queue.SimpleQueue[int]()
    for daemon in daemons:
        daemon.answer = lambda request: came.put(request.id) or silence(request)
    tnx = Client(endpoints(daemons), timeout=PATIENCE_S)
    futures = [tnx.submit(X) for _ in range(10)]
    assert {came.get(timeout=PATIENCE_S) for _ in futures} == set(range(1, 11))
    assert futures[0].cancel()
    tnx.close()
    for future in futures[1:]:
        with pytest.raises(errors.Cancelled, match="was closed before predict was answered"):
            future.result(PATIENCE_S)
    with pytest.raises(errors.FailedPrecondition, match="is closed"):
        tnx.predict(X)
