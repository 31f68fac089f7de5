"""An executor made of lanes: one thread, one runner and one hand-over queue each."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from tnxctl.errors import Internal, TensorNextError, Unavailable
from tnxctl.frames import STORAGE
from tnxctl.wire import TensorSpec
from tnxd.executors.execution import Execution
from tnxd.executors.runner import Runner, first_line
from tnxd.models.model import Model
from tnxd.work import INLINE, Batch, Device

OnDone = Callable[[Execution], None]

log = logging.getLogger(__name__)

_WARM_UP_ROUNDS = 3


class LanePool:
    """Implements `tnxd.executors.execution.Executor`.

    Args:
        runners: one per lane. inline: one more for the caller's thread, if the device allows that.
        lane_threads: threads that work on one batch of a lane.
        replicas: what the runners look modules up in; `load` fills it.
        place: puts a freshly built module on the device.
        memory_mb: free and total memory of the device in MiB, without blocking.
        on_done: called on the lane's thread with every execution that `submit` took, when it is over.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        description: str,
        *,
        runners: Sequence[Runner],
        inline: Runner | None,
        lane_threads: int = 1,
        replicas: dict[str, torch.nn.Module],
        place: Callable[[torch.nn.Module], torch.nn.Module],
        memory_mb: Callable[[], tuple[float, float]],
        on_done: OnDone,
    ) -> None:
        self.name = name
        self.kind = kind
        self.description = description
        self.lanes = len(runners)
        self.lane_threads = lane_threads
        self.memory_mb = memory_mb
        self._inline = inline
        self._replicas = replicas
        self._place = place
        self._queues: list[queue.SimpleQueue[tuple[Execution, OnDone]]] = [queue.SimpleQueue() for _ in runners]
        self._on_done = on_done
        for lane, runner in enumerate(runners):
            # Daemon threads: a model that hangs must not keep the process from ending.
            threading.Thread(
                target=self._work, args=(runner, self._queues[lane]), name=f"{name}/{lane}", daemon=True
            ).start()

    def load(self, model: Model) -> list[tuple[int, float]]:
        module = self._place(model.factory().requires_grad_(False).eval())
        self._replicas[model.name] = module
        try:
            costs: list[tuple[int, float]] = []
            for lane in range(self.lanes):
                done: queue.SimpleQueue[Execution] = queue.SimpleQueue()
                costs = []
                for rows in warm_up_sizes(model.max_batch_size):
                    for _ in range(_WARM_UP_ROUNDS):
                        self._queues[lane].put((self._example(model, rows, lane), done.put))
                        execution = done.get()
                        outcome = execution.outcomes[0]
                        if execution.fatal:
                            raise Unavailable(execution.fatal)
                        if isinstance(outcome, TensorNextError):
                            raise outcome
                    costs.append((rows, (execution.finished_ns - execution.started_ns) / 1e3))
            return costs
        except BaseException:
            del self._replicas[model.name]
            raise

    def submit(self, execution: Execution) -> None:
        self._queues[execution.batch.lane].put((execution, self._on_done))

    def run_inline(self, execution: Execution) -> None:
        assert self._inline is not None
        self._inline.run(execution)

    def adopt_thread(self) -> None:
        if self._inline is not None:
            self._inline.enter_thread()

    def warm_up_inline(self, model: Model, limit_us: float) -> list[tuple[int, float]]:
        """As `load`, on the calling thread, from small to large as long as a batch takes no longer than the limit."""
        costs: list[tuple[int, float]] = []
        if self._inline is None:
            return costs
        for rows in warm_up_sizes(model.max_batch_size):
            for _ in range(_WARM_UP_ROUNDS):
                execution = self._example(model, rows, INLINE)
                self._inline.run(execution)
            micros = (execution.finished_ns - execution.started_ns) / 1e3
            costs.append((rows, micros))
            if micros > limit_us:
                break
        return costs

    def _example(self, model: Model, rows: int, lane: int) -> Execution:
        item = tuple(
            np.zeros(shape, STORAGE[spec.datatype])
            for shape, spec in zip(model.example_shapes(rows), model.inputs, strict=True)
        )
        specs = [
            TensorSpec(spec.name, spec.datatype, array.shape) for spec, array in zip(model.inputs, item, strict=True)
        ]
        bound = model.bind(specs, item)
        device = Device(self.name, self.kind, self.lanes, frozenset())
        batch = Batch(device, lane, model.name, [], bound.rows)
        return Execution(batch, model, [bound.arrays], [bound.rows], bound.group)

    @staticmethod
    def _work(runner: Runner, inbox: queue.SimpleQueue[tuple[Execution, OnDone]]) -> None:
        broken = ""
        try:
            runner.enter_thread()
        except BaseException as error:  # a device that vanished: answer for it rather than leave callers waiting
            broken = f"{type(error).__name__}: {first_line(error)}"
        while True:
            execution, on_done = inbox.get()
            execution.fatal = broken
            try:
                runner.run(execution)
            except BaseException as error:  # a defect of ours: this request must be answered, and the lane go on
                log.exception("lane %s", threading.current_thread().name)
                execution.outcomes = [Internal(f"the executor failed: {first_line(error)}") for _ in execution.items]
            on_done(execution)
            del execution  # hold no request's memory while waiting for the next


def warm_up_sizes(max_batch_size: int) -> list[int]:
    """1, 2, 4, ... up to and with the limit: one batch size for every bucket of the cost model."""
    sizes = [1]
    while sizes[-1] * 2 < max_batch_size:
        sizes.append(sizes[-1] * 2)
    return sizes if max_batch_size <= 1 else [*sizes, max_batch_size]
