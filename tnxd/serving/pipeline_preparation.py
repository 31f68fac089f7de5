"""Preparation of a request for a pipeline: the versions that its steps get, how they fit, and when all will be done."""

from __future__ import annotations

from collections.abc import Sequence

from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument, NotFound, TensorNextError, Unavailable
from tnxctl.protocol.wire import TensorSpec
from tnxd.deployment.reconciler import Reconciler
from tnxd.deployment.registry import LOADING_RETRY_S, Registry
from tnxd.deployment.version import READY, Version
from tnxd.models.model import Model
from tnxd.models.pipelines import Pipeline, Wiring, wire
from tnxd.scheduling.paths import PathPrediction, predict_path
from tnxd.scheduling.refusals import TooLate
from tnxd.scheduling.request import NEVER, Request
from tnxd.scheduling.scheduler import Scheduler
from tnxd.scheduling.times import milliseconds
from tnxd.serving.pending import Pending
from tnxd.serving.step_errors import error_of_step, of_step

# Wirings that are kept: one for each pipeline, and more while the traffic of a step's model is split.
_MOST_WIRINGS = 256


class Fitted:
    """A wiring, and what requests for it have shown.

    Attributes:
        before, behind: of all nodes. groups, rows: of the last request of each step.
        row_nbytes: most bytes that the results of steps of the last request took at a time, for each of its rows.
    """

    def __init__(self, pipeline: Pipeline, models: Sequence[Model]) -> None:
        self.pipeline = pipeline  # known by its identity, so it must not go
        self.wiring: Wiring = wire(pipeline.description, pipeline.label, models)
        self.before = [node.before for node in self.wiring.nodes]
        self.behind = [node.behind for node in self.wiring.nodes]
        self.groups = [model.example_group for model in models]
        self.rows = [1] * len(models)
        self.row_nbytes = 0.0

    def expected_nbytes(self, rows: int) -> int:
        """Bytes that the results between the steps of a request are expected to take at a time."""
        return int(self.row_nbytes * rows)


class Preparation:
    """Preparation of requests for pipelines. It keeps the wirings that it has made.

    Args:
        reconciler: loads versions again that had to make room.
    """

    def __init__(self, scheduler: Scheduler, registry: Registry, reconciler: Reconciler) -> None:
        self._scheduler = scheduler
        self._registry = registry
        self._reconciler = reconciler
        self._fitted: dict[tuple[int, ...], Fitted] = {}

    def forget_wirings(self) -> None:
        """Forget which models have been fitted together, after a change: some may have gone, and their memory shall."""
        self._fitted.clear()

    def steps(self, pipeline: Pipeline, whole: Pending, route_key: str) -> tuple[list[Version], list[Model]]:
        """The versions that the steps of a request get, and their models."""
        versions, models, waits = [], [], ""
        for step in pipeline.description.steps:
            try:
                version = self._registry.find(step.model, whole.peer, route_key)
            except (NotFound, InvalidArgument, FailedPrecondition) as error:
                raise FailedPrecondition(of_step(step.name, error.message)) from None
            except TensorNextError as error:
                raise error_of_step(step.name, error) from None
            model = version.model
            if model is None or version.state != READY:
                self._reconciler.request_load(version)
                waits = waits or of_step(step.name, f"model {version.title!r} had made room for another")
                continue
            versions.append(version)
            models.append(model)
        if waits:
            raise Unavailable(f"{waits} and is being loaded again", retry_after_s=LOADING_RETRY_S)
        return versions, models

    def fit(self, pipeline: Pipeline, models: list[Model]) -> Fitted:
        """The wiring of a pipeline with these models. Raises FailedPrecondition: they do not fit."""
        key = (id(pipeline), *map(id, models))
        fitted = self._fitted.get(key)
        if fitted is None:
            fitted = Fitted(pipeline, models)
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

    def predict(self, whole: Pending, fitted: Fitted, now_ns: int) -> PathPrediction:
        """Predict when all steps are done. Raises TooLate: not by the deadline; and as `Scheduler.outlook` does."""
        wiring = fitted.wiring
        outlooks = []
        for place, node in enumerate(wiring.nodes):
            model = node.model
            rows = whole.rows if wiring.max_batch_size and not model.joins else fitted.rows[place]
            request = Request(
                model.key, model.max_units, rows, 0, fitted.groups[place], whole.client, whole.peer, whole.wanted
            )
            request.prefer_gpu, request.min_gpu_memory_mb = whole.prefer_gpu, whole.min_gpu_memory_mb
            request.priority, request.deadline_ns = whole.priority, whole.deadline_ns
            try:
                outlooks.append(self._scheduler.outlook(request, now_ns))
            except TensorNextError as error:
                raise error_of_step(node.name, error) from None
        path = predict_path(wiring.order, fitted.before, fitted.behind, outlooks)
        left_us = (whole.deadline_ns - now_ns) / 1e3
        needs_us = path.total_us + path.margin_us
        if whole.deadline_ns != NEVER and needs_us > left_us:
            waits = any(outlook.wait_us for outlook in outlooks)
            raise TooLate(
                f"its {len(outlooks)} steps cannot be done within its deadline, {milliseconds(left_us)} from now: "
                f"predicted are {milliseconds(path.total_us)}, with a margin of {milliseconds(path.margin_us)}",
                now_ns + int(needs_us * 1e3),
                retry_after_s=(needs_us - left_us) / 1e6 if waits else None,
            )
        return path


def _type(spec: TensorSpec) -> tuple[str, int]:
    """Datatype and rank of a tensor."""
    return spec.datatype, len(spec.shape)
