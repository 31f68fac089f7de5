"""An executor made of lanes: one thread, one runner and one hand-over queue each."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch

from tnxctl.errors import Internal, TensorNextError, Unavailable
from tnxctl.frames import STORAGE
from tnxctl.wire import TensorSpec
from tnxd.executors.execution import Execution, Warmth
from tnxd.executors.runner import Runner
from tnxd.models.model import Model
from tnxd.sentences import first_line, sentence
from tnxd.work import INLINE, SPARE, Batch, Device

OnDone = Callable[[Execution], None]

log = logging.getLogger(__name__)

# A batch that takes longer than this is run once for warm-up, a shorter one three times: its second run may differ.
_LONG_US = 200_000.0
_WARM_UP_ROUNDS = 3

# A batch may take this share of the free memory, divided by the lanes, which may all run one: else larger ones are not
# tried. Other models and the requests themselves need memory, too.
_MEMORY_SHARE = 0.25


class _Job:
    """A function that a lane's thread is to call with its runner. Attributes: done: its result, or what it raised."""

    def __init__(self, function: Callable[[Runner], Any]) -> None:
        self._function = function
        self.done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run(self, runner: Runner, broken: str) -> None:
        try:
            if broken:
                raise Unavailable(broken)
            self.done.put((self._function(runner), None))
        except BaseException as error:  # a model's code may raise anything, SystemExit too
            self.done.put((None, error))


Task = tuple[Execution, OnDone] | str | _Job
"""What a lane's thread is told: to run an execution, to forget the model of that key, or to call a function."""


class LanePool:
    """Implements `tnxd.executors.execution.Executor`.

    Args:
        make_runner: makes one for each lane, and one more that warms models up beside the lanes.
        lanes: how many batches run at a time.
        inline: a runner for the caller's thread, if the device allows that.
        lane_threads: threads that work on one batch of a lane.
        place: puts a freshly built module on the device.
        memory_mb: free and total memory of the device in MiB, without blocking.
        give_back: returns memory that is not used any more to the system; may block.
        on_done: called on the lane's thread with every execution that `submit` took, when it is over.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        description: str,
        *,
        make_runner: Callable[[], Runner],
        lanes: int,
        inline: Runner | None,
        lane_threads: int = 1,
        place: Callable[[torch.nn.Module], torch.nn.Module],
        memory_mb: Callable[[], tuple[float, float]],
        give_back: Callable[[], None] = lambda: None,
        on_done: OnDone,
    ) -> None:
        self.name = name
        self.kind = kind
        self.description = description
        self.lanes = lanes
        self.lane_threads = lane_threads
        self.memory_mb = memory_mb
        self._make_runner = make_runner
        self._inline = inline
        self._runners: list[Runner] = [] if inline is None else [inline]
        self._calls: dict[str, Callable[[], Call]] = {}
        self._examples: dict[str, tuple[Model, Make]] = {}
        self._place = place
        self._give_back = give_back
        self._on_done = on_done
        self._queues = [self._start_lane(str(lane)) for lane in range(lanes)]
        self._warm_up = self._start_lane("warm-up"), threading.Lock()
        self._spare: queue.SimpleQueue[Task] | None = None

    def _start_lane(self, label: str, *, yields: bool = False) -> Inbox:
        inbox: Inbox = queue.SimpleQueue()
        runner = self._make_runner()
        # First known, then given what there is; `_install` does it the other way round, on another thread.
        self._runners.append(runner)
        for key, call in list(self._calls.items()):
            runner.calls[key] = call()
        # Daemon threads: a model that hangs must not keep the process from ending.
        threading.Thread(
            target=self._work, args=(runner, inbox, yields), name=f"{self.name}/{label}", daemon=True
        ).start()
        return inbox

    def load(self, model: Model) -> Warmth:
        module = self._place(model.factory())
        nbytes = _nbytes(module)
        try:
            with self._warm_up_lane() as lane:
                verdict: Verdict = _called(lane, lambda runner: try_out(module, model, runner.torch_device, self.kind))
                if not verdict.pristine:
                    del module
                    module = self._place(model.factory())
                self._install(model.key, lane_calls(module, verdict))
                if verdict.make is not None:
                    self._examples[model.key] = verdict.model, verdict.make
                costs, safe_rows, most_rows = self._warm_up_sizes(lane, verdict)
        except BaseException:
            self.unload(model.key)
            raise
        return Warmth(
            costs,
            nbytes,
            warmed=verdict.make is not None or verdict.kind == SHARED,
            batches=bool(verdict.model.max_batch_size),
            serial=verdict.serial,
            state=verdict.kind,
            random=verdict.state.random,
            tolerance=verdict.tolerance,
            safe_rows=safe_rows,
            most_rows=most_rows,
            notes=verdict.notes,
        )

    def _install(self, key: str, call: Callable[[], Call]) -> None:
        """Give every lane what it calls for a model."""
        self._calls[key] = call
        for runner in list(self._runners):
            runner.calls[key] = call()

    def _warm_up_sizes(self, lane: Inbox, verdict: Verdict) -> tuple[list[tuple[int, float]], int, int]:
        """Run growing batches: their costs, and `safe_rows` and `most_rows` as `Warmth` has them."""
        model, costs, most_rows = verdict.model, [], 0
        if verdict.make is None:
            return [], 0, 0
        needed = 0.0  # bytes per row
        for rows in model.warm_up or warm_up_sizes(model.max_batch_size):
            execution, nbytes = None, 0
            for _ in range(_WARM_UP_ROUNDS):
                left = _called(lane, lambda runner: runner.memory_left()) * _MEMORY_SHARE / self.lanes
                if costs and left and needed * rows > left:
                    most_rows = costs[-1][0]
                    log.warning(
                        "%s on %s: batches of %d rows would take %.0f MiB of memory, and %.0f may be taken: at most "
                        "%d rows a batch", model.key, self.name, rows, needed * rows / _MIB, left / _MIB, most_rows,
                    )
                    return costs, 0, most_rows
                execution, nbytes = self._measured_example(lane, verdict, rows)
        return costs, 0, most_rows

    @contextlib.contextmanager
    def _warm_up_lane(self) -> Iterator[queue.SimpleQueue[Task]]:
        lane, busy = self._warm_up
        if not busy.acquire(blocking=False):  # a model that somebody gave up hangs there, perhaps for good
            lane, busy = self._warm_up = self._start_lane("warm-up"), threading.Lock()
            busy.acquire()
        try:
            yield lane
        finally:
            busy.release()

    def touch(self, model: Model) -> None:
        for inbox in self._queues:
            self._run_example(inbox, model, 1)

    def unload(self, key: str) -> None:
        self._replicas.pop(key, None)
        for inbox in (*self._queues, self._warm_up[0], self._spare):
            if inbox is not None:
                inbox.put(key)
        gc.collect()  # a network may refer to itself
        self._give_back()

    def forget_inline(self, key: str) -> None:
        if self._inline is not None:
            self._inline.forget(key)

    def _run_example(self, inbox: queue.SimpleQueue[Task], model: Model, rows: int) -> Execution:
        """Run the model on zeros. Raises what is wrong with it."""
        done: queue.SimpleQueue[Execution] = queue.SimpleQueue()
        inbox.put((self._example(model, rows), done.put))
        execution = done.get()
        outcome = execution.outcomes[0]
        if execution.fatal:
            raise Unavailable(execution.fatal)
        if isinstance(outcome, TensorNextError):
            raise outcome
        return execution

    def submit(self, execution: Execution) -> None:
        lane = execution.batch.lane
        if lane == SPARE:
            if self._spare is None:
                self._spare = self._start_lane("spare", yields=True)
            inbox = self._spare
        else:
            inbox = self._queues[lane]
        inbox.put((execution, self._on_done))

    def run_inline(self, execution: Execution) -> None:
        assert self._inline is not None
        self._inline.run(execution)

    def adopt_thread(self) -> None:
        if self._inline is not None:
            self._inline.enter_thread()

    def _example(self, model: Model, rows: int) -> Execution:
        item = tuple(
            np.zeros(shape, STORAGE[spec.datatype])
            for shape, spec in zip(model.example_shapes(rows), model.inputs, strict=True)
        )
        specs = [
            TensorSpec(spec.name, spec.datatype, array.shape) for spec, array in zip(model.inputs, item, strict=True)
        ]
        bound = model.bind(specs, item)
        device = Device(self.name, self.kind, self.lanes, set())
        batch = Batch(device, INLINE, model.key, [], bound.rows)
        return Execution(batch, model, [bound.arrays], [bound.rows], bound.group)

    @staticmethod
    def _work(runner: Runner, inbox: queue.SimpleQueue[Task], yields: bool) -> None:
        if yields:
            with contextlib.suppress(OSError, AttributeError):  # where threads have no priorities of their own
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        broken = ""
        try:
            runner.enter_thread()
        except BaseException as error:  # a device that vanished: answer for it rather than leave callers waiting
            broken = sentence(error)
        while True:
            task = inbox.get()
            if isinstance(task, str):
                runner.forget(task)
                continue
            execution, on_done = task
            execution.fatal = broken
            try:
                runner.run(execution)
            except BaseException as error:  # a defect of ours: this request must be answered, and the lane go on
                log.exception("lane %s", threading.current_thread().name)
                execution.outcomes = [Internal(f"the executor failed: {first_line(error)}") for _ in execution.items]
            on_done(execution)
            del task, execution  # hold no request's memory while waiting for the next


def warm_up_sizes(max_batch_size: int) -> list[int]:
    """1, 2, 4, ... up to and with the limit: one batch size for every bucket of the cost model."""
    sizes = [1]
    while sizes[-1] * 2 < max_batch_size:
        sizes.append(sizes[-1] * 2)
    return sizes if max_batch_size <= 1 else [*sizes, max_batch_size]


def _nbytes(module: torch.nn.Module) -> int:
    """Of parameters and buffers; what two of them share counts once. 0 for a module of another runtime."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
