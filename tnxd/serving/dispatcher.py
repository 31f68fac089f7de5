"""Dispatcher: sends batches to the lanes of executors, or runs them inline; answers and learns from what comes back."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import compress

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import Internal, ResourceExhausted, TensorNextError, Unavailable
from tnxctl.protocol.wire import Limits, encode
from tnxd.deployment.background import Background, Copy
from tnxd.deployment.reconciler import Reconciler
from tnxd.deployment.shadow import Shadows
from tnxd.deployment.version import Version
from tnxd.device_kinds import PROCESS
from tnxd.events import event
from tnxd.executors.execution import Execution, Executor
from tnxd.lanes import BACKGROUND, INLINE
from tnxd.models.sizes import count_strings, reply_too_large, too_many_strings
from tnxd.models.time_limits import PROCESS_END_S
from tnxd.scheduling.device import Batch
from tnxd.scheduling.refusals import Refusals
from tnxd.scheduling.request import DEVICE, Request
from tnxd.scheduling.scheduler import Scheduler
from tnxd.serving.answers import Answers
from tnxd.serving.pending import Answer, Pending, StepRequest, as_answer, as_execution, as_frames, as_result
from tnxd.serving.quarantine import Quarantine
from tnxd.serving.reports import Inventory

log = logging.getLogger(__name__)

# Answers made before they are sent, one after the other: libzmq's thread sleeps as soon as it has nothing to do, and to
# wake it for an answer takes longer than to make one. More at a time would leave clients waiting for no reason.
_SENT_TOGETHER = 16


class Dispatcher:
    """Dispatcher of batches to executors. What an executor has, it knows by its `Execution`.

    Args:
        inventory: the executors. scheduler: of the same devices.
        reconciler: whose audits look at what was computed.
        background: batches that nobody waits for. shadows: what they are copies for.
        refusals: forgotten whenever requests leave the queue.
        limits: of the tensors of an answer.
        stall_timeout_s: a batch that runs longer is given up, and its lane counts as hung until it ends after all.
        on_device_lost: called when a device has failed for good.

    Attributes:
        inline: the execution that runs on the serving thread now, for any thread to look at.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        inventory: Inventory,
        reconciler: Reconciler,
        answers: Answers,
        background: Background,
        shadows: Shadows,
        refusals: Refusals,
        quarantine: Quarantine,
        *,
        limits: Limits,
        stall_timeout_s: float,
        on_device_lost: Callable[[], None],
    ) -> None:
        self.inline: Execution | None = None
        self._scheduler = scheduler
        self._inventory = inventory
        self._shadow_of = inventory.registry.shadow_of
        self._traffic = inventory.traffic
        self._audits = reconciler.audits
        self._answers = answers
        self._background = background
        self._shadows = shadows
        self._refusals = refusals
        self._quarantine = quarantine
        self._limits = limits
        self._stall_timeout_s = stall_timeout_s
        self._on_device_lost = on_device_lost
        self._on_lanes = inventory.on_lanes

    # --- out to the executors ----------------------------------------------------------------------------------

    def dispatch(self) -> bool:
        """Put batches on free lanes. True if one ran inline: more may have come meanwhile."""
        if not self._scheduler.queued:
            if self._background:
                self._run_copy()
            return False
        inline: Batch | None = None
        batches, late = self._scheduler.next_batches(time.perf_counter_ns())
        if batches or late:
            self._refusals.clear()
        for request in late:
            self._answers.late(request)
        for batch in batches:
            if batch.lane == INLINE:
                inline = batch
            else:
                execution = as_execution(batch)
                self._on_lanes[execution] = batch
                self._executor(batch).submit(execution)
        if inline is None:
            return False
        self.run_inline(inline)
        return True

    def run_inline(self, batch: Batch) -> None:
        """Run a batch on the calling thread, and answer its requests."""
        self.inline = execution = as_execution(batch)
        self._executor(batch).run_inline(execution)
        self.inline = None
        self._finish(execution, batch)

    def _run_copy(self) -> None:
        found = self._background.next(self._scheduler, time.perf_counter_ns())
        if found is not None:
            copy, batch = found
            self._on_lanes[copy] = batch
            self._executor(batch).submit(copy)

    def _executor(self, batch: Batch) -> Executor:
        return self._inventory.executors[batch.device.name]

    # --- back from them ----------------------------------------------------------------------------------------

    def finish(self, execution: Execution) -> None:
        """Answer the requests of an execution that a lane is done with."""
        self._finish(execution, self._on_lanes.pop(execution))

    def _finish(self, execution: Execution, batch: Batch) -> None:
        try:
            self._settle(execution, batch)
        except Exception:  # a defect of ours: these clients get an answer, and the others go on
            log.exception("finishing a batch of %s", batch.model, extra=event("defect", batch.model))
            for request in batch.requests:
                if not request.done:
                    self._answers.error(request, Internal("the daemon failed at this request; its log says how"))

    def _settle(self, execution: Execution, batch: Batch) -> None:
        device = batch.device
        if device.is_gpu:
            self._scheduler.set_free_memory(device.name, execution.memory_free_mb)
            batch.preparation_us = execution.gather_us + execution.h2d_us
        again: list[Request] = []
        answers: list[Answer] = []
        steps: list[tuple[StepRequest, tuple[Array, ...]]] = []
        model = execution.model
        sizes_known = model.reply_row_nbytes  # and looked at before
        rows = sum(execution.rows) if model.joins else batch.rows
        # Of a copy, which has no requests, nothing is counted.
        counts = self._traffic[batch.requests[0].version].counts if batch.requests else None  # type: ignore[attr-defined]
        for request, outcome in zip(batch.requests, execution.outcomes, strict=False):
            assert isinstance(request, Pending)
            if request.done:
                continue  # its deadline came first, or the batch had been given up
            if isinstance(outcome, TensorNextError):
                if execution.exhausted and execution.crowded and isinstance(outcome, ResourceExhausted):
                    again.append(request)  # what ran beside it may have had the memory
                elif not (execution.exhausted and self._runs_elsewhere(request, outcome)):
                    self._answers.error(request, outcome, execution)
                continue
            if request.__class__ is StepRequest:
                steps.append((request, outcome))
                continue
            frames = outcome
            if not sizes_known:
                if model.returns_strings:
                    strings = count_strings(outcome)
                    if strings > self._limits.strings:
                        self._answers.error(request, too_many_strings(strings, self._limits))
                        continue
                    frames = as_frames(outcome)
                nbytes = sum([array.nbytes for array in frames])
                if nbytes > self._limits.message_bytes or nbytes > request.max_reply_bytes:
                    most = self._limits.message_bytes
                    self._answers.error(request, reply_too_large(nbytes, request.max_reply_bytes, most))
                    continue
            result = as_result(request, rows, execution, outcome)
            if request.space is None:
                answers.append((request, result, encode(result), frames))
            else:
                answers.append(as_answer(request, result, frames))
            if len(answers) == _SENT_TOGETHER:
                assert counts is not None
                self._answers.results(answers, counts)
                answers.clear()
        if answers:
            assert counts is not None
            self._answers.results(answers, counts)
        if execution.exhausted and not execution.crowded and batch.lane != BACKGROUND:
            self._scheduler.models.limit_rows(device.name, batch.model, execution.safe_rows)
        failures = sum([isinstance(outcome, TensorNextError) for outcome in execution.outcomes])
        if failures or self._quarantine.active:
            self._judge(execution, batch)
        # How long a failure took says nothing about the next success.
        succeeded = not execution.exhausted and not failures
        run_ns = execution.finished_ns - execution.started_ns
        micros = run_ns / 1e3 if succeeded else 0.0
        self._scheduler.finished(batch, micros, time.perf_counter_ns(), execution.finished_ns)
        if again:
            self._run_alone(batch, again)
        if self._refusals:
            self._refusals.clear()
        for step, outputs in steps:  # now that their lane is free again
            step.owner.succeeded(step, outputs, execution, rows)
        if batch.lane == INLINE:
            device.inline_ns += run_ns
        elif batch.lane != BACKGROUND and device.chip is None:
            device.busy_ns += run_ns * batch.threads
        if counts is not None:
            if failures:
                done = [not isinstance(outcome, TensorNextError) for outcome in execution.outcomes]
                rows = sum(compress(execution.rows, done))
            if failures < len(batch.requests):
                counts.add_batch(rows)
            if execution.exhausted and not execution.crowded and batch.rows > 1:
                counts.splits += 1
            if batch.stolen:
                counts.steals += 1
        if isinstance(execution, Copy):
            self._background.finished(execution)
        elif failures < len(batch.requests):
            version: Version = batch.requests[0].version  # type: ignore[attr-defined]
            if version in self._audits:
                self._audits[version].offer(execution, self._background)
            if self._shadow_of and version in self._shadow_of:
                self._shadows.offer(execution, self._shadow_of[version])
        if execution.mixes:
            mixing: Version = execution.version if isinstance(execution, Copy) else batch.requests[0].version  # type: ignore[attr-defined]
            mixing.end_batches(batch.model, execution.mixes)
        if execution.fatal and not device.error:
            self.lose_device(device.name, execution.fatal)

    def _judge(self, execution: Execution, batch: Batch) -> None:
        """Have clients ride alone after a model failed at their requests, until others of theirs have succeeded."""
        if execution.fatal:
            return
        for request, outcome in zip(batch.requests, execution.outcomes, strict=False):
            peer = request.peer
            if not isinstance(outcome, TensorNextError):
                self._quarantine.succeeded(peer)
            elif not isinstance(outcome, (ResourceExhausted, Unavailable)):
                self._quarantine.failed(peer)
                if request.connection.closed:  # type: ignore[attr-defined]
                    self._quarantine.left(peer, request.connection.client.name)  # type: ignore[attr-defined]

    def _run_alone(self, batch: Batch, requests: list[Request]) -> None:
        """Try requests again that found no memory beside other batches: while nothing else runs on their device."""
        name = batch.device.name
        about = event("out_of_memory", batch.model, device=name, count=len(requests))
        log.warning(
            "%s on %s: %d requests found no memory beside other batches, and run again without them",
            *(batch.model, name, len(requests)),
            extra=about,
        )
        if batch.device.error:
            self._reroute(requests)
        else:
            self._scheduler.run_alone(batch, requests)

    def _runs_elsewhere(self, request: Pending, error: TensorNextError) -> bool:
        """Route a request to another device after a GPU had no memory for it. False if there is none."""
        if not isinstance(error, ResourceExhausted) or not self._scheduler.devices[request.device].is_gpu:
            return False
        if request.wanted not in ("", "auto"):
            return False
        request.excluded |= {request.device}
        request.alone &= ~DEVICE
        try:
            self._scheduler.add(request, time.perf_counter_ns())
        except TensorNextError:
            return False
        return True

    def lose_device(self, name: str, why: str) -> None:
        """Use a device no more, which is lost for good."""
        about = event("device_lost", device=name, reason=why)
        log.error("device %s failed and is no longer used: %s", name, why, extra=about)
        self._inventory.device_failures[name] = why
        self._reroute(self._scheduler.fail_device(name, why))
        self._on_device_lost()

    def _reroute(self, requests: Iterable[Request]) -> None:
        """Route requests anew, whose device is lost."""
        for request in requests:
            try:
                self._scheduler.add(request, time.perf_counter_ns())
            except TensorNextError as error:
                self._answers.error(request, error)

    # --- what does not come back -------------------------------------------------------------------------------

    def limit_s(self, execution: Execution) -> float:
        """Seconds that an execution may run before it is given up.

        A process of an isolated model is ended at the limit by whoever waits for it, which may have waited as long for
        its turn. That says more, and costs no lane, so only a wait that does not end is given up here.
        """
        limit_s = execution.model.time_limit_s or self._stall_timeout_s
        return 2 * limit_s + PROCESS_END_S if execution.model.isolation == PROCESS.name else limit_s

    def give_up_hung(self) -> Counter[str]:
        """Give up batches that run for too long. Returns the number of hung lanes, by device.

        A batch that waits on its lane for others has the limit from when they are over. It is given up with them.
        """
        now_ns = time.perf_counter_ns()
        hung: Counter[str] = Counter()
        for execution, batch in self._on_lanes.items():  # by the time at which they were formed
            name, limit_s = batch.device.name, self.limit_s(execution)
            if not execution.started_ns and not hung[name]:
                executor = self._executor(batch)
                limit_s *= executor.lanes if executor.shares_chip else 1
            if (now_ns - (execution.started_ns or batch.started_ns)) / 1e9 > limit_s:
                hung[name] += batch.lane != BACKGROUND
                if not batch.hung:
                    self._give_up(execution, batch)
        return hung

    def _give_up(self, execution: Execution, batch: Batch) -> None:
        """Give up a hung batch: its requests get an error. Its lane is free again if it ever ends."""
        why = f"model {batch.model!r} ran for over {self.limit_s(execution):g} s on {batch.device.name}"
        held = [request for request in batch.requests if not request.done]
        if held:
            log.error(
                "%s: %d requests given up, the lane counts as hung",
                *(why, len(held)),
                extra=event("batch_hangs", batch.model, device=batch.device.name, count=len(held)),
            )
        for request in held:
            self._answers.error(request, Internal(why))
        self._scheduler.mark_hung(batch)
        if isinstance(execution, Copy):
            self._background.stop(execution.model)
            about = event("copies_stopped", batch.model, device=batch.device.name)
            log.error("%s: it gets no more copies", why, extra=about)

    def unanswered(self) -> list[Request]:
        """Requests on lanes that nobody has answered yet."""
        return [request for batch in self._on_lanes.values() for request in batch.requests if not request.done]
