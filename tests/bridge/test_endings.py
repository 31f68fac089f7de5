"""Ends: of clients in the middle of a request, of daemons that go, restart or drain, and of the bridge itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from bridges import SECONDS, Bridge, running_bridge, until
from conftest import Daemon
from daemons import ODD, ONE_LANE
from patience import longer_each_time
from tnxctl import Client
from tnxctl.protocol.wire import HealthReport

WAIT = b'{"model": "wait", "input_data": [[%d, 0, 0, 0]]}'


class Held:
    """Bridge of a daemon with one lane, whose model waits until it is released."""

    def __init__(self, daemon: Daemon, bridge: Bridge, fifo: Path) -> None:
        self.daemon = daemon
        self.bridge = bridge
        self._fifo = fifo

    def release(self) -> None:
        """Let the model go on, once it waits."""
        with self._fifo.open("wb"):
            pass

    def await_health(self, holds: Callable[[HealthReport], bool]) -> HealthReport:
        """The daemon's health, as soon as something holds."""
        ends = time.monotonic() + SECONDS
        with Client(self.daemon.endpoint, timeout=SECONDS) as client:
            while not holds(report := client.health()):
                assert time.monotonic() < ends, report
                time.sleep(0.01)  # between two looks: the daemon tells nobody of this by itself
        return report


@pytest.fixture
def held(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> Iterator[Held]:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "tnxd.toml").write_text(ONE_LANE)
    environment = {**os.environ, "RUN_FIFO": str(tmp_path / "fifo")}
    daemon = run_daemon(
        "--model", "wait", "--config", str(tmp_path / "tnxd.toml"), program=ODD, environment=environment
    )
    with running_bridge(tmp_path, daemon.endpoint, "--timeout", "60s") as bridge:
        yield Held(daemon, bridge, tmp_path / "fifo")


def test_what_a_client_that_goes_away_had_asked_for_is_withdrawn(held: Held) -> None:
    with held.bridge.connect() as first, held.bridge.connect() as second, held.bridge.connect() as third:
        first.request("POST", "/predict", WAIT % 1)
        held.await_health(lambda report: report.running == 1)
        second.request("POST", "/predict", WAIT % 0)
        for _ in range(3):
            third.request("POST", "/predict", WAIT % 0)  # of these, the bridge sends one at a time
        held.await_health(lambda report: report.queued == 2)
        second.close()
        third.close()
        report = held.await_health(lambda report: report.queued == 0)
        assert report.errors == {"CANCELLED": 2}
        held.release()
        assert first.response().status == 200
        assert first.ask("GET", "/health").status == 200


def test_a_client_that_goes_away_before_its_body_has_come_costs_nothing(held: Held) -> None:
    for _ in range(10):
        with held.bridge.connect() as peer:
            peer.send("POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n", b"[" * 1000)
    assert held.bridge.ask("GET", "/health").status == 200
    assert held.await_health(lambda report: True).requests == 0


def test_a_bridge_that_ends_answers_what_it_has_taken_first(held: Held) -> None:
    with held.bridge.connect() as busy, held.bridge.connect() as idle:
        assert idle.ask("GET", "/health").status == 200
        busy.request("POST", "/predict", WAIT % 1)
        held.await_health(lambda report: report.running == 1)
        held.bridge.process.send_signal(signal.SIGTERM)
        assert idle.is_ended()
        held.release()
        answer = busy.response()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert busy.is_ended()
    assert held.bridge.process.wait(SECONDS) == 0


def test_a_second_signal_waits_for_no_request(held: Held) -> None:
    with held.bridge.connect() as busy:
        busy.request("POST", "/predict", WAIT % 1)
        held.await_health(lambda report: report.running == 1)
        with held.bridge.connect() as idle:
            idle.ask("GET", "/health")
            held.bridge.process.send_signal(signal.SIGTERM)
            assert idle.is_ended()
        assert held.bridge.stop() == 0
        answer = busy.response()
        assert (answer.status, answer.error, answer.headers["retry-after"]) == (503, "the bridge ends", "1")
    held.release()


def test_a_drain_that_takes_too_long_is_cut(held: Held, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    with running_bridge(folder, held.daemon.endpoint, "--limit", "drain_timeout_s=0.2", "--timeout", "60s") as bridge:
        with bridge.connect() as busy:
            busy.request("POST", "/predict", WAIT % 1)
            held.await_health(lambda report: report.running == 1)
            bridge.process.send_signal(signal.SIGTERM)
            assert (busy.response().status, busy.is_ended()) == (503, True)
        assert bridge.process.wait(SECONDS) == 0
    held.release()


def test_a_body_that_waits_for_the_response_before_it_is_not_late(held: Held, tmp_path: Path) -> None:
    """It is not read meanwhile, so it cannot come in time."""
    body = (WAIT % 0).ljust(300_000)
    for limit_s in longer_each_time(1.0):
        folder = tmp_path / f"{limit_s:g}"
        folder.mkdir()
        limits = ("--limit", f"body_timeout_s={limit_s}", "--limit", "body_rate=1000000000")
        with running_bridge(folder, held.daemon.endpoint, *limits) as bridge, bridge.connect() as peer:
            peer.request("POST", "/predict", WAIT % 1)
            held.await_health(lambda report: report.running == 1)
            half = len(body) // 2
            peer.send(f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n", body[:half])
            for _ in range(2):  # time passes: as much as a body has
                with bridge.connect() as late:
                    late.send("POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
                    assert late.response().status == 408
            held.release()
            assert peer.response().status == 200
            with suppress(ConnectionError):  # that it is late may have been said already
                peer.send(body[half:])
            answer = peer.response()
            if answer.status == 200:
                break
            assert answer.status == 408  # it is, where this process has been slow since


def test_a_daemon_that_is_not_there(tmp_path: Path) -> None:
    with running_bridge(tmp_path, f"ipc://{tmp_path}/nobody", "--timeout", "0.3s") as bridge, bridge.connect() as peer:
        for method, path, body in (("GET", "/health", b""), ("POST", "/predict", b'{"input_data": [[1]]}')):
            answer = peer.ask(method, path, body)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert "no connection within 300 ms" in answer.error
        assert peer.ask("GET", "/nowhere").status == 404


def test_a_daemon_that_restarts_is_waited_for(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> None:
    address = ("--bind", f"ipc://{tmp_path}/tnx")
    daemon = run_daemon(*address)
    with running_bridge(tmp_path, daemon.endpoint, "--timeout", "60s") as bridge, bridge.connect() as peer:
        assert peer.ask("GET", "/health").status == 200
        assert daemon.stop() == 0
        peer.request("POST", "/predict", b'{"model": "digits", "input_data": [[%s]]}' % b", ".join([b"1"] * 64))
        run_daemon(*address)
        assert peer.response().status == 200
        assert peer.ask("GET", "/health").status == 200


def test_a_daemon_that_drains_is_said_to(held: Held, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    with (
        running_bridge(folder, held.daemon.endpoint, "--timeout", "2s") as hasty,
        hasty.connect() as peer,
        held.bridge.connect() as busy,
    ):
        until(lambda: peer.ask("GET", "/health").document.get("status"), lambda status: status == "ready")
        busy.request("POST", "/predict", WAIT % 1)
        held.await_health(lambda report: report.running == 1)
        held.daemon.process.send_signal(signal.SIGTERM)
        until(lambda: peer.ask("GET", "/health").document.get("status"), lambda status: status == "draining")
        answer = until(lambda: peer.ask("POST", "/predict", WAIT % 0), lambda answer: answer.status != 504)
        assert (answer.status, "drain" in answer.error, answer.headers["retry-after"]) == (503, True, "1")
        held.release()
        assert busy.response().status == 200
