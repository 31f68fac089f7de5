"""Parts of `tnxctl bench` without a daemon: its tally of the answers that it gets, and its search for a rate."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from math import inf
from typing import Any

import msgspec
import pytest

from fake_daemon import TIMING
from tnxctl import session
from tnxctl.cli import bench as command
from tnxctl.cli.bench import lines, runs
from tnxctl.cli.bench.recording import LOST, OUTSIDE, Load, Recording, Step, grown
from tnxctl.protocol import wire
from tnxctl.protocol.errors import Internal


def test_limits_are_those_of_the_client() -> None:
    assert command.MOST_OUTSTANDING == session.MAX_PENDING_CALLS
    assert command.HIGHEST_RATE == runs.HIGHEST_RATE


# --- numbers -------------------------------------------------------------------------------------------------


def result_header(number: int, **changes: Any) -> bytes:
    timing = msgspec.structs.replace(TIMING, **changes)
    return wire.encode(
        wire.Result(
            v=1, id=number, model="mlp", version="1", outputs=(), device="cpu", reason="", batch_size=4,
            latency_ms=0.1, gpu_memory_mb=0.0, timing=timing,
        )
    )  # fmt: skip


def recorded(latencies_us: list[int], **changes: Any) -> Recording:
    """A recording of requests that were sent 5 µs late, with these latencies from when they were due."""
    recording = Recording()
    with recording.running():
        for number, latency_us in enumerate(latencies_us):
            recording.send(number, 0, 5_000)
            recording.take(result_header(number, **changes), latency_us * 1000)
    return recording


def test_percentiles_are_latencies_that_happened() -> None:
    step = recorded(list(range(1000, 0, -1))).step(Load(rate=10.0))
    assert step.latency_us == {"p50": 500.0, "p90": 900.0, "p99": 990.0, "p99.9": 999.0, "max": 1000.0}
    assert step.late_us == {"p99": 5.0, "max": 5.0}
    assert (step.rows, step.devices) == (4.0, Counter(cpu=1000))
    assert step.stages_us[OUTSIDE] == pytest.approx(500.5 - 150.0)


def test_requests_without_a_result_are_later_than_any_other() -> None:
    recording = recorded([1] * 98)
    recording.give_up(1, LOST, "no answer")
    assert recording.step(Load(rate=10.0)).p99_of_all_us == inf
    recording = recorded([1] * 99)
    recording.give_up(1, LOST, "no answer")
    step = recording.step(Load(rate=10.0))
    assert (step.p99_of_all_us, step.requests, step.failed) == (1.0, 100, 1)


def test_a_result_after_its_deadline_is_an_error() -> None:
    recording = Recording(deadline_ns=1e6)
    recording.send(7, 0, 0)
    recording.take(result_header(7), 1_000_001)
    assert recording.errors == {"DEADLINE_EXCEEDED": 1}


def test_answers_to_earlier_requests_are_left_aside() -> None:
    recording = recorded([1])
    recording.take(result_header(99), 10)
    assert recording.step(Load(concurrency=1)).requests == 1


@pytest.mark.parametrize("header", [b"\xc1", wire.encode(wire.ModelsReport(v=1, id=0, models=()))])
def test_replies_that_are_none_end_it(header: bytes) -> None:
    with pytest.raises(Internal, match="predict got"):
        recorded([1]).take(header, 10)


def test_the_stage_that_grew() -> None:
    first = recorded([200]).step(Load(concurrency=1))
    queued = recorded([1200], queue_us=1020.0, total_us=1150.0).step(Load(concurrency=8))
    outside = recorded([700]).step(Load(concurrency=8))
    same = recorded([201]).step(Load(concurrency=2))
    assert grown(queued, first) == ("queue", 1000.0)
    assert grown(outside, first) == (OUTSIDE, 500.0)
    assert grown(same, first) is None, "by so little"
    assert grown(first, first) is None


# --- the search by itself ------------------------------------------------------------------------------------


class FakeBench:
    """Steps that were not measured: the p99 is 1 ms up to a rate, and 1 s beyond it.

    Attributes:
        tried: rates, in order.
    """

    def __init__(self, most: float, alone_per_s: float = 1000.0, seconds: float = 1.0, flukes: int = 0) -> None:
        self.tried: list[float] = []
        self.seconds = seconds
        self._most = most
        self._alone_per_s = alone_per_s
        self._flukes = flukes

    def measure(self, load: Load) -> Step:
        good = load.rate <= self._most
        if load.rate:
            self.tried.append(load.rate)
        if load.rate and good and self._flukes:
            self._flukes -= 1
            good = False
        step = recorded([1_000 if good else 1_000_000] * 100).step(load)
        return step if load.rate else replace(step, seconds=step.answered / self._alone_per_s)


def searched(bench: FakeBench) -> runs.Search:
    search = runs.Search(bench, 10_000.0)  # type: ignore[arg-type]  # it measures, which is all that is asked of it
    for _ in search:
        pass
    assert search.over
    return search


def test_rates_double_and_then_close_in() -> None:
    bench = FakeBench(3000.0)
    search = searched(bench)
    assert bench.tried == [500, 1000, 2000, 4000, 4000, 3000, 3500, 3500, 3250, 3250, 3120, 3120]
    assert search.best is not None
    assert (search.best.load.rate, search.too_high) == (3000, 3120)
    assert lines.answer(search) == "3000/s is the highest rate whose p99 stays under 10 ms; 3120/s is too high"


def test_rates_are_halved_where_the_first_is_too_high() -> None:
    search = searched(FakeBench(100.0))
    assert search.best is not None
    assert 95 <= search.best.load.rate <= 100
    assert search.too_high is not None
    assert 100 < search.too_high <= 106


def test_one_bad_step_is_no_verdict() -> None:
    bench = FakeBench(3000.0, flukes=1)
    search = searched(bench)
    assert bench.tried[:3] == [500, 500, 1000]
    assert search.best is not None
    assert search.best.load.rate == 3000


def test_steps_in_which_the_client_was_late_count_for_less() -> None:
    bench = FakeBench(3000.0, flukes=2)
    search = runs.Search(bench, 8.0)  # type: ignore[arg-type]  # microseconds: all are over that, and 5 is how late
    rates = [step.load.rate for step in itertools.islice(search, 5)]
    assert rates == [0, 500, 500, 500, 250]


def test_a_search_ends_where_there_are_too_few_requests() -> None:
    search = searched(FakeBench(0.5, alone_per_s=100.0))
    assert search.best is None
    assert search.too_high == 12.5
    assert lines.answer(search) == "No rate was found whose p99 stays under 10 ms: 12.5/s is too high"


def test_a_search_ends_at_the_highest_rate() -> None:
    search = searched(FakeBench(1e9))
    assert search.best is not None
    assert (search.best.load.rate, search.too_high) == (runs.HIGHEST_RATE, None)
    assert lines.answer(search).endswith("; no higher one was tried")


def test_a_search_that_is_ended_early_says_so() -> None:
    search = runs.Search(FakeBench(3000.0), 10_000.0)  # type: ignore[arg-type]
    steps = iter(search)
    for _ in range(3):
        next(steps)
    assert lines.answer(search).startswith("1000/s is the highest rate so far ")
