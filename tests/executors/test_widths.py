"""Batches on one core and on several: real threads of real lanes."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tnxctl.protocol.wire import TensorSpec
from tnxd.config import Config, Cpu
from tnxd.executors import loading
from tnxd.executors.cpu import CpuRunner, open_cpu
from tnxd.executors.execution import Execution
from tnxd.executors.pool import LanePool
from tnxd.lanes import NO_TEAMS, Teams
from tnxd.models.model import Model

TWO = Teams(lanes=1, threads=2, cores=2)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that does not hang gets its turn, however busy the machine is."""
    monkeypatch.setattr(loading, "TURN_S", 60.0)


SEEN: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
"""Name and number of threads of each forward. A trial does not look into a queue."""


class Layers(torch.nn.Module):
    """Takes long enough with 64 rows to be tried on several cores."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(512, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SEEN.put((threading.current_thread().name, torch.get_num_threads()))
        for _ in range(8):
            x = self.layer(x)
        return x


class Counting(Layers):
    """Answers with the number of its threads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = super().forward(x) * 0 + torch.get_num_threads()
        return answer


def model(network: Callable[[], torch.nn.Module] = Layers, **options: Any) -> Model:
    spec = (TensorSpec("x", "FP32", (-1, 512)),)
    return Model("m", "1", spec, spec, 64, lambda: network().eval().requires_grad_(False), **options)


def started(teams: Teams) -> tuple[LanePool, queue.SimpleQueue[Execution]]:
    """Two lanes."""
    done: queue.SimpleQueue[Execution] = queue.SimpleQueue()
    pool = LanePool(
        "cpu",
        "cpu",
        "",
        make_runner=CpuRunner,
        lanes=2,
        inline=None,
        teams=teams,
        memory_mb=lambda: (0.0, 0.0),
        on_done=done.put,
    )
    drained()
    return pool, done


def drained() -> list[tuple[str, int]]:
    return [SEEN.get() for _ in range(SEEN.qsize())]


def submit(pool: LanePool, served: Model, lane: int, threads: int) -> None:
    pool.submit(Execution(lane, 0, served, [(np.ones((64, 512), np.float32),)], [64], (), threads))


def test_device_without_teams_measures_no_width() -> None:
    pool, _ = started(NO_TEAMS)
    report = pool.load(model())
    assert (report.widths, report.threads) == ((), 0)
    assert {threads for _, threads in drained()} == {1}


def test_model_that_answers_otherwise_with_more_threads_keeps_to_one() -> None:
    pool, _ = started(TWO)
    report = pool.load(model(Counting))
    assert (report.threads, report.widths) == (1, ())
    assert "on one core only: on one and on 2, output 'x'[0, 0] is 1 and 2" in report.notes


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (2, 2), (64, 2)])
def test_model_may_ask_for_a_number_of_threads(asked: int, given: int) -> None:
    pool, _ = started(TWO)
    report = pool.load(model(threads=asked))
    assert report.threads == given
    assert {threads for _, threads in drained()} == {1, given}
    measured = {rows: wide_us for rows, _, wide_us in report.widths}
    assert bool(measured) == (given > 1)
    assert {rows: dict(report.costs)[rows] for rows in measured} == measured, "its costs are those of its team"


def test_hanging_lane_does_not_keep_models_from_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "TURN_S", 0.01)
    pool, done = started(TWO)
    held, holds = threading.Event(), threading.Event()

    def hang(_: object) -> None:
        holds.set()
        held.wait()

    threading.Thread(target=lambda: pool._lanes[0].call(hang), daemon=True).start()
    assert holds.wait(60)
    served = model()
    report = pool.load(served)
    held.set()
    submit(pool, served, 0, 1)
    assert done.get(timeout=60).outcomes
    assert (report.warmed, report.widths) == (True, ())
    assert {threads for _, threads in drained()} == {1}, "what nobody waits for any more is not run"


def test_lane_whose_last_batch_was_wide_runs_narrow_ones_on_one_thread_after_another_model_was_loaded() -> None:
    pool, done = started(TWO)
    first = model()
    pool.load(first)
    submit(pool, first, 0, 2)
    done.get(timeout=60)
    pool.load(replace(first, name="second"))
    drained()
    submit(pool, first, 0, 1)
    done.get(timeout=60)
    assert drained() == [("cpu/0", 1)]


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux has it")
def test_lanes_may_leave_the_cores_to_whatever_else_wants_them() -> None:
    pool = open_cpu("cpu", Config(cpu=Cpu(workers=2, scheduling="idle")), lambda _: None)
    assert {lane.call(lambda _: os.sched_getscheduler(0)) for lane in pool._lanes} == {os.SCHED_IDLE}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_one_lane_has_a_team_and_no_other_thread_has_one() -> None:
    """In a process of its own, where no team has been before."""
    here = Path(__file__)
    code = f"import sys; sys.path[:0] = {[str(here.parent), str(here.parents[1])]}\nimport test_widths as t\nt.report()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    added, later, loading, serving = json.loads(ended.stdout)
    assert (added, later) == (1, 0), "a team of two is one thread beside the lane's own"
    assert loading == ["cpu/0"]
    assert serving == [["cpu/1", 1], ["cpu/0", 2], ["cpu/0", 1], ["cpu/0", 2], ["cpu/1", 1]]


def report() -> None:
    """Print what `test_one_lane_has_a_team_and_no_other_thread_has_one` looks at."""

    def count(expected: int) -> int:
        """Number of threads, as soon as it is the expected one: one that was waited for is gone some time later."""
        until = time.monotonic() + 60
        while (found := len(os.listdir("/proc/self/task"))) != expected and time.monotonic() < until:
            time.sleep(0.01)
        return found

    torch.set_num_threads(1)
    pool, done = started(TWO)
    before = len(os.listdir("/proc/self/task"))
    served = model()
    pool.load(served)
    loaded = count(before + 1)
    wide = sorted({name for name, threads in drained() if threads > 1})
    for lane, threads in ((1, 1), (0, 2), (0, 1), (0, 2), (1, 1)):
        submit(pool, served, lane, threads)
        done.get(timeout=60)
    serving = drained()
    pool.touch(served)
    print(json.dumps([loaded - before, count(loaded) - loaded, wide, serving]))
