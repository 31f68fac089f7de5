"""Logging to a pipe that is full, unread or closed, and a flood of records: the daemon serves, and stops."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from daemons import ODD, PATIENT, full_pipe, running
from dealer import Dealer, rows

POISON = rows(1, 4, 1.0)

GOOD = rows(1, 4, 100.0)


def check_that_it_serves(endpoint: str, failing: int = 40) -> None:
    """Check that so many requests that fail, and as many that succeed, each get their answer."""
    with Dealer(endpoint) as dealer:
        dealer.await_health(status="ready")
        for _ in range(failing):
            dealer.predict(POISON)
            dealer.predict(GOOD)
        codes = [getattr(dealer.receive()[0], "code", "") for _ in range(2 * failing)]
        assert sorted(codes) == [""] * failing + ["INTERNAL"] * failing


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_unread_pipe_blocks_neither_serving_nor_stopping(stream: str, tmp_path: Path) -> None:
    with full_pipe() as (_, writer), running(tmp_path, "--model", "odd", program=ODD, **{stream: writer}) as daemon:
        check_that_it_serves(daemon.endpoint)
        assert daemon.stop() == 0


def test_full_disk_blocks_neither_serving_nor_stopping(tmp_path: Path) -> None:
    with (
        open("/dev/full", "wb") as full,
        running(tmp_path, "--model", "odd", program=ODD, stderr=full, stdout=full) as daemon,
    ):
        check_that_it_serves(daemon.endpoint)
        assert daemon.stop() == 0


def test_closed_streams_are_not_taken_for_sockets(tmp_path: Path) -> None:
    """The next descriptor that is opened gets the number of a closed one, and what is printed would go there."""

    def close() -> None:
        for descriptor in range(3):
            os.close(descriptor)

    with running(tmp_path, before=close) as daemon:
        with Dealer(daemon.endpoint) as dealer:
            dealer.await_health(status="ready")
            streams = [os.readlink(f"/proc/{daemon.process.pid}/fd/{descriptor}") for descriptor in range(3)]
            assert streams == [os.devnull] * 3
        assert daemon.stop() == 0


def test_log_is_not_filled_by_one_client_with_wrong_requests(tmp_path: Path) -> None:
    with running(tmp_path, "--model", "odd", program=PATIENT) as daemon:
        with Dealer(daemon.endpoint) as dealer:
            dealer.await_health(status="ready")
            for _ in range(2000):
                dealer.predict(POISON)
            assert {dealer.error().code for _ in range(2000)} == {"INTERNAL"}
        assert daemon.stop() == 0
        lines = daemon.log.splitlines()
        told = [line for line in lines if "odd on cpu raised" in line]
        more = [int(found[1].replace(",", "")) for line in told if (found := re.search(r"and ([\d,]+) more", line))]
        assert len(told) - len(more) + sum(more) == 2000
        assert sum("Traceback" in line for line in lines) == len(told) - len(more)
        assert len(lines) < 200
