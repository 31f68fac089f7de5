"""Helpers for the tests of the benchmarks: their modules on the path, a stand-in for the model, the programs run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from tnxctl import wire

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "peers")]  # as `python bench/compare.py` has it

import proctree  # noqa: E402

Array = np.ndarray[Any, Any]


def first_half(array: Array) -> Array:
    """Stands for the model: float32 [N, 256] -> float32 [N, 128]."""
    return np.ascontiguousarray(array[:, :128])


def result_header(id_: int, rows: int = 1) -> bytes:
    return wire.encode(
        wire.Result(
            v=1,
            id=id_,
            model="mlp",
            version="1",
            outputs=(wire.TensorSpec("output", "FP32", (rows, 128)),),
            device="cpu",
            reason="only device",
            batch_size=rows,
            latency_ms=0.1,
            gpu_memory_mb=0.0,
            timing=wire.Timing(1.0, 2.0, 3.0, 0.0, 100.0, 0.0, 4.0, 110.0),
        )
    )


def run(program: str, *arguments: str, seconds: float = 50) -> str:
    """Run a program of `bench/` to its end, which must be good. Returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(BENCH / program), *arguments], capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def refusal(program: click.Command, *arguments: str) -> tuple[int, str]:
    """The exit status and the output of a command line that makes no sense."""
    done = CliRunner().invoke(program, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def check_that_it_stops_what_it_started(program: str, *arguments: str, number: signal.Signals, children: int) -> None:
    """Signal a program of `bench/` once it measures, when it has so many servers and clients."""
    restore: Callable[[], Any] = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(
        [sys.executable, str(BENCH / program), "--rounds", "1000", "--seconds", "0.1", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore,  # shells start background jobs with SIGINT ignored
    ) as bench:
        assert bench.stdout is not None
        assert bench.stdout.readline()  # its heading: everything runs
        started = set(proctree.members(bench.pid)) - {bench.pid}
        assert len(started) == children
        bench.send_signal(number)
        _, stderr = bench.communicate(timeout=50)
    assert bench.returncode not in (0, -number)
    assert "Traceback" not in stderr
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
