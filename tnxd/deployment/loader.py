"""Make the registry true while the daemon serves: load, warm up, swap, let the old finish, free.

Everything here runs on the serving loop's thread and touches registry and scheduler without a lock. An operation is a
generator; what blocks it yields, as a function, and gets the result back when that has run on a thread beside the loop.
So an operation reads from top to bottom, and between two of its steps the loop serves. One runs at a time.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from tnxctl.protocol.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    TensorNextError,
)
from tnxctl.protocol.wire import Limits, excerpt, split_title
from tnxd.deployment.audit import Audit
from tnxd.deployment.registry import (
    DRAINING,
    EVICTED,
    FAILED,
    READY,
    UNLOADED,
    Deployment,
    Registry,
    Version,
    check_weights,
    signature_difference,
)
from tnxd.error_text import sentence
from tnxd.executors.execution import SHARED, Executor, LoadReport
from tnxd.models.catalog import Catalog
from tnxd.models.model import Model
from tnxd.models.sizes import check_message_sizes
from tnxd.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

_MIB = 1024 * 1024

# How long a version that came back for a request stays at least. Its clients ask again within a fraction of that.
_STAY_S = 0.5

T = TypeVar("T")


@dataclass(frozen=True)
class _Drained:
    """A wish of an operation: to go on once no request of a model is waiting or running."""

    key: str


Operation = Generator[Callable[[], Any] | _Drained, Any, T]
Done = Callable[[T | TensorNextError], None]


@dataclass
class Changes:
    """Changes by a reload: NAME@VERSION that came and went; what failed, by title, name or path, with the reason."""

    loaded: list[str] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Loader:
    """Runs operations, one after the other.

    Args:
        scheduler, executors: have the same devices, all of them before `start`, and no model yet.
        scan: looks at what could be served; blocks.
        call_soon: has the loop run a function; called from the thread beside it.
        limits: of messages; what cannot be asked for within them is not loaded.
        budget: bytes that the weights of all models may take on a device, by kind of device; no limit without an entry.
        load_timeout_s: a step that takes longer has failed. Its thread is left to itself: Python cannot end it.
        on_reload: called with True when a reload begins and with False when it is over.
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
    ) -> None:
        self._registry = registry
        self._scheduler = scheduler
        self._executors = executors
        self._scan = scan
        self._call_soon = call_soon
        self._limits = limits
        self._budget = budget
        self._timeout_s = load_timeout_s
        self._on_reload = on_reload
        self._waiting: deque[tuple[Operation[Any], Done[Any]]] = deque()
        self._current: tuple[Operation[Any], Done[Any]] | None = None
        self._drained: _Drained | None = None
        self._inbox: queue.SimpleQueue[tuple[int, Callable[[], Any]] | None] | None = None
        self._step = 0
        self._late = 0
        self._given_up: dict[int, str] = {}
        self._reload_asked: list[Done[Changes]] | None = None  # by whom, while one waits
        self._step_until = float("inf")

    @property
    def active(self) -> bool:
        """Whether an operation is under way, and `poll` may have something to do."""
        return self._current is not None

    # --- what can be asked for ---------------------------------------------------------------------------------

    def start(self, done: Done[Changes]) -> None:
        """The first load of everything, before any request."""
        self._submit(self._start(), done)

    def reload(self, done: Done[Changes] | None = None) -> None:
        """Look at the catalogue again, and load and unload what it says. One that waits already will do."""
        asked = [done] if done is not None else []
        if self._reload_asked is not None:
            self._reload_asked += asked
            return
        self._reload_asked = asked

        def tell_all(outcome: Changes | TensorNextError) -> None:
            for tell in asked:
                tell(outcome)

        self._submit(self._announced_reload(), tell_all)

    def load(self, title: str, done: Done[str]) -> None:
        """Load NAME@VERSION, which gets no traffic unless it is the first, or NAME as the catalogue says."""
        self._submit(self._load_title(title), done)

    def unload(self, title: str, done: Done[str]) -> None:
        """Let NAME@VERSION, or all versions of NAME, finish and go."""
        self._submit(self._unload_title(title), done)

    def request_load(self, version: Version) -> None:
        """Load an evicted version, for which a request has come."""
        if not version.loading:
            version.loading = True
            self._waiting.appendleft((self._bring_back(version), lambda outcome: None))  # requests wait for it
            self._go_on()

    def route(self, name: str, weights: Mapping[str, float], shadow: str) -> None:
        """Split the traffic of a name. Raises as `check_weights` does."""
        deployment = self._registry.deployment(name)
        check_weights(deployment, weights, shadow)
        deployment.route({number: weight for number, weight in weights.items() if weight > 0}, shadow)
        self._registry.rebuild()
        split = excerpt(deployment.weights, 200) if weights else "newest"
        log.info("traffic of %s: %s%s", name, split, f", shadow {shadow}" if shadow else "")

    # --- how operations run ------------------------------------------------------------------------------------

    def _submit(self, operation: Operation[T], done: Done[T]) -> None:
        self._waiting.append((operation, done))
        self._go_on()

    def _go_on(self) -> None:
        """Begin what waits, as long as nothing is under way. A loop: many may fail at their first step."""
        while self._current is None and self._waiting:
            self._current = self._waiting.popleft()
            self._advance(partial(self._current[0].send, None))

    def _advance(self, resume: Callable[[], Callable[[], Any] | _Drained]) -> None:
        """Let the current operation go on up to its next step."""
        assert self._current is not None
        _, done = self._current
        self._step += 1
        self._step_until = float("inf")
        try:
            step = resume()
        except StopIteration as stop:
            self._end(done, stop.value)
        except TensorNextError as error:
            self._end(done, error)
        except Exception as error:
            log.exception("loading")
            self._end(done, FailedPrecondition(sentence(error)))
        else:
            self._step_until = time.monotonic() + self._timeout_s
            if isinstance(step, _Drained):
                self._drained = step
                self.poll()
            else:
                if self._inbox is None:
                    self._inbox = queue.SimpleQueue()
                    threading.Thread(target=self._work, args=(self._inbox,), name="loading", daemon=True).start()
                self._inbox.put((self._step, step))

    def _end(self, done: Done[Any], outcome: Any) -> None:
        self._registry.rebuild()
        try:
            done(outcome)
        except Exception:
            log.exception("answering for an operation")
        self._current = None

    def poll(self) -> None:
        """Go on if what the current operation waits for has come. The loop calls it every turn while `active`."""
        if self._drained is not None and not self._scheduler.outstanding(self._drained.key):
            self._drained = None
            self._resume(None, None)
        elif self._drained is not None and self._scheduler.is_hung(self._drained.key):
            self._drained = None
            self._resume(None, DeadlineExceeded("what is left of it hangs"))
        elif self._current is not None and time.monotonic() > self._step_until:
            if self._drained is None and self._inbox is not None:
                self._inbox.put(None)  # its thread is stuck in a model's code; should that end, it ends, too
                self._inbox = None
            self._late = self._step
            self._drained = None
            self._resume(None, DeadlineExceeded(f"it took longer than load_timeout_s, {self._timeout_s:g} s"))

    def _resume(self, result: Any, error: BaseException | None) -> None:
        assert self._current is not None
        operation = self._current[0]
        self._advance(partial(operation.send, result) if error is None else partial(operation.throw, error))
        self._go_on()

    def _work(self, inbox: queue.SimpleQueue[tuple[int, Callable[[], Any]] | None]) -> None:
        """The thread beside the loop."""
        while True:
            task = inbox.get()
            if task is None:
                return
            number, step = task
            result: Any = None
            error: BaseException | None = None
            try:
                result = step()
            except Exception as raised:
                error = raised
            except BaseException as raised:  # a model's code may raise anything; GeneratorExit would end an operation
                error = FailedPrecondition(sentence(raised))
            self._call_soon(partial(self._step_done, number, result, error))
            del task, step, result, error  # hold no model's memory while waiting for the next

    def _step_done(self, number: int, result: Any, error: BaseException | None) -> None:
        if number == self._step and self._current is not None:
            self._resume(result, error)
        elif number in self._given_up:  # it has come to an end after all: free what it made
            self._submit(self._free_all(self._given_up.pop(number)), lambda outcome: None)

    # --- operations --------------------------------------------------------------------------------------------

    def _start(self) -> Operation[Changes]:
        changes = yield from self._reload()
        for _, version in self._registry:
            version.loading = False  # whatever was announced and has gone since
            if version.model is not None:
                for executor in self._executors.values():
                    if self._scheduler.has_model(executor.name, version.model.key):
                        try:
                            yield partial(executor.touch, version.model)
                        except Exception as error:
                            log.error("%s on %s: %s", version.title, executor.name, sentence(error))
        return changes

    def _announced_reload(self) -> Operation[Changes]:
        self._reload_asked = None
        self._on_reload(True)
        try:
            return (yield from self._reload())
        except TensorNextError as error:
            log.error("nothing was reloaded: %s", error.message)
            raise
        finally:
            self._on_reload(False)

    def _reload(self) -> Operation[Changes]:
        catalog = yield from self._look()
        changes = Changes(failed=dict(catalog.failures))
        registry = self._registry
        registry.failures = dict(catalog.failures)
        for deployment in [registry.register(entry) for entry in catalog.entries.values()]:
            yield from self._follow(deployment, changes, catalog.failures)
        for name, deployment in list(registry.deployments.items()):
            # It has gone; a mistake in what is there would be no reason to stop serving it.
            if name not in catalog.entries and name not in catalog.failures:
                for number, version in list(deployment.versions.items()):
                    if version.title not in catalog.failures or not version.servable:
                        yield from self._retire(version, UNLOADED, changes)
                        del deployment.versions[number]
                if not deployment.versions:
                    del registry.deployments[name]
        for what, why in catalog.failures.items():
            log.error("%s cannot be served: %s", what, why)
        return changes

    def _follow(self, deployment: Deployment, changes: Changes, failures: Mapping[str, str]) -> Operation[None]:
        """Make one name what its entry says. What cannot be loaded is in `failed`, and what served goes on."""
        entry = deployment.entry
        serving = {version.number: weight for version, weight in deployment.shares()}
        if deployment.restore and not serving:
            deployment.route(entry.weights, entry.shadow)
        restore = deployment.restore
        weights, shadow = (entry.weights, entry.shadow) if restore else (deployment.weights, deployment.shadow)
        if restore and (weights or shadow) and not deployment.weights:
            deployment.weights = dict(serving)  # what comes up now may get less than all of it, or nothing
        wanted = {*entry.wanted, *deployment.pinned, *weights, shadow} & entry.sources.keys()
        for number, version in [item for item in deployment.versions.items() if item[0] in wanted]:
            if version.servable and version.source.stamp == entry.sources[number].stamp:
                continue
            # Whether requests for the name alone will reach it, or copies of them.
            answers = not weights or number in (*weights, shadow)
            try:
                if version.servable:
                    yield from self._renew(deployment, version, changes)
                else:
                    yield from self._bring_up(deployment, version, takes_over=answers)
                    changes.loaded.append(version.title)
            except TensorNextError as error:
                changes.failed[version.title] = error.message
                wanted = wanted | serving.keys()
                restore = restore and not answers
        if restore and deployment.restore:
            deployment.route(weights, shadow)
            self._registry.rebuild()
        wanted = wanted | {*deployment.weights, deployment.shadow} & entry.sources.keys()  # as routed meanwhile
        for number, version in list(deployment.versions.items()):
            if number not in wanted and not (version.servable and version.title in failures):
                yield from self._retire(version, UNLOADED, changes)
            if number not in entry.sources and version.state == UNLOADED:
                del deployment.versions[number]

    def _renew(self, deployment: Deployment, old: Version, changes: Changes) -> Operation[None]:
        """The files of a version have changed: the new contents take its place when they are ready."""
        new = Version(deployment.entry.sources[old.number], deployment.next_generation(old.number))
        try:
            yield from self._bring_up(deployment, new, takes_over=True)
        except TensorNextError as error:
            old.error = f"its newer files cannot be loaded: {error.message}"
            raise
        deployment.put(new)
        self._registry.rebuild()
        changes.loaded.append(new.title)
        yield from self._retire(old, UNLOADED, Changes())

    def _load_title(self, title: str) -> Operation[str]:
        name, number = split_title(title)
        catalog = yield from self._look()
        entry = catalog.entries.get(name)
        if entry is None:
            if name in catalog.failures:
                raise FailedPrecondition(f"model {name!r} cannot be served: {catalog.failures[name]}")
            raise NotFound(f"no model {name!r}; there are {', '.join(catalog.entries) or 'none'}")
        changes = Changes()
        if not number:
            deployment = self._registry.register(entry)
            deployment.restore = True
            yield from self._follow(deployment, changes, catalog.failures)
            for version in [deployment.versions[wanted] for wanted in entry.wanted]:
                if version.state == EVICTED:
                    yield from self._bring_back(version)
            for failed, why in changes.failed.items():
                raise FailedPrecondition(f"{failed}: {why}")
            return name
        if title in catalog.failures:
            raise FailedPrecondition(f"{title}: {catalog.failures[title]}")
        deployment = self._registry.register(entry)
        version = deployment.sole(number)
        serving = deployment.shares()
        if version.servable and version.source.stamp != entry.sources[number].stamp:
            yield from self._renew(deployment, version, changes)
        elif version.state == EVICTED:
            yield from self._bring_back(version)
        elif not version.servable:
            yield from self._bring_up(deployment, version, takes_over=False)
            if serving and not deployment.weights:
                # Asked for by number, it waits until traffic is routed to it.
                deployment.weights = {other.number: weight for other, weight in serving}
                deployment.implied = True
        deployment.pinned.add(number)
        return name

    def _unload_title(self, title: str) -> Operation[str]:
        name, number = split_title(title)
        deployment = self._registry.deployment(name)
        versions = [deployment.sole(number)] if number else list(deployment.versions.values())
        if number and versions[0].state in (UNLOADED, FAILED):
            raise FailedPrecondition(f"model {title!r} is {versions[0].state}")
        for version in versions:
            deployment.pinned.discard(version.number)
            deployment.weights.pop(version.number, None)
            if deployment.shadow == version.number:
                deployment.shadow = ""
            yield from self._retire(version, UNLOADED, Changes())
        waiting = [each for each in deployment.versions.values() if each.number in deployment.pinned and each.servable]
        if deployment.implied and not waiting:
            deployment.weights, deployment.implied = {}, False
        return name

    def _bring_back(self, version: Version) -> Operation[None]:
        """Load an evicted version again, with the files that it has now."""
        version.loading = True
        try:
            catalog = yield from self._look()
            deployment = self._registry.deployments.get(version.source.name)
            if deployment is None or version.state != EVICTED:
                return
            entry = catalog.entries.get(deployment.name)
            source = entry.sources.get(version.number, version.source) if entry is not None else version.source
            changed = source.stamp != version.source.stamp
            if changed:
                version.source, version.generation = source, deployment.next_generation(version.number)
                version.mixes, version.audit = "", None  # what was found was about other files
            yield from self._bring_up(deployment, version, takes_over=changed)
        finally:
            version.loading = False

    # --- steps of operations -----------------------------------------------------------------------------------

    def _look(self) -> Operation[Catalog]:
        """The catalog of what could be served now. Raises FailedPrecondition: the repository itself is wrong."""
        try:
            catalog: Catalog = yield self._scan
        except (InvalidArgument, PermissionDenied) as error:  # not with the request
            raise FailedPrecondition(error.message) from None
        return catalog

    def _bring_up(self, deployment: Deployment, version: Version, *, takes_over: bool) -> Operation[None]:
        """Load a version on its devices and warm it up. It is READY then, or nothing of it is left.

        Args:
            takes_over: it will get the traffic of the version that serves: their signatures must agree.

        Raises:
            TensorNextError: whatever went wrong, as a sentence.
        """
        began = time.monotonic()
        version.loading = True
        reports: dict[str, LoadReport] = {}
        try:
            model: Model = yield partial(version.source.open, version.generation)
            check_message_sizes(model, self._limits)
            serving = deployment.shares()
            if takes_over and serving and serving[0][0].model is not None:
                difference = signature_difference(serving[0][0].model, model)
                if difference:
                    raise FailedPrecondition(
                        f"its signature is not that of version {serving[0][0].number}, which serves: {difference}; "
                        f"loaded as {version.title} it would be served beside"
                    )
            failures: dict[str, str] = {}
            for name, executor in self._executors.items():
                if not model.may_use(name) or self._scheduler.devices[name].error:
                    continue
                yield from self._make_room(executor, version)
                try:
                    report: LoadReport = yield partial(executor.load, model)
                except BaseException as error:
                    if not isinstance(error, TensorNextError):  # those are logged where they come from
                        log.error("%s on %s", version.title, name, exc_info=error)
                    failures[name] = sentence(error)
                    if isinstance(error, DeadlineExceeded):
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
            if takes_over and serving and not all(report.warmed for report in reports.values()):
                raise FailedPrecondition(
                    f"it could not be warmed up, and version {serving[0][0].number} serves: {_notes(reports)[0]}"
                )
            model = _as_tried(model, reports.values(), mixes=bool(version.mixes))
        except BaseException as error:
            for name in reports:
                yield from self._free(self._executors[name], version.key)
            if isinstance(error, DeadlineExceeded):
                # The thread that was given up may yet write under the old key.
                self._given_up[self._late] = version.key
                version.generation = deployment.next_generation(version.number)
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
            log.error("%s cannot be loaded: %s", version.title, failure.message)
            raise failure from None
        for name in reports:
            self._scheduler.add_model(
                name,
                model.key,
                group=model.example_group,
                costs=[(rows, micros) for rows, micros in reports[name].costs if model.max_batch_size or rows == 1],
                safe_rows=reports[name].safe_rows,
                most_rows=reports[name].most_rows,
            )
        self._scheduler.set_lane_limit(model.key, model.replicas)
        version.model = model
        version.audit = self._audit(version, model, reports.values())
        version.notes = (
            *model.notes,
            *_notes(reports),
            *((f"no batches: {version.mixes}",) if version.mixes else ()),
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
        log.info("%s is loaded on %s, %.1f s", version.title, ", ".join(reports), version.load_s)

    def _retire(self, version: Version, state: str, changes: Changes) -> Operation[None]:
        """Send nothing more to a version, let it finish what it has, free it."""
        if not version.servable:
            if version.state == FAILED:
                version.state = UNLOADED
            return
        held = version.state == READY
        # One that is evicted keeps its traffic: a request that comes while it drains is told to come back.
        version.state = EVICTED if state == EVICTED else DRAINING
        self._registry.rebuild()
        changes.unloaded.append(version.title)
        assert version.model is not None
        key = version.model.key
        if held:
            try:
                yield _Drained(key)
            except DeadlineExceeded:
                log.error("%s: a batch hangs, its memory is not freed", version.title)
                held = False
                # What still runs or waits has the old key: other contents must not answer it.
                version.generation = self._registry.deployments[version.source.name].next_generation(version.number)
            self._scheduler.remove_model(key)
        if held:
            self._scheduler.forget(key)
            for executor in self._executors.values():
                executor.forget_inline(key)
                yield from self._free(executor, key)
        version.state = state
        self._registry.rebuild()
        log.info("%s is %s", version.title, state)

    def _free(self, executor: Executor, key: str) -> Operation[None]:
        """Unload, from a device that may be lost."""
        try:
            yield partial(executor.unload, key)
        except Exception as error:
            log.error("%s is not freed on %s: %s", key, executor.name, sentence(error))

    def _free_all(self, key: str) -> Operation[None]:
        for executor in self._executors.values():
            yield from self._free(executor, key)

    def _make_room(self, executor: Executor, version: Version) -> Operation[None]:
        """Evict least recently used versions until the new one fits on the device. Raises ResourceExhausted."""
        budget = self._budget.get(executor.kind, 0)
        if not budget:
            return
        if version.nbytes > budget:
            raise ResourceExhausted(
                f"it takes {version.nbytes / _MIB:.0f} MiB and {executor.name} may hold {budget / _MIB:.0f} MiB in all"
            )
        while True:
            held = [
                other
                for _, other in self._registry
                if other.state == READY
                and other.model is not None
                and self._scheduler.has_model(executor.name, other.model.key)
            ]
            free = budget - sum(other.nbytes for other in held)
            if version.nbytes <= free:
                return
            others = [other for other in held if other.source.name != version.source.name]
            if version.nbytes > free + sum(other.nbytes for other in others):
                raise ResourceExhausted(
                    f"it takes {version.nbytes / _MIB:.0f} MiB, and beside the other versions of its model "
                    f"{free / _MIB:.0f} of {budget / _MIB:.0f} MiB are free on {executor.name}"
                )
            victim = min(others, key=lambda other: other.last_used)
            stay_s = victim.came_back + _STAY_S - time.monotonic()
            if stay_s > 0:  # the clients that it was loaded for are about to ask again
                yield partial(time.sleep, stay_s)
            log.info("%s leaves %s to make room for %s", victim.title, executor.name, version.title)
            yield from self._retire(victim, EVICTED, Changes())

    def _audit(self, version: Version, model: Model, reports: Collection[LoadReport]) -> Audit | None:
        """The audit of a version that can be audited, which goes on if there was one before."""
        if not model.audit or any(report.serial or report.random for report in reports):
            return None
        return version.audit or Audit(version, model.audit, self._end_batches)

    def _end_batches(self, version: Version, key: str, why: str) -> None:
        """Called by an audit, on another thread."""
        self._call_soon(partial(version.end_batches, key, why))


def _as_tried(model: Model, reports: Collection[LoadReport], *, mixes: bool) -> Model:
    """A model as all of its devices can serve it. Args: mixes: requests have been seen to change each other."""
    if mixes or not all(report.batches for report in reports):
        examples = next((report.examples for report in reports if report.examples), model.examples)
        model = replace(model.unbatched(), examples=examples)
    if any(report.serial for report in reports):
        model = replace(model, replicas=1)
    return model


def _notes(reports: Mapping[str, LoadReport]) -> list[str]:
    """The findings of trials, once if they are the same everywhere."""
    return list(dict.fromkeys(note for report in reports.values() for note in report.notes))
