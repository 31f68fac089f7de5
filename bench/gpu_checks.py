"""Parts of `gpu.py` that see whether the right thing happens: tests, a device that is lost, memory that runs out."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np

from gpu_networks import BALLAST, HUNGER_MIB, HUNGRY, IDS, LOOKUP
from gpu_report import ASSERT, MEMORY, MEMORY_BACK, RESTART, TESTS, Check
from gpu_run import ROOT, Daemon, Run
from tnxctl import Result
from tnxctl.protocol.errors import TensorNextError

CUDA_TESTS = ("tests/executors/test_cuda.py", "tests/executors/test_accelerator.py", "tests/executors/test_graphs.py")
"""Tests that use a real device where there is one."""

_LONGEST_TEST_S = 60
_OUTCOME = re.compile(r"^\S*::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)

_ROOM = 6  # rows of the hungry model that there is memory left for
_REQUESTS = 64
_CALL_S = 5.0
_RISE_S = 8.0
_NO_ROOM = re.compile(r"no memory for \d+ rows|out of memory")


def tests(run: Run) -> None:
    """Run the tests of the CUDA lane, each file in a process of its own: one may end that, or never come back.

    Tests that had their turn count, also where others had none.
    """
    # No configuration: that of setup.cfg needs plugins that may be missing here.
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    command += ["-v", "-ra", "--color=no"]
    if importlib.util.find_spec("pytest_timeout"):
        command += [f"--timeout={_LONGEST_TEST_S}"]
    counts: Counter[str] = Counter()
    ends = []
    for path in CUDA_TESTS:
        run.heading(path)
        with run.log.open("ab") as log:
            process = subprocess.Popen([*command, path], cwd=ROOT, env=run.environment, stdout=log, stderr=log)
            try:
                code = process.wait(run.patience(run.budget.left()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = -signal.SIGKILL
                run.left_out.append(f"tests of {path} that had no turn")
        counts.update(_OUTCOME.findall(run.said(path)))
        if code not in (0, 1):  # 1: tests failed, which the counts tell
            ends.append(f"{path} ended with {code}")
    seen = [f"{count} {outcome.lower()}" for outcome, count in counts.items()] or ["none had its turn"]
    run.report.checks[TESTS] = Check(", ".join([*seen, *ends]), counts.keys() == {"PASSED"} and not ends)


# --- a device that is lost -----------------------------------------------------------------------------------

_GOOD, _BAD = np.array([[IDS - 1]], np.int64), np.array([[IDS + 7]], np.int64)


def device_assert(run: Run) -> None:
    """Look an index up that is out of range, and see what the daemon does about the device that this has ended."""
    with run.daemon("device assert, continue", [LOOKUP], ['on_device_loss = "continue"'], "cuda,cpu") as daemon:
        before = _ask(daemon, _GOOD)
        told = _ask(daemon, _BAD)
        lost = [device for device in daemon.client.health().devices if device.name.startswith("cuda")]
        after = _ask(daemon, _GOOD)
        seen = f"asked {_where(before)}, then {_where(told)}; {lost[0].name} {lost[0].status}: {lost[0].error}; "
        seen += f"then {_where(after)}"
        ok = (
            isinstance(before, Result)
            and before.device.startswith("cuda")
            and isinstance(told, TensorNextError)
            and bool(lost[0].error)
            and isinstance(after, Result)
            and after.device == "cpu"
            and np.array_equal(before.output, after.output)
        )
        run.report.checks[ASSERT] = Check(seen, ok)
    if not run.fits(5.0, RESTART):
        return
    with run.daemon("device assert, restart", [LOOKUP], ['on_device_loss = "restart"']) as daemon:
        before = _ask(daemon, _GOOD)
        told = _ask(daemon, _BAD)
        code = daemon.child.wait(run.patience(60.0))
    with run.daemon("device assert, after it", [LOOKUP], []) as daemon:
        after = _ask(daemon, _GOOD)
    ok = code == 1 and isinstance(after, Result) and after.device.startswith("cuda")
    seen = f"asked {_where(before)}, then {_where(told)}; exit code {code}; the next daemon: {_where(after)}"
    run.report.checks[RESTART] = Check(seen, ok)


def _ask(daemon: Daemon, ids: np.ndarray) -> Result | TensorNextError:
    try:
        return daemon.client.predict(ids, model=LOOKUP, timeout=_CALL_S)
    except TensorNextError as error:
        return error


def _where(answer: Result | TensorNextError) -> str:
    return f"answered on {answer.device}" if isinstance(answer, Result) else f"{answer.code} ({answer})"


# --- memory that runs out ------------------------------------------------------------------------------------


def memory(run: Run) -> None:
    """Take memory of the device away, in the daemon itself, until a batch that fitted no longer does; give it back."""
    # Without graphs: what one computes in is its own from the load on, and cannot run out.
    with run.daemon("memory", [HUNGRY, BALLAST], ["cuda.graphs = false"]) as daemon:
        free_mb = daemon.client.health().gpu_memory_free_mb
        held = _hold(daemon, free_mb - _ROOM * HUNGER_MIB[run.report.size])
        alone = _ask_all(daemon)
        ran_out = _NO_ROOM.search(run.said("memory")) is not None  # the daemon's log tells of it, and no reply does
        wrong, small = _rows(daemon)
        seen = (
            f"{held:,.0f} of {free_mb:,.0f} MiB taken; one request of {_REQUESTS} rows {alone or 'answered rightly'}, "
        )
        seen += "in pieces" if ran_out else "at once: memory did not run out"
        seen += f"; {_REQUESTS} requests of one {wrong or 'answered rightly'}, in batches of up to {small}"
        run.report.checks[MEMORY] = Check(seen, ran_out and not wrong and not alone and small < _REQUESTS)
        _hold(daemon, 0.0)
        until = time.monotonic() + run.patience(_RISE_S)
        while True:  # the daemon tries larger batches again once many have worked
            wrong, large = _rows(daemon)
            if wrong or large > small or time.monotonic() > until:
                break
        seen = f"{_REQUESTS} requests of one {wrong or 'answered rightly'}, in batches of up to {large}"
        run.report.checks[MEMORY_BACK] = Check(seen, not wrong and large > small)


def _hold(daemon: Daemon, mib: float) -> float:
    """Have the ballast take so many MiB. Returns what it got."""
    wanted = np.array([max(mib, 0.0)], np.float32)
    return float(daemon.client.predict({"wanted": wanted}, model=BALLAST).output[0])


def _rows(daemon: Daemon) -> tuple[str, int]:
    """Ask for single rows, all at once. Returns what was wrong, and the rows of the largest batch."""
    inputs = [np.full((1, 1), number, np.float32) for number in range(_REQUESTS)]
    futures = [daemon.client.submit(each, model=HUNGRY) for each in inputs]
    faults: Counter[str] = Counter()
    largest = 0
    for number, future in enumerate(futures):
        try:
            result = future.result()
        except TensorNextError as error:
            faults[error.code] += 1
            continue
        largest = max(largest, result.batch_size)
        faults["wrong"] += float(result.output[0, 0]) != 2 * number
    return ", ".join(f"{count} {fault}" for fault, count in (+faults).items()), largest


def _ask_all(daemon: Daemon) -> str:
    """Ask for as many rows in one request. Returns what was wrong."""
    rows = np.arange(_REQUESTS, dtype=np.float32).reshape(_REQUESTS, 1)
    try:
        result = daemon.client.predict(rows, model=HUNGRY)
    except TensorNextError as error:
        return f"{error.code} ({error})"
    return "" if np.array_equal(result.output, rows * 2) else "wrong"
