"""Pools of lanes without a server, and what comes back from them, for tests of executors."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tnxctl.protocol.wire import TensorSpec
from tnxd.executors.execution import Execution
from tnxd.executors.pool import LanePool
from tnxd.executors.runner import Runner
from tnxd.models.model import Model


def drain(seen: queue.SimpleQueue[Any]) -> list[Any]:
    """All that is in a queue. A trial does not look into one: what a module puts there is no state of its own."""
    return [seen.get() for _ in range(seen.qsize())]


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
