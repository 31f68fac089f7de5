"""Versions that come and go while requests run: the real reconciler and scheduler, over devices that obey a test."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, TensorNextError
from tnxctl.protocol.wire import Limits, TensorSpec
from tnxd.deployment.reconciler import Changes, Reconciler
from tnxd.deployment.registry import Registry
from tnxd.deployment.version import EVICTED, FAILED, READY, UNLOADED
from tnxd.executors.execution import Execution, LoadReport
from tnxd.lanes import NO_TEAMS, Teams
from tnxd.models.catalog import Catalog, Entry
from tnxd.models.model import Model
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Device
from tnxd.scheduling.request import Request
from tnxd.scheduling.scheduler import Scheduler
from unprintable import Unprintable

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
        )


@dataclass
class FakeExecutor:
    """A device that holds keys instead of models."""

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

    def load(self, model: Model) -> LoadReport:
        if model.key in self.broken:
            raise self.broken[model.key]
        self.held.add(model.key)
        self.most = max(self.most, len(self.held))
        return LoadReport([(1, 100.0), (4, 200.0)], self.sizes.get(model.name, MIB), **self.trials.get(model.key, {}))

    def touch(self, model: Model) -> None:
        assert model.key in self.held

    def unload(self, key: str) -> None:
        self.held.discard(key)

    def forget_inline(self, key: str) -> None: ...
    def submit(self, execution: Execution) -> None: ...
    def run_inline(self, execution: Execution) -> None: ...
    def adopt_thread(self) -> None: ...
    def memory_mb(self) -> tuple[float, float]:
        return 0.0, 0.0


def raising(error: BaseException) -> Callable[[], None]:
    """A value of `FakeSource.opens` for a version that cannot be opened."""

    def opens() -> None:
        raise error

    return opens


class Bench:
    """A reconciler and what it works on; `run` plays the serving loop."""

    def __init__(
        self, *, budget_mb: int = 0, load_timeout_s: float = 60.0, executors: tuple[str, ...] = ("cpu",)
    ) -> None:
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
            budget={"cpu": budget_mb * MIB},
            load_timeout_s=load_timeout_s,
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


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    made.add("net", "1")
    assert made.run(made.reconciler.start) == Changes(["net@1"], [], {})
    yield made
    assert made.executor.held == {version.key for _, version in made.registry if version.state == READY}


def test_a_new_version_takes_over_and_the_old_one_is_freed(bench: Bench) -> None:
    bench.add("net", "2")
    assert bench.run(bench.reconciler.reload) == Changes(["net@2"], ["net@1"], {})
    assert bench.states() == {"net@1": UNLOADED, "net@2": READY}
    assert bench.answers("net") == "net@2"
    assert bench.executor.held == {"net@2"}
    assert bench.reloads == [True, False]


def test_the_old_version_finishes_what_it_has(bench: Bench) -> None:
    request = bench.request("net")
    bench.add("net", "2")
    outcomes: list[Any] = []
    bench.reconciler.reload(outcomes.append)
    while bench.answers("net") != "net@2":
        bench.turn()
    assert not outcomes
    assert request.waiting
    assert "net@1" in bench.executor.held
    assert bench.states()["net@1"] == "draining"
    with pytest.raises(FailedPrecondition, match="draining"):
        bench.answers("net@1")
    bench.finish_all()
    while not outcomes:
        bench.turn()
    assert bench.executor.held == {"net@2"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"opens": raising(RuntimeError("these weights are broken"))},
            "these weights are broken",
        ),
        ({"opens": raising(SystemExit(3))}, "SystemExit: 3"),
        ({"opens": raising(NotFound("net/2/model.pt2: no such file"))}, "no such file"),
        ({"width": 5}, "its signature is not that of version 1"),
    ],
)
def test_a_version_that_fails_leaves_the_old_one_serving(bench: Bench, change: dict[str, Any], words: str) -> None:
    bench.add("net", "2", **change)
    changes = bench.run(bench.reconciler.reload)
    assert changes.loaded == changes.unloaded == []
    assert words in changes.failed["net@2"]
    assert bench.states() == {"net@1": READY, "net@2": FAILED}
    assert bench.answers("net") == "net@1"
    with pytest.raises(FailedPrecondition, match="not loaded"):
        bench.answers("net@2")
    # Mended, it takes over with the next look.
    bench.add("net", "2", stamp="b")
    assert bench.run(bench.reconciler.reload) == Changes(["net@2"], ["net@1"], {})


# --- what a trial has found ----------------------------------------------------------------------------------


def test_one_device_where_rows_depend_on_each_other_ends_batches_everywhere() -> None:
    bench = Bench(executors=("cuda:0", "cpu"))
    bench.executors["cpu"].trials["net@1"] = {"batches": False, "notes": ("no batches: why",)}
    bench.add("net", "1")
    bench.run(bench.reconciler.start)
    version = bench.registry.find("net", b"c", "")
    assert version.model is not None
    assert version.model.max_batch_size == 0
    assert version.notes == ("no batches: why",)
    curve = bench.costs.curve("cpu", "net@1", version.model.example_group)
    assert (curve.mean(1), curve.known) == (100.0, True)


def test_a_serial_version_runs_once_at_a_time_and_has_no_audit() -> None:
    bench = Bench()
    bench.executor.trials["net@1"] = {"serial": True, "state": "scratch"}
    bench.add("net", "1")
    bench.add("pure", "1")
    bench.run(bench.reconciler.start)
    serial, pure = (bench.registry.find(name, b"c", "") for name in ("net", "pure"))
    assert (serial.kind, pure.kind) == ("scratch", "pure")
    assert bench.reconciler.audits.keys() == {pure}
    for name in ("net", "pure"):
        bench.request(name)
    placements = bench.scheduler.devices["cpu"].placements
    assert [placements[f"{name}@1"].load.max_lanes for name in ("net", "pure")] == [1, 0]


def test_a_shared_state_is_on_one_device() -> None:
    bench = Bench(executors=("cuda:0", "cpu"))
    bench.executors["cuda:0"].trials["net@1"] = {"serial": True, "state": "shared", "batches": False}
    bench.add("net", "1", state="shared")
    bench.run(bench.reconciler.start)
    assert [executor.held for executor in bench.executors.values()] == [{"net@1"}, set()]


def test_what_could_not_be_warmed_up_takes_nobodys_place(bench: Bench) -> None:
    bench.executor.trials["net@2"] = bench.executor.trials["new@1"] = {"warmed": False, "notes": ("not warmed up: x",)}
    bench.add("net", "2")
    bench.add("new", "1")
    changes = bench.run(bench.reconciler.reload)
    assert changes.loaded == ["new@1"]
    assert "could not be warmed up, and version 1 serves: not warmed up: x" in changes.failed["net@2"]
    assert bench.answers("net") == "net@1"


def test_rows_beyond_what_memory_allows_are_never_tried() -> None:
    bench = Bench()
    bench.executor.trials["net@1"] = {"most_rows": 2}
    bench.add("net", "1")
    bench.run(bench.reconciler.start)
    placement = bench.scheduler.devices["cpu"].placements["net@1"]
    assert placement.row_limit(4) == 2
    for _ in range(1000):
        for _ in range(2):
            bench.request("net")
        bench.finish_all()
    assert placement.row_limit(4) == 2


def test_what_an_audit_has_ended_stays_ended_when_a_version_comes_back() -> None:
    bench = Bench(budget_mb=1)
    bench.add("net", "1")
    bench.run(bench.reconciler.start)
    version = bench.registry.find("net", b"c", "")
    version.end_batches("another", "they mix")
    assert not version.mixes
    version.end_batches(version.key, "they mix")
    version.end_batches(version.key, "again")
    bench.add("other", "1")
    bench.run(bench.reconciler.reload)
    assert version.state == EVICTED
    bench.reconciler.request_load(version)
    bench.run_until_idle()
    assert version.state == READY
    assert version.model is not None
    assert version.model.max_batch_size == 0
    assert version.notes == ("no batches: they mix",)


def test_a_warm_up_that_fails_leaves_nothing_behind(bench: Bench) -> None:
    bench.executor.broken["net@2"] = RuntimeError("out of registers")
    bench.add("net", "2")
    assert "out of registers" in bench.run(bench.reconciler.reload).failed["net@2"]
    assert bench.executor.held == {"net@1"}


def test_a_load_that_never_ends_is_given_up_and_the_next_one_works() -> None:
    bench = Bench(load_timeout_s=0.2)
    bench.add("net", "1")
    bench.run(bench.reconciler.start)
    release = threading.Event()
    bench.add("net", "2", opens=release.wait)
    assert "load_timeout_s, 0.2 s" in bench.run(bench.reconciler.reload).failed["net@2"]
    assert bench.answers("net") == "net@1"
    bench.add("net", "3")
    assert bench.run(bench.reconciler.reload).loaded == ["net@3"]
    release.set()  # what comes of it now interests nobody
    bench.add("net", "4")
    assert bench.run(bench.reconciler.reload).loaded == ["net@4"]
    assert bench.executor.held == {"net@4"}


def test_changed_files_of_a_version_take_its_place(bench: Bench) -> None:
    request = bench.request("net")
    bench.add("net", "1", stamp="b")
    outcomes: list[Any] = []
    bench.reconciler.reload(outcomes.append)
    while bench.registry.find("net", b"c", "").key == "net@1":
        bench.turn()
    assert bench.executor.held == {"net@1", "net@1#1"}
    assert request.model == "net@1"
    bench.finish_all()
    while not outcomes:
        bench.turn()
    assert outcomes == [Changes(["net@1"], [], {})]
    assert bench.executor.held == {"net@1#1"}
    # Files that cannot be loaded leave those that can, and say so.
    bench.add("net", "1", stamp="c", opens=raising(OSError("cut short")))
    assert "cut short" in bench.run(bench.reconciler.reload).failed["net@1"]
    assert "newer files" in bench.registry.describe("net")[1].error
    assert bench.answers("net") == "net@1"


def test_a_version_asked_for_by_number_waits_for_its_traffic(bench: Bench) -> None:
    bench.add("net", "2")
    assert bench.run(lambda done: bench.reconciler.load("net@2", done)) == "net"
    assert bench.answers("net") == "net@1"
    assert bench.answers("net@2") == "net@2"
    bench.reconciler.route("net", {"2": 1.0}, "")
    assert bench.answers("net") == "net@2"
    assert bench.run(bench.reconciler.reload) == Changes([], ["net@1"], {})
    assert bench.run(lambda done: bench.reconciler.unload("net@2", done)) == "net"
    with pytest.raises(FailedPrecondition, match="unloaded"):
        bench.answers("net")


def test_unloading_one_of_two_leaves_all_to_the_other(bench: Bench) -> None:
    bench.add("net", "2")
    bench.run(lambda done: bench.reconciler.load("net@2", done))
    bench.reconciler.route("net", {"1": 95.0, "2": 5.0}, "")
    bench.run(lambda done: bench.reconciler.unload("net@1", done))
    assert bench.answers("net") == "net@2"


def test_traffic_that_nobody_has_a_share_of_goes_to_the_newest_and_to_the_shadow_last(bench: Bench) -> None:
    for number in ("2", "3"):
        bench.add("net", number)
        bench.run(lambda done, number=number: bench.reconciler.load(f"net@{number}", done))
    bench.reconciler.route("net", {"1": 1.0}, "3")
    bench.run(lambda done: bench.reconciler.unload("net@1", done))
    assert bench.answers("net") == "net@2"
    bench.run(lambda done: bench.reconciler.load("net@1", done))
    assert bench.answers("net") == "net@2"  # its share is forgotten
    for number in ("1", "2"):
        bench.run(lambda done, number=number: bench.reconciler.unload(f"net@{number}", done))
    assert bench.answers("net") == "net@3"
    bench.run(lambda done: bench.reconciler.unload("net@3", done))
    with pytest.raises(FailedPrecondition, match="unloaded"):
        bench.answers("net")


@pytest.mark.parametrize(
    ("title", "error", "words"),
    [
        ("none", NotFound, "no model 'none'; there are net"),
        ("net@9", NotFound, "no version '9'"),
        ("typo", FailedPrecondition, "not TOML"),
        ("net@8", FailedPrecondition, "no model file"),
        ("net@x", InvalidArgument, "a whole number from 1"),
    ],
)
def test_what_cannot_be_loaded_says_why(bench: Bench, title: str, error: type[TensorNextError], words: str) -> None:
    bench.failures = {"typo": "typo/model.toml: not TOML", "net@8": "net/8: no model file"}
    outcome = bench.run(lambda done: bench.reconciler.load(title, done))
    assert isinstance(outcome, error)
    assert words in outcome.message


def test_a_model_that_has_gone_is_unloaded_and_one_with_a_mistake_is_not(bench: Bench) -> None:
    bench.add("other", "1")
    bench.run(bench.reconciler.reload)
    del bench.sources["net"]
    bench.failures["net"] = "net/model.toml: unknown key"
    assert bench.run(bench.reconciler.reload) == Changes([], [], bench.failures)
    assert bench.answers("net") == "net@1"
    bench.failures.clear()
    assert bench.run(bench.reconciler.reload) == Changes([], ["net@1"], {})
    with pytest.raises(NotFound, match="there are other"):
        bench.answers("net")


def test_the_least_recently_used_model_makes_room_and_comes_back() -> None:
    bench = Bench(budget_mb=10)
    for name, size in (("a", 4), ("b", 4), ("c", 4)):
        bench.executor.sizes[name] = size * MIB
        bench.add(name, "1", nbytes=size * MIB)
    bench.run(bench.reconciler.start)
    assert sorted(bench.states().values()) == [EVICTED, READY, READY]
    assert bench.states()["a@1"] == EVICTED
    bench.answers("b")
    version = bench.registry.find("a", b"c", "")
    assert version.state == EVICTED
    bench.reconciler.request_load(version)
    bench.reconciler.request_load(version)  # asked for twice, it is loaded once
    bench.run_until_idle()
    assert bench.states() == {"a@1": READY, "b@1": READY, "c@1": EVICTED}
    assert bench.executor.most == 2


def test_a_model_that_can_never_fit_is_refused_with_both_numbers() -> None:
    bench = Bench(budget_mb=10)
    bench.add("small", "1", nbytes=MIB)
    bench.add("large", "1", nbytes=11 * MIB)
    changes = bench.run(bench.reconciler.start)
    assert "it takes 11 MiB and cpu may hold 10 MiB" in changes.failed["large@1"]
    assert bench.answers("small") == "small@1"
    # What its files did not tell, its weights do.
    bench.executor.sizes["sly"] = 12 * MIB
    bench.add("sly", "1", nbytes=MIB)
    assert "it takes 12 MiB and cpu may hold 10 MiB" in bench.run(bench.reconciler.reload).failed["sly@1"]
    assert bench.executor.held == {"small@1"}


def test_a_device_that_cannot_hold_a_model_is_noted_and_the_other_serves() -> None:
    bench = Bench(executors=("cpu", "cuda:0"))
    bench.executors["cuda:0"].broken["net@1"] = RuntimeError("no kernel image")
    bench.add("net", "1")
    assert not bench.run(bench.reconciler.start).failed
    version = bench.registry.describe("net")[1]
    assert version.state == READY
    assert version.notes == ("not on cuda:0: RuntimeError: no kernel image",)


def test_operations_run_one_after_the_other(bench: Bench) -> None:
    outcomes: list[str] = []
    bench.add("net", "2")
    bench.reconciler.load("net@2", lambda outcome: outcomes.append("loaded"))
    bench.reconciler.unload("net@1", lambda outcome: outcomes.append("unloaded"))
    bench.reconciler.reload(lambda outcome: outcomes.append("reloaded"))
    while len(outcomes) < 3:
        bench.turn()
    assert outcomes == ["loaded", "unloaded", "reloaded"]
    assert bench.states() == {"net@1": UNLOADED, "net@2": READY}


def test_operations_that_fail_at_once_are_no_recursion(bench: Bench) -> None:
    release = threading.Event()
    bench.add("net", "2", opens=release.wait)
    outcomes: list[Any] = []
    bench.reconciler.load("net@2", outcomes.append)
    for _ in range(3000):
        bench.reconciler.unload("@", outcomes.append)
    release.set()
    bench.run_until_idle()
    assert len(outcomes) == 3001


def test_a_mistake_in_the_version_that_serves_does_not_unload_it(bench: Bench) -> None:
    del bench.sources["net"]["1"]
    bench.wanted["net"] = ()
    bench.failures["net@1"] = "net/1 can be written by others"
    assert bench.run(bench.reconciler.reload) == Changes([], [], bench.failures)
    assert bench.answers("net") == "net@1"
    del bench.sources["net"]
    assert bench.run(bench.reconciler.reload) == Changes([], [], bench.failures)
    assert bench.answers("net") == "net@1"


def test_a_load_that_ends_after_it_was_given_up_leaves_nothing() -> None:
    bench = Bench(load_timeout_s=0.2)
    release, ended = threading.Event(), threading.Event()
    load = bench.executor.load

    def slow(model: Model) -> LoadReport:
        release.wait()
        ended.set()
        return load(model)

    bench.executor.load = slow  # type: ignore[method-assign]
    bench.add("net", "1")
    assert "load_timeout_s" in bench.run(bench.reconciler.start).failed["net@1"]
    release.set()
    assert ended.wait(10)
    bench.executor.load = load  # type: ignore[method-assign]
    bench.add("other", "1")
    bench.run(bench.reconciler.reload)
    while bench.reconciler.active or bench.executor.held != {"net@1#1", "other@1"}:
        bench.turn()
    assert bench.answers("net") == "net@1"


def one_evicted() -> Bench:
    """Room for one of two models: b has taken the place of a."""
    bench = Bench(budget_mb=1)
    for name in ("a", "b"):
        bench.add(name, "1", nbytes=MIB)
    bench.run(bench.reconciler.start)
    return bench


def test_an_evicted_version_keeps_its_traffic_while_it_drains() -> None:
    bench = one_evicted()
    assert bench.states() == {"a@1": EVICTED, "b@1": READY}
    request = bench.request("b")
    bench.reconciler.request_load(bench.registry.find("a", b"c", ""))
    while bench.states()["b@1"] == READY:
        bench.turn()
    assert request.waiting
    assert bench.answers("b") == "b@1"
    bench.finish_all()
    bench.run_until_idle()
    assert bench.states() == {"a@1": READY, "b@1": EVICTED}


def test_an_evicted_version_comes_back_as_its_files_are_now() -> None:
    bench = one_evicted()
    bench.add("a", "1", nbytes=MIB, stamp="b")
    bench.reconciler.request_load(bench.registry.find("a", b"c", ""))
    bench.run_until_idle()
    assert bench.executor.held == {"a@1#1"}
    assert bench.run(bench.reconciler.reload) == Changes([], [], {})
    bench.reconciler.request_load(bench.registry.find("b", b"c", ""))
    bench.run_until_idle()
    bench.add("a", "1", nbytes=MIB, stamp="c", width=5)
    bench.reconciler.request_load(bench.registry.find("a", b"c", ""))
    bench.run_until_idle()
    assert "signature" in bench.registry.describe("a")[1].error


def test_what_cannot_fit_evicts_nobody() -> None:
    bench = Bench(budget_mb=4)
    for name in ("a", "b"):
        bench.add(name, "1", nbytes=MIB)
        bench.executor.sizes[name] = MIB
    bench.run(bench.reconciler.start)
    bench.add("a", "2", nbytes=4 * MIB)
    assert "beside the other versions" in bench.run(bench.reconciler.reload).failed["a@2"]
    assert bench.states()["b@1"] == READY
    assert bench.answers("a") == "a@1"


def test_a_split_over_different_signatures_is_refused() -> None:
    bench = Bench()
    bench.add("net", "1")
    bench.add("net", "2", width=5)
    bench.wanted["net"] = ("1", "2")
    bench.weights["net"] = {"1": 50.0, "2": 50.0}
    assert "signature" in bench.run(bench.reconciler.start).failed["net@2"]
    assert {bench.registry.find("net", b"c", str(key)).number for key in range(20)} == {"1"}


def test_loading_a_name_restores_its_traffic(bench: Bench) -> None:
    bench.add("net", "2")
    bench.wanted["net"] = ("1", "2")
    bench.weights["net"] = {"1": 95.0, "2": 5.0}
    bench.run(bench.reconciler.reload)
    bench.run(lambda done: bench.reconciler.unload("net", done))
    bench.run(lambda done: bench.reconciler.load("net", done))
    assert bench.registry.deployments["net"].weights == {"1": 95.0, "2": 5.0}


def test_a_load_by_name_that_fails_leaves_the_traffic_as_it_was(bench: Bench) -> None:
    bench.add("net", "2")
    bench.run(lambda done: bench.reconciler.load("net@2", done))
    bench.add("net", "3", opens=raising(OSError("broken")))
    assert "broken" in bench.run(lambda done: bench.reconciler.load("net", done)).message
    assert bench.states() == {"net@1": READY, "net@2": READY, "net@3": FAILED}
    assert bench.shares("net") == {"1": 1.0}
    bench.add("net", "3", stamp="mended")
    assert bench.run(lambda done: bench.reconciler.load("net", done)) == "net"
    assert bench.shares("net") == {"3": 1.0}
    assert bench.states() == {"net@1": UNLOADED, "net@2": READY, "net@3": READY}  # 2 was asked for by number


def test_a_reload_with_other_traffic_that_fails_leaves_it_as_it_was() -> None:
    bench = Bench()
    for number in ("1", "2"):
        bench.add("net", number)
    bench.wanted["net"], bench.weights["net"] = ("1", "2"), {"1": 75.0, "2": 25.0}
    bench.run(bench.reconciler.start)
    bench.weights["net"] = {}
    bench.add("net", "3", opens=raising(OSError("broken")))
    for _ in range(2):  # however often it fails
        assert "broken" in bench.run(bench.reconciler.reload).failed["net@3"]
        assert bench.states() == {"net@1": READY, "net@2": READY, "net@3": FAILED}
        assert bench.shares("net") == {"1": 0.75, "2": 0.25}
    bench.add("net", "3", stamp="mended")
    assert bench.run(bench.reconciler.reload) == Changes(["net@3"], ["net@1", "net@2"], {})
    assert bench.shares("net") == {"3": 1.0}


@pytest.mark.parametrize(
    ("weights", "shadow", "shares"),
    [
        ({"1": 90.0, "2": 5.0, "3": 5.0}, "", {"1": 0.9, "2": 0.05, "3": 0.05}),
        ({"1": 1.0}, "2", {"1": 1.0}),
        ({}, "3", {"2": 1.0}),
    ],
)
def test_traffic_changes_when_all_that_it_needs_is_loaded(
    bench: Bench, weights: dict[str, float], shadow: str, shares: dict[str, float]
) -> None:
    bench.weights["net"], bench.shadows["net"] = weights, shadow
    meanwhile: list[dict[str, float]] = []
    bench.add("net", "2", opens=lambda: meanwhile.append(bench.shares("net")))
    bench.add("net", "3", opens=lambda: meanwhile.append(bench.shares("net")))
    bench.wanted["net"] = ("1", "2", "3")
    bench.executor.broken["net@3"] = RuntimeError("out of registers")
    failed = bench.run(bench.reconciler.reload).failed
    assert list(failed) == ["net@3"]
    assert bench.shares("net") == ({"1": 1.0} if "3" in (*weights, shadow) or not weights else shares)
    del bench.executor.broken["net@3"]
    assert not bench.run(bench.reconciler.reload).failed
    assert bench.shares("net") == shares
    assert bench.registry.deployments["net"].shadow == shadow
    assert meanwhile[:2] == [{"1": 1.0}] * 2


def test_traffic_that_is_routed_during_a_reload_stays(bench: Bench) -> None:
    release = threading.Event()
    bench.add("net", "2", opens=release.wait)
    bench.weights["net"] = {"2": 1.0}
    outcomes: list[Any] = []
    bench.reconciler.reload(outcomes.append)
    while "net@2" not in bench.states() or not bench.registry.deployments["net"].versions["2"].loading:
        bench.turn()
    bench.reconciler.route("net", {"1": 1.0}, "")
    release.set()
    while not outcomes:
        bench.turn()
    assert outcomes == [Changes(["net@2"], [], {})]
    assert bench.shares("net") == {"1": 1.0}


def test_what_is_loaded_by_number_does_not_undo_the_catalog_traffic(bench: Bench) -> None:
    bench.add("net", "2")
    bench.wanted["net"] = ("1", "2")
    bench.run(bench.reconciler.reload)
    bench.add("net", "3")
    bench.wanted["net"] = ("1", "2")
    bench.run(lambda done: bench.reconciler.load("net@3", done))
    assert bench.shares("net") == {"2": 1.0}
    bench.weights["net"] = {"1": 75.0, "2": 25.0}
    bench.run(bench.reconciler.reload)
    bench.run(lambda done: bench.reconciler.unload("net@3", done))
    assert bench.shares("net") == {"1": 0.75, "2": 0.25}


@pytest.mark.parametrize("other", [True, False])  # whether the name has another version meanwhile
def test_a_version_that_comes_again_does_not_meet_a_load_of_it_that_was_given_up(other: bool) -> None:
    bench = Bench(load_timeout_s=0.2)
    release = threading.Event()
    load, unload = bench.executor.load, bench.executor.unload
    freed: list[str] = []

    def slow(model: Model) -> LoadReport:
        release.wait()
        return load(model)

    def free(key: str) -> None:
        unload(key)
        freed.append(key)

    if other:
        bench.add("net", "1")
        bench.run(bench.reconciler.start)
    bench.executor.load = slow  # type: ignore[method-assign]
    source = bench.add("net", "2")
    assert "load_timeout_s" in bench.run(bench.reconciler.reload).failed["net@2"]
    bench.executor.load = load  # type: ignore[method-assign]
    del bench.sources["net"]["2"]
    bench.wanted["net"] = ("1",)
    if not other:
        del bench.sources["net"]
    bench.run(bench.reconciler.reload)
    assert "net@2" not in bench.states()
    bench.sources.setdefault("net", {})["2"] = source
    bench.wanted["net"] = ("2",)
    assert bench.run(bench.reconciler.reload).loaded == ["net@2"]
    bench.executor.unload = free  # type: ignore[method-assign]
    release.set()
    while "net@2" not in freed:  # what came too late
        bench.turn()
    assert bench.executor.held == {bench.registry.find("net", b"c", "").key} == {"net@2#1"}


@pytest.mark.parametrize("error", [InvalidArgument("net/model.toml: dtype"), PermissionDenied("net/2 is writable")])
def test_what_is_wrong_with_files_is_not_wrong_with_the_request(bench: Bench, error: TensorNextError) -> None:
    bench.add("net", "2", opens=raising(error))
    outcome = bench.run(lambda done: bench.reconciler.load("net@2", done))
    assert (type(outcome), outcome.message) == (FailedPrecondition, error.message)
    bench.scan_error = error
    for begin in (bench.reconciler.reload, lambda done: bench.reconciler.load("net@2", done)):
        outcome = bench.run(begin)
        assert (type(outcome), outcome.message) == (FailedPrecondition, error.message)


def test_what_was_held_back_for_a_version_by_number_ends_with_it(bench: Bench) -> None:
    bench.add("net", "2")
    bench.run(lambda done: bench.reconciler.load("net@2", done))
    bench.run(lambda done: bench.reconciler.unload("net@2", done))
    bench.add("net", "3")
    bench.run(bench.reconciler.reload)
    assert bench.answers("net") == "net@3"


def test_reloads_that_nobody_waits_for_become_one(bench: Bench) -> None:
    for _ in range(100):
        bench.reconciler.reload()
    bench.run_until_idle()
    assert len(bench.reloads) <= 4


def test_a_device_that_fails_to_free_does_not_stop_the_rest(bench: Bench) -> None:
    unload = bench.executor.unload

    def broken(key: str) -> None:
        unload(key)
        raise RuntimeError("the device is gone")

    bench.executor.unload = broken  # type: ignore[method-assign]
    bench.add("net", "2")
    assert bench.run(bench.reconciler.reload) == Changes(["net@2"], ["net@1"], {})
    assert bench.states() == {"net@1": UNLOADED, "net@2": READY}


def test_a_version_whose_way_back_was_barred_once_comes_back_later() -> None:
    bench = one_evicted()
    bench.scan_error = PermissionDenied("models can be written by others")
    bench.reconciler.request_load(bench.registry.find("a", b"c", ""))
    bench.run_until_idle()
    assert bench.states()["a@1"] == EVICTED
    bench.scan_error = None
    bench.reconciler.request_load(bench.registry.find("a", b"c", ""))
    bench.run_until_idle()
    assert bench.states()["a@1"] == READY


def test_a_version_asked_for_by_number_that_has_gone_is_no_obstacle(bench: Bench) -> None:
    bench.add("net", "2")
    bench.run(lambda done: bench.reconciler.load("net@2", done))
    del bench.sources["net"]["2"]
    bench.wanted["net"] = ("1",)
    bench.run(bench.reconciler.reload)
    assert bench.states() == {"net@1": READY}
    assert bench.run(lambda done: bench.reconciler.unload("net@1", done)) == "net"


def test_an_exception_that_cannot_say_what_it_is(bench: Bench) -> None:
    bench.add("net", "2", opens=raising(Unprintable()))
    assert "Unprintable" in bench.run(bench.reconciler.reload).failed["net@2"]
    assert not bench.registry.deployments["net"].versions["2"].loading
