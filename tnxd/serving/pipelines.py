"""Requests for pipelines: each is made of step requests, which the scheduler has like all others.

A step is queued when all that feeds it is there, so parallel branches run at the same time, and each step shares
batches with whatever else is asked of its model. What a step gives goes on as it is, without a copy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    TensorNextError,
    Unavailable,
    from_code,
)
from tnxctl.protocol.wire import VERSION, Limits, Result, StepTiming, TensorSpec, Timing, encode
from tnxd.deployment.reconciler import Reconciler
from tnxd.deployment.registry import LOADING_RETRY_S
from tnxd.deployment.version import READY, Version
from tnxd.executors.execution import Execution
from tnxd.models.model import Model
from tnxd.models.pipelines import Node, Pipeline, Source, Wiring, wire
from tnxd.models.sizes import count_strings, reply_too_large, too_many_strings
from tnxd.scheduling.paths import PathPrediction, predict_path
from tnxd.scheduling.refusals import TooLate
from tnxd.scheduling.request import NEVER, Request
from tnxd.scheduling.scheduler import Scheduler
from tnxd.serving.answers import Answers
from tnxd.serving.pending import Pending, StepRequest, as_frames, described
from tnxd.serving.quarantine import Quarantine
from tnxd.serving.reports import Inventory

log = logging.getLogger(__name__)

# Wirings that are kept: one for each pipeline, and more while the traffic of a step's model is split.
_MOST_WIRINGS = 256


class _Stage(NamedTuple):
    """What is told of a step that is done. An execution would keep the tensors of all requests of its batch alive.

    Attributes:
        timing: as the reply has it. reason: why it ran where it did.
        finished_ns: when, of `time.perf_counter_ns`. latency_us: of the forward.
    """

    timing: StepTiming
    reason: str
    finished_ns: int
    latency_us: float


class _Fitted:
    """A wiring, and what requests for it have shown.

    Attributes:
        before, behind: of all nodes. groups, rows: of the last request of each step.
    """

    def __init__(self, pipeline: Pipeline, models: Sequence[Model]) -> None:
        self.pipeline = pipeline  # known by its identity, so it must not go
        self.wiring: Wiring = wire(pipeline.description, pipeline.label, models)
        self.before = [node.before for node in self.wiring.nodes]
        self.behind = [node.behind for node in self.wiring.nodes]
        self.groups = [model.example_group for model in models]
        self.rows = [1] * len(models)


class _Run:
    """A request for a pipeline between its start and its end.

    Attributes:
        whole: the request. fitted: what it runs. versions: of the steps.
        after_us: for each step, what those behind it will take at least.
        inputs: of the whole. results: outputs of each step that is done, as long as somebody needs them.
        missing: for each step, how many of those before it are not done. uses: how many may still take its outputs.
        outstanding: steps that wait or run. stages: those that are done.
    """

    __slots__ = (
        "after_us",
        "fitted",
        "inputs",
        "missing",
        "outstanding",
        "results",
        "stages",
        "uses",
        "versions",
        "whole",
    )

    def __init__(self, whole: Pending, fitted: _Fitted, versions: Sequence[Version], after_us: Sequence[float]) -> None:
        wiring = fitted.wiring
        self.whole = whole
        self.fitted = fitted
        self.versions = versions
        self.after_us = after_us
        self.inputs = whole.arrays
        self.results: list[tuple[Array, ...]] = [()] * len(versions)
        self.missing = [len(node.before) for node in wiring.nodes]
        self.uses = list(wiring.uses)
        self.outstanding: set[StepRequest] = set()
        self.stages: list[_Stage | None] = [None] * len(versions)

    def tensor(self, source: Source) -> Array:
        """What a source stands for."""
        array = self.inputs[source.place] if source.step < 0 else self.results[source.step][source.place]
        assert array is not None  # a pipeline has no input that may be left out
        return array

    def needed(self) -> set[str]:
        """Keys of all models that it needs until it ends."""
        return {self.whole.model, *(node.model.key for node in self.fitted.wiring.nodes)}


class Pipelines:
    """All requests for pipelines that are under way.

    Limits and fairness see the client: the limits of what is in flight count the whole once, those of the queue are
    asked once, for its first step, and each step waits among the requests of its client.

    Args:
        reconciler: loads versions again that had to make room.
        answers: of the whole requests.
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
        *,
        limits: Limits,
        max_delay_us: float,
    ) -> None:
        self._scheduler = scheduler
        self._registry = inventory.registry
        self._traffic = inventory.traffic
        self._reconciler = reconciler
        self._answers = answers
        self._quarantine = quarantine
        self._limits = limits
        self._max_delay_us = max_delay_us
        self._runs: dict[Pending, _Run] = {}
        self._fitted: dict[tuple[int, ...], _Fitted] = {}

    def forget_wirings(self) -> None:
        """Forget which models have been fitted together, after a change: some may have gone, and their memory shall."""
        self._fitted.clear()

    # --- in ----------------------------------------------------------------------------------------------------

    def start(self, whole: Pending, route_key: str, now_ns: int) -> None:
        """Begin a request for a pipeline: queue the steps that need nothing but its inputs.

        Raises:
            FailedPrecondition: a step cannot be served, or does not fit the others.
            Unavailable: a step is being loaded, or no device that the request may use has its model.
            InvalidArgument: an input does not fit a step, or the request names a device that does not exist.
            ResourceExhausted: the queue is full.
            TooLate: the whole would not be done by its deadline.
        """
        pipeline = whole.served
        assert isinstance(pipeline, Pipeline)
        versions, models = self._steps(pipeline, whole, route_key)
        fitted = self._fit(pipeline, models)
        wiring = fitted.wiring
        path = self._predict(whole, fitted, now_ns)
        run = _Run(whole, fitted, versions, path.after_us)
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
            self._scheduler.hold(key)
        self._runs[whole] = run

    def _steps(self, pipeline: Pipeline, whole: Pending, route_key: str) -> tuple[list[Version], list[Model]]:
        """The versions that the steps of a request get, and their models."""
        versions, models, waits = [], [], ""
        for step in pipeline.description.steps:
            try:
                version = self._registry.find(step.model, whole.peer, route_key)
            except (NotFound, InvalidArgument, FailedPrecondition) as error:
                raise FailedPrecondition(_of_step(step.name, error.message)) from None
            except TensorNextError as error:
                raise _named(step.name, error) from None
            model = version.model
            if model is None or version.state != READY:
                self._reconciler.request_load(version)
                waits = waits or _of_step(step.name, f"model {version.title!r} had made room for another")
                continue
            versions.append(version)
            models.append(model)
        if waits:
            raise Unavailable(f"{waits} and is being loaded again", retry_after_s=LOADING_RETRY_S)
        return versions, models

    def _fit(self, pipeline: Pipeline, models: list[Model]) -> _Fitted:
        """The wiring of a pipeline with these models. Raises FailedPrecondition: they do not fit."""
        key = (id(pipeline), *map(id, models))
        fitted = self._fitted.get(key)
        if fitted is None:
            fitted = _Fitted(pipeline, models)
            wiring = fitted.wiring
            for told, now in ((pipeline.inputs, wiring.inputs_taken), (pipeline.outputs, wiring.outputs_given)):
                if [_type(spec) for spec in told] != [_type(spec) for spec in now]:  # lengths are asked at each step
                    raise FailedPrecondition(
                        f"{pipeline.label}: steps: with the versions that this request would get, its signature is "
                        f"another: {now} instead of {told}"
                    )
            if len(self._fitted) >= _MOST_WIRINGS:
                self._fitted.clear()
            self._fitted[key] = fitted
        return fitted

    def _predict(self, whole: Pending, fitted: _Fitted, now_ns: int) -> PathPrediction:
        """Predict when all steps are done. Raises TooLate: not by the deadline; and as `Scheduler.outlook` does."""
        wiring = fitted.wiring
        outlooks = []
        for place, node in enumerate(wiring.nodes):
            model = node.model
            rows = whole.rows if wiring.max_batch_size else fitted.rows[place]
            request = Request(
                model.key, model.max_batch_size, rows, 0, fitted.groups[place], whole.client, whole.peer, whole.wanted
            )
            request.prefer_gpu, request.min_gpu_memory_mb = whole.prefer_gpu, whole.min_gpu_memory_mb
            request.priority, request.deadline_ns = whole.priority, whole.deadline_ns
            try:
                outlooks.append(self._scheduler.outlook(request, now_ns))
            except TensorNextError as error:
                raise _named(node.name, error) from None
        path = predict_path(wiring.order, fitted.before, fitted.behind, outlooks)
        left_us = (whole.deadline_ns - now_ns) / 1e3
        needs_us = path.total_us + path.margin_us
        if whole.deadline_ns != NEVER and needs_us > left_us:
            waits = any(outlook.wait_us for outlook in outlooks)
            raise TooLate(
                f"its {len(outlooks)} steps cannot be done within its deadline, {left_us / 1e3:.3g} ms from now: "
                f"predicted are {path.total_us / 1e3:.3g} ms, with a margin of {path.margin_us / 1e3:.3g} ms",
                now_ns + int(needs_us * 1e3),
                retry_after_s=(needs_us - left_us) / 1e6 if waits else None,
            )
        return path

    def _queue(self, run: _Run, place: int, now_ns: int, *, admitted: bool) -> None:
        """Queue a step whose inputs are there. Raises as `Scheduler.add` does, and InvalidArgument: they do not fit."""
        node = run.fitted.wiring.nodes[place]
        try:
            request = self._request(run, node, place, now_ns, admitted)
            self._scheduler.add(request, now_ns)
        except TooLate:
            raise
        except TensorNextError as error:
            raise _named(node.name, error) from None
        run.outstanding.add(request)
        run.fitted.groups[place], run.fitted.rows[place] = request.group, request.rows
        self._traffic[request.version].requests += 1

    def _request(self, run: _Run, node: Node, place: int, now_ns: int, admitted: bool) -> StepRequest:
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
            1 if alone else model.max_batch_size,
            bound.rows,
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
            alone=alone,
            admitted=admitted,
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
        try:
            self._go_on(run, request, outputs, execution, rows)
        except TensorNextError as error:
            self._fail(run, error)
        except Exception:  # a defect of ours: this client gets an answer, and the others go on
            log.exception("the daemon failed between the steps of %s", run.whole.model)
            self._fail(run, Internal("the daemon failed at this request; its log says how"))

    def _go_on(
        self, run: _Run, request: StepRequest, outputs: tuple[Array, ...], execution: Execution, rows: int
    ) -> None:
        wiring, place = run.fitted.wiring, request.place
        node = wiring.nodes[place]
        if node.keeps:
            _check_rows(node, request, outputs)
        run.outstanding.remove(request)
        run.results[place] = outputs
        run.stages[place] = _stage(run, request, execution, rows)
        _finish(request)
        now_ns = time.perf_counter_ns()
        for other in node.behind:
            run.missing[other] -= 1
            if not run.missing[other]:
                self._queue(run, other, now_ns, admitted=True)
                for before in wiring.nodes[other].before:
                    run.uses[before] -= 1
                    if not run.uses[before]:
                        run.results[before] = ()
        if not run.outstanding:
            self._answer(run, place, execution)

    def failed(self, request: StepRequest, error: TensorNextError) -> None:
        """A step will not be computed: nor will the whole."""
        run = self._runs.get(request.whole)
        if run is None or request.done:
            return
        name = run.fitted.wiring.nodes[request.place].name
        if isinstance(error, DeadlineExceeded):
            whole = run.whole
            allowed_ms = (whole.deadline_ns - whole.came_ns) / 1e6
            what = "the deadline has passed" if not run.after_us[request.place] else "too little time is left"
            what += f", {allowed_ms:.3g} ms were allowed for the whole"
            error = DeadlineExceeded(_of_step(name, what), retry_after_s=allowed_ms / 1e3)
        else:
            error = _named(name, error)
        self._fail(run, error)

    def withdraw(self, whole: Pending) -> bool:
        """Take out the steps of a request that wait, and drop what others give. False if it is none of a pipeline."""
        run = self._runs.get(whole)
        if run is None:
            return False
        self._end(run)
        return True

    # --- out ---------------------------------------------------------------------------------------------------

    def _answer(self, run: _Run, place: int, execution: Execution) -> None:
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
        header = _result_header(run, place, execution.memory_free_mb, outputs)
        self._end(run)
        self._answers.results([(whole, header, frames)], execution)

    def _fail(self, run: _Run, error: TensorNextError) -> None:
        self._end(run)
        self._answers.error(run.whole, error)

    def _end(self, run: _Run) -> None:
        """Forget a run, and whatever of it waits."""
        del self._runs[run.whole]
        for key in run.needed():
            self._scheduler.release(key)
        self._withdraw_steps(run)

    def _withdraw_steps(self, run: _Run) -> None:
        for request in run.outstanding:
            self._scheduler.cancel(request)
            _finish(request)
        run.outstanding.clear()


def _finish(request: StepRequest) -> None:
    """A step is over: the scheduler may remember it until its deadline, without what it was about."""
    request.done = True
    request.arrays = ()


def _check_rows(node: Node, request: StepRequest, outputs: tuple[Array, ...]) -> None:
    """Check that a step has as many rows as it got. Raises Internal: it has others."""
    for place, inputs in node.keeps:
        came = [array.shape[0] for array in [request.arrays[at] for at in inputs] if array is not None]
        rows = outputs[place].shape[0]
        if rows not in came:
            spec = node.model.outputs[place]
            raise Internal(
                _of_step(
                    node.name,
                    f"output {spec.name!r} has {rows} rows, its inputs have {came[0]}; where that is meant, "
                    f"pipeline.toml says changes_rows = true",
                )
            )


def _type(spec: TensorSpec) -> tuple[str, int]:
    """Datatype and rank of a tensor."""
    return spec.datatype, len(spec.shape)


def _of_step(name: str, what: str) -> str:
    return f"step {name!r}: {what}"


def _named(name: str, error: TensorNextError) -> TensorNextError:
    """The error of a step as that of the whole."""
    return from_code(error.code, _of_step(name, error.message), error.retry_after_s)


def _stage(run: _Run, request: StepRequest, execution: Execution, rows: int) -> _Stage:
    """What is told of a step that is done. Args: rows: of its batch."""
    timing = StepTiming(
        name=run.fitted.wiring.nodes[request.place].name,
        model=request.served.name,
        version=request.served.version,
        device=request.device,
        batch_size=rows,
        start_us=(request.queued_ns - run.whole.received_ns) / 1e3,
        queue_us=(execution.started_ns - request.queued_ns) / 1e3,
        gather_us=execution.gather_us,
        h2d_us=execution.h2d_us,
        compute_us=execution.compute_us,
        d2h_us=execution.d2h_us,
    )
    return _Stage(timing, request.reason, execution.finished_ns, execution.latency_us)


def _result_header(run: _Run, last: int, memory_free_mb: float, outputs: tuple[Array, ...]) -> bytes:
    """The header frame of the result. Args: last: place of the step that ended last. memory_free_mb: then, of a GPU."""
    whole, nodes = run.whole, run.fitted.wiring.nodes
    stages = [stage for stage in run.stages if stage is not None]  # which all are done
    # Back from the end: each step began when the last one before it was done, so these follow one another.
    way, place = [stages[last]], last
    while nodes[place].before:
        place = max(nodes[place].before, key=lambda other: stages[other].finished_ns)
        way.append(stages[place])
    gather_us = sum([stage.timing.gather_us for stage in way])
    h2d_us = sum([stage.timing.h2d_us for stage in way])
    compute_us = sum([stage.timing.compute_us for stage in way])
    d2h_us = sum([stage.timing.d2h_us for stage in way])
    reason = stages[0].reason
    if any(stage.reason != reason for stage in stages):
        reason = "; ".join([_of_step(stage.timing.name, stage.reason) for stage in stages])
    finished_ns = stages[last].finished_ns
    now = time.perf_counter_ns()
    result = Result(
        v=VERSION,
        id=whole.id,
        model=whole.served.name,
        version=whole.served.version,
        outputs=described(whole.served.outputs, outputs),
        device=", ".join(dict.fromkeys([stage.timing.device for stage in stages])),
        reason=reason,
        batch_size=stages[last].timing.batch_size,
        latency_ms=sum([stage.latency_us for stage in way]) / 1e3,
        gpu_memory_mb=memory_free_mb,
        timing=Timing(
            receive_us=(whole.queued_ns - whole.received_ns) / 1e3,
            queue_us=(finished_ns - whole.queued_ns) / 1e3 - gather_us - h2d_us - compute_us - d2h_us,
            gather_us=gather_us,
            h2d_us=h2d_us,
            compute_us=compute_us,
            d2h_us=d2h_us,
            reply_us=(now - finished_ns) / 1e3,
            total_us=(now - whole.received_ns) / 1e3,
        ),
        predicted_us=whole.predicted_us,
        steps=tuple([stage.timing for stage in stages]),
    )
    return encode(result)
