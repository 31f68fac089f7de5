"""Properties of the scheduler that hold whatever happens."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from scheduling_helpers import MS, affine_costs, cpu, gpu, request, untried_scheduler
from tnxctl.protocol.errors import DeadlineExceeded, ResourceExhausted
from tnxd.lanes import INLINE
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Batch
from tnxd.scheduling.request import LEVELS, NEVER, Request


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 12), st.integers(0, 3), st.sampled_from([None, 1, 2, 5, 20, 90])),
            st.tuples(st.just("pass"), st.integers(0, 4000), st.just(0), st.none()),
            st.tuples(st.just("cancel"), st.integers(0, 50), st.just(0), st.none()),
            st.tuples(st.just("finish"), st.integers(0, 5), st.just(0), st.none()),
        ),
        max_size=60,
    )
)
def test_requests_end_once_and_none_is_started_late_whatever_happens(
    steps: list[tuple[str, int, int, int | None]],
) -> None:
    """Deadlines, priorities, clients, cancelled and expired requests: each ends in exactly one way."""
    scheduler = untried_scheduler(
        gpu(lanes=1), cpu(lanes=2), costs=affine_costs(300, 50, "cpu", "cuda:0"), max_requests=40
    )
    ends: Counter[int] = Counter()
    added: list[Request] = []
    running: list[Batch] = []
    now_ns = 0

    def end(one: Request) -> None:
        assert not one.waiting
        one.done = True
        ends[id(one)] += 1

    def look() -> None:
        batches, late = scheduler.next_batches(now_ns)
        running.extend(batches)
        for one in [*late, *scheduler.expire(now_ns)]:
            assert one.deadline_ns != NEVER
            end(one)
        for batch in batches:
            assert batch.rows == sum(one.rows for one in batch.requests)
            assert len(batch.requests) == 1 or batch.rows <= 8
            for one in batch.requests:
                assert not one.done
                assert one.deadline_ns >= now_ns + int(batch.costs.lane.mean(batch.rows) * 1e3)
        assert scheduler.next_event_ns() > now_ns

    for action, size, level, patience_ms in steps:
        if action == "add":
            deadline_ns = NEVER if patience_ms is None else now_ns + patience_ms * MS
            one = request(
                rows=size,
                nbytes=4 * size,
                wanted="auto",
                priority=level,
                client=b"%d" % (size % 3),
                deadline_ns=deadline_ns,
            )
            try:
                scheduler.add(one, now_ns)
            except DeadlineExceeded:
                assert patience_ms is not None
            except ResourceExhausted:
                assert scheduler.queued == 40
            else:
                added.append(one)
        elif action == "pass":
            now_ns += size * 1000
        elif action == "cancel" and added:
            one = added[size % len(added)]
            if scheduler.cancel(one):
                end(one)
        elif action == "finish" and running:
            batch = running.pop(size % len(running))
            scheduler.finished(batch, 0.0)
            for one in batch.requests:
                if not one.done:
                    end(one)
        look()
    while scheduler.queued or running:
        look()
        while running:
            batch = running.pop()
            scheduler.finished(batch, 0.0)
            for one in batch.requests:
                if not one.done:
                    end(one)
    assert ends == Counter(id(one) for one in added)
    assert (scheduler.queued, scheduler.queued_bytes, scheduler.running) == (0, 0, 0)
    for device in scheduler.devices.values():
        assert (device.outstanding_rows, device.queued, device.counts) == (0, 0, [0] * LEVELS)
        assert sorted(device.free_lanes) == list(range(device.lanes))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 12), st.integers(0, 2), st.booleans()),
            st.tuples(st.just("run"), st.just(0), st.just(0), st.just(False)),
            st.tuples(st.just("finish"), st.integers(0, 5), st.just(0), st.just(False)),
        )
    )
)
def test_requests_run_once_in_order_and_within_limits(steps: list[tuple[str, int, int, bool]]) -> None:
    costs = CostModel()
    costs.curve("cpu", "mlp", (0,), inline=True).observe(4, 10.0)
    scheduler = untried_scheduler(
        gpu(lanes=2), cpu(lanes=2, inline_limit_us=20.0), costs=costs, max_requests=20, max_bytes=400
    )
    added: list[Request] = []
    seen: Counter[int] = Counter()
    running: list[Batch] = []
    latest: dict[tuple[str, tuple[int, ...]], int] = {}

    def start() -> None:
        for batch in scheduler.next_batches(0)[0]:
            running.append(batch)
            rows = sum(one.rows for one in batch.requests)
            assert rows == batch.rows
            assert len(batch.requests) == 1 or rows <= 8
            assert len({(one.model, one.group, one.device) for one in batch.requests}) == 1
            for one in batch.requests:
                seen[id(one)] += 1
                key = (one.device, one.group)
                position = next(index for index, other in enumerate(added) if other is one)
                assert position > latest.get(key, -1)  # first come, first served within a group
                latest[key] = position
        lanes = [(batch.device.name, batch.lane) for batch in running if batch.lane != INLINE]
        assert len(lanes) == len(set(lanes))

    for action, size, group, prefer_gpu in steps:
        if action == "add":
            one = request(rows=size, nbytes=4 * size, group=(group,), prefer_gpu=prefer_gpu)
            try:
                scheduler.add(one, 0)
            except ResourceExhausted:
                assert scheduler.queued == 20 or scheduler.queued_bytes + one.nbytes > 400
            else:
                added.append(one)
        elif action == "run":
            start()
        elif running:
            scheduler.finished(running.pop(size % len(running)), 0.0)
    while scheduler.queued or running:
        start()
        while running:
            scheduler.finished(running.pop(), 0.0)
    assert seen == Counter(id(one) for one in added)
    assert (scheduler.queued, scheduler.queued_bytes, scheduler.running) == (0, 0, 0)
    assert all(device.outstanding_rows == 0 for device in scheduler.devices.values())
    assert all(sorted(device.free_lanes) == [0, 1] for device in scheduler.devices.values())
