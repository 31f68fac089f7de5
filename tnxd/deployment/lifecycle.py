"""The lifecycle of a version: loaded on devices and warmed up, retired, freed, or evicted to make room for others.

All functions are parts of operations (`tnxd.deployment.operations`), on the serving loop's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from tnxctl.protocol.errors import DeadlineExceeded, FailedPrecondition, ResourceExhausted, TensorNextError
from tnxctl.protocol.wire import MIB, Limits
from tnxd.deployment import pipelines
from tnxd.deployment.audit import Audit
from tnxd.deployment.operations import Drained, Operation, OperationRunner, StepTimeout
from tnxd.deployment.registry import Deployment, Registry
from tnxd.deployment.replicas import places
from tnxd.deployment.traffic import signature_difference
from tnxd.deployment.version import DRAINING, EVICTED, FAILED, READY, UNLOADED, Version
from tnxd.device_kinds import PROCESS
from tnxd.error_text import sentence
from tnxd.events import event, machine_event, speaker
from tnxd.executors.execution import SHARED, Executor, LoadReport
from tnxd.models.model import Model
from tnxd.models.pipelines import Pipeline
from tnxd.models.sizes import check_message_sizes
from tnxd.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

T = TypeVar("T")


# How long a version that came back for a request stays at least. Its clients ask again within a fraction of that.
_STAY_S = 0.5


class Lifecycle:
    """Brings versions up on the devices, and takes them down.

    Args:
        runner: runs the operations that these functions are parts of.
        call_soon: has the loop run a function; called from other threads.
        limits: of messages; what cannot be asked for within them is not loaded.
        budget: bytes that the weights of all models may take on a device, by kind of device; no limit without an entry.
        open_processes: opens the device for models in processes of their own, unless it is open.

    Attributes:
        audits: the audit of each version that has one, also while it is not loaded.
    """

    def __init__(
        self,
        registry: Registry,
        scheduler: Scheduler,
        executors: Mapping[str, Executor],
        runner: OperationRunner,
        call_soon: Callable[[Callable[[], None]], None],
        limits: Limits,
        budget: Mapping[str, int],
        open_processes: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._scheduler = scheduler
        self._executors = executors
        self._runner = runner
        self._call_soon = call_soon
        self._open_processes = open_processes
        self._limits = limits
        self._budget = budget
        self.audits: dict[Version, Audit] = {}

    def bring_up(self, deployment: Deployment, version: Version, *, takes_over: bool) -> Operation[None]:
        """Load a version on its devices and warm it up. It is READY then, or nothing of it is left.

        Args:
            takes_over: it will get the traffic of the version that serves: their signatures must agree.

        Raises:
            TensorNextError: whatever went wrong, as a sentence.
        """
        began = time.monotonic()
        version.loading = True
        reports: dict[str, LoadReport] = {}
        failures: dict[str, str] = {}
        try:
            model: Model = yield partial(_speaking, version.title, version.source.open, version.generation)
            if version.given_up:
                model = replace(model, variants=())
            if isinstance(model, Pipeline):
                self._check_room_for_steps(model)
                model = pipelines.assembled(self._registry, model)
            check_message_sizes(model, self._limits)
            if model.isolation == PROCESS.name:
                self._open_processes()
            predecessor = next((version for version, _ in deployment.shares()), None) if takes_over else None
            if predecessor is not None:
                _check_successor(predecessor, version, model)
            if not isinstance(model, Pipeline):
                yield from self._load(version, model, reports, failures)
            if predecessor is not None and not all(report.warmed for report in reports.values()):
                raise FailedPrecondition(
                    f"it could not be warmed up, and version {predecessor.number} serves: {_notes(reports)[0]}"
                )
            model = _as_tried(model, reports.values(), mixes=bool(version.mixes))
        except BaseException as error:
            for name in reports:
                yield from self._free(self._executors[name], version.key)
            if isinstance(error, StepTimeout):
                # The thread that hangs may yet write under the old key.
                self._runner.when_ended(error, partial(self._free_everywhere, version.key))
                version.generation = deployment.next_generation(version.number)
            failure = _failed(version, error)
            about = event("model_failed", version.title, reason=failure.message)
            log.error("%s cannot be loaded: %s", version.title, failure.message, extra=about)
            raise failure from None
        self._put_in_service(version, model, reports, failures, began)

    def _load(
        self, version: Version, model: Model, reports: dict[str, LoadReport], failures: dict[str, str]
    ) -> Operation[None]:
        """Load a model on every device that it may use, but for GPUs without room for it where others have room.

        Args:
            reports, failures: filled by device: what loading showed, or why it failed.

        Raises:
            FailedPrecondition: it is on no device.
        """
        names, full = self._places(version, model)
        for name in names:
            executor = self._executors[name]
            if name in full and any(self._scheduler.devices[other].is_gpu for other in reports):
                failures[name] = full[name]
                continue
            yield from self._make_room(executor, version)
            try:
                report: LoadReport = yield partial(_speaking, version.title, executor.load, model)
            except BaseException as error:
                if not isinstance(error, TensorNextError):  # those are logged where they come from
                    about = event("model_failed_on_device", version.title, device=name)
                    log.error("%s on %s", version.title, name, exc_info=error, extra=about)
                failures[name] = sentence(error)
                if isinstance(error, StepTimeout):
                    raise
                continue
            reports[name] = report
            version.nbytes = report.nbytes or version.source.nbytes
            yield from self._make_room(executor, version)  # only now is it known for sure
            if model.state == SHARED:
                break  # on another device it would have another state
        if not reports:
            where = "; ".join(f"{name}: {why}" for name, why in failures.items())
            raise FailedPrecondition(where or f"no device may run it: {', '.join(model.devices)}")

    def _places(self, version: Version, model: Model) -> tuple[list[str], dict[str, str]]:
        """Devices that a model may use, in the order in which it is loaded there, and why GPUs have no room for it."""
        usable = [name for name in self._executors if model.may_use(name) and not self._scheduler.devices[name].error]
        free = {name: self._free_nbytes(name) for name in usable if self._scheduler.devices[name].is_gpu}
        gpus = places(free, version.nbytes)
        order = iter([*gpus.roomy, *gpus.full])
        full = {
            name: f"{free[name] / MIB:.0f} MiB are free there, and it takes {version.nbytes / MIB:.0f} MiB"
            for name in gpus.full
        }
        return [next(order) if name in free else name for name in usable], full

    def _free_nbytes(self, name: str) -> float:
        """Bytes that are free for weights on a GPU: of its memory, and of what models may take there."""
        executor = self._executors[name]
        free_mb, total_mb = executor.memory_mb()
        free = free_mb * MIB if total_mb else float("inf")
        budget = self._budget.get(executor.kind, 0)
        if budget:
            free = min(free, budget - sum(other.nbytes for other in self._held(name)))
        return free

    def _held(self, device: str) -> list[Version]:
        """Versions that serve from a device."""
        return [
            other
            for _, other in self._registry
            if other.state == READY
            and other.model is not None
            and self._scheduler.models.is_on(device, other.model.key)
        ]

    def _put_in_service(
        self,
        version: Version,
        model: Model,
        reports: Mapping[str, LoadReport],
        failures: Mapping[str, str],
        began: float,
    ) -> None:
        """Route requests to a version that is loaded. Args: began: when its load did, by the monotonic clock."""
        for name, report in reports.items():
            counted = report.joins == model.joins  # else on this device alone in tokens, or in rows
            self._scheduler.models.add(
                name,
                model.key,
                group=model.example_group,
                costs=[(rows, us) for rows, us in report.costs if counted and (model.max_batch_size or rows == 1)],
                safe_rows=report.safe_rows if counted else 0,
                most_rows=report.most_rows if counted else 0,
                padded=report.padded if model.pads else None,
                widths=report.widths if counted else (),
                threads=report.threads,
            )
        self._scheduler.models.set_lane_limit(model.key, model.replicas)
        if model.isolation != "none":
            self._scheduler.models.keep_off_caller(model.key)
        version.model = model
        self._audit(version, model, reports.values())
        version.notes = (
            *model.notes,
            *_notes(reports),
            *((f"no batches: {version.mixes}",) if version.mixes else ()),
            *((f"optimize: the network runs as it is, since {version.given_up}",) if version.given_up else ()),
            *(f"not on {name}: {why}" for name, why in failures.items()),
        )
        version.trials = reports
        version.load_s = time.monotonic() - began
        version.loading = False
        version.error = ""
        if version.state == EVICTED:
            version.came_back = time.monotonic()
        version.state = READY
        self._registry.rebuild()
        place = f"on {', '.join(reports)}" if reports else f"as a pipeline of {len(version.source.steps)} steps"
        about = event("model_loaded", version.title, devices=list(reports), seconds=round(version.load_s, 3))
        log.info("%s is loaded %s, %.1f s", version.title, place, version.load_s, extra=about)
        for name, report in reports.items():
            if report.variant:
                about = machine_event("model_optimized", version.title, device=name, variant=report.variant)
                log.info("%s runs as %s on %s", version.title, report.variant, name, extra=about)

    def retire(self, version: Version, state: str = UNLOADED) -> Operation[bool]:
        """Send nothing more to a version, let it finish what it has, free it.

        Args:
            state: what it is then: UNLOADED or EVICTED.

        Returns:
            Whether requests could be sent to it before.
        """
        if not version.servable:
            if version.state == FAILED:
                version.state = UNLOADED
            return False
        held = version.state == READY
        # One that is evicted keeps its traffic: a request that comes while it drains is told to come back.
        version.state = EVICTED if state == EVICTED else DRAINING
        self._registry.rebuild()
        assert version.model is not None
        key = version.model.key
        if held:
            try:
                yield Drained(key)
            except DeadlineExceeded:
                about = event("memory_not_freed", version.title, reason="a batch hangs")
                log.error("%s: a batch hangs, its memory is not freed", version.title, extra=about)
                held = False
                # What still runs or waits has the old key: other contents must not answer it.
                version.generation = self._registry.deployments[version.source.name].next_generation(version.number)
            self._scheduler.models.remove(key)
        if held:
            self._scheduler.models.forget(key)
            for executor in self._executors.values():
                executor.forget_inline(key)
                yield from self._free(executor, key)
        version.state = state
        self._registry.rebuild()
        about = event("model_evicted" if state == EVICTED else "model_unloaded", version.title)
        log.info("%s is %s", version.title, state, extra=about)
        return True

    def _free(self, executor: Executor, key: str) -> Operation[None]:
        """Unload, from a device that may be lost."""
        try:
            yield partial(executor.unload, key)
        except Exception as error:
            about = event("memory_not_freed", key, device=executor.name, reason=sentence(error))
            log.error("%s is not freed on %s: %s", key, executor.name, sentence(error), extra=about)

    def _free_everywhere(self, key: str) -> Operation[None]:
        for executor in self._executors.values():
            yield from self._free(executor, key)

    def _make_room(self, executor: Executor, version: Version) -> Operation[None]:
        """Evict least recently used versions until the new one fits on the device. Raises ResourceExhausted."""
        budget = self._budget.get(executor.kind, 0)
        if not budget:
            return
        if version.nbytes > budget:
            raise ResourceExhausted(
                f"it takes {version.nbytes / MIB:.0f} MiB and {executor.name} may hold {budget / MIB:.0f} MiB in all"
            )
        while True:
            held = self._held(executor.name)
            free = budget - sum(other.nbytes for other in held)
            if version.nbytes <= free:
                return
            others = [other for other in held if other.source.name != version.source.name]
            if version.nbytes > free + sum(other.nbytes for other in others):
                raise ResourceExhausted(
                    f"it takes {version.nbytes / MIB:.0f} MiB, and beside the other versions of its model "
                    f"{free / MIB:.0f} of {budget / MIB:.0f} MiB are free on {executor.name}"
                )
            victim = min(others, key=lambda other: other.last_used)
            stay_s = victim.came_back + _STAY_S - time.monotonic()
            if stay_s > 0:  # the clients that it was loaded for are about to ask again
                yield partial(time.sleep, stay_s)
            about = event("model_makes_room", victim.title, device=executor.name, room_for=version.title)
            log.info("%s leaves %s to make room for %s", victim.title, executor.name, version.title, extra=about)
            self._registry.evictions[victim.title] += 1
            yield from self.retire(victim, EVICTED)

    def _check_room_for_steps(self, pipeline: Pipeline) -> None:
        """Check that all models of a pipeline find room at a time. Raises FailedPrecondition: they would evict others.

        What is evicted is loaded for the next request: of a pipeline, each would find another one missing, for ever.
        """
        versions = dict(pipelines.step_versions(self._registry, pipeline))
        for executor in self._executors.values():
            budget = self._budget.get(executor.kind, 0)
            nbytes = sum(version.nbytes for version, model in versions.items() if model.may_use(executor.name))
            if 0 < budget < nbytes:
                raise FailedPrecondition(
                    f"{pipeline.label}: steps: their models take {nbytes / MIB:.0f} MiB together, and {executor.name} "
                    f"may hold {budget / MIB:.0f} MiB in all"
                )

    def _audit(self, version: Version, model: Model, reports: Collection[LoadReport]) -> None:
        """Audit a version that can be audited. What was begun before it was unloaded goes on."""
        if not model.audit or any(report.serial or report.random for report in reports):
            self.audits.pop(version, None)
        elif version not in self.audits:
            self.audits[version] = Audit(version, model.audit, self._end_batches, self._give_up_variant)

    def _end_batches(self, version: Version, key: str, why: str) -> None:
        """Called by an audit, on another thread."""
        self._call_soon(partial(version.end_batches, key, why))

    def _give_up_variant(self, version: Version, key: str, why: str) -> None:
        """Called by an audit, on another thread."""

        def give_up() -> None:
            if version.give_up_variant(key, why):
                for executor in self._executors.values():
                    executor.give_up_variant(key)

        self._call_soon(give_up)


def _speaking(title: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function that runs a model's code: what that prints is known to be of this version."""
    speaker.model = title
    return function(*arguments)


def _check_successor(serving: Version, version: Version, model: Model) -> None:
    """Check that a model can answer requests made for the version that serves. Raises FailedPrecondition."""
    difference = signature_difference(serving.model, model) if serving.model is not None else ""
    if difference:
        raise FailedPrecondition(
            f"its signature is not that of version {serving.number}, which serves: {difference}; "
            f"loaded as {version.title} it would be served beside"
        )


def _failed(version: Version, error: BaseException) -> TensorNextError:
    """Note that a version could not be loaded. Returns the reason."""
    # What is wrong with a model's files is not wrong with the request to load it.
    failure = (
        error
        if isinstance(error, (FailedPrecondition, ResourceExhausted, DeadlineExceeded))
        else FailedPrecondition(sentence(error))
    )
    version.loading = False
    if version.state == EVICTED and isinstance(failure, ResourceExhausted):
        version.error = failure.message  # there may be room another time
    elif not version.servable or version.state == EVICTED:
        version.state, version.error = FAILED, failure.message
    return failure


def _as_tried(model: Model, reports: Collection[LoadReport], *, mixes: bool) -> Model:
    """A model as all of its devices can serve it. Args: mixes: requests have been seen to change each other."""
    if mixes or not all(report.batches for report in reports):
        examples = next((report.examples for report in reports if report.examples), model.examples)
        model = replace(model.singly(), examples=examples)
    elif model.ragged is not None and not all(report.joins for report in reports):
        model = replace(model, ragged=model.ragged.apart())
    if any(report.serial for report in reports):
        model = replace(model, replicas=1)
    return model


def _notes(reports: Mapping[str, LoadReport]) -> list[str]:
    """The findings of trials, once if they are the same everywhere."""
    return list(dict.fromkeys(note for report in reports.values() for note in report.notes))
