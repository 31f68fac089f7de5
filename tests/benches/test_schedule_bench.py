"""The simulation behind `bench/schedule.py`: its numbers must be right, above all those that flatter when wrong."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

import benchmarks
from tnxctl.protocol import mcap, recordings, wire

# isort: split
# On the path since `benchmarks` was imported.
import decisions
import lengths
import loops
import recorded_trace
import schedule
import traces
from oracle import cost_by_start, upper_bound
from policies import Policy, Run, Scheduled, Threshold
from schedule import SCHEDULER, examine
from simulation import IDEAL, Loop, Noise, Outcome, replay
from traces import CPU, GPU, Job, Machine, Trace


class NoNoise(Noise):
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __call__(self, device: str, model: str, rows: int) -> float:
        return self._machine.cost_us(device, model, rows)


def machine(lanes: int = 1, limit: int = 4) -> Machine:
    """CPU: 100 us and 10 us per row; GPU: 200 us and 1 us per row."""
    return Machine(
        {CPU: lanes, GPU: 1},
        {"m": limit},
        {(CPU, "m"): {1: 110, limit: 100 + 10 * limit}, (GPU, "m"): {1: 201, limit: 200 + limit}},
    )


def trace(*jobs: Job, on: Machine | None = None) -> Trace:
    return Trace("test", "", on or machine(), list(jobs))


def always_cpu(given: Trace, loop: Loop = IDEAL) -> Outcome:
    return replay(given, Threshold(given.machine, given.jobs, math.inf), NoNoise(given.machine), loop)


@pytest.mark.parametrize(("rows", "micros"), [(1, 110), (2, 120), (4, 140), (5, 250), (8, 280), (9, 390)])
def test_costs_are_straight_between_points_and_add_up_beyond_the_limit(rows: int, micros: float) -> None:
    assert machine().cost_us(CPU, "m", rows) == pytest.approx(micros)


def test_batches_form_while_the_lane_is_busy() -> None:
    outcome = always_cpu(trace(*[Job(at, 1e9, "m") for at in (0, 10, 20, 30, 40, 50)]))
    assert list(outcome.done_us) == pytest.approx([110, 250, 250, 250, 250, 360])
    assert outcome.rows_per_batch == pytest.approx(2)
    assert outcome.busy == pytest.approx({CPU: 1.0, GPU: 0.0})


def test_what_is_done_a_moment_too_late_does_not_count() -> None:
    outcome = always_cpu(trace(Job(0, 110, "m"), Job(200, 309.9, "m")))
    assert list(outcome.in_time) == [True, False]
    assert (outcome.share, outcome.computed_late, outcome.refused) == (0.5, 1, 0)


def test_lanes_work_side_by_side() -> None:
    outcome = always_cpu(trace(*[Job(0, 1e9, "m", rows=4)] * 3, on=machine(lanes=2)))
    assert list(outcome.done_us) == pytest.approx([140, 140, 280])


def test_the_threshold_goes_by_rows() -> None:
    given = trace(Job(0, 1e9, "m", rows=2), Job(0, 1e9, "m", rows=3))
    outcome = replay(given, Threshold(given.machine, given.jobs, 2), NoNoise(given.machine))
    assert outcome.device == [CPU, GPU]


def test_the_oldest_request_says_which_model_is_next() -> None:
    costs = {(device, model): {1: 100.0, 4: 100.0} for device in (CPU, GPU) for model in "ab"}
    given = trace(
        *[Job(at, 1e9, model) for at, model in ((0, "a"), (1, "b"), (2, "a"), (3, "b"))],
        on=Machine({CPU: 1, GPU: 1}, {"a": 4, "b": 4}, costs),
    )
    assert list(always_cpu(given).done_us) == pytest.approx([100, 200, 300, 200])


class _Refusing(Threshold):
    def add(self, number: int, now_ns: int, deadline_ns: int) -> bool:
        return number % 2 == 0 and super().add(number, now_ns, deadline_ns)


def test_what_is_refused_is_counted_and_not_met() -> None:
    given = trace(*[Job(at, 1e9, "m") for at in range(4)])
    outcome = replay(given, _Refusing(given.machine, given.jobs, math.inf), NoNoise(given.machine))
    assert (outcome.refused, list(outcome.in_time)) == (2, [True, False, True, False])


class _Counting:
    """Passes everything on, and counts which jobs run."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.add, self.wanted, self.finished = policy.add, policy.wanted, policy.finished
        self.next_event_ns = policy.next_event_ns
        self.started: list[int] = []
        self.rows: list[int] = []

    @property
    def given_up(self) -> int:
        return self._policy.given_up

    def start(self, now_ns: int) -> list[Run]:
        runs = self._policy.start(now_ns)
        for run in runs:
            self.started += run.jobs
            self.rows.append(run.rows)
        return runs


@pytest.mark.parametrize("name", traces.NAMES)
def test_the_scheduler_runs_nothing_twice_and_leaves_nothing_behind(name: str) -> None:
    given = traces.make(name, traces.machine(), 600, seed=3)
    noise = Noise(given.machine, 3)
    scheduled = Scheduled(given.machine, given.jobs, noise)
    policy = _Counting(scheduled)
    outcome = replay(given, policy, noise)
    assert len(policy.started) == len(set(policy.started))
    assert set(policy.started) == {number for number, device in enumerate(outcome.device) if device}
    assert scheduled.scheduler.running == 0
    policy.start(10**15)  # whatever still waits has expired by now
    assert scheduled.scheduler.queued == 0


def test_noise_is_as_the_table_on_average_and_the_same_for_a_seed() -> None:
    one, other = Noise(machine(), 5), Noise(machine(), 5)
    drawn = [one(CPU, "m", 1) for _ in range(20_000)]
    assert drawn[:100] == [other(CPU, "m", 1) for _ in range(100)]
    assert sum(drawn) / len(drawn) == pytest.approx(110, rel=0.005)
    assert min(drawn) >= 110 * 0.97


@pytest.mark.parametrize("name", traces.NAMES)
def test_traces_are_the_same_for_a_seed_ordered_and_possible(name: str) -> None:
    first, again, other = (traces.make(name, traces.machine(), 300, seed) for seed in (1, 1, 2))
    assert first.jobs == again.jobs
    assert first.jobs != other.jobs
    assert all(a.arrival_us <= b.arrival_us for a, b in itertools.pairwise(first.jobs))
    assert all(job.deadline_us > job.arrival_us and job.rows >= 1 for job in first.jobs)
    assert 290 <= len(first.jobs) <= 300


# --- the serving loop ------------------------------------------------------------------------------------------


def test_a_loop_takes_its_time_and_does_one_thing_at_a_time() -> None:
    """Both messages are taken in, one after the other, before the lane gets them; answers leave one after the other."""
    loop = Loop(receive_us=10, admit_us=5, answer_us=20, turn_us=1)
    outcome = always_cpu(trace(Job(0, 1e9, "m"), Job(0, 1e9, "m")), loop)
    assert list(outcome.unread_us) == pytest.approx([1, 16])
    begin = 1 + 15 + 15
    assert list(outcome.done_us) == pytest.approx([begin + 120 + 1 + 20, begin + 120 + 1 + 40])


def test_what_arrives_while_messages_are_taken_in_is_taken_in_too_but_not_for_ever() -> None:
    jobs = [Job(10.0 * number, 1e9, "m") for number in range(20)]
    outcome = always_cpu(trace(*jobs, on=machine(limit=20)), Loop(receive_us=10, intake_us=55))
    assert outcome.done_us[5] == pytest.approx(60 + 160)
    assert outcome.done_us[6] > 60 + 160


def test_lanes_first_gives_a_lane_that_is_done_its_next_batch_before_more_is_taken_in() -> None:
    jobs = [Job(0, 1e9, "m", rows=4), *[Job(20.0 * number, 1e9, "m", rows=4) for number in range(1, 30)]]
    done = {
        first: always_cpu(trace(*jobs), Loop(receive_us=19, turn_us=0.5, lanes_first=first)).done_us[1]
        for first in (True, False)
    }
    assert done[True] < done[False]


class _Watching(Threshold):
    """Notes the deadlines that it is told."""

    def __init__(self, given: Trace) -> None:
        super().__init__(given.machine, given.jobs, math.inf)
        self.deadlines_us: list[float] = []

    def add(self, number: int, now_ns: int, deadline_ns: int) -> bool:
        self.deadlines_us.append(deadline_ns / 1e3)
        return super().add(number, now_ns, deadline_ns)


@pytest.mark.parametrize(("from_arrival", "second"), [(True, 1_000), (False, 1_010)])
def test_a_deadline_counts_from_the_arrival_or_from_the_receipt(from_arrival: bool, second: float) -> None:
    given = trace(Job(0, 1_000, "m"), Job(0, 1_000, "m"))
    policy = _Watching(given)
    replay(given, policy, NoNoise(given.machine), Loop(receive_us=10, from_arrival=from_arrival))
    assert policy.deadlines_us == pytest.approx([1_000, second])


def test_a_refusal_takes_time_too() -> None:
    given = trace(*[Job(0, 1e9, "m") for _ in range(3)])
    policy = _Refusing(given.machine, given.jobs, math.inf)
    outcome = replay(given, policy, NoNoise(given.machine), Loop(receive_us=10, admit_us=5, refuse_us=30))
    assert outcome.refused == 1
    assert list(outcome.unread_us) == pytest.approx([0, 15, 55])


def test_an_inline_batch_keeps_the_loop_from_taking_in_more() -> None:
    given = trace(Job(0, 1e9, "m"), Job(10, 1e9, "m"), on=Machine({CPU: 1}, {"m": 4}, {(CPU, "m"): {1: 110, 4: 140}}))
    for limit, unread in ((1_000.0, 100), (0.0, 0)):
        measure = NoNoise(given.machine)
        policy = Scheduled(given.machine, given.jobs, measure, inline_limit_us=limit)
        assert list(replay(given, policy, measure).unread_us) == pytest.approx([0, unread])


def test_threads_share_the_cores_that_there_are() -> None:
    def took(loop: Loop) -> float:
        return float(always_cpu(trace(Job(0, 1e9, "m")), loop).done_us[0])

    assert took(Loop(cores=1.0)) == pytest.approx(110)
    assert took(Loop(cores=0.5)) == pytest.approx(220)
    # While the loop takes in the second message, the batch has half of a core, and a quarter if it keeps only half.
    given = trace(Job(0, 1e9, "m"), Job(12, 1e9, "m"))
    for share, done in ((1.0, 12 + 20 + 98), (0.5, 12 + 20 + 103)):
        outcome = always_cpu(given, Loop(receive_us=10, cores=1.0, lane_share=share))
        assert outcome.done_us[0] == pytest.approx(done)


def test_what_was_given_up_on_a_lane_is_answered_once() -> None:
    """The batch takes five times what the scheduler knows."""

    class Slow(NoNoise):
        factor = 1

        def __call__(self, device: str, model: str, rows: int) -> float:
            return self.factor * super().__call__(device, model, rows)

    given = trace(Job(0, 400, "m"), Job(700, 1e9, "m"))
    measure = Slow(given.machine)
    policy = Scheduled(given.machine, given.jobs, measure)
    measure.factor = 5
    outcome = replay(given, policy, measure, Loop(answer_us=50, give_up_us=7))
    assert outcome.given_up == 1
    assert outcome.done_us[0] == pytest.approx(5 * 110)  # no answer was made for it


@pytest.mark.parametrize(("multiple", "measured"), [(0.6, 5_151), (1, 5_715), (2, 2_419)])
def test_a_loop_with_costs_as_measured_loses_deadlines_as_a_daemon_did(multiple: float, measured: float) -> None:
    """Deadlines counted from the receipt then; on two cores that others used, too."""
    load = loops.measure(loops.RECEIPT, multiple, seed=1)
    assert load.in_time_per_s == pytest.approx(measured, rel=0.2)


def test_a_loop_that_cannot_take_in_all_that_comes_meets_next_to_no_deadline() -> None:
    """The daemon had 17 a second. There and here these are the first of the load, before messages wait for long."""
    load = loops.measure(loops.RECEIPT, 4, seed=1, seconds=1.0)
    assert load.of_capacity < 0.03
    assert load.refused < 0.8  # it takes in many that are too late already
    again = loops.measure(loops.ARRIVAL, 4, seed=1, seconds=1.0)
    assert again.of_capacity < 0.03
    assert again.refused > 0.9  # it does not, but is as busy with refusing them


def test_the_program_prints_all_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loops, "MULTIPLES", (0.1,))
    written = tmp_path / "loads.json"
    done = CliRunner().invoke(schedule.main, ["--loop", "--json", str(written)])
    assert done.exit_code == 0
    loads = json.loads(written.read_bytes())["loads"]
    assert [load["loop"] for load in loads] == list(loops.LOOPS)
    assert all(load["of_admitted"] == 1 and loops.RECEIPT in done.output for load in loads)
    assert CliRunner().invoke(schedule.main, ["--loop", "--trace", "light"]).exit_code == 2


# --- the upper bound -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0.3, 1.0, 2.5, 40.0])
def test_a_batch_costs_no_less_than_at_its_cheapest_start(length: float) -> None:
    """Held against many starts in each slot, with the prices summed up piece by piece."""
    price = np.random.default_rng(1).exponential(1.0, 30)
    spent = np.concatenate([[0.0], np.cumsum(price)])
    edges = np.arange(31)
    least = cost_by_start(spent, length)
    for slot in range(30):
        starts = np.linspace(slot, slot + 1, 2001)
        tried = np.interp(starts + length, edges, spent) - np.interp(starts, edges, spent)
        assert least[slot] <= tried.min() + 1e-9
        assert least[slot] == pytest.approx(tried.min(), abs=0.01)


def test_everything_possible_is_met_where_there_is_time() -> None:
    jobs = [Job(1000.0 * number, 1000.0 * number + 500, "m") for number in range(20)]
    assert upper_bound(trace(*jobs)) == pytest.approx(1.0)


@pytest.mark.slow
def test_half_of_twice_the_capacity_is_met() -> None:
    """Both devices together do 4/140 + 4/204 rows per microsecond; deadlines are loose, but all by the end."""
    capacity = 4 / 140 + 4 / 204
    count = 2000
    end = count / (2 * capacity)
    jobs = [Job(end * number / count * 0.8, end, "m") for number in range(count)]
    assert upper_bound(trace(*jobs)) == pytest.approx(0.5, abs=0.02)


def best_of_all(given: Trace) -> int:
    """The most deadlines that can be met, by trying every order of batches on every lane."""
    jobs, costs = given.jobs, given.machine

    def search(left: frozenset[int], free_us: tuple[float, float]) -> int:
        best = 0
        for at, device in enumerate((CPU, GPU)):
            for size in range(1, 5):
                for members in itertools.combinations(sorted(left), size):
                    rows = sum(jobs[number].rows for number in members)
                    if rows > costs.limits["m"]:
                        continue
                    start = max(free_us[at], *[jobs[number].arrival_us for number in members])
                    ends = start + costs.cost_us(device, "m", rows)
                    if any(jobs[number].deadline_us < ends for number in members):
                        continue
                    then = (ends, free_us[1]) if at == 0 else (free_us[0], ends)
                    best = max(best, size + search(left - set(members), then))
        return best

    return search(frozenset(range(len(jobs))), (0.0, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_no_schedule_meets_more_than_the_bound(seed: int) -> None:
    chance = random.Random(seed)
    jobs = sorted(
        (
            Job(arrival, arrival + chance.uniform(110, 300), "m", chance.choice((1, 2, 3, 4)))
            for arrival in (chance.uniform(0, 150) for _ in range(6))
        ),
        key=lambda job: job.arrival_us,
    )
    given = trace(*jobs)
    assert best_of_all(given) <= upper_bound(given) * len(jobs) + 1e-6


@pytest.mark.slow
def test_the_scheduler_stays_below_the_bound() -> None:
    report = examine(traces.make("overload", traces.machine(), 2000, seed=1), seed=1)
    assert 0 < report.policies[SCHEDULER].met < report.upper_bound < 1


# --- the rest --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queued", [0, 300])
def test_decisions_are_measured_with_as_many_in_the_queue(queued: int) -> None:
    measured = decisions.measure(traces.machine(), queued, clients=3, rounds=3)
    assert (measured.queued, measured.clients) == (queued, 3)
    assert measured.add_us > 0
    assert measured.start_us > 0


@pytest.mark.slow
def test_the_program_writes_a_table_json_and_a_picture(tmp_path: Path) -> None:
    written, again, picture = tmp_path / "one.json", tmp_path / "again.json", tmp_path / "one.png"
    options = ["--requests", "300", "--trace", "light", "--trace", "clients", "--no-decisions", "--json"]
    table = benchmarks.run("schedule.py", *options, str(written), "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Within 5 % of the upper bound" in table
    report = json.loads(written.read_bytes())
    assert [entry["trace"] for entry in report["traces"]] == ["light", "clients"]
    for entry in report["traces"]:
        for policy in entry["policies"].values():
            assert 0 <= policy["met"] <= 1
        assert set(entry["policies"][SCHEDULER]["met_by_priority"]) <= {"0", "1", "2", "3"}
    assert CliRunner().invoke(schedule.main, [*options, str(again)]).exit_code == 0
    assert json.loads(again.read_bytes())["traces"] == report["traces"]  # nothing depends on the clock


@pytest.mark.parametrize(
    ("machine", "outstanding", "padded", "packed"),
    [("CPU", 8, 1.3, 1.5), ("CPU", 64, 1.05, 1.1), ("assumed GPU", 8, 5.0, 5.0), ("assumed GPU", 64, 8.0, 15.0)],
)
def test_texts_of_all_lengths_gain_by_sharing_batches(
    machine: str, outstanding: int, padded: float, packed: float
) -> None:
    base = lengths.measure(machine, lengths.EQUAL, outstanding, 1, done=1_500)
    for way, gain in ((lengths.PADDED, padded), (lengths.PACKED, packed)):
        fared = lengths.measure(machine, way, outstanding, 1, done=1_500)
        assert fared.per_s > gain * base.per_s
        assert fared.p99_ms < base.p99_ms


def test_ragged_prints_every_way_on_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "OUTSTANDING", (8,))
    monkeypatch.setattr(lengths, "MACHINES", {"CPU": lengths.cpu_us})
    path = tmp_path / "ragged.json"
    result = CliRunner().invoke(schedule.main, ["--ragged", "--json", str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    report = msgspec.json.decode(path.read_bytes(), type=schedule.RaggedReport)
    assert [one.way for one in report.texts] == list(lengths.WAYS)
    assert all(one.way in result.output for one in report.texts)


def test_ragged_and_loop_do_not_go_together() -> None:
    result = CliRunner().invoke(schedule.main, ["--ragged", "--loop"])
    assert result.exit_code == 2
    assert "traces and costs of their own" in result.output


# --- recordings ------------------------------------------------------------------------------------------------


def recorded(path: Path, *, devices: str = '{"cpu":{"kind":"cpu","lanes":1}}', end: bytes = b"") -> Path:
    """Recording of two versions, of which only m@1 has costs: two requests of it each millisecond, for 50 ms."""
    costs = {"cpu": {"1": 110.0, "8": 180.0}, "cuda:0": {"1": 200.0, "8": 210.0}}
    known = {"max_batch_size": "8", "priority": "2", "costs_us": json.dumps(costs), "deadline_us": "3000"}
    parts = [
        mcap.beginning(recordings.PROFILE, "tnxd"),
        mcap.metadata(recordings.ABOUT, {"devices": devices}),
        mcap.channel(1, "m@1", recordings.ENCODING, known),
        mcap.channel(2, "n@1", recordings.ENCODING, {"max_batch_size": "0", "costs_us": "{}"}),
        mcap.metadata(recordings.CLIENT, {"number": "5", "name": "alice"}),
    ]
    for number in range(100):
        rows = 1 + number % 2
        spec = wire.TensorSpec("x", "FP32", (rows, 1))
        deadline_us = 5000.0 if number % 2 else None
        header = wire.encode(wire.Predict(v=1, id=1, inputs=(spec,), priority=None, deadline_us=deadline_us))
        at_ns = 10**18 + number // 2 * 1_000_000
        parts += map(bytes, recordings.message(1, number, at_ns, 5, header, [bytes(4 * rows)]))
    parts += map(bytes, recordings.message(2, 100, 10**18, 5, header, [b""]))
    path.write_bytes(b"".join([*parts, end or mcap.end()]))
    return path


def test_a_recording_is_a_trace(tmp_path: Path) -> None:
    found, remarks = recorded_trace.read(recorded(tmp_path / "day.mcap"), 1000)
    assert found.name == "day"
    assert found.machine.lanes == {CPU: 1}
    assert found.machine.limits == {"m@1": 8}
    assert found.machine.cost_us(CPU, "m@1", 8) == 180.0
    assert found.jobs[:3] == [
        Job(0.0, 3000.0, "m@1", 1, "alice", 2),
        Job(0.0, 5000.0, "m@1", 2, "alice", 2),
        Job(1000.0, 4000.0, "m@1", 1, "alice", 2),
    ]
    assert remarks == ["day.mcap: 1 requests are left out: no costs of n@1"]
    assert len(recorded_trace.read(tmp_path / "day.mcap", 10)[0].jobs) == 10


def test_a_recording_is_replayed_through_the_policies(tmp_path: Path) -> None:
    path, json_path = recorded(tmp_path / "day.mcap", end=b"\5"), tmp_path / "report.json"
    arguments = ["--trace", str(path), "--no-decisions", "--json", str(json_path)]
    told = CliRunner().invoke(schedule.main, arguments)
    assert told.exit_code == 0, told.output
    (report,) = json.loads(json_path.read_text())["traces"]
    assert (report["trace"], report["requests"]) == ("day", 100)
    assert {name: one["met"] for name, one in report["policies"].items()} == {
        SCHEDULER: 1.0, "best threshold": 1.0, "always CPU": 1.0,
    }  # fmt: skip
    assert "day.mcap: it was cut off" in told.output


def test_a_recording_of_a_daemon_with_a_gpu_is_replayed_on_both(tmp_path: Path) -> None:
    both = '{"cpu":{"kind":"cpu","lanes":2},"cuda:0":{"kind":"cuda","lanes":2},"process":{"kind":"process","lanes":1}}'
    found, _ = recorded_trace.read(recorded(tmp_path / "day.mcap", devices=both), 1000)
    assert found.machine.lanes == {CPU: 2, GPU: 2}
    assert set(examine(found, 1).policies) == {SCHEDULER, "best threshold", "always CPU", "always GPU"}


@pytest.mark.parametrize(
    "devices", ["{}", "[]", "{", '{"cpu":{"kind":"cpu","lanes":0}}', '{"tpu":{"kind":"x","lanes":1}}']
)
def test_a_recording_that_says_too_little_is_a_sentence(devices: str, tmp_path: Path) -> None:
    told = CliRunner().invoke(schedule.main, ["--trace", str(recorded(tmp_path / "day.mcap", devices=devices))])
    assert told.exit_code == 1
    assert "day.mcap" in told.output
    assert "Traceback" not in told.output


def test_a_trace_is_a_name_or_a_file() -> None:
    told = CliRunner().invoke(schedule.main, ["--trace", "nope"])
    assert told.exit_code == 2
    assert "'nope' is neither a file nor one of light, busy" in told.output
