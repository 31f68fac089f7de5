"""The pool of lanes and its threads, without a server."""

from __future__ import annotations

import queue
import threading

import numpy as np
import pytest
import torch

from lane_pools import drain, execution, pool, served
from tnxctl.protocol.errors import TensorNextError, Unavailable
from tnxd.executors.cpu import CpuRunner
from tnxd.executors.execution import Execution
from tnxd.executors.trial import lane_comparison


class Probe(torch.nn.Module):
    """Remembers in what surroundings it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: queue.SimpleQueue[tuple[str, bool, int]] = queue.SimpleQueue()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        name = threading.current_thread().name
        self.seen.put((name, torch.is_inference_mode_enabled(), torch.get_num_threads()))
        return x + 1


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
        finished = done.get(timeout=60)
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
    finished = done.get(timeout=60)
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
    finished = done.get(timeout=60)
    assert finished.fatal == "an illegal memory access was encountered"
    assert [type(outcome) for outcome in finished.outcomes] == [Unavailable, Unavailable]
    assert drain(calls) == [2]


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
    make: type[torch.nn.Module], factor: float | None, serial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_comparison, "_SECONDS", 60.0)  # in all of its rounds, two lanes get into each other's way
    lanes, done = pool(2, CpuRunner)
    model = served(make)
    report = lanes.load(model)
    assert report.serial is serial
    for lane, value in ((0, 3.0), (1, 5.0), (0, 7.0)):
        lanes.submit(execution(model, lane, value))
        outcome = done.get(timeout=60).outcomes[0]
        assert not isinstance(outcome, TensorNextError)
        assert outcome[0].tolist() == [[value * (factor or value)] * 2]


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
