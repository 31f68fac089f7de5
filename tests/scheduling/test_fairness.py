"""Fair shares of clients."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling_helpers import make_scheduler, request, run_one, untried_scheduler


@given(st.integers(1, 200), st.integers(0, 20), st.integers(1, 8))
def test_client_among_many_waits_for_a_turn_of_each_and_no_more(flood: int, others: int, rows: int) -> None:
    scheduler = untried_scheduler(max_requests=10_000, max_bytes=1 << 30)
    for _ in range(flood):
        scheduler.add(request(rows=rows, client=b"flood"), 0)
    for number in range(others):
        scheduler.add(request(rows=rows, client=b"%d" % number), 0)
    last = request(rows=rows, client=b"last")
    scheduler.add(last, 0)
    before = 0
    while True:
        (batch,) = scheduler.next_batches(0)[0]
        scheduler.finished(batch, 0.0)
        if last in batch.requests:
            break
        before += batch.rows
    turn = 16 + rows  # a turn ends with the request that fills it
    assert before <= (others + 2) * turn


@pytest.mark.parametrize("model", ["mlp", "other"])
def test_single_request_does_not_wait_for_the_ten_thousand_of_another_client(model: str) -> None:
    scheduler = make_scheduler()
    for _ in range(10_000):
        scheduler.add(request(client="flood"), 0)
    ((running,), _) = scheduler.next_batches(0)
    single = request(model=model, client="single")
    scheduler.add(single, 0)
    scheduler.finished(running, 1000.0)
    batches = 0
    while not single.done:
        batch = run_one(scheduler)
        batches += 1
        for one in batch.requests:
            one.done = True
    assert batches <= 3


def test_predicted_wait_of_a_light_client_knows_of_turns() -> None:
    scheduler = make_scheduler()
    for _ in range(10_000):
        scheduler.add(request(client="flood"), 0)
    light, heavy = request(client="light"), request(client="flood")
    scheduler.add(request(client="light"), 0)
    scheduler.add(light, 0)
    scheduler.add(heavy, 0)
    assert light.predicted_us < 10_000
    assert heavy.predicted_us > 1_000_000


def test_clients_get_rows_by_their_shares_however_many_connections_they_have() -> None:
    scheduler = make_scheduler()
    for number in range(600):
        scheduler.add(request(rows=4, client="half", peer=b"%d" % (number % 30), share=0.5), 0)
        scheduler.add(request(rows=4, client="one", peer=b"one"), 0)
        scheduler.add(request(rows=4, client="three", peer=b"%d" % (number % 2), share=3.0), 0)
    rows = {"half": 0, "one": 0, "three": 0}
    while sum(rows.values()) < 900:
        for one in run_one(scheduler).requests:
            rows[one.client] += one.rows
    assert rows["one"] == pytest.approx(200, abs=64)
    assert rows["half"] == pytest.approx(100, abs=64)
    assert rows["three"] == pytest.approx(600, abs=100)
