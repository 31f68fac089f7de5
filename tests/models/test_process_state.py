"""Changes of the process by a step or while models serve: each found, named and undone."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from process_changes import ALL, CHANGES, HARMLESS, IDS, UNTRIED, backends, complaint, in_own_thread, is_among, state
from tnxd.models.process_state.drift import DriftMonitor
from tnxd.models.process_state.restoration import Changes, settings_restored
from tnxd.models.process_state.setter_calls import SEED
from tnxd.models.process_state.snapshot import SETTINGS, differs


@pytest.fixture(autouse=True)
def _traced(request: pytest.FixtureRequest) -> None:
    if sys.gettrace() is not None:
        pytest.skip("a tracer is at work")


def test_every_setting_is_tried() -> None:
    names = {setting.name for setting in SETTINGS} | {SEED}
    assert names == CHANGES.keys() | UNTRIED
    assert len(names) == len(SETTINGS) + 1


@pytest.mark.parametrize(("name", "change"), ALL, ids=IDS)
def test_change_is_undone_and_named(name: str, change: Callable[[], Any]) -> None:
    before = state()
    with settings_restored("importing net.py") as changes:
        change()
    assert is_among(name, changes.names)
    assert changes.lasting == []
    after = state()
    assert {setting: value for setting, value in after.items() if differs(before[setting], value)} == {}
    assert any(name in note for note in changes.note()) == (name not in HARMLESS)


def test_step_without_changes_has_no_note() -> None:
    with settings_restored() as changes:
        torch.nn.Linear(3, 3)(torch.rand(2, 3))
        random.random()
        np.random.random()
        logging.getLogger("tnxd.new")
        with torch.inference_mode(), torch.autocast("cpu"), np.errstate(all="raise"), warnings.catch_warnings():
            pass
    assert changes.names == []
    assert changes.note() == ()


def test_change_before_an_error_is_undone() -> None:
    with suppress(SystemExit), settings_restored() as changes:
        torch.set_default_dtype(torch.float64)
        sys.exit(1)
    assert torch.get_default_dtype() is torch.float32
    assert changes.names == ["torch's default dtype"]


def test_restoration_works_in_a_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "gone"
    place.mkdir()
    monkeypatch.chdir(place)
    place.rmdir()
    with settings_restored() as changes:
        torch.set_default_dtype(torch.float64)
    assert changes.names == ["torch's default dtype"]
    os.chdir(tmp_path)


def test_change_that_cannot_be_undone_is_noted() -> None:
    kept = signal.getsignal(signal.SIGUSR2)
    go, gone = threading.Event(), threading.Event()

    def import_elsewhere() -> Changes:
        with settings_restored("importing net.py") as changes:
            go.set()
            assert gone.wait(60)
        return changes

    try:
        with ThreadPoolExecutor(1) as pool:
            importing = pool.submit(import_elsewhere)
            assert go.wait(60)
            signal.signal(signal.SIGUSR2, lambda *_: None)
            gone.set()
            changes = importing.result()
    finally:
        signal.signal(signal.SIGUSR2, kept)
    assert changes.lasting == ["signal handlers"]
    assert changes.note() == ("importing net.py changed signal handlers, which could not be put back there",)


@pytest.mark.parametrize(
    ("seed", "draw"),
    [
        (torch.manual_seed, lambda: torch.rand(4).tolist()),
        (random.seed, lambda: [random.random() for _ in range(4)]),
        (np.random.seed, lambda: np.random.rand(4).tolist()),
    ],
    ids=["torch", "random", "numpy"],
)
def test_random_numbers_after_a_seed_are_unforeseeable_and_none_comes_twice(
    seed: Callable[[int], Any], draw: Callable[[], list[float]]
) -> None:
    drawn = []
    for _ in range(2):
        with settings_restored():
            seed(7)
            drawn.append(draw())  # a lane that samples meanwhile
        drawn.append(draw())
    assert drawn[0] == drawn[2]
    assert len({tuple(numbers) for numbers in drawn}) == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda: os.environ.update(OMP_NUM_THREADS="7"), "the environment variable OMP_NUM_THREADS"),
        (lambda: os.environ.pop("PATH"), "the environment variable PATH"),
        (lambda: os.environ.update(A="1", B="2"), "the environment variables A, B"),
        (
            lambda: os.environ.update({f"A{index}": "1" for index in range(9)}),
            "the environment variables A0, A1, A2 and 6 more",
        ),
    ],
)
def test_environment_variables_are_named(change: Callable[[], Any], told: str) -> None:
    with settings_restored() as changes:
        change()
    assert changes.names == [told]
    with settings_restored():
        assert complaint(change) == f"a forward changes {told}, for all models of the process"


def test_settings_that_torch_makes_for_itself_are_left_alone() -> None:
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_WARM_POOL")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    limit = sys.getrecursionlimit()
    try:
        with settings_restored() as changes:
            sys.setrecursionlimit(2000)
            for name in names:
                os.environ[name] = "/somewhere"
            os.environ["MORE"] = "1"
        assert changes.names == ["the environment variable MORE"]
        assert [os.environ[name] for name in names] == ["/somewhere"] * 3
        assert sys.getrecursionlimit() == 2000
    finally:
        sys.setrecursionlimit(limit)
        for name in names:
            del os.environ[name]
        os.environ.update(kept)


# --- while it serves -----------------------------------------------------------------------------------------

WATCHED = [(name, change) for name, change in ALL if name != SEED and name not in ("the filters of warnings",)]


@pytest.mark.parametrize(("name", "change"), WATCHED, ids=[name for name, _ in WATCHED])
def test_drift_is_undone_and_logged_once(
    name: str, change: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    with settings_restored():
        monitor = DriftMonitor()
        assert monitor.restore() == []
        for _ in range(2):
            change()
            assert is_among(name, monitor.restore())
            assert monitor.restore() == []
    assert len([record for record in caplog.records if f"changed {name}" in record.getMessage()]) == 1


@contextmanager
def cores_of_all(cores: set[int]) -> Iterator[None]:
    """All threads of this process have those cores, as after `taskset -ap`, and their own again at the end."""
    tasks = [int(name) for name in os.listdir("/proc/self/task")]
    before = {task: os.sched_getaffinity(task) for task in tasks}
    try:
        for task in tasks:
            os.sched_setaffinity(task, cores)
        yield
    finally:
        for task in tasks:
            os.sched_setaffinity(task, before[task])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads have no cores of their own")
def test_cores_that_an_operator_gives_to_all_threads_are_left_alone() -> None:
    most, over = os.sched_getaffinity(0), threading.Event()
    few = {min(most)}
    if most == few:
        pytest.skip("needs two cores")
    other = threading.Thread(target=over.wait)
    other.start()
    try:
        monitor = DriftMonitor()
        with ExitStack() as stack:
            with settings_restored("importing net.py") as changes:
                stack.enter_context(cores_of_all(few))
            assert changes.names == []
            assert monitor.restore() == []
            assert os.sched_getaffinity(0) == few
            os.sched_setaffinity(0, most - few)
            assert monitor.restore() == ["the processor affinity of the thread"]
            assert os.sched_getaffinity(0) == few
    finally:
        over.set()
        other.join()


def test_setting_of_a_thread_is_not_seen_on_others() -> None:
    setting = next(each for each in SETTINGS if each.name == "torch's default device or function modes")
    before = setting.read()
    with settings_restored():
        torch.set_default_device("meta")
        assert in_own_thread(setting.read) == before


def test_restored_tf32_settings_can_be_read_by_torch() -> None:
    """torch.export asks for it, and refuses to work where conv and rnn were set apart from each other."""
    with settings_restored():
        backends.cudnn.allow_tf32 = False
    assert backends.cudnn.allow_tf32
    with settings_restored():
        backends.cudnn.conv.fp32_precision = "ieee"
    assert backends.cudnn.allow_tf32
