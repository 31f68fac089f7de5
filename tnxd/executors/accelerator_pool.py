"""Executor of an accelerator: lanes that begin a batch before the last one is over."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from weakref import WeakSet

from tnxctl.protocol.errors import TensorNextError
from tnxd.error_text import first_line
from tnxd.events import event
from tnxd.executors.accelerator import Accelerator
from tnxd.executors.accelerator_runner import AcceleratorRunner
from tnxd.executors.execution import Execution, LoadReport
from tnxd.executors.lane import TURN_S, Lane, OnDone
from tnxd.executors.loading import Loading
from tnxd.executors.optimizer import Optimizer
from tnxd.executors.overlapped_lane import work
from tnxd.executors.pool import LanePool
from tnxd.executors.trial.examples import Item
from tnxd.executors.trial.graphing import graph_lanes
from tnxd.executors.trial.lengths import row_of_length
from tnxd.executors.trial.warmup import run_example
from tnxd.lanes import BACKGROUND
from tnxd.models.model import Model
from tnxd.models.process_state.restoration import settings_restored

log = logging.getLogger(__name__)


_pools: WeakSet[AcceleratorPool] = WeakSet()
"""All that there are."""


class AcceleratorPool(LanePool):
    """Executor of an accelerator. To scheduling, every batch that may be under way at a time is a lane.

    Args:
        kind: of the device. accelerator: the device.
        make_runner: makes the runner of a lane, given how many batches it may have under way.
        threads: that issue batches, each on a stream of its own. depth: batches that each may have under way.
        optimizer, on_done: as in `LanePool`.
    """

    shares_chip = True

    def __init__(
        self,
        kind: str,
        accelerator: Accelerator,
        make_runner: Callable[[int], AcceleratorRunner],
        *,
        threads: int,
        depth: int,
        optimizer: Optimizer | None,
        on_done: OnDone,
    ) -> None:
        self.accelerator = accelerator
        self._make = make_runner
        self._depth = depth
        self._threads = threads
        self._serving: list[AcceleratorRunner] = []
        super().__init__(
            accelerator.name,
            kind,
            accelerator.description,
            make_runner=lambda: make_runner(1),
            lanes=threads,
            inline=None,
            place=accelerator.place,
            memory_mb=accelerator.memory.latest,
            give_back=lambda: accelerator.memory.give_back(self._is_idle),
            settle=accelerator.settle,
            optimizer=optimizer,
            on_done=on_done,
        )
        self.lanes = threads * depth
        _pools.add(self)

    def _start_lane(self, label: str, *, serves: bool = False, yields: bool = False) -> Lane:
        runner = self._make(self._depth if serves else 1)
        runner.yields = not serves
        if serves:
            self._serving.append(runner)
        self._calls.add(runner)
        return Lane(f"{self.name}/{label}", runner, self._on_done, yields=yields, work=work)

    def _is_idle(self) -> bool:
        """Whether no accelerator has a batch under way: torch empties its caches of all of them."""
        return not any(runner.is_busy for pool in list(_pools) for runner in pool._serving)

    def _warm_lanes(self, loading: Loading, report: LoadReport) -> LoadReport:
        """Run the sizes of warm-up on each lane: plans of kernels are a thread's own, and memory a stream's.

        Each size has a turn of its own between the batches that are served.
        """
        assert loading.verdict is not None
        if loading.example is None or loading.make is None:
            return graph_lanes(self._lanes, loading.verdict, report)  # which says that there are none
        (model, _), make = loading.example, loading.make
        if report.padded:
            items = (row_of_length(model, make, rows, length) for rows, length, _ in report.padded)
        else:
            items = (make(rows, 0) for rows, _ in report.costs)
        try:
            for item in items:
                for lane in self._lanes:
                    lane.call(partial(_warm, model=model, item=item), within_s=TURN_S)
            for lane, runner in zip(self._lanes, self._serving, strict=True):
                lane.call(lambda _, runner=runner: runner.reserve(), within_s=TURN_S)  # type: ignore[misc]
        except TensorNextError as error:  # it serves all the same; its first batches take longer
            log.warning(
                "%s on %s: a lane stays cold: %s",
                *(model.key, self.name, first_line(error)),
                extra=event("lane_cold", model.key, device=self.name, reason=first_line(error)),
            )
        else:
            report = graph_lanes(self._lanes, loading.verdict, report)
        self._give_back()
        return report

    def failure(self) -> str:
        return self.accelerator.failure

    def submit(self, execution: Execution) -> None:
        lane = execution.lane
        (self._background if lane == BACKGROUND else self._lanes[lane % self._threads]).submit(execution)


def _warm(runner: AcceleratorRunner, model: Model, item: Item) -> None:
    with settings_restored("a forward"):
        run_example(runner, model, item)
