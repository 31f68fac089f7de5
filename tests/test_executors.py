"""The pool and its threads, without a server."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tnxctl.errors import TensorNextError, Unavailable
from tnxctl.wire import TensorSpec
from tnxd.executors.cpu import CpuRunner, available_cores, choose_threads
from tnxd.executors.execution import Execution
from tnxd.executors.pool import LanePool, warm_up_sizes
from tnxd.executors.runner import Runner
from tnxd.models.model import Model
from tnxd.work import Batch, Device


@pytest.mark.parametrize(
    ("cores", "workers", "threads"), [(1, 1, 1), (2, 1, 1), (4, 3, 1), (8, 2, 3), (16, 3, 4), (64, 15, 4)]
)
def test_workers_and_threads_fill_the_cores_but_one(cores: int, workers: int, threads: int) -> None:
    assert choose_threads(cores) == (workers, threads)
    assert workers * threads <= max(cores - 1, 1)


def test_what_is_given_stays() -> None:
    assert choose_threads(16, workers=5) == (5, 3)
    assert choose_threads(16, threads=2) == (7, 2)
    assert choose_threads(2, workers=4, threads=4) == (4, 4)


def test_warm_up_covers_every_power_of_two_and_the_limit() -> None:
    assert warm_up_sizes(0) == [1]
    assert warm_up_sizes(1) == [1]
    assert warm_up_sizes(8) == [1, 2, 4, 8]
    assert warm_up_sizes(12) == [1, 2, 4, 8, 12]


class Probe(torch.nn.Module):
    """Remembers in what surroundings it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool, int, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        name = threading.current_thread().name
        self.seen.append((name, torch.is_inference_mode_enabled(), torch.get_num_threads(), self.training))
        return x + 1


def served(factory: Callable[[], torch.nn.Module]) -> Model:
    spec = (TensorSpec("x", "FP32", (-1, 2)),)
    return Model("m", "1", spec, spec, 4, factory)


def pool(
    runners: int, runner: Callable[[dict[str, torch.nn.Module]], Runner]
) -> tuple[LanePool, queue.Queue[Execution]]:
    done: queue.Queue[Execution] = queue.Queue()
    replicas: dict[str, torch.nn.Module] = {}
    made = LanePool(
        "cpu",
        "cpu",
        "",
        runners=[runner(replicas) for _ in range(runners)],
        inline=None,
        replicas=replicas,
        place=lambda module: module,
        memory_mb=lambda: (0.0, 0.0),
        on_done=done.put,
    )
    return made, done


def execution(model: Model, lane: int, value: float) -> Execution:
    batch = Batch(Device("cpu", "cpu", 1, frozenset()), lane, model.name, [], 1)
    return Execution(batch, model, [(np.full((1, 2), value, np.float32),)], [1], ())


def test_every_lane_runs_in_inference_mode_with_its_share_of_threads() -> None:
    probe = Probe().train()
    model = served(lambda: probe)
    lanes, done = pool(3, lambda replicas: CpuRunner(replicas, 2))
    costs = lanes.load(model)
    assert [rows for rows, _ in costs] == [1, 2, 4]
    assert all(micros > 0 for _, micros in costs)
    probe.seen.clear()
    for lane in range(3):
        lanes.submit(execution(model, lane, float(lane)))
    outputs = {}
    for _ in range(3):
        finished = done.get(timeout=20)
        outcome = finished.outcomes[0]
        assert not isinstance(outcome, TensorNextError)
        outputs[finished.batch.lane] = float(outcome[0][0, 0])
        assert finished.finished_ns > finished.started_ns
        total = finished.gather_us + finished.h2d_us + finished.compute_us + finished.d2h_us
        assert total == pytest.approx((finished.finished_ns - finished.started_ns) / 1e3)
    assert outputs == {0: 1.0, 1: 2.0, 2: 3.0}
    assert sorted(probe.seen) == [(f"cpu/{lane}", True, 2, False) for lane in range(3)]


def test_a_lane_that_cannot_start_answers_all_the_same() -> None:
    class Vanished(CpuRunner):
        def enter_thread(self) -> None:
            raise RuntimeError("the device is gone")

    lanes, done = pool(1, lambda replicas: Vanished(replicas, 1))
    model = served(torch.nn.Identity)
    with pytest.raises(Unavailable, match="the device is gone"):
        lanes.load(model)
    lanes.submit(execution(model, 0, 1.0))
    finished = done.get(timeout=20)
    assert "the device is gone" in finished.fatal
    assert isinstance(finished.outcomes[0], Unavailable)


def test_a_device_error_is_fatal_and_not_bisected() -> None:
    calls = []

    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            if len(calls) > 9:  # after the warm-up
                raise torch.AcceleratorError("an illegal memory access was encountered")
            return x

    lanes, done = pool(1, lambda replicas: CpuRunner(replicas, 1))
    model = served(Broken)
    lanes.load(model)
    calls[:] = [0] * 9
    batch = Batch(Device("cpu", "cpu", 1, frozenset()), 0, model.name, [], 2)
    item = (np.zeros((1, 2), np.float32),)
    lanes.submit(Execution(batch, model, [item, item], [1, 1], ()))
    finished = done.get(timeout=20)
    assert finished.fatal == "an illegal memory access was encountered"
    assert [type(outcome) for outcome in finished.outcomes] == [Unavailable, Unavailable]
    assert len(calls) == 10


def test_a_model_that_fails_to_warm_up_is_not_kept() -> None:
    class Fails(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    replicas: dict[str, torch.nn.Module] = {}

    def runner(shared: dict[str, torch.nn.Module]) -> CpuRunner:
        nonlocal replicas
        replicas = shared
        return CpuRunner(shared, 1)

    lanes, _ = pool(1, runner)
    with pytest.raises(TensorNextError, match="ValueError: no"):
        lanes.load(served(Fails))
    assert replicas == {}


def test_an_input_alone_reaches_the_model_without_a_copy_if_it_is_aligned() -> None:
    addresses = []

    class Address(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            addresses.append(x.data_ptr())
            return x.sum(dim=1)

    spec = (TensorSpec("x", "FP32", (-1, -1)),)
    model = Model("m", "1", spec, (TensorSpec("y", "FP32", (-1,)),), 4, Address)
    lanes, done = pool(1, lambda replicas: CpuRunner(replicas, 1))
    lanes.load(model)
    raw = np.zeros(4 * 10 + 1, np.uint8)
    for x, same in ((np.ones((1, 100_000), np.float32), True), (raw[1:].view(np.float32).reshape(1, 10), False)):
        width = x.shape[1]
        batch = Batch(Device("cpu", "cpu", 1, frozenset()), 0, model.name, [], 1)
        lanes.submit(Execution(batch, model, [(x,)], [1], (width,)))
        done.get(timeout=20)
        assert (addresses[-1] == x.ctypes.data) is same


def test_available_cores_is_what_the_process_may_use() -> None:
    assert available_cores() >= 1
