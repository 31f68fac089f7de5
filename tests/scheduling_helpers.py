"""Schedulers and requests for tests of scheduling, in times that a test makes up."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.request import Request
from tnxd.scheduling.scheduler import Scheduler

MS = 1_000_000
"""Nanoseconds of a millisecond."""

MODELS = frozenset({"mlp", "other"})


def memory_kept(work: Callable[[], object]) -> int:
    """Bytes that a piece of work allocates and leaves."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        work()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return after - before


def cpu(lanes: int = 1, inline_limit_us: float = 0.0) -> Device:
    return Device("cpu", "cpu", lanes, set(MODELS), inline_limit_us=inline_limit_us)


def gpu(index: int = 0, free_mb: float = 8000.0, lanes: int = 1, models: frozenset[str] = MODELS) -> Device:
    return Device(f"cuda:{index}", "cuda", lanes, set(models), free_mb)


def request(model: str = "mlp", **options: Any) -> Request:
    options.setdefault("max_batch_size", 8)
    return Request(model, **options)


def make_scheduler(*devices: Device, costs: CostModel | None = None, **limits: Any) -> Scheduler:
    """One CPU lane by default, on which any batch takes a millisecond."""
    if costs is None:
        costs = CostModel()
        for model in MODELS:
            for rows in (1, 2, 4, 8):
                for _ in range(100):  # until the spread is small
                    costs.curve("cpu", model).observe(rows, 1000.0)
    limits.setdefault("max_requests", 100_000)
    limits.setdefault("max_bytes", 1 << 40)
    return Scheduler(devices or [cpu()], costs, **limits)


def untried_scheduler(*devices: Device, costs: CostModel | None = None, **limits: Any) -> Scheduler:
    """The same, but it knows no costs other than the given ones."""
    return make_scheduler(*devices, costs=costs or CostModel(), **limits)


def scheduler_with_lanes(count: int, **options: Any) -> Scheduler:
    """So many lanes of a CPU, on which a full batch takes a millisecond."""
    costs = CostModel()
    for model in MODELS:
        costs.curve("cpu", model).observe(8, 1000.0)
    return make_scheduler(Device("cpu", "cpu", count, set(MODELS), **options), costs=costs)


def scheduler_with_inline(lane_us: float, inline_us: float = 0.0) -> Scheduler:
    """A CPU that runs batches of up to a millisecond inline. Eight rows take so long on a lane, and inline."""
    costs = CostModel()
    costs.curve("cpu", "mlp").observe(8, lane_us)
    if inline_us:
        costs.curve("cpu", "mlp", inline=True).observe(8, inline_us)
    device = Device("cpu", "cpu", 1, set(MODELS), inline_limit_us=1000.0)
    return make_scheduler(device, costs=costs)


def scheduler_of_two_devices() -> Scheduler:
    """A CPU that is quick with little, a GPU that is quick with much."""
    costs = CostModel()
    for rows in (1, 8, 64):
        costs.curve("cpu", "mlp").observe(rows, 50.0 + 50.0 * rows)
        costs.curve("cuda:0", "mlp").observe(rows, 400.0 + 2.0 * rows)
    return make_scheduler(gpu(), cpu(), costs=costs)


def affine_costs(fixed_us: float, per_row_us: float, *devices: str) -> CostModel:
    """Costs of "mlp" that are known exactly: a fixed part and one per row."""
    costs = CostModel()
    for device in devices or ("cpu",):
        for rows in (1, 2, 4, 8):
            for _ in range(200):  # until hardly any spread is left
                costs.curve(device, "mlp").observe(rows, fixed_us + per_row_us * rows)
    return costs


def run_one(scheduler: Scheduler, now: int = 0) -> Batch:
    """Run the next batch, which is over at once."""
    (batch,), late = scheduler.next_batches(now)
    assert not late
    scheduler.finished(batch, 1000.0)
    return batch
