"""The reconciler: makes the registry true while the daemon serves. It carries out plans, one after the other.

Everything here runs on the serving loop's thread and touches registry and scheduler without a lock. What is to be done
is decided in `tnxd.deployment.plan`; how a version is brought up and retired is in `tnxd.deployment.lifecycle`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, TensorNextError
from tnxctl.protocol.wire import Limits, excerpt, split_title
from tnxd.deployment import pipelines
from tnxd.deployment.lifecycle import Lifecycle
from tnxd.deployment.operations import Done, Operation, OperationRunner
from tnxd.deployment.plan import (
    BringBack,
    BringUp,
    Hold,
    Pin,
    Release,
    Remove,
    Renew,
    Retire,
    Route,
    Step,
    Withdraw,
    plan_load,
    plan_recall,
    plan_removal,
    plan_unload,
    reconcile,
)
from tnxd.deployment.registry import Deployment, Registry
from tnxd.deployment.traffic import check_weights
from tnxd.deployment.version import EVICTED, FAILED, UNLOADED, Version
from tnxd.error_text import sentence
from tnxd.events import event
from tnxd.executors.execution import Executor
from tnxd.models.catalog import Catalog
from tnxd.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)


@dataclass
class Changes:
    """Changes by a reload: NAME@VERSION that came and went; what failed, by title, name or path, with the reason."""

    loaded: list[str] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Reconciler:
    """Loads and unloads versions as the catalog and operators want it.

    Args:
        scheduler, executors: have the same devices, all of them before `start`, and no model yet.
        scan: looks at what could be served; blocks.
        call_soon: has the loop run a function; called from the thread beside it.
        limits, budget, open_processes: see `Lifecycle`.
        load_timeout_s: a step that takes longer has failed.
        on_reload: called with True when a reload begins and with False when it is over.

    Attributes:
        audits: see `Lifecycle`.
    """

    def __init__(
        self,
        registry: Registry,
        scheduler: Scheduler,
        executors: Mapping[str, Executor],
        scan: Callable[[], Catalog],
        call_soon: Callable[[Callable[[], None]], None],
        *,
        limits: Limits,
        budget: Mapping[str, int],
        load_timeout_s: float,
        on_reload: Callable[[bool], None],
        open_processes: Callable[[], None] = lambda: None,
    ) -> None:
        self._registry = registry
        self._scheduler = scheduler
        self._executors = executors
        self._scan = scan
        self._on_reload = on_reload
        self._runner = OperationRunner(scheduler.models, call_soon, load_timeout_s, self._operation_ended)
        self._lifecycle = Lifecycle(
            registry, scheduler, executors, self._runner, call_soon, limits, budget, open_processes
        )
        self.audits = self._lifecycle.audits
        registry.before_change = partial(pipelines.refresh, registry)
        self._reload_asked: list[Done[Changes]] | None = None  # by whom, while one waits

    @property
    def active(self) -> bool:
        """Whether an operation is under way, and `poll` may have something to do."""
        return self._runner.active

    def poll(self) -> None:
        """Go on if what the current operation waits for has come. The loop calls it every turn while `active`."""
        self._runner.poll()

    # --- what can be asked for ---------------------------------------------------------------------------------

    def start(self, done: Done[Changes]) -> None:
        """Load everything for the first time, before any request."""
        self._runner.submit(self._start(), done)

    def reload(self, done: Done[Changes] | None = None) -> None:
        """Look at the catalog again, and load and unload what it says. One that waits already will do."""
        asked = [done] if done is not None else []
        if self._reload_asked is not None:
            self._reload_asked += asked
            return
        self._reload_asked = asked

        def tell_all(outcome: Changes | TensorNextError) -> None:
            for tell in asked:
                tell(outcome)

        self._runner.submit(self._announced_reload(), tell_all)

    def load(self, title: str, done: Done[str]) -> None:
        """Load NAME@VERSION, which gets no traffic unless it is the first, or NAME as the catalog says."""
        self._runner.submit(self._load_title(title), done)

    def unload(self, title: str, done: Done[str]) -> None:
        """Let NAME@VERSION, or all versions of NAME, finish and go."""
        self._runner.submit(self._unload_title(title), done)

    def request_load(self, version: Version) -> None:
        """Load an evicted version, for which a request has come."""
        if not version.loading:
            version.loading = True
            self._runner.submit(self._bring_back(version), lambda outcome: None, urgent=True)  # requests wait for it

    def route(self, name: str, weights: Mapping[str, float], shadow: str) -> None:
        """Split the traffic of a name. Raises as `check_weights` does."""
        deployment = self._registry.deployment(name)
        check_weights(deployment, weights, shadow)
        deployment.route({number: weight for number, weight in weights.items() if weight > 0}, shadow)
        self._registry.rebuild()
        split = excerpt(deployment.weights, 200) if weights else "newest"
        about = event("traffic_routed", name, weights=dict(deployment.weights), shadow=shadow)
        log.info("traffic of %s: %s%s", name, split, f", shadow {shadow}" if shadow else "", extra=about)

    def _operation_ended(self) -> None:
        for version in self.audits.keys() - {version for _, version in self._registry}:
            del self.audits[version]
        self._registry.rebuild()

    # --- operations --------------------------------------------------------------------------------------------

    def _start(self) -> Operation[Changes]:
        changes = yield from self._reload()
        for _, version in self._registry:
            version.loading = False  # whatever was announced and has gone since
            if version.model is not None:
                for executor in self._executors.values():
                    if self._scheduler.models.is_on(executor.name, version.model.key):
                        try:
                            yield partial(executor.touch, version.model)
                        except Exception as error:
                            why = sentence(error)
                            about = event("model_failed_on_device", version.title, device=executor.name, reason=why)
                            log.error("%s on %s: %s", version.title, executor.name, why, extra=about)
        return changes

    def _announced_reload(self) -> Operation[Changes]:
        self._reload_asked = None
        self._on_reload(True)
        try:
            return (yield from self._reload())
        except TensorNextError as error:
            about = event("reload_failed", reason=error.message)
            log.error("nothing was reloaded: %s", error.message, extra=about)
            raise
        finally:
            self._on_reload(False)

    def _reload(self) -> Operation[Changes]:
        catalog = yield from self._refresh()
        changes = Changes(failed=dict(catalog.failures))
        registry = self._registry
        registry.failures = dict(catalog.failures)
        deployments = [registry.register(entry) for entry in catalog.entries.values()]
        held = {deployment: pipelines.held(registry, deployment.name) for deployment in deployments}
        for deployment in deployments:
            yield from self._reconcile(deployment, catalog, changes)
        for name, deployment in list(registry.deployments.items()):
            if name not in catalog.entries and name not in catalog.failures:
                for step in plan_removal(deployment, catalog.failures):
                    yield from self._carry_out(step, deployment, changes)
                if not deployment.versions:
                    del registry.deployments[name]
        for deployment, before in held.items():
            if before - pipelines.held(registry, deployment.name):  # a pipeline has gone, and needs them no more
                yield from self._reconcile(deployment, catalog, changes)
        for what, why in catalog.failures.items():
            log.error("%s cannot be served: %s", what, why, extra=event("model_failed", what, reason=why))
        return changes

    def _load_title(self, title: str) -> Operation[str]:
        name, number = split_title(title)
        catalog = yield from self._refresh()
        entry = catalog.entries.get(name)
        if entry is None:
            if name in catalog.failures:
                raise FailedPrecondition(f"model {name!r} cannot be served: {catalog.failures[name]}")
            raise NotFound(f"no model {name!r}; there are {', '.join(catalog.entries) or 'none'}")
        if number and title in catalog.failures:
            raise FailedPrecondition(f"{title}: {catalog.failures[title]}")
        deployment = self._registry.register(entry)
        changes = Changes()
        if number:
            steps = plan_load(deployment, number)
        else:
            deployment.restore = True
            yield from self._reconcile(deployment, catalog, changes)
            steps = plan_recall(deployment)
        for step in steps:
            yield from self._carry_out(step, deployment, changes)
        for failed, why in changes.failed.items():
            raise FailedPrecondition(f"{failed}: {why}")
        return name

    def _unload_title(self, title: str) -> Operation[str]:
        name, number = split_title(title)
        deployment = self._registry.deployment(name)
        state = deployment.version(number).state if number else ""
        if state == FAILED:
            raise FailedPrecondition(f"model {title!r} is {state}")
        if state == UNLOADED:  # asked for a second time, perhaps, by somebody who has not heard of the first
            return name
        for step in plan_unload(deployment, [number] if number else deployment.versions):
            yield from self._carry_out(step, deployment, Changes())
        return name

    # --- how plans are carried out -----------------------------------------------------------------------------

    def _refresh(self) -> Operation[Catalog]:
        """The catalog of what could be served now. Raises FailedPrecondition: the repository itself is wrong."""
        try:
            catalog: Catalog = yield self._scan
        except (InvalidArgument, PermissionDenied) as error:  # not with the request
            raise FailedPrecondition(error.message) from None
        return catalog

    def _reconcile(self, deployment: Deployment, catalog: Catalog, changes: Changes) -> Operation[None]:
        """Make one name what its entry says. What cannot be loaded is in `failed`, and what served goes on."""
        plan = reconcile(deployment)
        failed: list[str] = []
        for first in plan.before:
            yield from self._carry_out(first, deployment, changes)
        for load in plan.loads:
            try:
                yield from self._carry_out(load, deployment, changes)
            except TensorNextError as error:
                changes.failed[deployment.versions[load.number].title] = error.message
                failed.append(load.number)
        for step in plan.rest(deployment, failed, catalog.failures, pipelines.held(self._registry, deployment.name)):
            yield from self._carry_out(step, deployment, changes)

    def _carry_out(self, step: Step, deployment: Deployment, changes: Changes) -> Operation[None]:
        """Carry out one step of a plan. Raises TensorNextError: a load has failed."""
        match step:
            case BringUp(number, takes_over):
                version = deployment.versions[number]
                yield from self._lifecycle.bring_up(deployment, version, takes_over=takes_over)
                changes.loaded.append(version.title)
            case Renew(number):
                yield from self._renew(deployment, deployment.versions[number])
                changes.loaded.append(deployment.versions[number].title)
            case BringBack(number):
                yield from self._bring_back(deployment.versions[number])
            case Retire(number):
                if (yield from self._lifecycle.retire(deployment.versions[number])):
                    changes.unloaded.append(deployment.versions[number].title)
            case Remove(number):
                del deployment.versions[number]
            case Route(weights, shadow):
                deployment.route(weights, shadow)
                self._registry.rebuild()
            case Hold(weights, implied):
                deployment.hold(weights, implied=implied)
            case Pin(number):
                deployment.pinned.add(number)
            case Withdraw(number):
                deployment.withdraw(number)
            case Release():
                deployment.release()

    def _renew(self, deployment: Deployment, old: Version) -> Operation[None]:
        """The files of a version have changed: the new contents take its place when they are ready."""
        new = Version(deployment.entry.sources[old.number], deployment.next_generation(old.number))
        try:
            yield from self._lifecycle.bring_up(deployment, new, takes_over=True)
        except TensorNextError as error:
            old.error = f"its newer files cannot be loaded: {error.message}"
            raise
        deployment.put(new)
        self._registry.rebuild()
        yield from self._lifecycle.retire(old)

    def _bring_back(self, version: Version) -> Operation[None]:
        """Load an evicted version again, with the files that it has now."""
        version.loading = True
        try:
            catalog = yield from self._refresh()
            deployment = self._registry.deployments.get(version.source.name)
            if deployment is None or version.state != EVICTED:
                return
            entry = catalog.entries.get(deployment.name)
            source = entry.sources.get(version.number, version.source) if entry is not None else version.source
            changed = source.stamp != version.source.stamp
            if changed:
                version.source, version.generation = source, deployment.next_generation(version.number)
                version.mixes = ""  # what was found was about other files
                self.audits.pop(version, None)
            yield from self._lifecycle.bring_up(deployment, version, takes_over=changed)
        finally:
            version.loading = False
