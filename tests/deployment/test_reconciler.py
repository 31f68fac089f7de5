"""Versions that come and go while requests run: the real reconciler and scheduler, over devices that obey a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from reconciling import MIB, Bench, loaded_bench, one_evicted, raising
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, TensorNextError
from tnxd.deployment.reconciler import Changes
from tnxd.deployment.version import EVICTED, FAILED, READY, UNLOADED
from tnxd.models.variants import Variant
from unprintable import Unprintable


@pytest.fixture
def bench() -> Iterator[Bench]:
    with loaded_bench() as made:
        yield made


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


def test_a_variant_that_an_audit_has_ended_stays_ended_when_a_version_comes_back() -> None:
    bench = Bench(budget_mb=1)
    bench.add("net", "1").variants = (Variant("faster", ("cpu",), "", lambda build, workshop: build()),)
    bench.executor.trials["net@1"] = {"variant": "faster"}
    bench.run(bench.reconciler.start)
    version = bench.registry.find("net", b"c", "")
    assert not version.give_up_variant("another", "it answered otherwise")
    assert version.give_up_variant(version.key, "it answered otherwise")
    assert not version.give_up_variant(version.key, "again")
    bench.add("other", "1")
    bench.run(bench.reconciler.reload)
    assert version.state == EVICTED
    bench.executor.trials.clear()
    bench.reconciler.request_load(version)
    bench.run_until_idle()
    assert version.state == READY
    assert version.model is not None
    assert version.model.variants == ()
    assert version.notes == ("optimize: the network runs as it is, since it answered otherwise",)


def test_a_warm_up_that_fails_leaves_nothing_behind(bench: Bench) -> None:
    bench.executor.broken["net@2"] = RuntimeError("out of registers")
    bench.add("net", "2")
    assert "out of registers" in bench.run(bench.reconciler.reload).failed["net@2"]
    assert bench.executor.held == {"net@1"}


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


def test_a_mistake_in_the_version_that_serves_does_not_unload_it(bench: Bench) -> None:
    del bench.sources["net"]["1"]
    bench.wanted["net"] = ()
    bench.failures["net@1"] = "net/1 can be written by others"
    assert bench.run(bench.reconciler.reload) == Changes([], [], bench.failures)
    assert bench.answers("net") == "net@1"
    del bench.sources["net"]
    assert bench.run(bench.reconciler.reload) == Changes([], [], bench.failures)
    assert bench.answers("net") == "net@1"


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


@pytest.mark.parametrize("error", [InvalidArgument("net/model.toml: dtype"), PermissionDenied("net/2 is writable")])
def test_what_is_wrong_with_files_is_not_wrong_with_the_request(bench: Bench, error: TensorNextError) -> None:
    bench.add("net", "2", opens=raising(error))
    outcome = bench.run(lambda done: bench.reconciler.load("net@2", done))
    assert (type(outcome), outcome.message) == (FailedPrecondition, error.message)
    bench.scan_error = error
    for begin in (bench.reconciler.reload, lambda done: bench.reconciler.load("net@2", done)):
        outcome = bench.run(begin)
        assert (type(outcome), outcome.message) == (FailedPrecondition, error.message)


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


def test_an_exception_that_cannot_say_what_it_is(bench: Bench) -> None:
    bench.add("net", "2", opens=raising(Unprintable()))
    assert "Unprintable" in bench.run(bench.reconciler.reload).failed["net@2"]
    assert not bench.registry.deployments["net"].versions["2"].loading


def test_an_order_that_comes_twice_leaves_what_it_has_left_the_first_time(bench: Bench) -> None:
    bench.add("net", "2")
    reconciler = bench.reconciler

    def state() -> tuple[object, ...]:
        deployment = bench.registry.deployments["net"]
        return bench.states(), bench.shares("net"), deployment.shadow, set(deployment.pinned), set(bench.executor.held)

    def route(done: Callable[[Any], None]) -> None:
        reconciler.route("net", {"1": 3, "2": 1}, "")
        done("net")

    orders: list[Callable[[Callable[[Any], None]], None]] = [
        lambda done: reconciler.load("net@2", done),
        route,
        lambda done: reconciler.unload("net@1", done),
        lambda done: reconciler.unload("net", done),
        lambda done: reconciler.load("net", done),
        lambda done: bench.add("net", "3") and reconciler.reload(done),
    ]
    for order in orders:
        before = state()
        assert not isinstance(bench.run(order), TensorNextError)
        after = state()
        assert after != before
        assert not isinstance(bench.run(order), TensorNextError)
        assert state() == after
