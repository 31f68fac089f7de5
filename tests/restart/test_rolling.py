"""Rolling restarts: two daemons, one after the other, under the load of clients of both. No client sees an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from restarts import Starter, ready, restart

from tnxctl import Client


@contextmanager
def pair(folder: Path, *, holds: bool) -> Iterator[tuple[Starter, Starter]]:
    """Two daemons that are ready, whose listeners somebody holds, or they themselves."""
    starters = []
    for name in ("a", "b"):
        (folder / name).mkdir()
        starters.append(Starter(folder / name, holds=holds))
    first, second = starters
    try:
        first.daemon, second.daemon = first.start(), second.start()
        for starter in starters:
            ready(starter.daemon)
        yield first, second
    finally:
        for starter in starters:
            starter.close()


def both(first: Starter, second: Starter) -> list[list[str]]:
    """Clients of both: at tcp, at ipc, and at one of each."""
    (tcp, ipc), (other_tcp, other_ipc) = first.endpoints, second.endpoints
    return [[tcp, other_tcp], [ipc, other_ipc], [ipc, other_tcp]]


@pytest.mark.slow
def test_a_rolling_restart_is_not_noticed(tmp_path: Path) -> None:
    with pair(tmp_path, holds=False) as (first, second):
        report = restart(both(first, second), [first.terminate, second.kill], 2)
        assert report.is_good, report


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("holds", [False, True], ids=["each by itself", "by systemd"])
def test_forty_rolling_restarts_are_not_noticed(tmp_path: Path, holds: bool) -> None:
    with pair(tmp_path, holds=holds) as (first, second):
        ways = [first.terminate, second.terminate, first.kill, second.kill]
        report = restart(both(first, second), ways, 40)
        assert report.is_good, report


@pytest.mark.slow
@pytest.mark.parametrize("holds", [False, True], ids=["each by itself", "by systemd"])
def test_the_other_daemon_answers_meanwhile(tmp_path: Path, holds: bool) -> None:
    """Where systemd holds the listeners, a connection to nobody succeeds, and no handshake follows."""
    with (
        pair(tmp_path, holds=holds) as (first, second),
        Client([first.endpoints[0], second.endpoints[0]], timeout=60) as tnx,
    ):
        x = np.zeros((1, 256), "f4")
        while not all(tnx.traffic.endpoints.values()):
            tnx.predict(x, model="mlp")
        first.stop()
        before = tnx.traffic.endpoints[second.endpoints[0]]
        for _ in range(20):
            tnx.predict(x, model="mlp", timeout=60)
        assert tnx.traffic.endpoints[second.endpoints[0]] - before == 20
