"""Quotas by name: requests and bytes in flight, and rate, over all connections of a client together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemons import ODD, ONE_LANE
from dealer import Dealer, rows
from keyed import Keyed, keyed_daemon

PEOPLE = {
    "three": "predict\nmax_requests = 3",
    "kilobyte": "predict\nmax_mb = 0.001",
    "once": "predict\nrate = 0.001",
    "bob": "predict",
}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    os.mkfifo(folder / "release")
    with keyed_daemon(
        folder,
        PEOPLE,
        "--model",
        "wait",
        config=ONE_LANE,
        program=ODD,
        environment={**os.environ, "RUN_FIFO": str(folder / "release")},
    ) as running:
        yield running


@pytest.fixture
def release(keyed: Keyed) -> Callable[[], None]:
    """Lets go on what waits."""

    def open_and_close() -> None:
        with Path(keyed.folder, "release").open("wb"):
            pass

    return open_and_close


def code(peer: Dealer) -> str:
    """Code of the next reply, which must be an error, after a look at what it says."""
    error = peer.error()
    assert error.retry_after_us, error
    return f"{error.code} {error.message}"


@pytest.mark.parametrize(
    ("name", "size", "fits", "said"),
    [
        ("three", 1, 3, "RESOURCE_EXHAUSTED 3 requests of three are in flight, the limit is 3"),
        ("kilobyte", 16, 4, "RESOURCE_EXHAUSTED 1024 bytes of kilobyte are in flight, the limit is 1048"),
    ],
)
def test_what_a_name_has_in_flight_counts_over_all_its_connections(
    keyed: Keyed, release: Callable[[], None], name: str, size: int, fits: int, said: str
) -> None:
    with keyed.dealer(name) as first, keyed.dealer(name) as second, keyed.dealer("bob") as bob:
        both = [first, second]
        for number in range(fits):
            both[number % 2].predict(rows(size, 4, fill=1.0 if number == 0 else 0.5))  # the others wait behind it
            both[number % 2].health()  # it has been taken in
        for peer in both:
            peer.predict(rows(size, 4), id=100)
            assert code(peer) == said
        bob.predict(rows(16, 4))
        bob.health()  # and nothing before that, so bob's was not refused
        release()
        for number in range(fits):
            both[number % 2].result()
        bob.result()
        second.predict(rows(size, 4))  # there is room again
        second.result()


def test_a_rate_counts_over_all_connections_and_says_when_to_come_back(keyed: Keyed) -> None:
    with keyed.dealer("once") as first, keyed.dealer("once") as second, keyed.dealer("bob") as bob:
        first.predict(rows(1, 4))
        first.result()
        for peer in (second, first):
            peer.predict(rows(1, 4), id=200)
            error = peer.error()
            assert error.code == "RESOURCE_EXHAUSTED"
            assert error.message == "once asks more often than it may, the limit is 0.001 a second"
            assert 500e6 < (error.retry_after_us or 0) <= 1000e6
        for _ in range(50):
            bob.predict(rows(1, 4))
            bob.result()
