"""Batches of requests of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnxd.scheduling.cost_surface import CostSurface
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.ragged import padded, partition
from tnxd.scheduling.refusals import TooLate
from tnxd.scheduling.request import NEVER, Request
from tnxd.scheduling.scheduler import Scheduler

MS = 1_000_000  # nanoseconds
MOST_ROWS = 8
LONGEST = 512

Cost = Callable[[int, int], float]


def by_tokens(rows: int, length: int) -> float:
    """Microseconds of a batch: fixed ones up to 64 tokens, then as many as tokens."""
    return 100.0 * max(rows * length, 64)


def flat(rows: int, length: int) -> float:
    """Microseconds of a batch that padding hardly makes dearer, as on a device that is far from busy."""
    return 5_000.0 + rows * length


def scheduler(cost: Cost = by_tokens, devices: Sequence[str] = ("cpu",)) -> Scheduler:
    """A scheduler that knows what batches of the model cost."""
    made = Scheduler(
        [Device(name, "cpu", 1, set()) for name in devices], CostModel(), max_requests=10_000, max_bytes=1 << 40
    )
    sizes = [(rows, 1 << power) for power in range(10) for rows in (1, 2, 4, 8)]
    for name in devices:
        made.models.add(
            name,
            "texts",
            costs=[(rows * length, cost(rows, length)) for rows, length in sizes],
            padded=[(rows, length, cost(rows, length)) for rows, length in sizes],
        )
    return made


def text(
    length: int, rows: int = 1, *, client: str = "", priority: int = 1, deadline_ns: int = NEVER, wanted: str = ""
) -> Request:
    return Request(
        "texts",
        MOST_ROWS * LONGEST,
        rows * length,
        client=client,
        peer=client.encode(),
        wanted=wanted,
        priority=priority,
        deadline_ns=deadline_ns,
        length=length,
        most_rows=MOST_ROWS,
    )


def rows_of(batch: Batch) -> int:
    return sum(request.rows // request.length for request in batch.requests)


def lengths_of(batch: Batch) -> list[int]:
    return [request.length for request in batch.requests]


def run_all(made: Scheduler, cost: Cost = by_tokens, now_ns: int = 0) -> Iterator[tuple[int, Batch]]:
    """Run what waits, one batch after the other. Yields batches and when they began."""
    while made.queued:
        batches, _ = made.next_batches(now_ns)
        made.expire(now_ns)
        for batch in batches:
            yield now_ns, batch
            micros = cost(batch.rows // batch.length, batch.length)
            now_ns += int(micros * 1e3)
            made.finished(batch, micros, now_ns)
        if not batches:
            now_ns += MS


# --- the partition ---------------------------------------------------------------------------------------------


def total(waiting: Sequence[tuple[int, int]], parts: Sequence[tuple[int, int]], cost: Cost, most: int) -> float:
    micros = 0.0
    for first, last in parts:
        batches, rest = divmod(sum(rows for _, rows in waiting[first : last + 1]), most)
        length = waiting[last][0]
        micros += batches * cost(most, length) + (cost(rest, length) if rest else 0.0)
    return micros


def all_partitions(count: int) -> Iterator[list[tuple[int, int]]]:
    for cuts in range(1 << (count - 1)):
        edges = [0, *(place + 1 for place in range(count - 1) if cuts >> place & 1), count]
        yield [(begin, end - 1) for begin, end in pairwise(edges)]


@given(
    st.dictionaries(st.integers(1, 200), st.integers(1, 12), min_size=1, max_size=7),
    st.integers(1, 10),
    st.floats(0, 500),
    st.floats(0.1, 5),
)
def test_the_partition_costs_least_of_all(waiting: dict[int, int], most: int, fixed: float, each: float) -> None:
    ordered = sorted(waiting.items())

    def cost(rows: int, length: int) -> float:
        return max(fixed, each * rows * length)

    parts = partition(ordered, cost, lambda _: most)
    assert [place for first, last in parts for place in range(first, last + 1)] == list(range(len(ordered)))
    least = min(total(ordered, other, cost, most) for other in all_partitions(len(ordered)))
    assert total(ordered, parts, cost, most) == pytest.approx(least)


# --- the cost surface ------------------------------------------------------------------------------------------


def test_the_surface_is_straight_between_powers_of_two() -> None:
    surface = CostSurface()
    for length in (16, 32):
        surface.observe(4, length, 100.0 * length)
    assert surface.mean(4, 24) == pytest.approx(2_400)
    assert surface.mean(4, 16) == pytest.approx(1_600)


def test_the_surface_learns_where_no_curve_is() -> None:
    surface = CostSurface()
    for length in (16, 32):
        surface.observe(1, length, 100.0 * length)
    for _ in range(100):
        surface.observe(1, 24, 4_800.0)
    assert surface.mean(1, 24) == pytest.approx(4_800, rel=0.05)
    assert surface.mean(1, 25) == pytest.approx(5_000, rel=0.05)


def test_an_unknown_length_costs_what_as_many_tokens_cost() -> None:
    surface = CostSurface()
    assert surface.mean(1, 100) == 0.0
    for rows in (1, 2, 4, 8):
        surface.observe(rows, 16, 10.0 * rows * 16)
    assert surface.mean(1, 64) == pytest.approx(640)


# --- batches ---------------------------------------------------------------------------------------------------


def test_neighbours_share_a_batch_where_that_is_cheaper() -> None:
    made = scheduler()
    for length in (8, 9, 10, 200):
        made.add(text(length), 0)
    batches = [sorted(lengths_of(batch)) for _, batch in run_all(made)]
    assert batches == [[8, 9, 10], [200]]


def test_padding_is_not_done_where_it_costs_more() -> None:
    made = scheduler()
    for length in (100, 180):
        made.add(text(length), 0)
    assert [lengths_of(batch) for _, batch in run_all(made)] == [[100], [180]]


def test_all_lengths_share_a_batch_where_it_costs_the_same() -> None:
    made = scheduler(flat)
    for length in (3, 20, 50, 90):
        made.add(text(length), 0)
    (batch,) = [batch for _, batch in run_all(made, flat)]
    assert (batch.length, batch.rows) == (90, 4 * 90)


def test_where_lengths_are_equal_batches_are_as_without_padding() -> None:
    made = scheduler()
    for _ in range(MOST_ROWS + 3):
        made.add(text(20), 0)
    assert [rows_of(batch) for _, batch in run_all(made)] == [MOST_ROWS, 3]


def test_short_work_is_not_planned() -> None:
    made = scheduler(lambda rows, length: 10.0)
    for length in (8, 9):
        made.add(text(length), 0)
    assert [lengths_of(batch) for _, batch in run_all(made)] == [[8], [9]]


def test_a_batch_learns_with_its_padding() -> None:
    made = scheduler(flat)
    for length in (10, 64):
        made.add(text(length), 0)
    (batch,), _ = made.next_batches(0)
    assert batch.surface is not None
    before = batch.surface.mean(2, 64)
    for _ in range(50):
        batch.surface.observe(2, 64, 2 * before)
    made.finished(batch, 2 * before, MS)
    assert batch.surface.mean(2, 64) == pytest.approx(2 * before, rel=0.05)


def test_a_batch_ends_in_time_for_its_head() -> None:
    """A longer text would make the batch too long for the head, which waits for nobody."""
    made = scheduler(flat)
    urgent = text(8, deadline_ns=100 * MS)
    made.add(urgent, 0)
    made.add(text(512), 0)
    urgent.deadline_ns = 5_500_000
    assert flat(2, 512) > 5_500 > flat(1, 8)
    assert [lengths_of(batch) for _, batch in run_all(made, flat)] == [[8], [512]]


def test_what_would_be_late_in_a_batch_waits_for_a_smaller_one() -> None:
    made = scheduler(flat)
    made.add(text(100), 0)
    urgent = text(99, deadline_ns=2_000 * MS)
    made.add(urgent, 0)
    made.cancel(urgent)
    urgent = text(99, deadline_ns=2_000 * MS)
    made.add(urgent, 0)
    urgent.deadline_ns = 5_150_000  # it has less time now than the batch with the head takes
    (batch,), late = made.next_batches(0)
    assert lengths_of(batch) == [100]
    assert urgent.waiting
    assert not late


def test_a_head_that_can_only_be_late_is_given_up() -> None:
    made = scheduler()
    late = text(100, deadline_ns=500 * MS)
    made.add(late, 0)
    made.add(text(8), 0)
    late.deadline_ns = MS
    late.due_ns = MS
    batches, given_up = made.next_batches(0)
    assert given_up == [late]
    assert [lengths_of(batch) for batch in batches] == [[8]]
    made.finished(batches[0], 100.0, MS)
    assert made.queued == 0


def test_priority_goes_first_where_there_is_little_room() -> None:
    made = scheduler(flat)
    for length, count in ((20, 5), (22, 5), (23, 4)):
        for _ in range(count):
            made.add(text(length, priority=2), 0)
    for _ in range(2):
        made.add(text(21, priority=0), 0)
    (batch,), _ = made.next_batches(0)
    assert [request.priority for request in batch.requests][:2] == [0, 0]
    assert rows_of(batch) == MOST_ROWS


def test_rows_enough_for_a_batch_wait_for_no_more_company() -> None:
    made = scheduler()
    for number in range(MOST_ROWS):
        waiting = text(20 + number)
        waiting.max_delay_ns = 1_000 * MS
        made.add(waiting, 0)
        batches, _ = made.next_batches(0)
        assert bool(batches) == (number == MOST_ROWS - 1)


def test_a_thief_takes_one_length() -> None:
    """The predicted time is that of tokens without padding."""
    made = scheduler(devices=("cpu", "other"))
    made.add(text(400, wanted="auto"), 0)
    made.add(text(400, wanted="auto"), 0)
    running, _ = made.next_batches(0)
    for length in (30, 31, 30, 31, 30):
        made.add(text(length, wanted="auto"), 0)
    assert len(running) == 2
    made.finished(running[0], 40_000, 40 * MS)
    made.finished(running[1], 40_000, 40 * MS)
    batches, _ = made.next_batches(40 * MS)
    for batch in batches:
        assert batch.rows == rows_of(batch) * batch.length
        if batch.device.name != batch.requests[0].device:
            assert len(set(lengths_of(batch))) == 1


@pytest.mark.parametrize("several", [False, True], ids=["one length", "all lengths"])
def test_a_client_of_long_texts_has_no_more_than_its_share(several: bool) -> None:
    """A client with a short text at a time waits for one batch of another's long ones, or two, however many wait."""
    made = scheduler()
    for number in range(60):
        made.add(text(500 - number if several else 500, client="long"), 0)
    before = 0
    served = 0
    made.add(text(8, client="short"), 0)
    for now_ns, batch in run_all(made):
        if any(request.client == "short" for request in batch.requests):
            assert before <= 2
            before = 0
            served += 1
            if served == 10:
                return
            made.add(text(8, client="short"), now_ns)
        else:
            before += 1
    raise AssertionError("the short texts were not served")


def test_clients_share_by_tokens_and_not_by_texts() -> None:
    made = scheduler()
    for _ in range(100):
        made.add(text(500, client="long"), 0)
    for _ in range(3_000):
        made.add(text(8, client="short"), 0)
    tokens = {"long": 0, "short": 0}
    for _, batch in run_all(made):
        for request in batch.requests:
            tokens[request.client] += request.rows
        if tokens["long"] >= 16_000:
            break
    assert 0.6 < tokens["short"] / tokens["long"] < 1.1


def test_a_long_text_among_short_ones_delays_them_by_its_own_time() -> None:
    made = scheduler()
    made.add(text(512), 0)
    for _ in range(64):
        made.add(text(8), 0)
    ends = {}
    for now_ns, batch in run_all(made):
        for request in batch.requests:
            ends[request.serial] = now_ns + int(by_tokens(rows_of(batch), batch.length) * 1e3)
        assert len(set(lengths_of(batch))) == 1
    alone = 64 // MOST_ROWS * by_tokens(MOST_ROWS, 8) * 1e3
    assert max(ends.values()) <= alone + by_tokens(1, 512) * 1e3


@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 5, 6, 7, 30, 31, 33, 100, 300]),
            st.integers(0, 3),
            st.sampled_from(["a", "b", "c"]),
            st.integers(0, 3),
            st.sampled_from([NEVER, 20 * MS, 60 * MS, 300 * MS]),
        ),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from([by_tokens, flat]),
    st.booleans(),
)
@settings(max_examples=60)
def test_every_request_is_run_once_or_given_up(
    asked: list[tuple[int, int, str, int, int]], cost: Cost, mixed: bool
) -> None:
    made = scheduler(cost)
    for device in made.devices.values():
        device.free_lanes.clear()  # all are to wait at first
    added = []
    for length, rows, client, priority, deadline_ns in asked:
        request = text(
            length,
            rows,
            client=client if mixed else "a",
            priority=priority if mixed else 1,
            deadline_ns=deadline_ns if mixed else NEVER,
        )
        try:
            made.add(request, 0)
        except TooLate:
            continue
        added.append(request)
    for device in made.devices.values():
        device.free_lanes.append(0)
    now_ns, run, gone = 0, [], []
    for _ in range(10_000):
        if not made.queued:
            break
        batches, late = made.next_batches(now_ns)
        for request in late:
            request.done = True
        expired = made.expire(now_ns)
        for request in expired:
            request.done = True
        gone += [*late, *expired]
        for batch in batches:
            for request in batch.requests:
                assert not request.done
                request.done = True
                run.append(request)
            assert rows_of(batch) <= MOST_ROWS
            assert (batch.rows, batch.length) == padded(batch.requests)
            micros = cost(rows_of(batch), batch.length)
            assert all(request.deadline_ns >= now_ns + batch.run_us * 1e3 - 1 for request in batch.requests)
            now_ns += int(micros * 1e3)
            made.finished(batch, micros, now_ns)
        if not batches:
            now_ns += MS
    assert sorted(request.serial for request in [*run, *gone]) == sorted(request.serial for request in added)
    for device in made.devices.values():
        assert (device.queued, device.queued_rows, device.running_rows) == (0, 0, 0)
        assert all(not getattr(queue, "lengths", {}) for queue in device.queues.values())
