"""Replicas over several GPUs: each where there is room for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciling import MIB, Bench
from tnxd.deployment.replicas import places


def bench(memory: dict[str, int], sizes: dict[str, int], *, budget_mb: int = 0, cpu: bool = False) -> Bench:
    """Devices with so many MiB, and models of so many in the catalog. They are loaded in the order of their names."""
    made = Bench(budget_mb=budget_mb, executors=(*memory, *(("cpu",) if cpu else ())))
    for name, executor in made.executors.items():
        executor.memory = memory.get(name, 1000) * MIB
        executor.sizes = {model: size * MIB for model, size in sizes.items()}
    for model, size in sizes.items():
        made.add(model, "1", nbytes=size * MIB)
    return made


def held(made: Bench) -> dict[str, list[str]]:
    return {name: sorted(key.partition("@")[0] for key in each.held) for name, each in made.executors.items()}


def notes(made: Bench, model: str) -> str:
    return "; ".join(made.registry.find(model, b"c", "").notes)


def test_each_gpu_gets_a_replica_where_it_has_room() -> None:
    made = bench({"cuda:0": 100, "cuda:1": 100}, {"a": 30, "b": 30}, cpu=True)
    assert made.run(made.reconciler.start).failed == {}
    assert held(made) == {"cuda:0": ["a", "b"], "cuda:1": ["a", "b"], "cpu": ["a", "b"]}
    assert "not on" not in notes(made, "b")


def test_a_model_goes_where_memory_is_free_and_says_where_it_is_not() -> None:
    made = bench({"cuda:0": 100, "cuda:1": 200}, {"a": 80, "b": 80, "c": 30}, cpu=True)
    assert made.run(made.reconciler.start).failed == {}
    assert held(made) == {"cuda:0": ["a"], "cuda:1": ["a", "b", "c"], "cpu": ["a", "b", "c"]}
    assert "not on cuda:0: 20 MiB are free there, and it takes 80 MiB" in notes(made, "b")


def test_a_gpu_that_is_said_to_be_full_is_tried_where_no_other_has_a_replica() -> None:
    made = bench({"cuda:0": 100, "cuda:1": 95}, {"a": 94})
    made.executors["cuda:0"].broken["a@1"] = RuntimeError("no")
    assert made.run(made.reconciler.start).failed == {}
    assert held(made) == {"cuda:0": [], "cuda:1": ["a"]}
    assert "not on cuda:0: RuntimeError: no" in notes(made, "a")


def test_a_model_that_fits_on_no_gpu_is_served_by_the_cpu() -> None:
    made = bench({"cuda:0": 100, "cuda:1": 110}, {"a": 500}, cpu=True)
    assert made.run(made.reconciler.start).failed == {}
    assert held(made) == {"cuda:0": [], "cuda:1": [], "cpu": ["a"]}
    assert all(f"not on {name}: MemoryError" in notes(made, "a") for name in ("cuda:0", "cuda:1"))


def test_what_models_may_take_of_a_gpu_counts_as_its_memory() -> None:
    """Two models that exclude each other settle on one GPU each, and evict each other no more."""
    made = bench({"cuda:0": 1000, "cuda:1": 1000}, {"a": 60, "b": 60}, budget_mb=100)
    made.run(made.reconciler.start)
    assert made.states() == {"a@1": "evicted", "b@1": "ready"}
    assert held(made) == {"cuda:0": ["b"], "cuda:1": []}
    made.reconciler.request_load(made.registry.find("a", b"c", ""))
    made.run_until_idle()
    assert made.states() == {"a@1": "ready", "b@1": "ready"}
    assert held(made) == {"cuda:0": ["b"], "cuda:1": ["a"]}


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 100)), st.integers(0, 100))
def test_roomy_gpus_come_first_and_the_most_free_of_each_kind(free: dict[str, int], nbytes: int) -> None:
    roomy, full = places(free, nbytes)
    assert sorted([*roomy, *full]) == sorted(free)
    assert all(free[name] > nbytes or not nbytes for name in roomy)
    assert all(free[a] >= free[b] for a in roomy for b in full)
    assert [free[name] for name in (*roomy, *full)] == pytest.approx(sorted(free.values(), reverse=True))
