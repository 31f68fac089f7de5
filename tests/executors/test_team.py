"""Teams of threads: real ones of OpenMP, and where the kernel lets them run."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from tnxd.executors import team
from tnxd.executors.team import Team, other_members

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

pytestmark = pytest.mark.skipif(
    len(CORES) < 2 or not torch.backends.openmp.is_available(), reason="needs Linux, two cores and OpenMP"
)

T = TypeVar("T")


def on_a_thread(function: Callable[[], T]) -> T:
    """The result of a function on a thread of its own, which has no team before."""
    results: list[T] = []

    def run() -> None:
        torch.get_num_threads()
        torch.set_num_threads(len(CORES))
        results.append(function())
        torch.set_num_threads(1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def pinned(members: list[int]) -> list[set[int]]:
    return [os.sched_getaffinity(thread) for thread in members]


def test_each_other_thread_of_a_team_has_a_core_of_its_own() -> None:
    def work() -> tuple[list[int], set[int], list[set[int]], list[int]]:
        threads = set(os.listdir("/proc/self/task"))
        torch.ones(1 << 20).add_(1)
        started = sorted(int(thread) for thread in set(os.listdir("/proc/self/task")) - threads)
        served = Team()
        served.spread(len(CORES))
        return started, os.sched_getaffinity(0), pinned(started), sorted(other_members(len(CORES)))

    started, own, others, members = on_a_thread(work)
    assert members == started, "threads that torch's forwards use"
    assert len(members) == len(CORES) - 1
    assert own == set(CORES), "what a model starts on the lane's thread is not to be bound to one core"
    assert [len(cores) for cores in others] == [1] * len(others)
    assert len(set.union(*others)) == len(others)


def test_team_makes_room_where_the_lane_has_moved_to_another_core(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> list[list[set[int]]]:
        served, seen = Team(), []
        for core in (*CORES, *CORES):
            monkeypatch.setattr(team, "current_core", lambda core=core: core)
            served.spread(len(CORES))
            seen.append(pinned(other_members(len(CORES))))
        return seen

    for core, cores in zip((*CORES, *CORES), on_a_thread(work), strict=True):
        assert sorted(set.union(*cores)) == [other for other in CORES if other != core]


def test_team_that_leaves_a_core_to_others_may_run_on_all() -> None:
    def work() -> list[set[int]]:
        Team().spread(len(CORES) + 1)
        return pinned(other_members(len(CORES) + 1))

    assert on_a_thread(work) == [set(CORES)] * len(CORES)


@pytest.mark.parametrize("is_over", [True, False])
def test_thread_of_a_team_that_has_ended_is_replaced(monkeypatch: pytest.MonkeyPatch, is_over: bool) -> None:
    """Its id may belong to another program by now, which is left alone."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:

        def work() -> list[set[int]]:
            served = Team()
            with monkeypatch.context() as context:
                context.setattr(team, "current_core", lambda: CORES[0])
                served.spread(len(CORES))
                served._others = [other.pid] * len(served._others)
                context.setattr(team, "current_core", lambda: CORES[-1])
                served.spread(len(CORES))
            return pinned(other_members(len(CORES)))

        if is_over:  # a process is gone once it was waited for, a thread some time later
            other.communicate()
        assert set.union(*on_a_thread(work)) == set(CORES[:-1])
        if not is_over:
            assert os.sched_getaffinity(other.pid) == set(CORES)


def test_system_that_refuses_is_asked_once_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(thread: int, cores: set[int]) -> None:
        asked.append(thread)
        raise PermissionError

    def work() -> None:
        served = Team()
        for _ in range(3):
            served.spread(len(CORES))

    monkeypatch.setattr(team, "current_core", lambda: CORES[0])
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    on_a_thread(work)
    assert len(asked) == 1


def test_batches_run_without_the_functions_of_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_openmp", lambda: None)
    assert on_a_thread(lambda: other_members(len(CORES))) == []
    on_a_thread(lambda: Team().spread(len(CORES)))
