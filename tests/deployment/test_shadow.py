"""Copies of answered batches: where they run, and what is said about their answers."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from conftest import Daemon, serving_daemon
from model_repositories import HANGS_AT_7, ONE_ROW, put
from tnxctl import Client
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, Internal
from tnxctl.protocol.wire import TensorSpec
from tnxd.deployment.background import Background, Copy
from tnxd.deployment.shadow import Shadows
from tnxd.deployment.version import READY, UNLOADED, Version
from tnxd.executors.execution import Execution, Outcome
from tnxd.lanes import BACKGROUND
from tnxd.models.builtin import BuiltinSource
from tnxd.models.model import Model
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Device
from tnxd.scheduling.request import Request
from tnxd.scheduling.scheduler import Scheduler


class Shadowing(Shadows):
    """Shadows, and the background in which their copies run."""

    def __init__(self) -> None:
        background = Background()
        super().__init__(background)
        self.next, self.finished, self.stop = background.next, background.finished, background.stop
        self.waits = lambda: bool(background)


def model(version: str, limit: int = 4, outputs: tuple[TensorSpec, ...] = (TensorSpec("y", "FP32", (-1, 3)),)) -> Model:
    return Model("net", version, (TensorSpec("x", "FP32", (-1, 1)),), outputs, limit, object)  # type: ignore[arg-type]


OLD, NEW = model("1"), model("2")


def version(served: Model) -> Version:
    """A version that serves that model."""
    made = Version(BuiltinSource(served))
    made.state, made.model = READY, served
    return made


def scheduler(*models: str, lanes: int = 1) -> Scheduler:
    device = Device("cpu", "cpu", lanes, set(models))
    return Scheduler([device], CostModel(), max_requests=100, max_bytes=10**9)


def answered(*outcomes: Outcome, model: Model = OLD, width: int = 1) -> Execution:
    """A batch of one-row requests that has been answered so."""
    execution = Execution(0, 0, model, [(np.zeros((1, width), "f4"),)] * len(outcomes), [1] * len(outcomes), ())
    execution.outcomes = list(outcomes)
    execution.latency_us = 100.0
    return execution


def row(*values: float) -> tuple[Array, ...]:
    return (np.array([values], "f4"),)


def copied(shadows: Shadowing, candidate: Model, original: Execution, *outcomes: Outcome) -> Copy:
    """Let a batch be copied, with those outcomes."""
    shadows.offer(original, version(candidate))
    found = shadows.next(scheduler(candidate.key), 0)
    assert found is not None
    copy, _ = found
    copy.outcomes = list(outcomes)
    copy.latency_us = 200.0
    return copy


def compared(shadows: Shadowing, candidate: Model, original: Execution, *outcomes: Outcome) -> None:
    """Let a batch be copied, and wait until its outcomes have been compared."""
    shadows.finished(copied(shadows, candidate, original, *outcomes))
    settle(shadows)


def settle(shadows: Shadowing) -> None:
    """Wait until everything has been compared that has been handed over."""
    settled = threading.Event()
    shadows.finished(looked_at(shadows, settled.set))
    assert settled.wait(60)


def looked_at(shadows: Shadowing, on_look: Callable[[], object]) -> Copy:
    """A copy that calls a function, on the thread that compares, when its turn has come."""
    end = answered(Internal("the last one"), model=model("end"))
    copy = copied(shadows, NEW, end)
    copy.original = dataclasses.replace(copy.original, outcomes=_Calls(on_look))
    return copy


class _Calls(list):  # type: ignore[type-arg]
    """Tells when somebody looks."""

    def __init__(self, on_look: Callable[[], object]) -> None:
        super().__init__()
        self._on_look = on_look

    def __iter__(self):  # type: ignore[no-untyped-def]
        self._on_look()
        return super().__iter__()


def test_differences_are_summed_up() -> None:
    shadows = Shadowing()
    compared(shadows, NEW, answered(row(1, 2, 3), row(3, 2, 1)), row(1, 2, 3.5), row(1, 2, 3))
    compared(shadows, NEW, answered(row(0, 0, 9)), row(0, 0, 9))
    report = shadows.report(7, OLD, NEW)
    assert (report.id, report.model, report.baseline, report.candidate) == (7, "net", "1", "2")
    assert (report.requests, report.errors, report.skipped) == (3, 0, 0)
    (output,) = report.outputs
    assert (output.name, output.elements, output.max_abs, output.misfits) == ("y", 9, 2.0, 0)
    assert output.mean_abs == pytest.approx((0.5 + 2 + 2) / 9)
    assert output.argmax_agreement == pytest.approx(2 / 3)
    assert (report.baseline_us.count, report.baseline_us.p50_us) == (2, 100.0)
    assert (report.candidate_us.count, report.candidate_us.p99_us) == (2, 200.0)


def test_failures_of_the_candidate_are_counted_and_those_of_the_baseline_are_not() -> None:
    shadows = Shadowing()
    compared(
        shadows, NEW, answered(row(1, 2, 3), Internal("x"), row(1, 2, 3)), Internal("no"), row(0, 0, 0), row(1, 2, 3)
    )
    report = shadows.report(0, OLD, NEW)
    assert (report.requests, report.errors, report.last_error) == (2, 1, "no")
    assert report.outputs[0].max_abs == 0.0


def test_what_is_not_finite_and_what_does_not_fit() -> None:
    shadows = Shadowing()
    compared(shadows, NEW, answered(row(1, np.nan, 3)), row(1, np.nan, 3))
    compared(shadows, NEW, answered(row(1, np.nan, 3)), row(1, 2, 4))
    compared(shadows, NEW, answered(row(1, 2, 3)), row(1, 2))
    output = shadows.report(0, OLD, NEW).outputs[0]
    assert (output.misfits, output.max_abs) == (2, 1.0)


def test_bfloat16_is_compared_by_value() -> None:
    outputs = (TensorSpec("y", "BF16", (-1, 2)),)
    old, new = model("1", outputs=outputs), model("2", outputs=outputs)
    first, second = (np.array([values], ml_dtypes.bfloat16).view("u2") for values in ((1.0, 2.0), (1.0, 2.5)))
    shadows = Shadowing()
    compared(shadows, new, answered((first,), model=old), (second,))
    assert shadows.report(0, old, new).outputs[0].max_abs == 0.5


def test_strings_are_equal_or_one_apart() -> None:
    outputs = (TensorSpec("y", "BYTES", (-1, 2)),)
    old, new = model("1", outputs=outputs), model("2", outputs=outputs)
    first, second = (np.array([values], object) for values in ((b"a", b"b"), (b"a", b"c")))
    shadows = Shadowing()
    compared(shadows, new, answered((first,), model=old), (first.copy(),))
    assert shadows.report(0, old, new).outputs[0].max_abs == 0.0
    compared(shadows, new, answered((first,), model=old), (second,))
    output = shadows.report(0, old, new).outputs[0]
    assert (output.elements, output.max_abs, output.mean_abs, output.misfits) == (4, 1.0, 0.25, 0)
    assert output.argmax_agreement is None


def test_a_copy_runs_only_where_nothing_waits_and_never_inline() -> None:
    shadows = Shadowing()
    shadows.offer(answered(row(1, 2, 3)), version(NEW))
    busy = scheduler(OLD.key, NEW.key)
    busy.add(Request(OLD.key, max_batch_size=4, wanted="cpu"), 0)
    assert shadows.next(busy, 0) is None
    (batch,), _ = busy.next_batches(0)
    assert shadows.next(busy, 0) is None  # its only lane runs
    busy.finished(batch, 10.0)
    found = shadows.next(busy, 0)
    assert found is not None
    copy, batch = found
    assert copy.lane == batch.lane == BACKGROUND
    assert batch.requests == []
    assert not shadows.waits()
    busy.finished(batch, 10.0)
    assert busy.running == 0
    assert busy.models.outstanding(NEW.key) == 0


def test_a_smaller_limit_takes_the_first_requests_of_a_batch() -> None:
    shadows = Shadowing()
    shadows.offer(answered(*[row(1, 2, 3)] * 4), version(model("2", limit=3)))
    found = shadows.next(scheduler(NEW.key), 0)
    assert found is not None
    assert (len(found[0].items), found[1].rows) == (3, 3)
    assert shadows.report(0, OLD, NEW).skipped == 1


def test_what_finds_no_room_is_counted_and_what_goes_is_forgotten() -> None:
    shadows = Shadowing()
    candidate = version(NEW)
    for _ in range(100):
        shadows.offer(answered(row(1, 2, 3)), candidate)
    assert shadows.report(0, OLD, NEW).skipped == 100 - 64
    candidate.state = UNLOADED
    assert shadows.next(scheduler(NEW.key), 0) is None
    assert not shadows.waits()
    shadows.offer(answered(row(1, 2, 3), width=2**25), version(NEW))
    assert not shadows.waits()
    shadows.keep({OLD.key, NEW.key})
    assert shadows.report(0, OLD, NEW)
    shadows.keep({OLD.key})
    with pytest.raises(FailedPrecondition):
        shadows.report(0, OLD, NEW)


def test_what_no_device_can_run_blocks_nothing_else() -> None:
    shadows = Shadowing()
    shadows.offer(answered(row(1, 2, 3)), version(NEW))
    other = model("3")
    shadows.offer(answered(row(1, 2, 3)), version(other))
    found = shadows.next(scheduler(other.key), 0)
    assert found is not None
    assert found[0].model is other
    assert not shadows.waits()
    assert shadows.report(0, OLD, NEW).skipped == 1


@pytest.mark.parametrize(("limits", "rows", "group"), [((0, 4), [3], ()), ((4, 0), [1], (3,))])
def test_versions_of_which_one_has_batches_are_compared_request_by_request(
    limits: tuple[int, int], rows: list[int], group: tuple[int, ...]
) -> None:
    old, new = model("1", limits[0]), model("2", limits[1])
    item = (np.zeros((3, 1), "f4"),)
    original = Execution(0, 0, old, [item], [3 if old.max_batch_size else 1], () if old.max_batch_size else (3,))
    original.outcomes = [(np.zeros((3, 3), "f4"),)]
    shadows = Shadowing()
    shadows.offer(original, version(new))
    found = shadows.next(scheduler(new.key), 0)
    assert found is not None
    copy = found[0]
    assert (list(copy.rows), copy.group) == (rows, group)


def test_outputs_count_among_what_waits() -> None:
    shadows = Shadowing()
    shadows.offer(answered((np.zeros((1, 2**25), "f4"),)), version(NEW))
    assert not shadows.waits()


def test_what_waits_to_be_compared_is_bounded_in_bytes() -> None:
    shadows = Shadowing()
    looking, free = threading.Event(), threading.Event()

    def hold() -> None:
        looking.set()
        assert free.wait(60)

    shadows.finished(looked_at(shadows, hold))
    assert looking.wait(60)
    for _ in range(2):
        shadows.finished(copied(shadows, NEW, answered(row(1, 2, 3), width=10 * 2**20), row(1, 2, 3)))
    assert shadows.report(0, OLD, NEW).skipped == 1
    free.set()
    settle(shadows)
    compared(shadows, NEW, answered(row(1, 2, 3), width=10 * 2**20), row(1, 2, 3))
    report = shadows.report(0, OLD, NEW)
    assert (report.requests, report.skipped) == (2, 1)


def test_what_is_compared_late_does_not_bring_back_what_is_gone() -> None:
    shadows = Shadowing()
    copy = copied(shadows, NEW, answered(row(1, 2, 3)), row(1, 2, 3))
    shadows.keep({OLD.key})
    shadows.finished(copy)
    settle(shadows)
    with pytest.raises(FailedPrecondition):
        shadows.report(0, OLD, NEW)


def test_a_candidate_that_hangs_gets_no_more_copies() -> None:
    shadows = Shadowing()
    shadows.offer(answered(row(1, 2, 3)), version(NEW))
    shadows.stop(NEW)
    assert shadows.next(scheduler(NEW.key), 0) is None
    shadows.offer(answered(row(1, 2, 3)), version(NEW))
    assert not shadows.waits()


def test_nothing_to_compare() -> None:
    with pytest.raises(FailedPrecondition, match="route net 1=1 --shadow 2"):
        Shadowing().report(0, OLD, NEW)


# --- behind a real daemon ------------------------------------------------------------------------------------


SETTINGS = """
versions = "all"
time_limit_s = 4.0
[traffic]
weights = { 1 = 1 }
shadow = "2"
"""


@dataclass
class Ticking(Daemon):
    """A daemon whose model fails at 9 in version 1; its shadow, version 2, does not come back from a 7.

    Attributes:
        root: its model repository. told: the socket that systemd would listen on.
    """

    root: Path
    told: socket.socket

    def tick(self, times: int = 1) -> None:
        """Wait until the daemon has looked so often for what hangs."""
        while times:
            times -= b"WATCHDOG=1" in self.told.recv(4096).split(b"\n")


@pytest.fixture(scope="module")
def ticking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ticking]:
    folder = tmp_path_factory.mktemp("ticking")
    root = folder / "models"
    put(root, "net", 1, before="assert not bool((x == 9).any())")
    put(root, "net", 2, before=HANGS_AT_7, more=SETTINGS)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(folder / "notify"))
        told.settimeout(60)
        environment = {**os.environ, "NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "300000"}
        config = folder / "tnxd.toml"
        config.write_text('on_hang = "continue"\n')  # a loop that stands still for 0.2 s is busy, not hung
        arguments = ("--config", str(config), "--model-repository", str(root))
        with serving_daemon(folder / "log", *arguments, environment=environment) as daemon:
            yield Ticking(daemon.endpoint, daemon.process, daemon.log, root, told)


def test_a_batch_that_failed_is_not_copied(ticking: Ticking) -> None:
    with Client(ticking.endpoint, timeout=60.0) as client:
        with pytest.raises(Internal):
            client.predict(ONE_ROW + 9)
        with pytest.raises(FailedPrecondition, match="nothing to compare"):
            client.compare("net", "1", "2")


def test_a_shadow_that_hangs_is_told_of_once(ticking: Ticking) -> None:
    """Even when other files have taken its place."""
    with Client(ticking.endpoint, timeout=60.0) as client:
        client.predict(ONE_ROW + 7)
        while "it gets no more copies" not in ticking.log.read_text():
            ticking.tick()
        put(ticking.root, "net", 2, answer=3, more=SETTINGS)
        assert client.reload().loaded == ("net@2",)
        ticking.tick(15)  # more than the socket may hold of those before
        assert ticking.log.read_text().count("it gets no more copies") == 1
