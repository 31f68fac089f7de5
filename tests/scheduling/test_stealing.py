"""Work stealing: idle devices run what waits for others, in times that a test makes up.

A batch takes 4 ms on the CPU and 1 ms on the GPU, whatever its size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnxctl.protocol.errors import DeadlineExceeded
from tnxd.scheduling.costs import BatchCosts, CostModel
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.placement import ModelLoad, Placement
from tnxd.scheduling.request import NEVER, Request
from tnxd.scheduling.request_queue import RequestQueue
from tnxd.scheduling.scheduler import Scheduler

MS = 1_000_000
TIMES_US = {"cpu": 4000.0, "cuda:0": 1000.0}
LIMIT = 8


def request(model: str = "mlp", **options: Any) -> Request:
    options.setdefault("max_batch_size", LIMIT)
    options.setdefault("wanted", "auto")
    return Request(model, **options)


def costs(models: Iterable[str] = ("mlp",)) -> CostModel:
    known = CostModel()
    for device, micros in TIMES_US.items():
        for model in models:
            for rows in (1, 2, 4, LIMIT):
                for _ in range(200):  # until the spread is small
                    known.curve(device, model).observe(rows, micros)
    return known


class Pair:
    """A GPU and a CPU of one lane each."""

    def __init__(self, *, models: tuple[str, ...] = ("mlp",), on_cpu: tuple[str, ...] | None = None) -> None:
        self.gpu = Device("cuda:0", "cuda", 1, set(models), 8000.0)
        self.cpu = Device("cpu", "cpu", 1, set(models if on_cpu is None else on_cpu))
        self.scheduler = Scheduler([self.gpu, self.cpu], costs(models), max_requests=1000, max_bytes=1 << 30)

    def add(self, count: int, **options: Any) -> list[Request]:
        requests = [request(**options) for _ in range(count)]
        for one in requests:
            self.scheduler.add(one, 0)
        return requests

    def occupy(self, *devices: str) -> dict[str, Batch]:
        """Have each device run one batch."""
        for device in devices:
            self.add(1, wanted=device)
        batches, late = self.scheduler.next_batches(0)
        assert not late
        return {batch.device.name: batch for batch in batches}

    def freed(self, batch: Batch, now_ns: int = 0) -> list[Batch]:
        """The batches that start when one is over."""
        self.scheduler.finished(batch, 0.0)
        batches, late = self.scheduler.next_batches(now_ns)
        assert not late
        return batches


def pair_with_cpu_about_to_be_idle(**options: Any) -> tuple[Pair, Batch]:
    pair = Pair(**options)
    return pair, pair.occupy("cpu", "cuda:0")["cpu"]


def test_idle_device_steals_what_another_would_do_later() -> None:
    pair, on_cpu = pair_with_cpu_about_to_be_idle()
    waiting = pair.add(8 * LIMIT, deadline_ns=30 * MS)
    assert {one.device for one in waiting} == {"cuda:0"}
    (batch,) = pair.freed(on_cpu)
    assert batch.device is pair.cpu
    assert batch.requests == waiting[: LIMIT // 2]  # half of what it could have: the CPU is not busy for too long
    for one in batch.requests:
        assert (one.device, one.waiting) == ("cpu", False)
        assert one.reason.startswith("all are busy, and this is the fastest: cuda:0 ")
        assert one.reason.endswith("; then cpu was free, and took it over")
    assert (pair.gpu.queued, pair.cpu.queued, pair.scheduler.queued) == (7 * LIMIT + 4, 0, 7 * LIMIT + 4)
    assert pair.gpu.backlog_us == pytest.approx([0, (7 * LIMIT + 4) * 1000 / LIMIT, 0, 0])
    assert pair.cpu.passes[1] == pytest.approx(2 * 4000 / 4)  # what ran before, and this; the level has weight 4
    pair.scheduler.finished(batch, 4000.0)
    assert pair.scheduler.models.outstanding("mlp") == 1 + 7 * LIMIT + 4  # one of them runs on the GPU


@pytest.mark.parametrize(("rows", "stolen"), [(2 * LIMIT, 0), (3 * LIMIT + 4, 1)])
def test_requests_that_the_other_device_does_sooner_stay_there(rows: int, stolen: int) -> None:
    pair, on_cpu = pair_with_cpu_about_to_be_idle()
    pair.add(rows, deadline_ns=30 * MS)  # and what runs: 3 or 4.5 ms of work for the GPU
    assert len(pair.freed(on_cpu)) == stolen


def test_requests_too_urgent_for_the_idle_device_stay_and_the_next_urgent_go() -> None:
    pair, on_cpu = pair_with_cpu_about_to_be_idle()
    relaxed = pair.add(3 * LIMIT, deadline_ns=30 * MS)
    urgent = pair.add(2 * LIMIT, deadline_ns=int(3.9 * MS))
    middling = pair.add(2, deadline_ns=8 * MS)
    (batch,) = pair.freed(on_cpu)
    assert batch.requests == [*middling, *relaxed[:2]]
    assert all(one.waiting for one in urgent)


@pytest.mark.parametrize(
    "options",
    [{"wanted": "cuda:0"}, {"wanted": ""}, {"excluded": frozenset({"cpu"})}],
    ids=["named", "plain", "excluded"],
)
def test_requests_that_may_not_run_anywhere_stay(options: dict[str, Any]) -> None:
    pair, on_cpu = pair_with_cpu_about_to_be_idle()
    pair.add(8 * LIMIT, **options)
    assert pair.freed(on_cpu) == []
    assert pair.gpu.queued == 8 * LIMIT


def test_eligible_requests_are_found_among_others() -> None:
    pair, on_cpu = pair_with_cpu_about_to_be_idle()
    strict = [one for _ in range(5) for one in pair.add(LIMIT, wanted="cuda:0", deadline_ns=30 * MS)]
    free = pair.add(2, deadline_ns=40 * MS)
    assert pair.freed(on_cpu) == []  # too many stand before them
    for one in strict[: 3 * LIMIT + 1]:
        pair.scheduler.cancel(one)
    pair.add(3 * LIMIT + 1, wanted="cuda:0", deadline_ns=50 * MS)  # the GPU is as busy as before
    (batch,) = pair.scheduler.next_batches(0)[0]
    assert batch.requests == free


def test_gpu_steals_what_has_enough_memory_there() -> None:
    pair = Pair()
    pair.gpu.error = "away"
    pair.scheduler.fail_device("cuda:0", "away")
    on_cpu = pair.occupy("cpu")["cpu"]
    small, large = pair.add(4, min_gpu_memory_mb=100.0), pair.add(4, min_gpu_memory_mb=9000.0)
    assert pair.scheduler.next_batches(0) == ([], [])  # a failed device takes nothing over
    pair.gpu.error = ""
    (batch,) = pair.scheduler.next_batches(0)[0]
    assert (batch.device, batch.requests) == (pair.gpu, small)
    pair.scheduler.finished(batch, 0.0)
    assert pair.scheduler.next_batches(0) == ([], [])
    (batch,) = pair.freed(on_cpu)
    assert (batch.device, batch.requests) == (pair.cpu, large)


def test_model_that_is_not_on_the_idle_device_is_not_stolen() -> None:
    pair, on_cpu = pair_with_cpu_about_to_be_idle(models=("mlp", "other"), on_cpu=("mlp",))
    pair.add(8 * LIMIT, model="other")
    assert pair.freed(on_cpu) == []
    assert "other" not in pair.cpu.placements


def test_stolen_batches_keep_the_limits_of_the_model() -> None:
    pair, on_cpu = pair_with_cpu_about_to_be_idle()
    pair.scheduler.models.limit_rows("cpu", "mlp", 4)
    pair.add(8 * LIMIT, deadline_ns=30 * MS)
    (batch,) = pair.freed(on_cpu)
    assert (len(batch.requests), batch.max_rows) == (2, 4)

    pair = Pair()
    pair.cpu.lanes = 2
    pair.cpu.free_lanes = [0, 1]
    pair.occupy("cpu", "cuda:0")
    pair.scheduler.models.set_lane_limit("mlp", 1)
    pair.add(8 * LIMIT, deadline_ns=30 * MS)
    assert pair.scheduler.next_batches(0) == ([], [])


def test_device_with_work_of_its_own_does_that_first() -> None:
    pair, on_cpu = pair_with_cpu_about_to_be_idle()
    pair.add(8 * LIMIT, deadline_ns=30 * MS)
    own = pair.add(1, wanted="cpu")
    (batch,) = pair.freed(on_cpu)
    assert batch.requests == own


@pytest.mark.parametrize(("rows", "stolen"), [(LIMIT, 1), (20, 0)])
def test_request_as_large_as_a_batch_is_stolen_and_a_larger_one_is_not(rows: int, stolen: int) -> None:
    pair, on_cpu = pair_with_cpu_about_to_be_idle()
    pair.add(9, rows=rows, deadline_ns=90 * MS)
    assert [len(batch.requests) for batch in pair.freed(on_cpu)] == [1] * stolen


def test_model_without_batches_is_stolen_one_request_at_a_time() -> None:
    pair, on_cpu = pair_with_cpu_about_to_be_idle()
    pair.add(9, max_batch_size=0, deadline_ns=90 * MS)
    assert {batch.device.name: len(batch.requests) for batch in pair.freed(on_cpu)} == {"cpu": 1}
    assert pair.cpu.queued == 0


def test_all_lanes_steal_on_every_level() -> None:
    pair = Pair()
    pair.cpu.lanes = 2
    pair.cpu.free_lanes = [0, 1]
    pair.occupy("cpu", "cuda:0")
    urgent = pair.add(4, priority=0, deadline_ns=30 * MS)
    others = pair.add(8 * LIMIT, priority=1, deadline_ns=30 * MS)
    (first,) = pair.scheduler.next_batches(0)[0]
    assert first.requests == urgent
    pair.scheduler.finished(first, 0.0)
    (second,) = pair.scheduler.next_batches(0)[0]
    assert second.requests == others[:4]


def test_empty_request_is_routed_while_all_devices_are_busy() -> None:
    pair, _ = pair_with_cpu_about_to_be_idle()
    (one,) = pair.add(1, rows=0, deadline_ns=30 * MS)
    assert one.device == "cuda:0"


@pytest.mark.parametrize("alike", [True, False])
def test_requests_that_have_waited_for_long_are_stolen_too(alike: bool) -> None:
    pair, on_cpu = pair_with_cpu_about_to_be_idle()
    waiting = pair.add(8 * LIMIT, deadline_ns=10_000 * MS)
    if not alike:
        pair.add(1, client=b"last", deadline_ns=11_000 * MS)
    (batch,) = pair.freed(on_cpu, now_ns=5_000 * MS)
    assert batch.requests == waiting[: LIMIT // 2]


def test_clients_share_a_stolen_batch() -> None:
    pair, on_cpu = pair_with_cpu_about_to_be_idle()
    for client in (b"flood", b"other"):
        pair.add(8 * LIMIT, max_batch_size=64, deadline_ns=90 * MS, client=client)
    (batch,) = pair.freed(on_cpu)
    assert [one.client for one in batch.requests].count(b"other") == 16


def test_prediction_for_a_deadline_counts_what_others_will_steal() -> None:
    """The GPU alone would need 9 ms for what waits; while it does four batches, the CPU does one."""
    pair = Pair()
    pair.occupy("cpu", "cuda:0")
    pair.add(9 * LIMIT, deadline_ns=9 * MS)
    one = request(deadline_ns=int(10.5 * MS))
    pair.scheduler.add(one, 0)
    assert one.predicted_us == pytest.approx(1000 + 9 * 1000 * 0.8 + 1000, rel=0.001)
    with pytest.raises(DeadlineExceeded, match=r"predicted wait is 8\.2 ms and then 1 ms"):
        pair.scheduler.add(request(deadline_ns=int(9.15 * MS)), 0)


@pytest.mark.parametrize(("limit", "taken"), [(0, True), (4, False)])
def test_slow_devices_are_left_to_stolen_batches_where_the_fastest_is_full(limit: int, taken: bool) -> None:
    """It would be done after 9.3 ms on the GPU with all that waits there, after 8 ms on the CPU."""
    pair = Pair()
    pair.occupy("cpu", "cuda:0")
    pair.add(6 * (limit or 1), max_batch_size=limit, wanted="cuda:0", deadline_ns=int(8.9 * MS))
    one = request(max_batch_size=limit, deadline_ns=int(9.2 * MS))
    now = int(3.5 * MS)
    if taken:
        pair.scheduler.add(one, now)
        assert one.device == "cpu"
    else:
        with pytest.raises(DeadlineExceeded):
            pair.scheduler.add(one, now)


def test_request_without_a_deadline_goes_to_the_device_that_is_done_first() -> None:
    pair = Pair()
    pair.occupy("cpu", "cuda:0")
    devices = [one.device for one in pair.add(8 * LIMIT)]
    assert devices.count("cpu") > 0
    assert devices[0] == "cuda:0"


# --- the queue -----------------------------------------------------------------------------------------------

_entry = st.tuples(
    st.integers(0, 60), st.integers(0, 5), st.integers(0, 2), st.integers(0, 2), st.booleans(), st.booleans()
)


def queue_of(entries: list[tuple[int, int, int, int, bool, bool]]) -> tuple[RequestQueue, list[Request]]:
    queue = RequestQueue(("mlp", (), False), BatchCosts(), Placement(ModelLoad()))
    requests = []
    for serial, (due_ms, rows, level, client, lasting, stealable) in enumerate(entries):
        one = request(rows=rows, priority=level, client=b"%d" % client, wanted="auto" if stealable else "cuda:0")
        one.due_ns, one.serial, one.waiting = due_ms * MS, serial, True
        one.deadline_ns = NEVER if lasting else one.due_ns
        queue.add(one)
        requests.append(one)
    return queue, requests


@given(
    entries=st.lists(_entry, max_size=40),
    alike=st.booleans(),
    cancelled=st.lists(st.integers(0, 39), max_size=10),
    level=st.integers(0, 2),
    rows=st.integers(1, 12),
    now_ms=st.integers(0, 30),
    ends_ms=st.integers(0, 60),
)
def test_stolen_requests_are_eligible_and_in_time_and_the_rest_stays_in_order(
    entries: list[tuple[int, int, int, int, bool, bool]],
    alike: bool,
    cancelled: list[int],
    level: int,
    rows: int,
    now_ms: int,
    ends_ms: int,
) -> None:
    if alike:  # then the queue is a FIFO
        entries = [(due, rows, 1, 1, *rest) for due, rows, _, _, *rest in sorted(entries)]  # type: ignore[misc]
    queue, requests = queue_of(entries)
    for number in set(cancelled):
        if number < len(requests):
            queue.remove(requests[number])
    before = [one for one in requests if one.waiting]
    stolen = queue.steal(level, rows, now_ms * MS, ends_ms * MS, lambda one: one.wanted == "auto") if before else []
    assert sum(one.rows for one in stolen) <= rows
    assert len({id(one) for one in stolen}) == len(stolen)
    for one in stolen:
        assert one in before
        assert not one.waiting
        assert one.wanted == "auto"
        assert one.deadline_ns >= ends_ms * MS
    left = [one for one in before if one not in stolen]
    assert (queue.count, queue.rows) == (len(left), sum(one.rows for one in left))
    drained = queue.drain()
    assert {id(one) for one in drained} == {id(one) for one in left}
    for who in {(one.priority, one.client) for one in left}:
        dues = [(one.due_ns, one.serial) for one in drained if (one.priority, one.client) == who]
        assert dues == sorted(dues)
    eligible = [one for one in before if one.wanted == "auto" and one.due_ns >= ends_ms * MS and 0 < one.rows <= rows]
    if eligible and len(before) <= 16 and not any(one.due_ns < now_ms * MS for one in before):
        assert stolen


def test_requests_stolen_from_the_middle_of_a_fifo_are_the_most_urgent_in_time() -> None:
    queue, requests = queue_of([(due, 1, 1, 1, False, due % 2 == 0) for due in range(20)])
    stolen = queue.steal(1, 3, 0, 5 * MS, lambda one: one.wanted == "auto")
    assert stolen == [requests[6], requests[8], requests[10]]
    assert [one.due_ns // MS for one in queue.drain()] == [0, 1, 2, 3, 4, 5, 7, 9, *range(11, 20)]
