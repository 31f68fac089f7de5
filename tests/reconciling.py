"""A reconciler and a scheduler for tests, over sources and devices that do what a test says."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.wire import Limits, TensorSpec
from tnxd.deployment.reconciler import Changes, Reconciler
from tnxd.deployment.registry import Registry
from tnxd.deployment.version import READY
from tnxd.executors.execution import Execution, LoadReport
from tnxd.lanes import NO_TEAMS, Teams
from tnxd.models.catalog import Catalog, Entry
from tnxd.models.model import Model
from tnxd.models.variants import Variant
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Device
from tnxd.scheduling.request import Request
from tnxd.scheduling.scheduler import Scheduler

MIB = 1024 * 1024


@dataclass
class FakeSource:
    """Opens when it is told to: `opens` is called on the loading thread."""

    name: str
    version: str
    stamp: str = "a"
    nbytes: int = 0
    format: str = "pt2"
    width: int = 4
    state: str = ""
    variants: tuple[Variant, ...] = ()
    opens: Callable[[], None] = lambda: None

    def open(self, generation: int) -> Model:
        self.opens()
        return Model(
            name=self.name,
            version=self.version,
            inputs=(TensorSpec("x", "FP32", (-1, self.width)),),
            outputs=(TensorSpec("y", "FP32", (-1, 1)),),
            max_batch_size=4,
            factory=object,  # type: ignore[arg-type]
            generation=generation,
            state=self.state,  # type: ignore[arg-type]
            variants=self.variants,
        )


@dataclass
class FakeExecutor:
    """A device that holds keys instead of models. Without a size, its memory is not known."""

    name: str = "cpu"
    kind: str = "cpu"
    description: str = ""
    lanes: int = 1
    teams: Teams = NO_TEAMS
    held: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)
    broken: dict[str, BaseException] = field(default_factory=dict)
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)
    most: int = 0
    memory: int = 0

    def load(self, model: Model) -> LoadReport:
        if model.key in self.broken:
            raise self.broken[model.key]
        if self.memory and self._free() < self.sizes.get(model.name, MIB):
            raise MemoryError("out of memory")
        self.held.add(model.key)
        self.most = max(self.most, len(self.held))
        return LoadReport([(1, 100.0), (4, 200.0)], self.sizes.get(model.name, MIB), **self.trials.get(model.key, {}))

    def touch(self, model: Model) -> None:
        assert model.key in self.held

    def unload(self, key: str) -> None:
        self.held.discard(key)

    def forget_inline(self, key: str) -> None: ...
    def give_up_variant(self, key: str) -> None: ...
    def submit(self, execution: Execution) -> None: ...
    def run_inline(self, execution: Execution) -> None: ...
    def adopt_thread(self) -> None: ...
    def failure(self) -> str:
        return ""

    def memory_mb(self) -> tuple[float, float]:
        return self._free() / MIB, self.memory / MIB

    def _free(self) -> int:
        return self.memory - sum([self.sizes.get(key.partition("@")[0], MIB) for key in self.held])


def raising(error: BaseException) -> Callable[[], None]:
    """A value of `FakeSource.opens` for a version that cannot be opened."""

    def opens() -> None:
        raise error

    return opens


class Bench:
    """A reconciler and what it works on; `run` plays the serving loop."""

    def __init__(self, *, budget_mb: int = 0, executors: tuple[str, ...] = ("cpu",)) -> None:
        self.sources: dict[str, dict[str, FakeSource]] = {}
        self.wanted: dict[str, tuple[str, ...]] = {}
        self.weights: dict[str, dict[str, float]] = {}
        self.shadows: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.scan_error: TensorNextError | None = None
        self.executors = {name: FakeExecutor(name, name.partition(":")[0]) for name in executors}
        self.executor = self.executors[executors[0]]
        self.costs = CostModel()
        devices = [Device(name, each.kind, each.lanes, set()) for name, each in self.executors.items()]
        self.scheduler = Scheduler(devices, self.costs, max_requests=100, max_bytes=10**9)
        self.registry = Registry()
        self.reloads: list[bool] = []
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.reconciler = Reconciler(
            self.registry,
            self.scheduler,
            self.executors,
            self._scan,
            self._calls.put,
            limits=Limits(),
            budget={"cpu": budget_mb * MIB, "cuda": budget_mb * MIB},
            load_timeout_s=60.0,
            on_reload=self.reloads.append,
        )

    def add(self, name: str, version: str, **options: Any) -> FakeSource:
        """Put a version into the catalog; the newest is wanted."""
        source = FakeSource(name, version, **options)
        self.sources.setdefault(name, {})[version] = source
        self.wanted[name] = (max(self.sources[name], key=int),)
        return source

    def _scan(self) -> Catalog:
        if self.scan_error is not None:
            raise self.scan_error
        return Catalog(
            {
                name: Entry(
                    name, dict(sources), self.wanted[name], self.weights.get(name, {}), self.shadows.get(name, "")
                )
                for name, sources in self.sources.items()
            },
            dict(self.failures),
        )

    def run(self, begin: Callable[[Callable[[Any], None]], None]) -> Any:
        """Begin an operation and turn the loop until it is over; returns its outcome."""
        outcomes: list[Any] = []
        begin(outcomes.append)
        while not outcomes:
            self.turn()
        return outcomes[0]

    def turn(self) -> None:
        """One turn of the loop, as soon as there is something to do."""
        try:
            self._calls.get(timeout=0.01)()
        except queue.Empty:
            self.reconciler.poll()

    def run_until_idle(self) -> None:
        """Turn the loop until nothing is under way."""
        while self.reconciler.active:
            self.turn()

    def states(self) -> dict[str, str]:
        return {version.title: version.state for _, version in self.registry}

    def answers(self, name: str) -> str:
        return self.registry.find(name, b"c", "").title

    def shares(self, name: str) -> dict[str, float]:
        """The traffic of every version that has some, 0 to 1."""
        deployment = self.registry.deployments[name]
        return {version.number: deployment.traffic(version) for version, _ in deployment.shares()}

    def request(self, name: str) -> Request:
        """A request that waits for its version's lane."""
        version = self.registry.find(name, b"c", "")
        request = Request(version.key, max_batch_size=4, wanted="cpu")
        self.scheduler.add(request, 0)
        return request

    def finish_all(self) -> None:
        """Run everything that waits."""
        while self.scheduler.queued:
            batches, _ = self.scheduler.next_batches(0)
            for batch in batches:
                self.scheduler.finished(batch, 100.0)


@contextmanager
def loaded_bench() -> Iterator[Bench]:
    """A bench that serves version 1 of `net`; at the end its device holds what is ready, and nothing else."""
    made = Bench()
    made.add("net", "1")
    assert made.run(made.reconciler.start) == Changes(["net@1"], [], {})
    yield made
    assert made.executor.held == {version.key for _, version in made.registry if version.state == READY}


def one_evicted() -> Bench:
    """Room for one of two models: b has taken the place of a."""
    bench = Bench(budget_mb=1)
    for name in ("a", "b"):
        bench.add(name, "1", nbytes=MIB)
    bench.run(bench.reconciler.start)
    return bench
