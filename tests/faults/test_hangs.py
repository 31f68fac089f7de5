"""Hang of the serving thread in a batch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from daemons import ODD, running
from dealer import Dealer, rows

INLINE = "stall_timeout_s = {}\n[cpu]\ninline_limit_us = 1000000.0\n"


def test_hang_is_named_and_ends_the_process_for_a_restart(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    environment = {"RUN_FIFO": str(tmp_path / "fifo")}
    config = f'on_hang = "restart"\n{INLINE.format(4.0)}'  # long: a busy machine may keep a thread from its turn
    with running(tmp_path, "--model", "wait", program=ODD, config=config, environment=environment) as daemon:
        with Dealer(daemon.endpoint) as dealer:
            dealer.await_health(status="ready")
            dealer.predict(rows(1, 4, 1.0))
            assert daemon.process.wait(60) == 1
        assert "model 'wait@1' has run for over 4 s with 1 requests on the serving thread" in daemon.log
        assert "wait_for_release" in daemon.log  # where it hangs


@pytest.mark.slow
def test_hang_without_a_service_manager_is_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    environment = {"RUN_FIFO": str(fifo)}
    with running(
        tmp_path, "--model", "wait", program=ODD, config=INLINE.format(0.5), environment=environment
    ) as daemon:
        with Dealer(daemon.endpoint) as dealer:
            dealer.await_health(status="ready")
            dealer.predict(rows(1, 4, 1.0))
            with fifo.open("wb"):
                while "has run for over" not in daemon.log:
                    assert daemon.process.poll() is None
            assert dealer.result()[0].model == "wait"
        assert daemon.stop() == 0


@pytest.mark.slow
def test_stopped_process_that_continues_has_not_hung(tmp_path: Path) -> None:
    config = 'on_hang = "restart"\nstall_timeout_s = 4.0\n'
    with running(tmp_path, config=config, anew=True) as daemon, Dealer(daemon.endpoint) as dealer:
        dealer.await_health(status="ready")
        daemon.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, daemon.process.pid, os.WSTOPPED)
        dealer.predict(rows(1))
        assert not dealer.socket.poll(6000)  # longer than the limit
        daemon.process.send_signal(signal.SIGCONT)
        dealer.result()
        assert daemon.stop() == 0
