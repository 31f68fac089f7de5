"""Deadlines, cancelling, vanished clients, hung batches and choice of device in a running daemon."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import Daemon
from dealer import Dealer, rows
from model_repositories import ONE_ROW, SAYS_TOML, put, rss_mb
from obedient_devices import ANSWER, HOLD, RELEASE
from tnxctl.protocol import wire

ODD = (str(Path(__file__).parent / "odd_models.py"),)
MOST_ROWS = 16
"""Limit of a batch of the model `wait`."""
OBEDIENT = str(Path(__file__).parent / "obedient_devices.py")
RunDaemon = Callable[..., Daemon]


class Held:
    """A daemon with one worker, which holds the first request until it is released."""

    def __init__(self, daemon: Daemon, dealer: Dealer, fifo: Path) -> None:
        self.daemon = daemon
        self.dealer = dealer
        self._fifo = fifo
        # What it is charged depends on how long the warm-up took: on the last level that holds up no other.
        self.first = dealer.predict(rows(1, 4, 1.0), priority=wire.LOWEST_PRIORITY)
        dealer.await_health(running=1)

    def release(self) -> None:
        with self._fifo.open("wb"):
            pass


@pytest.fixture
def hold(run_daemon: RunDaemon, tmp_path: Path) -> Iterator[Callable[[str], Held]]:
    dealers = []

    def start(settings: str = "") -> Held:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        config = tmp_path / "tnxd.toml"
        config.write_text(f"{settings}\n[cpu]\nworkers = 1\ninline_limit_us = 0\n")
        environment = {**os.environ, "RUN_FIFO": str(fifo)}
        daemon = run_daemon("--model", "wait", "--config", str(config), program=ODD, environment=environment)
        dealer = Dealer(daemon.endpoint)
        dealers.append(dealer)
        return Held(daemon, dealer, fifo)

    yield start
    for dealer in dealers:
        dealer.context.destroy(linger=0)


# --- deadlines -----------------------------------------------------------------------------------------------


def test_a_deadline_that_passes_in_the_queue(hold: Callable[[str], Held]) -> None:
    held = hold("")
    late = held.dealer.predict(rows(1, 4), deadline_us=100_000.0)
    error = held.dealer.error()
    assert (error.id, error.code) == (late, "DEADLINE_EXCEEDED")
    assert "100 ms" in error.message
    report = held.dealer.health()
    assert (report.queued, report.running) == (0, 1)
    held.release()
    assert held.dealer.result()[0].id == held.first


@pytest.mark.slow
def test_what_has_been_answered_keeps_no_memory_until_its_deadline(run_daemon: RunDaemon) -> None:
    daemon = run_daemon("--model", "mlp")
    dealer = Dealer(daemon.endpoint)
    array = rows(8192, 256)  # 8 MiB
    for _ in range(3):
        dealer.predict(array, deadline_us=600e6)
        dealer.result()
    before = rss_mb(daemon.process.pid)
    for _ in range(20):
        dealer.predict(array, deadline_us=600e6)
        dealer.result()
    assert rss_mb(daemon.process.pid) - before < 80
    dealer.context.destroy(linger=0)


def test_a_deadline_that_passes_on_the_lane_is_answered_once(
    run_daemon: RunDaemon, hold: Callable[[str], Held]
) -> None:
    held = hold("")
    # The first one was sent without a deadline and keeps the lane: this one's batch is the next to hang, in time even
    # on a machine that does nothing for seconds.
    late = held.dealer.predict(rows(1, 4, 1.0), deadline_us=10e6)
    held.release()
    assert held.dealer.result()[0].id == held.first
    error = held.dealer.error()
    assert (error.id, error.code) == (late, "DEADLINE_EXCEEDED")
    assert held.dealer.health().running == 1
    held.release()
    held.dealer.await_health(running=0)
    again = held.dealer.predict(rows(1, 4))
    assert held.dealer.result()[0].id == again


def test_what_cannot_make_it_is_refused_on_arrival(daemon: Daemon) -> None:
    with Dealer(daemon.endpoint) as dealer:
        before = dealer.health().requests
        dealer.predict(rows(64), deadline_us=1.0)
        error = dealer.error()
        assert error.code == "DEADLINE_EXCEEDED"
        assert "the predicted wait is" in error.message
        dealer.predict(rows(64), deadline_us=60e6)
        result, _ = dealer.result()
        assert result.predicted_us > 0
        assert dealer.health().requests == before + 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("deadline_us", -1.0),
        ("deadline_us", 0.0),
        ("deadline_us", float("nan")),
        ("deadline_us", float("inf")),
        ("deadline_us", 1e12),
        ("priority", -1),
        ("priority", 4),
    ],
)
def test_absurd_values_are_refused_by_name(daemon: Daemon, field: str, value: float) -> None:
    with Dealer(daemon.endpoint) as dealer:
        dealer.predict(rows(1), **{field: value})
        error = dealer.error()
        assert error.code == "INVALID_ARGUMENT"
        assert field in error.message
        assert repr(value) in error.message
        dealer.predict(rows(1))
        dealer.result()


# --- which device --------------------------------------------------------------------------------------------


def test_devices_by_name(daemon: Daemon) -> None:
    with Dealer(daemon.endpoint) as dealer:
        for device, reason in (("cpu", "asked for cpu"), ("auto", "done first there")):
            dealer.predict(rows(1), device=device)
            result, _ = dealer.result()
            assert reason in result.reason
        dealer.predict(rows(1), device="cuda:77")
        error = dealer.error()
        assert error.code == "INVALID_ARGUMENT"
        assert "'cuda:77': there are" in error.message


# --- cancelling and vanishing --------------------------------------------------------------------------------


def cancel(dealer: Dealer, request: int) -> None:
    dealer.socket.send(wire.encode(wire.Cancel(v=wire.VERSION, id=request)))


def test_a_withdrawn_request_is_answered_and_never_run(hold: Callable[[str], Held]) -> None:
    held = hold("")
    waiting = held.dealer.predict(rows(1, 4, 1.0))  # would hang, too
    cancel(held.dealer, waiting)
    error = held.dealer.error()
    assert (error.id, error.code) == (waiting, "CANCELLED")
    cancel(held.dealer, waiting)  # too late, twice, never heard of: no answer, no harm
    cancel(held.dealer, held.first)
    cancel(held.dealer, 12345)
    held.release()
    assert held.dealer.result()[0].id == held.first
    report = held.dealer.health()
    assert (report.queued, report.running, report.errors) == (0, 0, {"CANCELLED": 1})


def test_one_cannot_withdraw_what_another_asked(hold: Callable[[str], Held]) -> None:
    held = hold("")
    waiting = held.dealer.predict(rows(1, 4))
    held.dealer.await_health(queued=1)
    with Dealer(held.daemon.endpoint) as other:
        cancel(other, waiting)
        assert other.health().queued == 1
    held.release()
    assert [held.dealer.result()[0].id for _ in range(2)] == [held.first, waiting]


def test_a_vanished_client_leaves_no_work_behind(hold: Callable[[str], Held]) -> None:
    held = hold("")
    with Dealer(held.daemon.endpoint) as vanishing:
        for _ in range(50):
            vanishing.predict(rows(1, 4, 1.0))
        held.dealer.await_health(queued=50)
    report = held.dealer.await_health(queued=0)
    assert report.abandoned == 50
    held.release()
    assert held.dealer.result()[0].id == held.first


def test_clients_that_come_and_go_take_nothing_from_those_that_stay(hold: Callable[[str], Held]) -> None:
    """The system hands the file descriptor of a closed connection to the next one."""
    held = hold("")
    staying = [held.dealer.predict(rows(1, 4)) for _ in range(3)]
    for _ in range(30):
        with Dealer(held.daemon.endpoint) as vanishing:
            vanishing.predict(rows(1, 4))
            vanishing.health()
    held.dealer.await_health(queued=3, abandoned=30)
    held.release()
    assert [held.dealer.result()[0].id for _ in range(4)] == [held.first, *staying]


# --- what hangs ----------------------------------------------------------------------------------------------


def test_a_hung_batch_is_given_up_and_other_lanes_go_on(run_daemon: RunDaemon, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    config = tmp_path / "tnxd.toml"
    config.write_text("[cpu]\nworkers = 2\ninline_limit_us = 0\n")
    environment = {**os.environ, "RUN_FIFO": str(fifo)}
    models = ("--model", "hangs", "--model", "odd")
    daemon = run_daemon(*models, "--config", str(config), program=ODD, environment=environment)
    with Dealer(daemon.endpoint) as dealer:
        hung = dealer.predict(rows(1, 4, 1.0), model="hangs")
        error = dealer.error()
        assert (error.id, error.code) == (hung, "INTERNAL")
        assert "'hangs@1' ran for over 1.5 s on cpu" in error.message
        for _ in range(5):
            dealer.predict(rows(1, 4), model="odd")
            dealer.result()
        with fifo.open("wb"):
            pass
        dealer.await_health(running=0)


# --- one at a time -------------------------------------------------------------------------------------------


def test_what_waits_for_an_inline_batch_of_its_model_waits_for_nothing_else(
    run_daemon: RunDaemon, tmp_path: Path
) -> None:
    """Else each would wait for the next message, or for the tick of a second: this would take more than a minute."""
    put(tmp_path / "models", "net", 1)
    settings = SAYS_TOML.replace("max_batch_size = 8", "max_batch_size = 1\nreplicas = 1")
    (tmp_path / "models/net/model.toml").write_text(settings)
    config = tmp_path / "tnxd.toml"
    config.write_text("[cpu]\nworkers = 1\ninline_limit_us = 1000000\n")
    daemon = run_daemon("--model-repository", str(tmp_path / "models"), "--config", str(config))
    with Dealer(daemon.endpoint) as dealer:
        ids = [dealer.predict(ONE_ROW, model="net") for _ in range(200)]
        assert sorted(dealer.result()[0].id for _ in ids) == ids


# --- fair shares ---------------------------------------------------------------------------------------------


def test_a_flood_of_one_client_does_not_hold_up_another(hold: Callable[[str], Held]) -> None:
    """The request in the middle of the flood is held, too: who waited behind all of it would wait for that."""
    held = hold("[queue]\nmax_requests = 20000")
    flood = 4000
    for number in range(flood):
        held.dealer.predict(rows(1, 4, float(number == flood // 2)))
    held.dealer.await_health(queued=flood)
    with Dealer(held.daemon.endpoint) as other:
        other.predict(rows(1, 4))
        held.dealer.await_health(queued=flood + 1)
        held.release()
        other.result()
        assert other.health().queued >= flood // 2 - MOST_ROWS
    held.release()
    for _ in range(flood + 1):
        held.dealer.result()


def test_priorities_in_a_running_daemon(run_daemon: RunDaemon) -> None:
    """On a device that does as it is told: what a level is charged with depends on what batches took before."""
    daemon = run_daemon("--model", "mlp", program=(OBEDIENT, "1"))
    with Dealer(daemon.endpoint) as dealer:
        held = dealer.predict(rows(1, fill=HOLD), device="cpu", priority=wire.LOWEST_PRIORITY)
        dealer.await_health(running=1)
        for index in range(60):
            dealer.predict(rows(64, fill=ANSWER), device="cpu", priority=3 - index % 4)
        dealer.await_health(queued=60)
        released = dealer.predict(rows(1, fill=RELEASE), device="cuda:0")
        answered = [dealer.result()[0].id for _ in range(62)]
    levels = [3 - (id_ - held - 1) % 4 for id_ in answered if id_ not in (held, released)]
    assert Counter(levels[:14]) == {0: 8, 1: 4, 2: 2}  # the last level had its turn with what held the lane
