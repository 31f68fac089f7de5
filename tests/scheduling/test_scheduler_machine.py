"""A scheduler driven as the daemon drives it: rules that hold whatever comes and goes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling_helpers import make_scheduler, request
from tnxctl.protocol.errors import ResourceExhausted, Unavailable
from tnxd.lanes import BACKGROUND
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.request import Request

_NAMES = ("net@1", "net@2")

_DEVICES = ("cuda:0", "cpu")

_model = st.sampled_from(_NAMES)

_device = st.sampled_from(_DEVICES)

_steps = st.one_of(
    # A burst of requests: their model, rows, priority, shape, device, number.
    st.tuples(
        st.just("add"),
        _model,
        st.integers(0, 12),
        st.integers(0, 3),
        st.integers(0, 1),
        st.sampled_from(["", "auto", "cpu"]),
        st.integers(1, 6),
    ),
    st.tuples(st.just("look"), st.integers(0, 4000)),
    st.tuples(st.just("finish"), st.integers(0, 9), st.sampled_from([0.0, 100.0, 9000.0])),
    st.tuples(st.just("crowd"), st.integers(0, 9), st.integers(1, 9)),
    st.tuples(st.just("cancel"), st.integers(0, 50)),
    st.tuples(st.just("background"), _model, st.integers(1, 12)),
    st.tuples(st.just("lanes"), _model, st.integers(0, 2)),
    st.tuples(st.just("rows"), _model, _device, st.integers(0, 6)),
    st.tuples(st.just("come"), _model, _device),
    st.tuples(st.just("go"), _model),
    st.tuples(st.just("fail")),
    st.tuples(st.just("hang"), st.integers(0, 9)),
)


class Machine:
    """A scheduler that is driven as the daemon does it, and the rules that hold whatever happens.

    Args:
        depth: batches of each of two streams of the GPU that share its chip; 0: each has a chip of its own.
    """

    def __init__(self, depth: int) -> None:
        self.cpu = Device("cpu", "cpu", 3, set(_NAMES), inline_limit_us=150.0)
        self.gpu = Device("cuda:0", "cuda", 2 * (depth or 1), set(_NAMES), 8000.0, shares_chip=depth > 0, streams=2)
        self.scheduler = make_scheduler(
            self.gpu, self.cpu, costs=CostModel(), max_requests=25, max_per_model=15, max_bytes_per_model=60
        )
        self.now_ns = 0
        self.added: list[Request] = []
        self.ends: Counter[int] = Counter()
        self.running: list[Batch] = []
        self.lanes = dict.fromkeys(_NAMES, 0)
        self.ceilings: dict[tuple[str, str], int] = {}

    def add(self, model: str, rows: int, level: int, group: int, wanted: str, count: int) -> None:
        for client in range(count):
            one = request(model, rows=rows, nbytes=rows, priority=level, group=(group,), wanted=wanted)
            one.client = str(client % 2)
            if self.accepts(one):
                self.added.append(one)

    def accepts(self, one: Request) -> bool:
        try:
            batch = self.scheduler.start(one, self.now_ns)
            if batch is None:
                self.scheduler.add(one, self.now_ns)
            else:
                self.running.append(batch)
                self.finish(len(self.running) - 1, 100.0)
        except Unavailable:
            assert one.model not in self.cpu.models
            assert one.wanted == "cpu" or one.model not in self.gpu.models or self.gpu.error
            return False
        except ResourceExhausted:
            same = [other for other in self.added if other.waiting and other.model == one.model]
            too_many = self.scheduler.queued == 25 or len(same) == 15
            assert too_many or sum(other.nbytes for other in same) + one.nbytes > 60
            return False
        return True

    def look(self, passed_us: int = 0) -> None:
        self.now_ns += 1000 * passed_us
        before = self.alive()
        batches, late = self.scheduler.next_batches(self.now_ns)
        assert not late
        self.running += batches
        for batch in batches:
            assert batch.requests
            assert not batch.device.error
            assert {(one.model, one.device) for one in batch.requests} == {(batch.model, batch.device.name)}
            ceiling = self.ceilings.get((batch.device.name, batch.model), 0)
            assert batch.max_rows == ceiling
            assert len(batch.requests) == 1 or batch.rows <= (ceiling or 8)
        after = self.alive()
        for place in after - before:
            assert not self.lanes[place[1]] or after[place] <= self.lanes[place[1]]
        for device in (self.gpu, self.cpu):
            used = [batch.lane for batch in self.running if batch.device is device and batch.lane >= 0]
            assert sorted([*used, *device.free_lanes]) == list(range(device.lanes))
            for (model, *_), queue in device.queues.items():
                # Nothing waits beside a free lane, but for a lane of its own, to be alone, or for more rows.
                has_all = 0 < self.lanes[model] <= after[device.name, model]
                assert (
                    not queue.count
                    or not device.free_lanes
                    or has_all
                    or device.reserved
                    or device.opens_ns > self.now_ns
                )
            alive = [batch for batch in self.running if batch.device is device and not batch.hung]
            assert len(alive) == 1 or not any(batch.alone for batch in alive)
            assert not device.reserved or alive  # else nothing would end it

    def alive(self) -> Counter[tuple[str, str]]:
        """Batches that run and do not hang, by device and model."""
        return Counter((batch.device.name, batch.model) for batch in self.running if not batch.hung)

    def hang(self, which: int) -> None:
        if self.running:
            self.scheduler.mark_hung(self.running[which % len(self.running)])

    def finish(self, which: int, micros: float) -> None:
        if self.running:
            batch = self.running.pop(which % len(self.running))
            self.scheduler.finished(batch, micros)
            for one in batch.requests:
                assert not one.waiting
                self.end(one)

    def crowd(self, which: int, failed: int) -> None:
        """A batch ran out of memory: some of its requests, at least, have no answer."""
        if self.running:
            batch = self.running.pop(which % len(self.running))
            self.scheduler.finished(batch, 0.0, self.now_ns)
            again = batch.requests[:failed] if batch.device is self.gpu and self.gpu.chip and not batch.alone else []
            if again and not self.gpu.error:
                self.scheduler.run_alone(batch, again)
                self.ceilings = {
                    (device.name, model): placement.max_rows
                    for device in (self.gpu, self.cpu)
                    for model, placement in device.placements.items()
                    if placement.max_rows
                }
            else:
                again = []
            for one in batch.requests[len(again) :]:
                self.end(one)

    def end(self, one: Request) -> None:
        one.done = True
        self.ends[id(one)] += 1

    def cancel(self, which: int) -> None:
        if self.added:
            one = self.added[which % len(self.added)]
            if self.scheduler.cancel(one):
                self.end(one)

    def start_background(self, model: str, rows: int) -> None:
        passes = [list(device.passes) for device in (self.gpu, self.cpu)]
        batch = self.scheduler.start_background(model, (0,), rows, self.now_ns)
        assert [list(device.passes) for device in (self.gpu, self.cpu)] == passes
        if batch is not None:
            device = batch.device
            assert batch.lane == BACKGROUND
            assert not device.queued
            assert not device.error
            assert model in device.models
            self.running.append(batch)
            assert not self.lanes[model] or self.alive()[device.name, model] <= self.lanes[model]

    def limit_lanes(self, model: str, lanes: int) -> None:
        self.lanes[model] = lanes
        self.scheduler.models.set_lane_limit(model, lanes)

    def limit_rows(self, model: str, device: str, rows: int) -> None:
        self.scheduler.models.limit_rows(device, model, rows)
        self.ceilings[device, model] = min(self.ceilings.get((device, model), 8), max(rows, 1))

    def come(self, model: str, device: str) -> None:
        self.scheduler.devices[device].models.add(model)

    def go(self, model: str) -> None:
        for device in (self.gpu, self.cpu):
            device.models.discard(model)
        if not self.scheduler.models.outstanding(model):
            self.scheduler.models.forget(model)
            self.lanes[model] = 0
            self.ceilings = {key: rows for key, rows in self.ceilings.items() if key[1] != model}
            assert not any(key[0] == model for device in (self.gpu, self.cpu) for key in device.queues)

    def fail(self) -> None:
        for one in self.scheduler.fail_device("cuda:0", "fell off the bus"):
            if not self.accepts(one):
                self.end(one)

    def count(self) -> None:
        for model in _NAMES:
            alive = sum(one.waiting for one in self.added if one.model == model)
            alive += sum(len(batch.requests) or 1 for batch in self.running if batch.model == model)
            assert self.scheduler.models.outstanding(model) == alive
            waiting = [one.nbytes for one in self.added if one.model == model and one.waiting]
            assert len(waiting) <= 15
            assert sum(waiting) <= 60
        assert self.scheduler.queued <= 25


@given(st.lists(_steps, min_size=20, max_size=60), st.integers(0, 2))
def test_requests_end_once_and_limits_hold_whatever_comes_and_goes(steps: list[tuple[Any, ...]], depth: int) -> None:
    """Models come and go, lanes and rows are limited, background batches run, devices fail: none waits in vain."""
    machine = Machine(depth)
    does = {
        "add": machine.add,
        "look": machine.look,
        "finish": machine.finish,
        "crowd": machine.crowd,
        "cancel": machine.cancel,
        "background": machine.start_background,
        "lanes": machine.limit_lanes,
        "rows": machine.limit_rows,
        "come": machine.come,
        "go": machine.go,
        "fail": machine.fail,
        "hang": machine.hang,
    }
    for name, *arguments in steps:
        does[name](*arguments)
        machine.count()
    scheduler = machine.scheduler
    while scheduler.queued or machine.running:
        machine.look()
        while machine.running:
            machine.finish(0, 0.0)
    assert machine.ends == Counter(id(one) for one in machine.added)
    assert (scheduler.queued, scheduler.queued_bytes, scheduler.running) == (0, 0, 0)
    for device in (machine.gpu, machine.cpu):
        assert (device.outstanding_rows, device.queued, device.counts) == (0, 0, [0, 0, 0, 0])
        assert not any(turns.members for turns in device.turns)
        assert not device.held
        for placement in device.placements.values():
            assert placement.lanes == []
            assert placement.backlog_us == pytest.approx([0.0] * 4, abs=1e-6)
        assert not device.reserved
