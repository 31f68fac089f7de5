"""Operations: one after the other, given up when they take too long, and joined where they ask for the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from reconciling import Bench, loaded_bench
from tnxd.deployment.version import READY, UNLOADED
from tnxd.executors.execution import LoadReport
from tnxd.models.model import Model


@pytest.fixture
def bench() -> Iterator[Bench]:
    with loaded_bench() as made:
        yield made


def hang(bench: Bench, release: threading.Event) -> None:
    """Hang in the step that is under way, whose time is over from now on."""
    bench.reconciler._runner._step_until = 0.0
    release.wait()


def test_a_load_that_never_ends_is_given_up_and_the_next_one_works() -> None:
    bench = Bench()
    bench.add("net", "1")
    bench.run(bench.reconciler.start)
    release = threading.Event()
    bench.add("net", "2", opens=lambda: hang(bench, release))
    assert "load_timeout_s, 60 s" in bench.run(bench.reconciler.reload).failed["net@2"]
    assert bench.answers("net") == "net@1"
    bench.add("net", "3")
    assert bench.run(bench.reconciler.reload).loaded == ["net@3"]
    release.set()  # what comes of it now interests nobody
    bench.add("net", "4")
    assert bench.run(bench.reconciler.reload).loaded == ["net@4"]
    assert bench.executor.held == {"net@4"}


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


def test_a_load_that_ends_after_it_was_given_up_leaves_nothing() -> None:
    bench = Bench()
    release, ended = threading.Event(), threading.Event()
    load = bench.executor.load

    def slow(model: Model) -> LoadReport:
        hang(bench, release)
        ended.set()
        return load(model)

    bench.executor.load = slow  # type: ignore[method-assign]
    bench.add("net", "1")
    assert "load_timeout_s" in bench.run(bench.reconciler.start).failed["net@1"]
    release.set()
    assert ended.wait(60)
    bench.executor.load = load  # type: ignore[method-assign]
    bench.add("other", "1")
    bench.run(bench.reconciler.reload)
    while bench.reconciler.active or bench.executor.held != {"net@1#1", "other@1"}:
        bench.turn()
    assert bench.answers("net") == "net@1"


@pytest.mark.parametrize("other", [True, False])  # whether the name has another version meanwhile
def test_a_version_that_comes_again_does_not_meet_a_load_of_it_that_was_given_up(other: bool) -> None:
    bench = Bench()
    release = threading.Event()
    load, unload = bench.executor.load, bench.executor.unload
    freed: list[str] = []

    def slow(model: Model) -> LoadReport:
        hang(bench, release)
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


def test_reloads_that_nobody_waits_for_become_one(bench: Bench) -> None:
    for _ in range(100):
        bench.reconciler.reload()
    bench.run_until_idle()
    assert len(bench.reloads) <= 4
