"""The serving loop, with the real scheduler, over devices that delay, reorder, fail, are lost and die on command."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from daemons import Running, running
from dealer import Dealer, rows
from obedient_devices import ANSWER, BREAK, BREAK_LATER, CROWD, EXHAUST, FAIL, HANG, HOLD, RELEASE, VANISH
from tnxctl.protocol import wire

PROGRAM = str(Path(__file__).parents[1] / "obedient_devices.py")

Start = Callable[..., tuple[Running, Dealer]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a daemon with so many lanes for each of its two devices, ready and with one connection."""
    with ExitStack() as stack:

        def started(lanes: int = 1, config: str = "") -> tuple[Running, Dealer]:
            program = (PROGRAM, str(lanes))
            daemon = stack.enter_context(running(tmp_path, "--model", "mlp", program=program, config=config))
            dealer = stack.enter_context(Dealer(daemon.endpoint))
            dealer.await_health(status="ready")
            return daemon, dealer

        yield started


def ask(dealer: Dealer, command: int, device: str = "cuda:0") -> int:
    """Send a request of one row."""
    return dealer.predict(rows(1, fill=command), model="mlp", device=device)


def await_running(dealer: Dealer, requests: int) -> None:
    dealer.await_health(running=requests)


def await_crowded(daemon: Running, dealer: Dealer) -> None:
    """Wait until a batch has found no memory beside others; the test's own time limit ends that."""
    while "no memory beside other batches" not in daemon.log:
        dealer.health()


def test_answers_leave_in_the_order_in_which_batches_end(start: Start) -> None:
    _, dealer = start(lanes=2)
    held = ask(dealer, HOLD)
    await_running(dealer, 1)
    second = ask(dealer, ANSWER)
    assert dealer.result()[0].id == second
    released = ask(dealer, RELEASE)
    assert {dealer.result()[0].id for _ in range(2)} == {held, released}


def test_a_request_that_fails_takes_no_other_of_its_batch_with_it(start: Start) -> None:
    _, dealer = start()
    held = ask(dealer, HOLD)
    await_running(dealer, 1)
    sent = {ask(dealer, command): command for command in (ANSWER, FAIL, ANSWER)}
    dealer.await_health(queued=3)
    ask(dealer, RELEASE, device="cpu")
    replies = dict(sorted((reply.id, reply) for reply, _ in (dealer.receive() for _ in range(5))))
    assert isinstance(replies[held], wire.Result)
    for number, command in sent.items():
        reply = replies[number]
        if command == FAIL:
            assert isinstance(reply, wire.ErrorReply)
            assert reply.code == "INTERNAL"
        else:
            assert isinstance(reply, wire.Result)
            assert reply.batch_size == 3


def test_requests_that_were_sent_before_are_counted_also_where_they_are_refused(start: Start) -> None:
    _, dealer = start()
    for attempt, model in ((1, "mlp"), (2, "mlp"), (3, "nobody"), (1, "mlp")):
        dealer.predict(rows(1, fill=ANSWER), model=model, attempt=attempt)
        dealer.receive()
    report = dealer.health()
    assert (report.requests, report.resent) == (4, 2)


def test_requests_of_a_lost_device_that_wait_run_elsewhere(start: Start) -> None:
    _, dealer = start()
    held = dealer.predict(rows(1, fill=HOLD), model="mlp")
    await_running(dealer, 1)
    lost = dealer.predict(rows(1, fill=BREAK), model="mlp", priority=0)
    waiting = [dealer.predict(rows(64, fill=ANSWER), model="mlp") for _ in range(5)]
    dealer.await_health(queued=6)
    ask(dealer, RELEASE, device="cpu")
    replies = {reply.id: reply for reply, _ in (dealer.receive() for _ in range(8))}
    assert isinstance(replies[held], wire.Result)
    error = replies[lost]
    assert isinstance(error, wire.ErrorReply)
    assert error.code == "UNAVAILABLE"
    for number in waiting:
        reply = replies[number]
        assert isinstance(reply, wire.Result), reply
        assert reply.device == "cpu"
    (gpu, _) = dealer.health().devices
    assert (gpu.name, gpu.status, gpu.error) == ("cuda:0", "failed", "it fell out of its slot")
    ask(dealer, ANSWER)
    assert "cuda:0 failed: it fell out of its slot" in dealer.error().message


@pytest.mark.parametrize(("choice", "code"), [("restart", 1), ("continue", None)])
def test_a_lost_device_ends_the_daemon_where_something_restarts_it(start: Start, choice: str, code: int | None) -> None:
    daemon, dealer = start(config=f'on_device_loss = "{choice}"')
    lost = ask(dealer, BREAK)
    assert dealer.error().id == lost
    if code is None:
        ask(dealer, ANSWER, device="cpu")
        dealer.result()
        assert daemon.stop() == 0
    else:
        assert daemon.process.wait(60) == code


def test_a_request_that_finds_no_memory_on_a_gpu_runs_on_the_cpu(start: Start) -> None:
    _, dealer = start()
    dealer.predict(rows(1, fill=EXHAUST), model="mlp")
    reply, _ = dealer.result()
    assert reply.device == "cpu"
    assert "cuda:0 had no memory left for it" in reply.reason
    ask(dealer, EXHAUST)
    assert dealer.error().code == "RESOURCE_EXHAUSTED"  # it named the device


def test_what_finds_no_memory_beside_others_runs_again_without_them_and_teaches_no_ceiling(start: Start) -> None:
    daemon, dealer = start(lanes=2)
    held = ask(dealer, HOLD)
    await_running(dealer, 1)
    crowded = ask(dealer, CROWD)
    await_crowded(daemon, dealer)
    assert dealer.health().queued == 1  # until the other one is over
    behind = [dealer.predict(rows(4, fill=ANSWER), model="mlp", device="cuda:0") for _ in range(3)]
    dealer.await_health(queued=4, running=1)  # beside a free lane: it is kept for what is to run alone
    released = ask(dealer, RELEASE, device="cpu")
    results = [dealer.result()[0] for _ in range(6)]
    assert {result.id for result in results[:2]} == {held, released}
    assert [result.id for result in results[2:]] == [crowded, *behind]
    assert [result.batch_size for result in results[2:]] == [1, 12, 12, 12]


def test_what_is_to_run_alone_is_routed_elsewhere_when_its_device_is_lost(start: Start) -> None:
    daemon, dealer = start(lanes=2)
    lost = ask(dealer, BREAK_LATER)
    await_running(dealer, 1)
    crowded = dealer.predict(rows(1, fill=CROWD), model="mlp")
    await_crowded(daemon, dealer)
    released = ask(dealer, RELEASE, device="cpu")
    replies = {reply.id: reply for reply, _ in (dealer.receive() for _ in range(3))}
    assert isinstance(replies[lost], wire.ErrorReply)
    for number in (crowded, released):
        reply = replies[number]
        assert isinstance(reply, wire.Result), reply
        assert reply.device == "cpu"


@pytest.mark.parametrize("command", [HANG, VANISH], ids=["late", "never"])
def test_a_batch_that_hangs_costs_its_requests_and_its_lane(start: Start, command: int) -> None:
    daemon, dealer = start(lanes=2, config="stall_timeout_s = 60")
    hung = ask(dealer, command)
    error = dealer.error()
    assert (error.id, error.code) == (hung, "INTERNAL")
    assert "ran for over 60 s on cuda:0" in error.message
    other = ask(dealer, RELEASE)
    assert dealer.result()[0].id == other
    if command == HANG:  # it has ended after all: its lane is free again
        dealer.await_health(running=0)
    else:
        assert dealer.health().running == 1
    assert daemon.stop() == 0


def test_a_second_signal_waits_for_nothing(start: Start) -> None:
    daemon, dealer = start()
    held = ask(dealer, HOLD)
    await_running(dealer, 1)
    waiting = ask(dealer, ANSWER)
    dealer.await_health(queued=1)
    daemon.process.send_signal(signal.SIGTERM)
    dealer.await_health(status="draining")
    refused = ask(dealer, ANSWER)
    assert dealer.error().id == refused
    daemon.process.send_signal(signal.SIGTERM)
    errors = [dealer.error() for _ in range(2)]
    assert {error.id for error in errors} == {held, waiting}
    assert {error.code for error in errors} == {"UNAVAILABLE"}
    assert daemon.process.wait(60) == 0


def test_a_drain_ends_when_its_time_is_up(start: Start) -> None:
    daemon, dealer = start(config="drain_timeout_s = 0.3")
    held = ask(dealer, HOLD)
    await_running(dealer, 1)
    daemon.process.send_signal(signal.SIGTERM)
    error = dealer.error()
    assert (error.id, error.code) == (held, "UNAVAILABLE")
    assert daemon.process.wait(60) == 0
