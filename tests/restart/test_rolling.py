"""Rolling restarts: two daemons, one after the other, under the load of clients of both. No client sees an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from restarts import Starter, restart, started

from tnxctl import Client


@pytest.fixture(params=[False, True], ids=["each by itself", "by systemd"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Starter, Starter]]:
    """Two daemons, whose listeners somebody holds, or they themselves."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    with started(folders[0], holds=request.param) as first, started(folders[1], holds=request.param) as second:
        yield first, second


def both(pair: tuple[Starter, Starter]) -> list[list[str]]:
    """Clients of both: at tcp, at ipc, and at one of each."""
    (tcp, ipc), (other_tcp, other_ipc) = (starter.endpoints for starter in pair)
    return [[tcp, other_tcp], [ipc, other_ipc], [ipc, other_tcp]]


def test_a_rolling_restart_is_not_noticed(pair: tuple[Starter, Starter]) -> None:
    first, second = pair
    report = restart(both(pair), [first.terminate, second.terminate], 2)
    assert report.is_good, report


def test_a_daemon_that_is_killed_is_not_noticed(pair: tuple[Starter, Starter]) -> None:
    first, second = pair
    report = restart(both(pair), [first.kill, second.kill], 2)
    assert report.is_good, report


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forty_rolling_restarts_are_not_noticed(pair: tuple[Starter, Starter]) -> None:
    first, second = pair
    report = restart(both(pair), [first.terminate, second.terminate, first.kill, second.kill], 40)
    assert report.is_good, report


def test_the_other_daemon_answers_meanwhile(pair: tuple[Starter, Starter]) -> None:
    first, second = pair
    with Client([first.endpoints[0], second.endpoints[0]], timeout=60) as tnx:
        x = np.zeros((1, 256), "f4")
        while not all(tnx.traffic.endpoints.values()):
            tnx.predict(x, model="mlp")
        first.stop()
        before = tnx.traffic.endpoints[second.endpoints[0]]
        for _ in range(20):
            tnx.predict(x, model="mlp", timeout=20)
        assert tnx.traffic.endpoints[second.endpoints[0]] - before == 20
        first.begin()
