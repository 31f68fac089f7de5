"""Traffic of versions: weights, shadows, and versions by number, whatever comes and goes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from reconciling import Bench, loaded_bench, one_evicted, raising
from tnxctl.protocol.errors import FailedPrecondition
from tnxd.deployment.reconciler import Changes
from tnxd.deployment.version import EVICTED, FAILED, READY, UNLOADED


@pytest.fixture
def bench() -> Iterator[Bench]:
    with loaded_bench() as made:
        yield made


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


def test_what_was_held_back_for_a_version_by_number_ends_with_it(bench: Bench) -> None:
    bench.add("net", "2")
    bench.run(lambda done: bench.reconciler.load("net@2", done))
    bench.run(lambda done: bench.reconciler.unload("net@2", done))
    bench.add("net", "3")
    bench.run(bench.reconciler.reload)
    assert bench.answers("net") == "net@3"


def test_a_version_asked_for_by_number_that_has_gone_is_no_obstacle(bench: Bench) -> None:
    bench.add("net", "2")
    bench.run(lambda done: bench.reconciler.load("net@2", done))
    del bench.sources["net"]["2"]
    bench.wanted["net"] = ("1",)
    bench.run(bench.reconciler.reload)
    assert bench.states() == {"net@1": READY}
    assert bench.run(lambda done: bench.reconciler.unload("net@1", done)) == "net"
