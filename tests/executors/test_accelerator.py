"""Lanes of an accelerator: on a real device where there is one, else on a pretended one in two orders of its work."""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import pytest
import torch

from pretended import pretended
from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.wire import TensorSpec
from tnxd.config import Config, Cuda
from tnxd.executors import accelerator, arena, slots
from tnxd.executors.accelerator_pool import AcceleratorPool
from tnxd.executors.accelerator_runner import AcceleratorRunner
from tnxd.executors.cpu import CpuRunner
from tnxd.executors.cuda import open_cuda
from tnxd.executors.execution import Execution
from tnxd.executors.runner_calls import RunnerCalls
from tnxd.models.model import Model
from tnxd.models.ragged import Ragged

REAL = torch.cuda.is_available()

DEVICE = "cuda:0"

needs_pretended = pytest.mark.skipif(REAL, reason="counts, faults and hangs are those of the pretended device")


@pytest.fixture(params=["real"] if REAL else ["late", "random"])
def machine(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The pretended machine, in each order of its work; None where the device is real."""
    with nullcontext() if REAL else pretended(policy=request.param, seed=3) as found:
        yield found


@pytest.fixture
def late() -> Iterator[Any]:
    """The pretended machine that does nothing before somebody waits for it."""
    with pretended() as found:
        yield found


class Lanes:
    """A pool of lanes, and what comes back from it."""

    def __init__(self, lanes: int = 1, depth: int = 2) -> None:
        self.done: queue.Queue[Execution] = queue.Queue()
        config = Config(devices=(DEVICE,), cuda=Cuda(lanes=lanes, depth=depth, graphs=False))
        self.pool: AcceleratorPool = open_cuda(DEVICE, config, self.done.put)

    def runner(self, lane: int = 0) -> AcceleratorRunner:
        return self.pool._serving[lane]

    def submit(self, model: Model, *items: tuple[Any, ...], lane: int = 0) -> Execution:
        rows = [len(item[0]) if model.max_batch_size else 1 for item in items]
        group = (
            model.ragged.group(model.inputs, items[0], 1)
            if model.ragged is not None
            else tuple(size for array in items[0] for size in array.shape[1:])
        )
        execution = Execution(lane, 0, model, items, rows, group)
        self.pool.submit(execution)
        return execution

    def next(self) -> Execution:
        return self.done.get(timeout=60)

    def answers(self, model: Model, *items: tuple[Any, ...], lane: int = 0) -> list[tuple[np.ndarray, ...]]:
        self.submit(model, *items, lane=lane)
        return outcomes(self.next())

    def turn(self) -> None:
        """Wait until the lane has nothing under way."""
        self.pool._lanes[0].call(lambda runner: None, within_s=60)


def outcomes(execution: Execution) -> list[tuple[np.ndarray, ...]]:
    for outcome in execution.outcomes:
        assert not isinstance(outcome, TensorNextError), outcome
    return execution.outcomes  # type: ignore[return-value]


def failures(execution: Execution) -> list[str]:
    return [str(getattr(outcome, "message", "")) for outcome in execution.outcomes]


def model(factory: Callable[[], torch.nn.Module], width: int = 4, rows: int = 4, name: str = "m") -> Model:
    spec = (TensorSpec("x", "FP32", (-1, width)),)
    return Model(name, "1", spec, spec, rows, factory)


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Seen(torch.nn.Module):
    """Says on which thread it was called, and with how many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.put((threading.current_thread().name, len(x)))
        return x * 2

    def drained(self) -> list[tuple[str, int]]:
        return [self.calls.get() for _ in range(self.calls.qsize())]


def numbers(rows: int, width: int = 4, start: float = 0.0) -> np.ndarray:
    return np.arange(start, start + rows * width, dtype=np.float32).reshape(rows, width)


# --- values: nothing is read before it is written, or written while it is read -------------------------------------


def test_batches_of_all_sizes_on_all_slots_come_back_right(machine: Any) -> None:
    lanes = Lanes(lanes=2, depth=2)
    double = model(Double)
    lanes.pool.load(double)
    sent = {}
    for index in range(24):
        parts = [(numbers(1 + index % 2, start=index),), (numbers(1 + index % 3, start=-index),)]
        sent[lanes.submit(double, *parts, lane=index % 4)] = parts
    for _ in range(24):
        finished = lanes.next()
        for (array,), (answer,) in zip(sent[finished], outcomes(finished), strict=True):
            np.testing.assert_array_equal(answer, array * 2)


@pytest.mark.parametrize("width", [1, 70_000])
def test_answers_are_in_memory_that_no_later_batch_writes(machine: Any, width: int) -> None:
    """Bodies of 4 bytes, and of 280 kB, which are handed over."""
    lanes = Lanes()
    double = model(Double, width)
    lanes.pool.load(double)
    kept = []
    for value in range(8):
        rows = 1 + 3 * (value % 2)
        kept.append(lanes.answers(double, (np.full((rows, width), value, np.float32),), lane=value % 2)[0][0])
    for value, answer in enumerate(kept):
        assert answer.shape == (1 + 3 * (value % 2), width)
        assert (answer == 2 * value).all()


def test_a_batch_larger_than_the_arena_goes_through_it_in_pieces(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "MOST_PINNED", 4096)
    monkeypatch.setattr(slots, "_MOST_KEPT", 8192)

    class Both(torch.nn.Module):
        def forward(self, x: torch.Tensor, flags: torch.Tensor, half: torch.Tensor) -> Any:
            return x * 2, ~flags, half + 1

    shapes = (("x", "FP32", (-1, 777)), ("flags", "BOOL", (-1, 1001)), ("half", "BF16", (-1, 333)))
    specs = tuple(TensorSpec(*each) for each in shapes)
    both = Model("m", "1", specs, specs, 8, Both)
    lanes = Lanes()
    lanes.pool.load(both)
    generator = np.random.default_rng(0)
    for lane in (0, 1, 0):
        items = [
            (
                generator.random((rows, 777), np.float32),
                generator.integers(0, 2, (rows, 1001)).astype(bool),
                np.full((rows, 333), 0x4000, np.uint16),  # 2.0
            )
            for rows in (1, 5, 2)
        ]
        for (x, flags, _), answer in zip(items, lanes.answers(both, *items, lane=lane), strict=True):
            np.testing.assert_array_equal(answer[0], x * 2)
            np.testing.assert_array_equal(answer[1], ~flags)
            np.testing.assert_array_equal(answer[2], np.full((len(x), 333), 0x4040, np.uint16))
    assert all(block.nbytes <= 4096 for slot in lanes.runner()._slots for block in (slot.inbound, slot.answers))


def test_small_outputs_of_several_types_come_back_together(machine: Any) -> None:
    class Three(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x.sum(1) > 1, x.to(torch.float64), x[:, :0]

    specs = (TensorSpec("a", "BOOL", (-1,)), TensorSpec("b", "FP64", (-1, 3)), TensorSpec("c", "FP32", (-1, 0)))
    three = Model("m", "1", (TensorSpec("x", "FP32", (-1, 3)),), specs, 4, Three)
    lanes = Lanes()
    lanes.pool.load(three)
    before = None if machine is None else machine.counts["device_to_host"]
    first, second = lanes.answers(three, (np.full((1, 3), 1.0, np.float32),), (np.zeros((2, 3), np.float32),))
    assert machine is None or machine.counts["device_to_host"] == before + 1
    assert [first[0].tolist(), second[0].tolist()] == [[True], [False, False]]
    assert second[1].dtype == np.float64
    assert first[1].flags.aligned
    assert first[1].tolist() == [[1.0] * 3]
    assert second[2].shape == (2, 0)


def test_a_model_without_batches_and_inputs_that_do_not_come(machine: Any) -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
            return x * factor

    inputs = (TensorSpec("x", "FP32", (-1,)), TensorSpec("factor", "FP32", ()))
    scaled = Model("m", "1", inputs, inputs[:1], 0, Scaled)
    lanes = Lanes()
    lanes.pool.load(scaled)
    for size in (3, 0, 70_000):
        x = np.ones(size, np.float32)
        np.testing.assert_array_equal(lanes.answers(scaled, (x, np.array(3, np.float32)))[0][0], x * 3)


@pytest.mark.parametrize("packed", [False, True])
def test_texts_of_different_lengths_share_a_batch(machine: Any, packed: bool) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor, *offsets: torch.Tensor) -> torch.Tensor:
            return (
                x.sum(1)
                if not offsets
                else torch.stack([x[a:b].sum() for a, b in torch.stack((offsets[0][:-1], offsets[0][1:]), 1).tolist()])
            )

    spec = (TensorSpec("x", "FP32", (-1, -1)),)
    ragged = Ragged((1,), (0,), (0,), 16, 64, packed=packed, joins=True)
    sums = Model("m", "1", spec, (TensorSpec("y", "FP32", (-1,)),), 8, Doubled, ragged=ragged)
    lanes = Lanes()
    assert lanes.pool.load(sums).joins
    items = [(np.full((rows, length), 2.0, np.float32),) for rows, length in ((1, 3), (2, 9), (1, 1))]
    for (array,), (answer,) in zip(items, lanes.answers(sums, *items), strict=True):
        np.testing.assert_array_equal(answer, array.sum(1))


def test_weights_made_on_another_thread_are_there_before_lanes_read_them(machine: Any) -> None:
    class Made(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            made = torch.ones(4, device=DEVICE) if torch.accelerator.is_available() else torch.ones(4)
            self.weight = torch.nn.Parameter(made * 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not bool((self.weight == 3).all()):
                raise ValueError("read before it was written")
            return x * self.weight

    lanes = Lanes()
    made = model(Made)
    report = lanes.pool.load(made)
    assert (report.warmed, report.notes) == (True, ())  # also in the trial
    np.testing.assert_array_equal(lanes.answers(made, (numbers(2),))[0][0], numbers(2) * 3)


def test_what_is_made_on_a_lane_is_there_for_others(machine: Any) -> None:
    lanes = Lanes()
    made = lanes.pool._lanes[0].call(lambda runner: torch.full((4,), 3.0, device=DEVICE) * 2)
    assert made.cpu().tolist() == [6.0] * 4  # which waits for this thread's own work, and for no more


def test_lanes_get_their_calls_once_these_can_be_used() -> None:
    runners = [CpuRunner(), CpuRunner()]
    settled = []

    def settle() -> None:
        settled.append([runner for runner in runners if {"m", "plain"} & {*runner.calls, *runner.plain_calls}])

    calls = RunnerCalls(settle)
    calls.add(runners[0])
    calls.install("m", torch.nn.Identity, torch.nn.Identity)
    calls.add(runners[1])
    assert settled == [[], runners[:1]]
    assert ["m" in runner.calls and "m" in runner.plain_calls for runner in runners] == [True, True]


def test_each_lane_has_its_own_copy_of_what_a_model_writes(machine: Any) -> None:
    class Writes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scratch", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.scratch.copy_(x.sum(0))
            return x + self.scratch

    lanes = Lanes(lanes=2, depth=2)
    writes = model(Writes)
    assert lanes.pool.load(writes).state == "scratch"
    sent = {lanes.submit(writes, (numbers(2, start=index),), lane=index % 4): index for index in range(8)}
    for _ in sent:
        finished = lanes.next()
        x = numbers(2, start=sent[finished])
        np.testing.assert_allclose(outcomes(finished)[0][0], x + x.sum(0), rtol=1e-6)


def test_lanes_call_a_model_one_after_the_other_that_they_share(machine: Any) -> None:
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.add_(len(x))
            for _ in range(6):
                x = x * 0
            return x + self.total

    counts = Model("m", "1", *[(TensorSpec("x", "FP32", (-1, 4)),)] * 2, 4, Counts, state="shared")
    lanes = Lanes(lanes=2, depth=2)
    lanes.pool.load(counts)
    (before,) = lanes.answers(counts, (numbers(1),))
    for index in range(24):
        lanes.submit(counts, (numbers(1),), lane=index % 4)
    totals = sorted(float(outcomes(lanes.next())[0][0][0, 0] - before[0][0, 0]) for _ in range(24))
    assert totals == [float(count) for count in range(1, 25)]


def test_a_shared_state_that_is_replaced_on_another_lane_is_whole(machine: Any) -> None:
    """Its memory must not be used again by the lane that made it while the other one still reads it."""

    class Sums(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.total: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total = x if self.total is None else self.total + x
            return self.total

    sums = Model("sums", "1", *[(TensorSpec("x", "FP32", (-1, 4)),)] * 2, 1, Sums, state="shared")
    lanes, double = Lanes(lanes=2, depth=2), model(Double)
    lanes.pool.load(sums)
    lanes.pool.load(double)
    one = np.ones((1, 4), np.float32)
    before = lanes.answers(sums, (one,))[0][0][0, 0]
    sent = [lanes.submit(double if index % 2 else sums, (one,), lane=index // 2 % 4) for index in range(24)]
    for _ in sent:
        outcomes(lanes.next())
    totals = sorted(float(outcomes(each)[0][0][0, 0] - before) for each in sent[::2])
    assert totals == [float(count) for count in range(1, 13)]


def test_a_shared_state_may_keep_its_inputs(machine: Any) -> None:
    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            last, self.last = self.last, x
            return x if last is None else last

    last = Model("m", "1", *[(TensorSpec("x", "FP32", (-1, 4)),)] * 2, 1, Last, state="shared")
    lanes = Lanes(depth=1)
    lanes.pool.load(last)
    answers = [lanes.answers(last, (np.full((1, 4), value, np.float32),))[0][0][0, 0] for value in range(4)]
    assert answers[1:] == [0, 1, 2]


def test_what_a_model_does_to_the_current_stream_and_device_is_undone(machine: Any) -> None:
    class Strays(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            other = torch.Stream(x.device) if x.device.type != "cuda" else torch.cuda.Stream(x.device)
            other.wait_stream(torch.accelerator.current_stream())
            torch.accelerator.set_stream(other)
            return x * 2

    lanes = Lanes()
    strays = model(Strays)
    lanes.pool.load(strays)
    for value in range(3):
        np.testing.assert_array_equal(
            lanes.answers(strays, (numbers(2, start=value),))[0][0], numbers(2, start=value) * 2
        )
    runner = lanes.runner()
    current = lanes.pool._lanes[0].call(lambda _: torch.accelerator.current_stream(runner.torch_device))
    assert current == runner._current


# --- overlap -------------------------------------------------------------------------------------------------------


@needs_pretended
def test_the_next_batch_is_issued_before_the_last_one_is_over(late: Any) -> None:
    seen = Seen()
    lanes = Lanes(depth=2)
    watched = model(lambda: seen)
    lanes.pool.load(watched)
    lanes.turn()
    seen.drained()
    late.devices[0].hang()
    first = lanes.submit(watched, (numbers(1),), lane=0)
    second = lanes.submit(watched, (numbers(2),), lane=1)
    assert [seen.calls.get(timeout=60)[1] for _ in range(2)] == [1, 2]
    assert lanes.done.empty()
    late.devices[0].release()
    assert [lanes.next(), lanes.next()] == [first, second]


@needs_pretended
def test_waiting_on_the_device_for_batches_before_it_is_no_part_of_a_run(late: Any) -> None:
    lanes = Lanes(depth=2)
    double = model(Double)
    lanes.pool.load(double)
    lanes.turn()
    late.devices[0].hang()
    lanes.submit(double, (numbers(1),), lane=0)
    second = lanes.submit(double, (numbers(2),), lane=1)
    under_way = lanes.runner()._under_way
    deadline = time.monotonic() + 60
    while len(under_way) < 2 or under_way[1].flight is None:
        assert time.monotonic() < deadline
    assert second.started_ns == 0  # it has not begun
    waiting = under_way[1]
    assert waiting.slot is not None
    waiting.slot.in_ready.elapsed_time = lambda other: 5.0  # type: ignore[method-assign]
    late.devices[0].release()
    assert [lanes.next(), lanes.next()][1] is second
    assert second.started_ns == waiting.issued_ns + 5_000_000
    total = second.gather_us + second.h2d_us + second.compute_us + second.d2h_us
    assert total == pytest.approx((second.finished_ns - second.started_ns) / 1e3)


def test_stages_sum_up_and_hold_no_wait_for_other_batches(machine: Any) -> None:
    lanes = Lanes(depth=3)
    double = model(Double)
    lanes.pool.load(double)
    for lane in range(3):
        lanes.submit(double, (numbers(4),), lane=lane)
    for _ in range(3):
        finished = lanes.next()
        assert min(finished.gather_us, finished.h2d_us, finished.compute_us, finished.d2h_us, finished.latency_us) > 0
        total = finished.gather_us + finished.h2d_us + finished.compute_us + finished.d2h_us
        assert total == pytest.approx((finished.finished_ns - finished.started_ns) / 1e3)
        assert finished.memory_free_mb > 0


@needs_pretended
def test_serving_allocates_nothing_pinned_and_waits_without_a_core(late: Any) -> None:
    lanes = Lanes()
    wide = model(Double, 70_000)
    lanes.pool.load(wide)
    counted = (
        "pinned_allocations",
        "event_synchronize_spinning",
        "stream_synchronize",
        "device_synchronize",
        "empty_cache",
    )
    with accelerator.capturing:  # so that no pool, of another test either, gives memory back from loading meanwhile
        before = {name: late.counts[name] for name in counted}
        copies = late.counts["host_to_device"], late.counts["device_to_host"]
        for index in range(8):
            one, other = np.ones((1, 70_000), np.float32), np.ones((3, 70_000), np.float32)
            lanes.answers(wide, (one,), (other,), lane=index % 2)
        assert {name: late.counts[name] for name in counted} == before
    assert (late.counts["host_to_device"] - copies[0], late.counts["device_to_host"] - copies[1]) == (8, 8)


def test_a_block_that_went_out_with_a_reply_comes_back_when_that_is_gone(machine: Any) -> None:
    lanes = Lanes()
    wide = model(Double, 70_000)
    lanes.pool.load(wide)
    spares = lanes.runner()._outbound.spares
    assert len(spares._blocks) == 2
    kept = [lanes.answers(wide, (np.full((1, 70_000), value, np.float32),))[0][0] for value in range(3)]
    assert len(spares._blocks) == 0
    assert [answer[0, 0] for answer in kept] == [0.0, 2.0, 4.0]
    del kept
    gc.collect()
    assert len(spares._blocks) == 2


def test_every_lane_is_warm_for_all_sizes(machine: Any) -> None:
    seen = Seen()
    lanes = Lanes(lanes=2)
    costs = lanes.pool.load(model(lambda: seen)).costs
    calls = set(seen.drained())
    for lane in ("0", "1"):
        assert {rows for name, rows in calls if name == f"{DEVICE}/{lane}"} == {rows for rows, _ in costs} == {1, 2, 4}


def test_lanes_that_serve_go_first(machine: Any) -> None:
    lanes = Lanes()
    priorities = {
        lane.runner._compute.priority  # type: ignore[attr-defined]
        for lane in (lanes.pool._warm_up[0], lanes.pool._background)
        for _ in [lane.call(lambda runner: None)]
    }
    lanes.turn()
    assert max(priorities) == 0
    assert lanes.runner()._compute.priority == -1  # type: ignore[attr-defined]


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_request_that_fails_fails_alone(machine: Any) -> None:
    class Picky(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if bool((x < 0).any()):
                raise ValueError("negative")
            return x * 2

    lanes = Lanes()
    picky = model(Picky)
    lanes.pool.load(picky)
    for lane in range(2):
        lanes.submit(picky, (numbers(1),), (numbers(1, start=-9),), (numbers(1),), lane=lane)
    for _ in range(2):
        finished = lanes.next()
        assert [bool(message) for message in failures(finished)] == [False, True, False]
        assert "negative" in failures(finished)[1]
    np.testing.assert_array_equal(lanes.answers(picky, (numbers(4),))[0][0], numbers(4) * 2)


def test_memory_of_a_batch_that_failed_is_not_written_while_it_is_still_read(machine: Any) -> None:
    class LooksUp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.table[x]
            if errors.qsize():
                raise errors.get()
            return found.sum(1)

    errors: queue.SimpleQueue[Exception] = queue.SimpleQueue()  # into which no trial looks
    index = (TensorSpec("x", "INT64", (-1, 2)),)
    looks_up = Model("looks_up", "1", index, (TensorSpec("y", "FP32", (-1, 4)),), 4, LooksUp)
    double = model(Double)
    lanes = Lanes(depth=1)
    lanes.pool.load(looks_up)
    lanes.pool.load(double)
    errors.put(ValueError("after its kernels were launched"))
    lanes.submit(looks_up, (np.ones((1, 2), np.int64),))
    assert "launched" in failures(lanes.next())[0]
    large = np.full((1, 4), 3e38, np.float32)  # an index far beyond the table
    assert np.isinf(lanes.answers(double, (large,))[0][0]).all()


@needs_pretended
def test_the_error_of_a_model_is_not_hidden_by_that_of_the_device(late: Any) -> None:
    class Raises(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if orders.qsize():
                orders.get()()
                raise ValueError("the model's own")
            return x * 2

    orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # into which no trial looks
    lanes = Lanes()
    raises = model(Raises)
    lanes.pool.load(raises)
    orders.put(late.devices[0].lose)
    lanes.submit(raises, (numbers(1),))
    assert "the model's own" in failures(lanes.next())[0]


@needs_pretended
def test_a_lost_device_answers_all_that_is_under_way(late: Any) -> None:
    lanes = Lanes()
    wide = model(Double, 70_000)
    lanes.pool.load(wide)
    kept = lanes.answers(wide, (np.ones((1, 70_000), np.float32),))[0][0]
    late.devices[0].hang()
    for lane in range(2):
        lanes.submit(wide, (np.ones((2, 70_000), np.float32),), lane=lane)
    late.devices[0].lose()
    late.devices[0].release()
    for _ in range(2):
        finished = lanes.next()
        assert finished.fatal
        assert failures(finished)[0].startswith(f"{DEVICE} failed")
    assert (kept == 2).all()
    pinned = late.host.nbytes
    del kept, finished
    gc.collect()
    with suppress(torch.AcceleratorError):
        lanes.turn()
    assert late.host.nbytes == pinned  # to free it is to ask the device


@needs_pretended
def test_a_device_that_does_not_answer_is_lost(late: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = Lanes()
    assert not lanes.pool.accelerator.is_lost()
    monkeypatch.setattr(accelerator, "_LOSS_S", 0.05)
    late.devices[0].hang()
    assert lanes.pool.accelerator.is_lost()
    late.devices[0].release()


@needs_pretended
def test_the_cache_is_not_emptied_twice_when_memory_runs_out(late: Any) -> None:
    class Greedy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 2 and errors.qsize():
                raise errors.get()
            return x * 2

    errors: queue.SimpleQueue[Exception] = queue.SimpleQueue()  # into which no trial looks
    lanes = Lanes()
    greedy = model(Greedy)
    lanes.pool.load(greedy)
    items = [(numbers(2),), (numbers(2),)]
    with accelerator.capturing:  # so that no pool gives memory back from loading meanwhile
        before = late.counts["empty_cache"]
        errors.put(torch.OutOfMemoryError("made up"))
        lanes.answers(greedy, *items)
        assert late.counts["empty_cache"] == before
        errors.put(MemoryError("made up"))  # as of a library that torch's allocator knows nothing of
        lanes.answers(greedy, *items)
        assert late.counts["empty_cache"] == before + 1


@needs_pretended
def test_memory_is_given_back_at_a_moment_when_nothing_runs(late: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "_MEMORY_PERIOD_S", 0.005)
    lanes = Lanes()
    double, other = model(Double), model(Double, name="other")
    lanes.pool.load(double)
    lanes.pool.load(other)
    deadline = time.monotonic() + 60
    while lanes.pool.accelerator.memory._is_idle is not None:
        assert time.monotonic() < deadline
    with accelerator.capturing:  # it is held until what was asked for is done
        before = late.counts["empty_cache"]
    late.devices[0].hang()
    lanes.submit(double, (numbers(1),))
    while not lanes.runner().is_busy:
        assert time.monotonic() < deadline
    lanes.pool.unload(other.key)
    assert late.counts["empty_cache"] == before
    late.devices[0].release()
    outcomes(lanes.next())
    while late.counts["empty_cache"] == before:
        assert time.monotonic() < deadline
