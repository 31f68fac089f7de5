"""The pool and its threads, without a server."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tnxctl.protocol.errors import FailedPrecondition, TensorNextError, Unavailable
from tnxctl.protocol.wire import TensorSpec
from tnxd.executors.cpu import CpuRunner, order_weights
from tnxd.executors.execution import Execution
from tnxd.executors.host import Peak
from tnxd.executors.pool import LanePool
from tnxd.executors.runner import Runner
from tnxd.executors.trial.warmup import warm_up_sizes
from tnxd.models.model import Model


def test_warm_up_covers_every_power_of_two_and_the_limit() -> None:
    assert warm_up_sizes(0) == [1]
    assert warm_up_sizes(1) == [1]
    assert warm_up_sizes(8) == [1, 2, 4, 8]
    assert warm_up_sizes(12) == [1, 2, 4, 8, 12]


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs a torch with MKL")
def test_weights_of_linear_layers_are_stored_input_by_input() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4)).requires_grad_(False)
    example = torch.randn(3, 6)
    before, weight = net(example), net[0].weight.clone()
    ordered = order_weights(net)
    assert ordered[0].weight.t().is_contiguous()
    assert torch.equal(ordered[0].weight, weight)
    torch.testing.assert_close(ordered(example), before)


def test_weights_that_other_layers_use_keep_their_layout() -> None:
    net = torch.nn.Sequential(torch.nn.Embedding(5, 6), torch.nn.Linear(6, 5)).requires_grad_(False)
    net[1].weight = net[0].weight
    doubles = torch.nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    assert order_weights(net)[1].weight.is_contiguous()
    assert order_weights(doubles).weight.is_contiguous()


class Apart(torch.nn.Module):
    """Takes the weight of a layer apart, as attention with latent keys does. Args: take: gives its values."""

    def __init__(self, take: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
        self.layer.weight.copy_(torch.tensor([[2.0, 2.0], [5.0, 7.0]]))
        self._take = take

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self._take(self.layer.weight)[:2]
        return x * first + second


@pytest.mark.parametrize("take", [lambda weight: weight.view(-1), lambda weight: weight.as_strided((4,), (1,))])
def test_a_weight_that_a_forward_takes_apart_keeps_its_layout(take: Callable[[torch.Tensor], torch.Tensor]) -> None:
    lanes, done = pool(1, CpuRunner, order_weights)
    model = served(lambda: Apart(take))
    report = lanes.load(model)
    assert (report.warmed, report.batches, report.notes) == (True, True, ())
    lanes.submit(execution(model, 0, 3.0))
    outcome = done.get(timeout=20).outcomes[0]
    assert not isinstance(outcome, TensorNextError)
    assert outcome[0].tolist() == [[8.0, 8.0]]


def drain(seen: queue.SimpleQueue[Any]) -> list[Any]:
    """All that is in a queue. A trial does not look into one: what a module puts there is no state of its own."""
    return [seen.get() for _ in range(seen.qsize())]


class Probe(torch.nn.Module):
    """Remembers in what surroundings it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: queue.SimpleQueue[tuple[str, bool, int]] = queue.SimpleQueue()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        name = threading.current_thread().name
        self.seen.put((name, torch.is_inference_mode_enabled(), torch.get_num_threads()))
        return x + 1


def served(factory: Callable[[], torch.nn.Module]) -> Model:
    spec = (TensorSpec("x", "FP32", (-1, 2)),)
    return Model("m", "1", spec, spec, 4, factory)


def pool(
    runners: int,
    runner: Callable[[], Runner],
    arrange: Callable[[torch.nn.Module], torch.nn.Module] = lambda module: module,
) -> tuple[LanePool, queue.Queue[Execution]]:
    done: queue.Queue[Execution] = queue.Queue()
    made = LanePool(
        "cpu",
        "cpu",
        "",
        make_runner=runner,
        lanes=runners,
        inline=None,
        arrange=arrange,
        memory_mb=lambda: (0.0, 0.0),
        on_done=done.put,
    )
    return made, done


def execution(model: Model, lane: int, value: float) -> Execution:
    return Execution(lane, 0, model, [(np.full((1, 2), value, np.float32),)], [1], ())


def test_every_lane_runs_in_inference_mode_on_one_thread() -> None:
    probe = Probe()
    model = served(lambda: probe)
    lanes, done = pool(3, CpuRunner)
    costs = lanes.load(model).costs
    assert [rows for rows, _ in costs] == [1, 2, 4]
    assert all(micros > 0 for _, micros in costs)
    drain(probe.seen)
    for lane in range(3):
        lanes.submit(execution(model, lane, float(lane)))
    outputs = {}
    for _ in range(3):
        finished = done.get(timeout=20)
        outcome = finished.outcomes[0]
        assert not isinstance(outcome, TensorNextError)
        outputs[finished.lane] = float(outcome[0][0, 0])
        assert finished.finished_ns > finished.started_ns
        total = finished.gather_us + finished.h2d_us + finished.compute_us + finished.d2h_us
        assert total == pytest.approx((finished.finished_ns - finished.started_ns) / 1e3)
    assert outputs == {0: 1.0, 1: 2.0, 2: 3.0}
    assert sorted(drain(probe.seen)) == [(f"cpu/{lane}", True, 1) for lane in range(3)]


def test_a_lane_that_cannot_start_answers_all_the_same() -> None:
    class Vanished(CpuRunner):
        def enter_thread(self) -> None:
            raise RuntimeError("the device is gone")

    lanes, done = pool(1, lambda: Vanished())
    model = served(torch.nn.Identity)
    with pytest.raises(Unavailable, match="the device is gone"):
        lanes.load(model)
    lanes.submit(execution(model, 0, 1.0))
    finished = done.get(timeout=20)
    assert "the device is gone" in finished.fatal
    assert isinstance(finished.outcomes[0], Unavailable)


def test_a_device_error_is_fatal_and_not_bisected() -> None:
    calls: queue.SimpleQueue[int] = queue.SimpleQueue()
    loaded = threading.Event()

    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.put(len(x))
            if loaded.is_set():
                raise torch.AcceleratorError("an illegal memory access was encountered")
            return x

    lanes, done = pool(1, CpuRunner)
    model = served(Broken)
    lanes.load(model)
    drain(calls)
    loaded.set()
    item = (np.zeros((1, 2), np.float32),)
    lanes.submit(Execution(0, 0, model, [item, item], [1, 1], ()))
    finished = done.get(timeout=20)
    assert finished.fatal == "an illegal memory access was encountered"
    assert [type(outcome) for outcome in finished.outcomes] == [Unavailable, Unavailable]
    assert drain(calls) == [2]


class Small(torch.nn.Module):
    """Has memory for so many rows; a row that begins with 100 is one too many, a negative one is an error."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.seen: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.workspaces: queue.LifoQueue[weakref.ref[torch.Tensor]] = queue.LifoQueue()

    @property
    def calls(self) -> list[int]:
        """Rows of each call since the last time that somebody asked."""
        return drain(self.seen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.put(len(x))
        workspace = x * 2
        self.workspaces.put(weakref.ref(workspace))
        if len(x) > self.rows or bool((x[..., 0] == 100).any()):
            raise torch.OutOfMemoryError("made up")
        if bool((x < 0).any()):
            raise ValueError("negative")
        return workspace


class Thrifty(CpuRunner):
    """Counts how often memory is freed, and looks whether what failed still holds some."""

    def __init__(self, small: Small) -> None:
        super().__init__()
        self.small = small
        self.freed = 0

    def free_memory(self) -> None:
        assert self.small.workspaces.get_nowait()() is None
        self.freed += 1


def run_small(
    memory: int, *items: list[float], max_batch_size: int = 16, max_rows: int = 0
) -> tuple[Execution, Small, Thrifty]:
    """Run one batch of such items, each value a row of two."""
    small = Small(16)
    made: list[Thrifty] = []

    def runner() -> Thrifty:
        made.append(Thrifty(small))
        return made[-1]

    lanes, done = pool(1, runner)
    spec = (TensorSpec("x", "FP32", (-1, 2) if max_batch_size else (-1,)),)
    model = Model("m", "1", spec, spec, max_batch_size, lambda: small)
    lanes.load(model)
    drain(small.seen)
    small.rows = memory
    values = [np.array(item, np.float32) for item in items]
    arrays = [np.repeat(each[:, None], 2, axis=1) if max_batch_size else each for each in values]
    counts = [len(array) if max_batch_size else 1 for array in arrays]
    lanes.submit(Execution(0, max_rows, model, [(array,) for array in arrays], counts, ()))
    finished = done.get(timeout=20)
    for outcome, array in zip(finished.outcomes, arrays, strict=True):
        if not isinstance(outcome, TensorNextError):
            np.testing.assert_array_equal(outcome[0], array * 2)
    return finished, small, made[0]


def codes(finished: Execution) -> list[str]:
    return [outcome.code if isinstance(outcome, TensorNextError) else "ok" for outcome in finished.outcomes]


def test_a_batch_that_memory_has_no_room_for_runs_in_halves() -> None:
    finished, small, runner = run_small(3, [1, 2], [3], [4], [5], [6, 7])
    assert codes(finished) == ["ok"] * 5
    assert small.calls == [7, 3, 4, 1, 3]
    assert (finished.exhausted, finished.safe_rows, runner.freed) == (True, 3, 2)


def test_a_request_that_memory_has_no_room_for_runs_in_pieces() -> None:
    finished, small, runner = run_small(3, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert codes(finished) == ["ok"]
    assert small.calls == [10, 5, 2, 2, 2, 2, 2]
    assert (finished.exhausted, finished.safe_rows, runner.freed) == (True, 2, 2)


def test_pieces_keep_to_the_limit_of_the_model_and_to_the_ceiling() -> None:
    finished, small, _ = run_small(8, [1] * 30)
    assert codes(finished) == ["ok"]
    assert small.calls == [16, 8, 8, 8, 6]
    finished, small, _ = run_small(8, [1] * 30, max_rows=4)
    assert codes(finished) == ["ok"]
    assert small.calls == [4] * 7 + [2]
    assert (finished.exhausted, finished.safe_rows) == (False, 0)


def test_a_single_row_too_large_for_memory_fails_its_request_alone() -> None:
    finished, small, _ = run_small(16, [1], [2, 100, 3], [4, 5], [6])
    assert codes(finished) == ["ok", "RESOURCE_EXHAUSTED", "ok", "ok"]
    assert small.calls == [7, 4, 1, 3, 1, 1, 3]
    assert (finished.exhausted, finished.safe_rows) == (True, 3)
    assert "cpu has no memory left" in str(finished.outcomes[1])
    finished, small, _ = run_small(16, [1, 2], [3, 4], [5], [100])
    assert small.calls == [6, 4, 2, 1, 1]
    assert (finished.exhausted, finished.safe_rows) == (True, 4)


def test_an_indivisible_request_too_large_for_memory_fails() -> None:
    finished, small, _ = run_small(16, [100.0, 1.0], max_batch_size=0)
    assert codes(finished) == ["RESOURCE_EXHAUSTED"]
    assert small.calls == [2]
    assert (finished.exhausted, finished.safe_rows) == (True, 0)


def test_an_error_of_another_kind_does_not_count_as_out_of_memory() -> None:
    finished, small, runner = run_small(16, [1, -2, 3], [4])
    assert codes(finished) == ["INTERNAL", "ok"]
    assert small.calls == [4, 3, 1]
    assert (finished.exhausted, finished.safe_rows, runner.freed) == (False, 0, 0)


class Frugal(CpuRunner):
    """Has 1,024 MiB of memory left, and sees each row take 20."""

    def __init__(self, small: Small) -> None:
        super().__init__()
        self.small = small

    def memory_left(self) -> int:
        return 1024 * 2**20

    @contextlib.contextmanager
    def measured(self) -> Iterator[Peak]:
        peak = Peak()
        drain(self.small.seen)
        yield peak
        peak.nbytes = 20 * 2**20 * self.small.calls[0]


@pytest.mark.parametrize(("lanes", "most"), [(1, 8), (2, 4), (16, 1)])
def test_a_warm_up_ends_where_a_batch_would_take_too_much_of_the_memory(lanes: int, most: int) -> None:
    """A row takes 20 MiB; of 1,024, a quarter may be taken by all lanes together."""
    small = Small(64)
    made, _ = pool(lanes, lambda: Frugal(small))
    spec = (TensorSpec("x", "FP32", (-1, 2)),)
    report = made.load(Model("m", "1", spec, spec, 64, lambda: small))
    assert (report.most_rows, report.safe_rows, [rows for rows, _ in report.costs][-1]) == (most, 0, most)


@pytest.mark.parametrize(("sizes", "run"), [(None, [1, 2, 4]), ((1, 3), [1, 3]), ((), [])])
def test_a_warm_up_runs_the_configured_sizes(sizes: tuple[int, ...] | None, run: list[int]) -> None:
    made, _ = pool(1, CpuRunner)
    spec = (TensorSpec("x", "FP32", (-1, 2)),)
    report = made.load(Model("m", "1", spec, spec, 4, torch.nn.Identity, warm_up=sizes))
    assert report.warmed
    assert report.batches
    assert [rows for rows, _ in report.costs] == run


class Told(torch.nn.Module):
    """Multiplies with what its parent tells it for the time of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.told: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.told is not None
        return x * self.told


class Tells(torch.nn.Module):
    """Leaves nothing behind, and is used by two lanes at once all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Told()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.child.told = x
        for _ in range(20):
            x = x + 0
        answer = self.child(x)
        self.child.told = None
        return answer


class Hooked(torch.nn.Module):
    """A hook of a copy would write to what it was copied from."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Identity()
        self.seen = torch.zeros(1, 2)
        self.layer.register_forward_hook(lambda module, given, output: setattr(self, "seen", output * 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * 0 + self.seen


class Context(torch.nn.Module):
    """Two layers share a dict, of which a copy for each would be two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Told(), Told()
        self.first.context = self.second.context = {"x": torch.zeros(1, 2)}  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.first.context["x"] = x * 2  # type: ignore[operator]
        return x * 0 + self.second.context["x"]  # type: ignore[index]


@pytest.mark.parametrize(("make", "factor", "serial"), [(Tells, None, True), (Hooked, 2, True), (Context, 2, False)])
def test_lanes_that_are_not_as_separate_as_they_look_take_turns(
    make: type[torch.nn.Module], factor: float | None, serial: bool
) -> None:
    lanes, done = pool(2, CpuRunner)
    model = served(make)
    report = lanes.load(model)
    assert report.serial is serial
    for lane, value in ((0, 3.0), (1, 5.0), (0, 7.0)):
        lanes.submit(execution(model, lane, value))
        outcome = done.get(timeout=20).outcomes[0]
        assert not isinstance(outcome, TensorNextError)
        assert outcome[0].tolist() == [[value * (factor or value)] * 2]


class FromEleven(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0) if len(x) > 10 else x


class Experts(torch.nn.Module):
    """Two experts that take the first four rows each that choose them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = torch.nn.functional.one_hot((x[:, 0] > x[:, 1]).long(), 2)
        place = (chosen.cumsum(0) * chosen).sum(1)
        return x * (place <= 4)[:, None]


class LastHalf(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:40], x[40:] - x[40:].mean(0)]) if len(x) > 40 else x


@pytest.mark.parametrize("network", [FromEleven, Experts, LastHalf])
@pytest.mark.parametrize("asked", [False, True])
def test_rows_that_mix_in_large_batches_alone_are_found_by_the_warm_up(
    network: type[torch.nn.Module], asked: bool
) -> None:
    made, _ = pool(1, CpuRunner)
    spec = (TensorSpec("x", "FP32", (-1, 2)),)
    served = Model("m", "1", spec, spec, 64, network, batching_asked=asked)
    if asked:
        with pytest.raises(
            FailedPrecondition, match=r"axis 0 does not count rows: alone and in a batch of (8|16|64), output"
        ):
            made.load(served)
    else:
        report = made.load(served)
        assert (report.batches, [rows for rows, _ in report.costs]) == (False, [1])
        assert "alone and in a batch of " in report.notes[0]


def test_a_forgotten_model_holds_no_staging_memory() -> None:
    _, _, runner = run_small(16, [1], [2])
    assert runner.staging._nbytes > 0
    runner.forget("m@1")
    assert runner.staging._nbytes == 0


def test_a_model_that_fails_to_warm_up_is_not_kept() -> None:
    class Fails(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise TypeError("no")

    made: list[CpuRunner] = []

    def runner() -> CpuRunner:
        made.append(CpuRunner())
        return made[-1]

    lanes, _ = pool(1, runner)
    with pytest.raises(TensorNextError, match="TypeError: no"):
        lanes.load(served(Fails))
    assert not any(each.calls for each in made)


def test_an_input_alone_reaches_the_model_without_a_copy_if_it_is_aligned() -> None:
    addresses: queue.SimpleQueue[int] = queue.SimpleQueue()

    class Address(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            addresses.put(x.data_ptr())
            return x.sum(dim=1)

    spec = (TensorSpec("x", "FP32", (-1, -1)),)
    model = Model("m", "1", spec, (TensorSpec("y", "FP32", (-1,)),), 4, Address)
    lanes, done = pool(1, CpuRunner)
    lanes.load(model)
    raw = np.zeros(4 * 10 + 1, np.uint8)
    for x, same in ((np.ones((1, 100_000), np.float32), True), (raw[1:].view(np.float32).reshape(1, 10), False)):
        width = x.shape[1]
        lanes.submit(Execution(0, 0, model, [(x,)], [1], (width,)))
        done.get(timeout=20)
        assert (drain(addresses)[-1] == x.ctypes.data) is same


def test_no_rows_need_no_forward() -> None:
    def fails() -> torch.nn.Module:
        raise AssertionError("not called")

    model = served(fails)
    lanes, done = pool(1, CpuRunner)
    none = execution(model, 0, 0.0)
    none.items, none.rows = [(np.zeros((0, 2), np.float32),)] * 2, [0, 0]
    lanes.submit(none)
    outcomes = done.get(timeout=10).outcomes
    assert [outcome[0].shape for outcome in outcomes] == [(0, 2), (0, 2)]
