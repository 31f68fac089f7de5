"""Start a daemon, send it handwritten digits, show what it answers and where the time goes, stop it.

    python examples/digits/demo.py

The daemon runs on loopback, on a free port and with its built-in settings: nothing has to be configured, and a daemon
that already runs is not disturbed. Exit code 0: every step worked, and at least 95 % of the held-out scans were read
right. Exit code 1: something did not, and stderr says what.
"""

from __future__ import annotations

import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tnxctl import Client
from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.wire import Timing

SCANS = Path(__file__).with_name("scans.npz")
"""`scans`, float32 [N, 64] with values 0..16, and `labels`, uint8 [N]: digits that the model was not trained on."""

TNXD = (sys.executable, "-m", "tnxd")
TNXCTL = (sys.executable, "-m", "tnxctl.cli")
ARGUMENTS = ("--bind", "tcp://127.0.0.1:*")

START_TIMEOUT = 120.0
"""Seconds until the daemon must be ready. The first import of torch from a cold disk can take most of them."""

STOP_TIMEOUT = 60.0
"""Seconds that the daemon may take to stop, and the tool to answer."""

PICTURES = 5
REQUIRED_ACCURACY = 0.95

STAGES = {
    "receive_us": "taken from the socket, decoded, checked",
    "queue_us": "waited for a free lane",
    "gather_us": "rows placed in the batch",
    "h2d_us": "copied to the GPU",
    "compute_us": "the forward",
    "d2h_us": "copied back from the GPU",
    "reply_us": "reply made and encoded",
    "total_us": "in the daemon, all of the above",
}
"""Field of `Timing` -> what happens in it."""


class DemoError(Exception):
    """A step of the demo failed; the message tells the user how."""


def main(tnxd: Sequence[str] = TNXD) -> int:
    """Run the demo with the daemon that the command `tnxd` starts; returns the exit code."""
    try:
        with running(tnxd) as endpoint:
            show_health(endpoint)
            show_predictions(endpoint)
    except (DemoError, TensorNextError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


# --- the daemon and the tool, as a user would start them -----------------------------------------------------


@contextmanager
def running(tnxd: Sequence[str]) -> Iterator[str]:
    """The endpoint of a daemon that is ready; it is stopped when the block ends, whatever happens in it.

    Raises:
        DemoError: it did not become ready, the block failed, or it did not stop with exit code 0. The message ends
            with the daemon's log.
    """
    show_command("tnxd", *ARGUMENTS)
    built_in_settings = {name: value for name, value in os.environ.items() if not name.startswith("TNXD_")}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [*tnxd, *ARGUMENTS], stdout=subprocess.PIPE, stderr=log, env=built_in_settings, encoding="utf-8"
        ) as process,
    ):
        try:
            ready = ready_line(process)
            found = re.search(r"ready on ([^\s,;]+)", ready)
            if found is None:
                raise DemoError(f"the daemon did not become ready (it printed {ready!r})")
            print(ready)
            yield found[1]
            stop(process)
        except (DemoError, TensorNextError) as error:
            raise DemoError(f"{error}\n{post_mortem(process, log)}") from error
        finally:
            process.kill()  # does nothing to a process that has ended


def ready_line(process: subprocess.Popen[str]) -> str:
    """The first line that the daemon prints; "" if it ends without a word or says nothing for START_TIMEOUT seconds."""
    assert process.stdout is not None
    alarm = threading.Timer(START_TIMEOUT, process.kill)  # a killed process closes its pipe: the reading ends
    alarm.start()
    try:
        return process.stdout.readline().rstrip()
    finally:
        alarm.cancel()


def stop(process: subprocess.Popen[str]) -> None:
    show_command("kill", str(process.pid))
    process.terminate()
    try:
        code = process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise DemoError(f"the daemon did not stop within {STOP_TIMEOUT:g} s of SIGTERM") from None
    if code:
        raise DemoError(f"after SIGTERM the daemon left with exit code {code}")
    print("tnxd stopped, exit code 0")


def post_mortem(process: subprocess.Popen[str], log: IO[bytes]) -> str:
    """A report on how the daemon ended, with what it wrote to its stderr."""
    try:
        state = f"exit code {process.wait(1.0)}"  # a pipe that closed announces an exit that may be a moment away
    except subprocess.TimeoutExpired:
        state = "still running"
        process.kill()
        process.wait()
    log.seek(0)
    return f"The daemon's log ({state}):\n{log.read().decode(errors='replace') or '(empty)'}"


def show_health(endpoint: str) -> None:
    show_command("tnxctl", "health", "--host", endpoint)
    try:
        done = subprocess.run([*TNXCTL, "health", "--host", endpoint], timeout=STOP_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"tnxctl health gave no answer within {STOP_TIMEOUT:g} s") from error
    if done.returncode:
        raise DemoError(f"tnxctl health ended with exit code {done.returncode}")


def show_command(*words: str) -> None:
    print(f"\n$ {shlex.join(words)}", flush=True)  # flushed, because a child may write to the same terminal next


# --- the scans -----------------------------------------------------------------------------------------------


def show_predictions(endpoint: str) -> None:
    """Send every held-out scan in a request of its own; show pictures, accuracy and times.

    Raises:
        DemoError: fewer than REQUIRED_ACCURACY of them were read right.
        TensorNextError: a request failed.
    """
    with np.load(SCANS) as held_out:
        scans, labels = held_out["scans"], held_out["labels"]
    scores = np.empty((len(scans), 10), np.float32)
    timings: list[Timing] = []
    round_trips_us: list[float] = []
    with Client(endpoint, timeout=30.0) as tnx:
        for row, scan in enumerate(scans):
            start = time.perf_counter()
            result = tnx.predict(scan[np.newaxis], model="digits")
            round_trips_us.append((time.perf_counter() - start) * 1e6)
            timings.append(result.timing)
            scores[row] = result.output

    print(f"\n{PICTURES} scans of handwritten digits, and what the model `digits` reads on {result.device}:\n")
    print(side_by_side(scans[:PICTURES], labels[:PICTURES], scores[:PICTURES]))
    right = int(np.count_nonzero(scores.argmax(axis=1) == labels))
    print(f"\n{right} of {len(scans)} held-out scans read right: {right / len(scans):.1%}")
    print(f"\nWhere the time of one request goes ({len(scans)} requests, one after the other):\n")
    print(time_table(timings, round_trips_us))
    if right < REQUIRED_ACCURACY * len(scans):
        raise DemoError(f"only {right} of {len(scans)} scans were read right, not {REQUIRED_ACCURACY:.0%} of them")


def side_by_side(scans: NDArray[Any], labels: NDArray[Any], scores: NDArray[Any]) -> str:
    """Pictures of a few scans in a row, 16 characters wide each, with the model's reading and the label below."""
    fancy = can_print("░▒▓█✓✗")
    shades, yes, no = (" ░▒▓█", "✓", "✗") if fancy else (" .:*#", "", "WRONG")
    levels = np.rint(scans.reshape(-1, 8, 8) / 16 * (len(shades) - 1)).astype(int)
    lines = ["".join(shades[level] * 2 for level in levels[:, y].flat) for y in range(8)]
    probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    readings = scores.argmax(axis=1)
    marks = np.where(readings == labels, yes, no)
    lines.append("")
    lines.append(
        "".join(
            f"read: {digit} ({row[digit]:.0%})".center(16) for digit, row in zip(readings, probabilities, strict=True)
        )
    )
    lines.append("".join(f"label: {label} {mark}".center(16) for label, mark in zip(labels, marks, strict=True)))
    return "\n".join(line.rstrip() for line in lines)


def can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def time_table(timings: Sequence[Timing], round_trips_us: Sequence[float]) -> str:
    """Mean and median of each stage, and of the whole round trip as the client sees it."""
    rows = [
        (field.removesuffix("_us"), [getattr(timing, field) for timing in timings], meaning)
        for field, meaning in STAGES.items()
    ]
    rows.append(("round trip", list(round_trips_us), "as this client saw it"))
    lines = [f"  {'stage':<12}{'mean us':>10}{'median us':>12}"]
    lines += [
        f"  {name:<12}{statistics.fmean(values):>10.1f}{statistics.median(values):>12.1f}   {meaning}"
        for name, values, meaning in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
