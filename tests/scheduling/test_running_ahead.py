"""Batches that begin while another one of their stream is under way: full ones at once, others as late as they can."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count
from math import ceil

import pytest

from scheduling_helpers import MODELS, MS, affine_costs, cpu, make_scheduler, request
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.request import NEVER
from tnxd.scheduling.scheduler import Scheduler

_BATCH_MS = 20


def scheduler_of(*, streams: int = 1, preparation_us: float = 4000.0) -> Scheduler:
    """A GPU to which every batch is the same, once what precedes it is done. Its streams take two at a time."""
    device = Device("cuda:0", "cuda", 2 * streams, set(MODELS), 8000.0, shares_chip=True, streams=streams)
    costs = affine_costs(_BATCH_MS * 1e3, 0.0, "cuda:0")
    for model in MODELS:
        costs.curve("cpu", model).observe(8, 1e6)
    scheduler = make_scheduler(device, cpu(), costs=costs)
    for rows in (1, 8):
        batch = start(scheduler, 0, rows)
        batch.preparation_us = preparation_us
        scheduler.finished(batch, _BATCH_MS * 1e3, 0)
    return scheduler


def start(scheduler: Scheduler, now_ns: int, rows: int = 1) -> Batch:
    scheduler.add(request(rows=rows, wanted="cuda:0"), now_ns)
    (batch,), late = scheduler.next_batches(now_ns)
    assert not late
    return batch


def test_a_small_batch_begins_when_the_one_before_it_is_about_to_be_over() -> None:
    scheduler = scheduler_of()
    start(scheduler, 0)
    for at_ms in range(5):
        scheduler.add(request(wanted="cuda:0"), at_ms * MS)
        assert scheduler.next_batches(at_ms * MS) == ([], [])
    opens_ns = scheduler.next_event_ns()
    assert opens_ns == pytest.approx((_BATCH_MS - 1.5 - 1.5 * 4) * MS, abs=0.01 * MS)
    assert scheduler.next_batches(opens_ns - 2000) == ([], [])
    (batch,), _ = scheduler.next_batches(opens_ns)
    assert batch.rows == 5
    assert scheduler.next_event_ns() == NEVER


def test_a_small_batch_begins_at_once_where_nothing_is_left_of_the_one_before_it() -> None:
    scheduler = scheduler_of()
    first = start(scheduler, 0)
    scheduler.add(request(wanted="cuda:0"), 0)
    assert scheduler.next_batches(0) == ([], [])
    scheduler.finished(first, 9e3, 9 * MS)
    assert len(scheduler.next_batches(9 * MS)[0]) == 1
    overdue = scheduler_of()
    start(overdue, 0)
    assert start(overdue, 30 * MS).rows == 1  # it takes longer than expected


def test_a_full_batch_does_not_wait_since_it_cannot_grow() -> None:
    scheduler = scheduler_of()
    start(scheduler, 0)
    assert start(scheduler, 0, rows=8).rows == 8
    larger = scheduler_of()
    start(larger, 0)
    assert start(larger, 0, rows=100).rows == 100


def test_short_batches_do_not_wait() -> None:
    scheduler = scheduler_of(preparation_us=13_000.0)
    start(scheduler, 0)
    assert start(scheduler, 0).rows == 1


def test_a_stream_with_nothing_to_do_takes_what_comes() -> None:
    scheduler = scheduler_of(streams=2)
    assert {start(scheduler, 0).lane % 2 for _ in range(2)} == {0, 1}
    scheduler.add(request(wanted="cuda:0"), 0)
    assert scheduler.next_batches(0) == ([], [])


def test_what_waits_for_a_stream_can_be_withdrawn_and_leaves_no_event() -> None:
    scheduler = scheduler_of()
    start(scheduler, 0)
    one = request(wanted="cuda:0")
    scheduler.add(one, 0)
    scheduler.next_batches(0)
    assert scheduler.next_event_ns() < NEVER
    assert scheduler.cancel(one)
    assert scheduler.next_event_ns() == NEVER


def test_a_stream_steals_nothing_while_it_has_work() -> None:
    scheduler = scheduler_of()
    start(scheduler, 0)
    for _ in range(4):
        one = request(model="other", wanted="auto", deadline_ns=60_000 * MS)
        scheduler.add(one, 0)
    batches, _ = scheduler.next_batches(0)
    assert {batch.device.name for batch in batches} <= {"cpu"}


def answers_per_second(lanes: int, clients: int, batch_us: float, copy_us: float) -> float:
    """Answers of a GPU with one stream, in simulated time, to clients that each have one request at a time.

    Args:
        lanes: batches that may be under way. batch_us: of any batch. copy_us: of each row before it is computed.
    """
    costs = CostModel()
    for rows in (1, 2, 4, 8):
        costs.curve("cuda:0", "mlp").observe(rows, batch_us + copy_us * rows)
    device = Device("cuda:0", "cuda", lanes, set(MODELS), 8000.0, shares_chip=True, streams=1)
    scheduler = make_scheduler(device, costs=costs)
    serial = count()
    events: list[tuple[float, int, Batch | str]] = [(100.0 * client, next(serial), "ask") for client in range(clients)]
    copied_us = computed_us = now_us = 0.0
    answers = 0
    while now_us < 1e6:
        now_us, _, event = heappop(events)
        now_ns = int(now_us * 1e3)
        if isinstance(event, Batch):
            event.preparation_us = copy_us * event.rows
            scheduler.finished(event, batch_us + copy_us * event.rows, now_ns)
            answers += len(event.requests)
            for place in range(len(event.requests)):
                heappush(events, (now_us + 200.0 + 10.0 * place, next(serial), "ask"))
        elif event == "ask":
            scheduler.add(request(wanted="cuda:0"), now_ns)
        for begun in scheduler.next_batches(now_ns)[0]:
            copied_us = max(copied_us, now_us) + copy_us * begun.rows
            computed_us = max(computed_us, copied_us) + batch_us
            heappush(events, (computed_us, next(serial), begun))
        opens_ns = scheduler.next_event_ns()
        if opens_ns != NEVER:  # the daemon's loop waits for milliseconds
            heappush(events, (now_us + 1e3 * max(ceil((opens_ns - now_ns) / 1e6), 1), next(serial), "look"))
    return answers


@pytest.mark.parametrize("clients", [2, 8, 12, 16, 32])
@pytest.mark.parametrize("copy_us", [20.0, 400.0])
def test_two_batches_at_a_time_get_no_less_done_than_one(clients: int, copy_us: float) -> None:
    """If a stream takes what waits at once, they get two thirds done."""
    one, two = (answers_per_second(lanes, clients, 10_000.0, copy_us) for lanes in (1, 2))
    assert two > 0.97 * one
    if copy_us > 100:
        assert two > 1.05 * one or clients == 2
