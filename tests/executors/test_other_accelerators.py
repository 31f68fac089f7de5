"""Kinds of accelerators that no machine here has: their names, and as much of their code as runs without them."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np
import pytest
import torch

from lane_pools import Small, drain, served
from tnxctl.protocol.errors import TensorNextError
from tnxd.config import Config
from tnxd.executors import devices, mps, xpu
from tnxd.executors.execution import Execution
from tnxd.executors.exhaustion import is_out_of_memory
from tnxd.executors.mps import MpsRunner
from tnxd.executors.pool import LanePool

_MIB = 1 << 20


def say_there_is(monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> None:
    """Have torch say that it was built for a kind of accelerator, and that there are so many."""
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind) if count else None
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("kind", "count", "found"),
    [("xpu", 2, ["xpu:0", "xpu:1", "cpu"]), ("mps", 1, ["mps", "cpu"]), ("xpu", 0, ["cpu"])],
)
def test_auto_is_every_device_under_the_name_that_torch_has_for_it(
    monkeypatch: pytest.MonkeyPatch, kind: str, count: int, found: list[str]
) -> None:
    say_there_is(monkeypatch, kind, count)
    opened: list[str] = []
    for name, opener in devices._OPENERS.items():
        monkeypatch.setitem(
            devices._OPENERS, name, opener._replace(open=lambda name, config, on_done: opened.append(name))
        )
    made = devices.open_devices(Config(devices=("auto",)), lambda execution: None)
    assert opened == [name for name in found if not name.startswith("cuda")]
    assert not made.failures


def test_what_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("xpu:0", "mps"):
        made = devices.open_devices(Config(devices=(name,)), lambda execution: None)
        assert not made.executors
        assert made.failures[name]
    assert xpu.xpu_names() == mps.mps_names() == []


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> tuple[LanePool, queue.Queue[Execution]]:
    """The executor of an Apple GPU, with the CPU in its place."""

    def has(owner: Any, **values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(owner, name, lambda value=value: value)

    has(torch.backends.mps, is_available=True)
    has(torch.mps, synchronize=None, empty_cache=None, recommended_max_memory=64 * _MIB)
    has(torch.mps, current_allocated_memory=24 * _MIB, driver_allocated_memory=32 * _MIB)
    monkeypatch.setattr(mps, "MpsRunner", lambda: MpsRunner("cpu"))
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *place: module)
    done: queue.Queue[Execution] = queue.Queue()
    return mps.open_mps("mps", Config(), done.put), done


def test_an_apple_gpu_has_one_lane_and_answers_with_stages_that_sum_up(
    apple: tuple[LanePool, queue.Queue[Execution]],
) -> None:
    pool, done = apple
    assert (pool.name, pool.kind, pool.lanes, pool.streams, pool.runs_inline) == ("mps", "mps", 1, 1, False)
    assert pool.memory_mb() == (40.0, 64.0)
    small = Small(16)
    model = served(lambda: small)
    pool.load(model)
    for values in ([1.0], [2.0, 3.0]):
        arrays = [np.full((1, 2), value, np.float32) for value in values]
        pool.submit(Execution(0, 0, model, [(array,) for array in arrays], [1] * len(values), ()))
        finished = done.get(timeout=60)
        for outcome, array in zip(finished.outcomes, arrays, strict=True):
            assert not isinstance(outcome, TensorNextError)
            np.testing.assert_array_equal(outcome[0], 2 * array)
        parts = finished.gather_us + finished.h2d_us + finished.compute_us + finished.d2h_us
        assert parts == pytest.approx(finished.run_us)
        assert 0 < finished.latency_us <= finished.compute_us
        assert finished.memory_free_mb == 40.0


def test_an_apple_gpu_without_memory_goes_on_in_halves(apple: tuple[LanePool, queue.Queue[Execution]]) -> None:
    pool, done = apple
    small = Small(16)
    model = served(lambda: small)
    pool.load(model)
    drain(small.seen)
    small.rows = 1
    pool.submit(Execution(0, 0, model, [(np.ones((1, 2), np.float32),)] * 2, [1, 1], ()))
    finished = done.get(timeout=60)
    assert not any(isinstance(outcome, TensorNextError) for outcome in finished.outcomes)
    assert (finished.exhausted, finished.safe_rows) == (True, 1)
    assert small.calls == [2, 1, 1]


def test_words_of_torch_for_memory_that_has_run_out_on_mps_are_known() -> None:
    words = "MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1.00 GB, max allowed: 18.00 GB)."
    assert is_out_of_memory(RuntimeError(words))


def test_an_intel_gpu_has_the_lanes_of_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    def pool(kind: str, accelerator: object, make_runner: object, **options: Any) -> None:
        made.update(options, kind=kind)

    monkeypatch.setattr(xpu, "AcceleratorPool", pool)
    monkeypatch.setattr(xpu, "Xpu", lambda name: None)
    xpu.open_xpu("xpu:1", Config(), lambda execution: None)
    assert (made["kind"], made["threads"], made["depth"]) == ("xpu", 1, 2)
