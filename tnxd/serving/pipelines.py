"""Requests for pipelines: each is made of step requests, which the scheduler has like all others.

A step is queued when all that feeds it is there, so parallel branches run at the same time, and each step shares
batches with whatever else is asked of its model. What a step gives goes on as it is, without a copy.
"""

from __future__ import annotations

import logging
import time

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import DeadlineExceeded, Internal, TensorNextError
from tnxctl.protocol.wire import Limits, TensorSpec
from tnxd.deployment.reconciler import Reconciler
from tnxd.events import event
from tnxd.executors.execution import Execution
from tnxd.models.pipelines import Node, Pipeline
from tnxd.models.sizes import count_strings, reply_too_large, too_many_strings
from tnxd.scheduling.refusals import TooLate
from tnxd.scheduling.request import NEVER
from tnxd.scheduling.scheduler import Scheduler
from tnxd.scheduling.times import milliseconds
from tnxd.serving.answers import Answers
from tnxd.serving.pending import Pending, StepRequest, as_answer, as_frames
from tnxd.serving.pipeline_preparation import Preparation
from tnxd.serving.pipeline_result import as_result, stage_of
from tnxd.serving.pipeline_run import Run, check_rows
from tnxd.serving.quarantine import Quarantine
from tnxd.serving.reports import Inventory
from tnxd.serving.step_errors import error_of_step, of_step
from tnxd.transport.client_limits import Admission

log = logging.getLogger(__name__)


class Pipelines:
    """All requests for pipelines that are under way.

    Limits and fairness see the client: the limits of what is in flight count the whole once, with the most that its
    steps' results take at a time; those of the queue are asked once, for its first step, and each step waits among the
    requests of its client.

    Args:
        reconciler: loads versions again that had to make room.
        answers: of the whole requests.
        admission: counts what the steps give, with the inputs of the whole.
        limits: of the messages.
        max_delay_us: longest wait for company, in microseconds, where a model has no limit of its own.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        inventory: Inventory,
        reconciler: Reconciler,
        answers: Answers,
        quarantine: Quarantine,
        admission: Admission,
        *,
        limits: Limits,
        max_delay_us: float,
    ) -> None:
        self._scheduler = scheduler
        self._models = scheduler.models
        self._traffic = inventory.traffic
        self._preparation = Preparation(scheduler, inventory.registry, reconciler)
        self._answers = answers
        self._quarantine = quarantine
        self._admission = admission
        self._limits = limits
        self._max_delay_us = max_delay_us
        self._runs: dict[Pending, Run] = {}

    def forget_wirings(self) -> None:
        """Forget which models have been fitted together, after a change: some may have gone, and their memory shall."""
        self._preparation.forget_wirings()

    # --- in ----------------------------------------------------------------------------------------------------

    def start(self, whole: Pending, route_key: str, now_ns: int) -> None:
        """Begin a request for a pipeline: queue the steps that need nothing but its inputs.

        Raises:
            FailedPrecondition: a step cannot be served, or does not fit the others.
            Unavailable: a step is being loaded, or no device that the request may use has its model.
            InvalidArgument: an input does not fit a step, or the request names a device that does not exist.
            ResourceExhausted: the queue is full, or the client has too much in flight.
            TooLate: the whole would not be done by its deadline.
        """
        pipeline = whole.served
        assert isinstance(pipeline, Pipeline)
        versions, models = self._preparation.steps(pipeline, whole, route_key)
        fitted = self._preparation.fit(pipeline, models)
        wiring = fitted.wiring
        path = self._preparation.predict(whole, fitted, now_ns)
        run = Run(whole, fitted, versions, path.after_us)
        if run.counted:
            self._admission.check_bytes(whole.connection, whole.nbytes + run.counted)
            whole.nbytes += run.counted
        whole.predicted_us = path.total_us
        first = [place for place in wiring.order if not run.missing[place]]
        try:
            for place in first:
                # The first one asks for all: where there is room for it, there is for the whole.
                self._queue(run, place, now_ns, admitted=bool(run.outstanding))
        except BaseException:
            self._withdraw_steps(run)
            raise
        for key in run.needed():
            self._models.hold(key)
        self._runs[whole] = run

    def _queue(self, run: Run, place: int, now_ns: int, *, admitted: bool) -> None:
        """Queue a step whose inputs are there. Raises as `Scheduler.add` does, and InvalidArgument: they do not fit."""
        node = run.fitted.wiring.nodes[place]
        try:
            request = self._request(run, node, place, now_ns, admitted)
            self._scheduler.add(request, now_ns)
        except TooLate:
            raise
        except TensorNextError as error:
            raise error_of_step(node.name, error) from None
        run.outstanding.add(request)
        run.fitted.groups[place], run.fitted.rows[place] = request.group, request.rows
        self._traffic[request.version].counts.requests += 1

    def _request(self, run: Run, node: Node, place: int, now_ns: int, admitted: bool) -> StepRequest:
        whole, model = run.whole, node.model
        specs: list[TensorSpec] = []
        arrays: list[Array] = []
        for spec, source in zip(model.inputs, node.sources, strict=True):
            if source is not None:
                array = run.tensor(source)
                specs.append(TensorSpec(spec.name, spec.datatype, array.shape))
                arrays.append(array)
        bound = model.bind(specs, arrays)
        delay_us = self._max_delay_us if model.max_delay_us is None else model.max_delay_us
        quarantine = self._quarantine
        alone = (
            quarantine.active
            and bool(model.max_batch_size)
            and quarantine.holds(whole.peer, whole.connection.client.name)
        )
        deadline_ns = whole.deadline_ns
        return StepRequest(
            model.key,
            1 if alone else model.max_units,
            bound.units,
            bound.nbytes,
            bound.group,
            whole.client,
            whole.peer,
            whole.wanted,
            whole.prefer_gpu,
            whole.min_gpu_memory_mb,
            whole.priority,
            # What comes behind it takes its time, too.
            deadline_ns if deadline_ns == NEVER else deadline_ns - int(run.after_us[place] * 1e3),
            int(delay_us * 1e3),
            now_ns if admitted else whole.came_ns,
            bound.length,
            model.max_batch_size,
            alone=alone,
            admitted=admitted,
            share=whole.share,
            connection=whole.connection,
            delimited=whole.delimited,
            id=whole.id,
            version=run.versions[place],
            served=model,
            arrays=bound.arrays,
            max_reply_bytes=whole.max_reply_bytes,
            received_ns=now_ns,
            queued_ns=now_ns,
            owner=self,
            whole=whole,
            place=place,
        )

    # --- what becomes of steps ---------------------------------------------------------------------------------

    def succeeded(self, request: StepRequest, outputs: tuple[Array, ...], execution: Execution, rows: int) -> None:
        """A step has been computed: queue those that waited for it, or answer the whole. Args: rows: of its batch."""
        run = self._runs.get(request.whole)
        if run is None or request.done:
            return  # its deadline came first, or another step failed
        run.outstanding.remove(request)
        self._traffic[request.version].counts.add_step(request, execution, rows)
        try:
            self._go_on(run, request, outputs, execution, rows)
        except TensorNextError as error:
            self._fail(run, error)
        except Exception:  # a defect of ours: this client gets an answer, and the others go on
            about = event("defect", run.whole.model)
            log.exception("the daemon failed between the steps of %s", run.whole.model, extra=about)
            self._fail(run, Internal("the daemon failed at this request; its log says how"))
        finally:
            _finish(request)

    def _go_on(
        self, run: Run, request: StepRequest, outputs: tuple[Array, ...], execution: Execution, rows: int
    ) -> None:
        wiring, place = run.fitted.wiring, request.place
        node = wiring.nodes[place]
        if node.keeps:
            check_rows(node, request, outputs)
        run.keep(place, outputs)
        if run.held > run.counted:
            more = run.held - run.counted
            run.counted = run.held
            run.expect()  # at once: others like it are about to come
            self._admission.grow(run.whole, more)
        run.stages[place] = stage_of(run, request, execution, rows)
        now_ns = time.perf_counter_ns()
        for other in node.behind:
            run.missing[other] -= 1
            if not run.missing[other]:
                self._queue(run, other, now_ns, admitted=True)
                for before in wiring.nodes[other].before:
                    run.used(before)
        if not run.outstanding:
            run.expect()
            self._answer(run, place, execution)

    def failed(self, request: StepRequest, error: TensorNextError) -> None:
        """A step will not be computed: nor will the whole."""
        run = self._runs.get(request.whole)
        if run is None or request.done:
            return
        run.outstanding.discard(request)
        _finish(request)
        self._traffic[request.version].counts.errors[error.code] += 1
        name = run.fitted.wiring.nodes[request.place].name
        if isinstance(error, DeadlineExceeded):
            whole = run.whole
            allowed_us = (whole.deadline_ns - whole.came_ns) / 1e3
            what = "the deadline has passed" if not run.after_us[request.place] else "too little time is left"
            what += f", {milliseconds(allowed_us)} were allowed for the whole"
            error = DeadlineExceeded(of_step(name, what), retry_after_s=allowed_us / 1e6)
        else:
            error = error_of_step(name, error)
        self._fail(run, error)

    def withdraw(self, whole: Pending) -> bool:
        """Take out the steps of a request that wait, and drop what others give. False if it is none of a pipeline."""
        run = self._runs.get(whole)
        if run is None:
            return False
        self._end(run)
        return True

    # --- out ---------------------------------------------------------------------------------------------------

    def _answer(self, run: Run, place: int, execution: Execution) -> None:
        """All steps are done. Args: place, execution: of the last one."""
        whole, wiring = run.whole, run.fitted.wiring
        outputs = tuple([run.results[source.step][source.place] for source in wiring.outputs])
        strings = count_strings(outputs)
        if strings > self._limits.strings:
            self._fail(run, too_many_strings(strings, self._limits))
            return
        frames = as_frames(outputs)
        nbytes = sum([array.nbytes for array in frames])
        if nbytes > min(self._limits.message_bytes, whole.max_reply_bytes):
            self._fail(run, reply_too_large(nbytes, whole.max_reply_bytes, self._limits.message_bytes))
            return
        result = as_result(run, place, execution.memory_free_mb, outputs)
        self._end(run)
        counts = self._traffic[whole.version].counts
        if self._answers.results([as_answer(whole, result, frames)], counts):
            counts.rows_of_wholes += whole.rows

    def _fail(self, run: Run, error: TensorNextError) -> None:
        self._end(run)
        self._answers.error(run.whole, error)

    def _end(self, run: Run) -> None:
        """Forget a run, and whatever of it waits."""
        if self._answers.traces.under_way:
            steps = [stage.timing for stage in run.stages if stage is not None]
            self._answers.traces.add_steps(run.whole, steps)
        del self._runs[run.whole]
        for key in run.needed():
            self._models.release(key)
        self._withdraw_steps(run)

    def _withdraw_steps(self, run: Run) -> None:
        for request in run.outstanding:
            self._scheduler.cancel(request)
            self._traffic[request.version].counts.abandoned += 1
            _finish(request)
        run.outstanding.clear()


def _finish(request: StepRequest) -> None:
    """A step is over: the scheduler may remember it until its deadline, without what it was about."""
    request.done = True
    request.arrays = ()
