"""OpenMP under variables that an operator may have set: a real one, in a process of its own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

PROGRAM = """
import json, os, sys, threading
from tnxd.process import openmp
openmp.settle()
import torch

started, looked = threading.Barrier(3), threading.Barrier(3)

def work():
    torch.set_num_threads(2)
    torch.ones(1 << 20).add_(1)
    started.wait()
    looked.wait()

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
started.wait()  # all of their teams are there, and stay until they were looked at
masks = []
for task in os.listdir("/proc/self/task"):
    masks.append(sorted(os.sched_getaffinity(int(task))))
looked.wait()
names = ("OMP_PROC_BIND", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
print(json.dumps([masks, {name: os.environ.get(name) for name in names}]))
"""


def settled(variables: dict[str, str]) -> tuple[list[list[int]], dict[str, str | None], str]:
    """Cores of each thread, variables, and the log of a process whose threads have teams."""
    return _settled(tuple(variables.items()))


@functools.cache  # to import torch takes seconds of a core, and two tests look at one process
def _settled(items: tuple[tuple[str, str], ...]) -> tuple[list[list[int]], dict[str, str | None], str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", PROGRAM]
    ran = subprocess.run(command, env={**kept, **dict(items)}, capture_output=True, text=True, check=True, timeout=120)
    masks, names = json.loads(ran.stdout)
    return masks, names, ran.stderr


@pytest.mark.skipif(len(CORES) < 2, reason="needs Linux and two cores")
@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_PROC_BIND": "true"},
        {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"},
        {"OMP_PLACES": "threads"},
        {"GOMP_CPU_AFFINITY": f"{CORES[0]}" if CORES else ""},
    ],
    ids=str,
)
def test_no_thread_is_bound_to_a_core(variables: dict[str, str]) -> None:
    masks, _, log = settled(variables)
    assert len(masks) >= 5
    assert masks == [CORES] * len(masks)
    assert ", ".join(variables) in log


NOTHING: dict[str, str] = {}
UNBOUND_AND_SPINNING = {"OMP_PROC_BIND": "FALSE", "OMP_PLACES": "cores", "GOMP_SPINCOUNT": "5"}
PASSIVE = {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize("variables", [NOTHING, UNBOUND_AND_SPINNING, PASSIVE], ids=str)
def test_who_asks_for_no_binding_is_told_nothing(variables: dict[str, str]) -> None:
    masks, _, log = settled(variables)
    assert masks == [CORES] * len(masks)
    assert not log


@pytest.mark.parametrize(
    ("variables", "spin_count"),
    [(NOTHING, "10000"), (UNBOUND_AND_SPINNING, "5"), (PASSIVE, None)],
    ids=str,
)
def test_operator_may_say_how_threads_wait(variables: dict[str, str], spin_count: str | None) -> None:
    _, names, _ = settled(variables)
    assert names["GOMP_SPINCOUNT"] == spin_count
    assert names["OMP_WAIT_POLICY"] == variables.get("OMP_WAIT_POLICY")
