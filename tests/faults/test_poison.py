"""Poisoned batches: requests of one client make the model raise, and others that share its batch pay once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from daemons import ODD, ONE_LANE, running
from dealer import Dealer, rows
from tnxd.serving.quarantine import Quarantine

GOOD = rows(1, 4, 100.0)
POISON = rows(1, 4, 1.0)


def test_client_that_failed_rides_alone_until_it_has_succeeded(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    arguments = ("--model", "odd", "--model", "wait")
    with (
        running(tmp_path, *arguments, program=ODD, config=ONE_LANE, environment={"RUN_FIFO": str(fifo)}) as daemon,
        Dealer(daemon.endpoint) as holds,
        Dealer(daemon.endpoint) as honest,
        Dealer(daemon.endpoint) as poisons,
    ):
        holds.await_health(status="ready")

        def together() -> tuple[set[int], set[int]]:
            """Sizes of the batches that the two get whose requests have waited together."""
            holds.predict(rows(1, 4, 1.0), model="wait")
            holds.await_health(running=1)
            for _ in range(4):
                honest.predict(GOOD, model="odd")
                poisons.predict(GOOD, model="odd")
            holds.await_health(queued=8)
            fifo.open("wb").close()
            sizes = [{dealer.result()[0].batch_size for _ in range(4)} for dealer in (honest, poisons)]
            holds.result()
            return sizes[0], sizes[1]

        assert together() == ({8}, {8})
        poisons.predict(POISON, model="odd")
        assert poisons.error().code == "INTERNAL"
        assert together() == ({4}, {1})
        assert together() == ({8}, {8})
        assert daemon.stop() == 0


def test_model_that_fails_for_all_clients_recovers_for_all(tmp_path: Path) -> None:
    with running(tmp_path, "--model", "odd", program=ODD, config=ONE_LANE) as daemon:
        dealers = [Dealer(daemon.endpoint) for _ in range(4)]
        try:
            dealers[0].await_health(status="ready")
            for array, code in ((POISON, "INTERNAL"), (GOOD, ""), (POISON, "INTERNAL"), (GOOD, "")):
                for dealer in dealers:
                    for _ in range(50):
                        dealer.predict(array, model="odd")
                codes = {getattr(dealer.receive()[0], "code", "") for dealer in dealers for _ in range(50)}
                assert codes == {code}
        finally:
            for dealer in dealers:
                dealer.__exit__(None, None, None)
        assert daemon.stop() == 0


def tell_of(quarantine: Quarantine, client: bytes, outcomes: str) -> str:
    """Tell of successes and failures of a client; returns before which it rode alone."""
    alone = ""
    for outcome in outcomes:
        alone += "x" if quarantine.holds(client) else "."
        (quarantine.succeeded if outcome == "+" else quarantine.failed)(client)
    return alone


@pytest.mark.parametrize(
    ("outcomes", "alone"),
    [
        ("++++", "...."),
        ("-+++", ".x.."),  # forgotten after one more
        ("-++-++", ".x..x."),
        ("-+-++++", ".x.xx.."),  # again before that: two are asked for
        ("--+++--", ".xxx..x"),
        ("-+-+-+-+++++++++", ".x.xxxxxxxxxxxx."),
    ],
)
def test_number_of_successes_that_are_asked_for(outcomes: str, alone: str) -> None:
    assert tell_of(Quarantine(), b"a", outcomes) == alone


def test_memory_of_clients_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnxd.serving.quarantine._MAX_CLIENTS", 2)
    quarantine = Quarantine()
    fail: Callable[[bytes], None] = quarantine.failed
    for client in (b"a", b"b", b"a", b"c"):
        fail(client)
    assert (quarantine.holds(b"a"), quarantine.holds(b"b"), quarantine.holds(b"c")) == (True, False, True)


def test_client_that_comes_again_is_known() -> None:
    quarantine = Quarantine()
    quarantine.failed(b"a")
    quarantine.left(b"a", "there")
    assert not quarantine.holds(b"b", "elsewhere")
    assert quarantine.holds(b"b", "there")
    assert tell_of(quarantine, b"b", "++") == "x."
    assert not quarantine.holds(b"b", "there")  # it has shown what it is
    assert quarantine.holds(b"c", "there")
    quarantine.left(b"c", "there")
    for _ in range(10_000):
        quarantine.succeeded(b"b")
    assert not quarantine.active
    assert not quarantine.holds(b"d", "there")
