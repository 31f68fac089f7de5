"""Variants of modules: taken where they are faster and answer alike, and named where not."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tnxctl.protocol.errors import FailedPrecondition
from tnxctl.protocol.wire import TensorSpec
from tnxd.executors.cpu import CpuRunner
from tnxd.executors.execution import Execution, LoadReport
from tnxd.executors.optimizer import Optimizer
from tnxd.executors.pool import LanePool
from tnxd.executors.substitute import Substitute
from tnxd.executors.trial.copies import Sparing
from tnxd.lanes import NO_TEAMS, Teams
from tnxd.models.model import Model
from tnxd.models.variants import Build, Variant, Workshop

SLOW_S = 0.02


class Doubling(torch.nn.Module):
    """Answers x * factor. Args: seconds: that a forward takes."""

    def __init__(self, seconds: float = 0.0, factor: float = 2.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.factor = factor
        self.register_buffer("weight", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x * self.weight * self.factor


class Watched(Doubling):
    """Attributes: sizes: of the batches that came, in rows."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.add(len(x))
        return super().forward(x)


class Narrow(Doubling):
    """Refuses more than three columns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 3:
            raise ValueError("four columns")
        return x * self.factor


class OwnColumns(torch.nn.Module):
    """The same as `Doubling` for any number of columns."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x * 2


def makes(module: Callable[[], torch.nn.Module]) -> Callable[[Build, Workshop], torch.nn.Module]:
    return lambda build, workshop: module()


def refuses(build: Build, workshop: Workshop) -> torch.nn.Module:
    raise FailedPrecondition("it is too round")


def stumbles(build: Build, workshop: Workshop) -> torch.nn.Module:
    raise ZeroDivisionError("of its own")


def variant(name: str, make: Callable[[Build, Workshop], torch.nn.Module], **other: Any) -> Variant:
    return Variant(name, ("cpu",), other.pop("missing", ""), make, **other)


class Scaling(Doubling):
    """Takes a sixteenth of the time with two threads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds / torch.get_num_threads() ** 4)
        return x * self.weight * self.factor


FASTER = variant("faster", makes(Watched))
SLOWER = variant("slower", makes(lambda: Doubling(3 * SLOW_S)))
WRONG = variant("wrong", makes(lambda: Doubling(factor=2.001)))
ROUNDED = variant("rounded", makes(lambda: Doubling(factor=2.00001)))
LAST = variant("last", makes(Doubling), beside="faster")


def model(*variants: Variant, columns: int = 2, seconds: float = SLOW_S, optimize: str = "auto") -> Model:
    spec = (TensorSpec("x", "FP32", (-1, columns)),)
    network = (lambda: Doubling(seconds)) if columns != -1 else lambda: OwnColumns(seconds)
    return Model("m", "1", spec, spec, 16, network, variants=variants, optimize=optimize)


@pytest.fixture
def load() -> Iterator[Callable[..., tuple[LoadReport, torch.nn.Module]]]:
    """Loads a model on a CPU, and returns the report and what its lanes call."""

    def loaded(served: Model, seconds: float = 60.0, teams: Teams = NO_TEAMS) -> tuple[LoadReport, torch.nn.Module]:
        done: queue.Queue[Execution] = queue.Queue()
        runners: list[CpuRunner] = []

        def make_runner() -> CpuRunner:
            runners.append(CpuRunner())
            return runners[-1]

        pool = LanePool(
            *("cpu", "cpu", ""),
            make_runner=make_runner,
            lanes=2,
            inline=None,
            teams=teams,
            memory_mb=lambda: (0.0, 0.0),
            optimizer=Optimizer("cpu", seconds, 300.0, None),
            on_done=done.put,
        )
        report = pool.load(served)
        calls = [runner.calls[served.key] for runner in runners]
        spared = [call._call if isinstance(call, Sparing) else call for call in calls]
        (call,) = {id(each): each for each in spared}.values()  # all lanes run the same
        assert isinstance(call, torch.nn.Module)
        return report, call.variant if isinstance(call, Substitute) else call

    return loaded


def test_the_fastest_variant_with_the_same_answers_is_taken(load: Callable[..., Any]) -> None:
    report, call = load(model(SLOWER, WRONG, FASTER, LAST))
    assert call.seconds == 0
    (note,) = report.notes
    assert note.startswith("optimize: faster runs, in 0.")
    assert "wrong: it answers otherwise: output 'x'" in note
    assert "slower" in note
    assert "too little" in note
    assert "last: not tried, since faster gains" in note
    assert call.sizes == {rows for rows, _ in report.costs} == {1, 2, 4, 8, 16}  # warmed up anew


@pytest.mark.parametrize("other", [SLOWER, variant("fast", makes(lambda: Doubling(SLOW_S / 2)))])
def test_a_variant_that_takes_long_is_tried_beside_all_but_one(load: Callable[..., Any], other: Variant) -> None:
    report, call = load(model(other, LAST))
    assert call.seconds == 0
    assert report.notes[0].startswith("optimize: last runs")


@pytest.mark.parametrize(("teams", "is_taken"), [(NO_TEAMS, True), (Teams(lanes=1, threads=2, cores=2), False)])
@pytest.mark.parametrize("module", [Doubling, Scaling])
def test_a_team_that_a_batch_may_have_counts(
    load: Callable[..., Any], teams: Teams, module: type[Doubling], *, is_taken: bool
) -> None:
    half = variant("half", makes(lambda: Doubling(SLOW_S / 2)))
    report, _ = load(replace(model(half), factory=lambda: module(SLOW_S)), teams=teams)
    assert report.notes[0].startswith("optimize: half runs") is (is_taken or module is Doubling)


class Crowding(Doubling):
    """Takes four times as long with two threads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds * torch.get_num_threads() ** 2)
        return x * self.weight * self.factor


@pytest.mark.parametrize(("threads", "is_taken"), [(0, True), (1, True), (2, False)])
def test_a_time_that_the_threads_of_a_model_leave_no_batch_does_not_count(
    load: Callable[..., Any], threads: int, *, is_taken: bool
) -> None:
    crowding = variant("crowding", makes(lambda: Crowding(SLOW_S / 2)))
    report, _ = load(replace(model(crowding), threads=threads), teams=Teams(lanes=1, threads=2, cores=2))
    assert report.notes[0].startswith("optimize: crowding runs") is is_taken


class InPlace(Doubling):
    """Writes its answer over the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x.mul_(self.weight * self.factor) + 0


def test_a_variant_that_writes_to_its_input_spares_the_examples_of_its_author(load: Callable[..., Any]) -> None:
    own = np.arange(1.0, 7.0, dtype=np.float32).reshape(3, 2)
    spec = (TensorSpec("x", "FP32", own.shape),)
    network = Model(
        *("m", "1", spec, spec, 0, lambda: InPlace(SLOW_S)),
        variants=(variant("quick", makes(InPlace)),),
        example_values={"x": own},
    )
    report, _ = load(network, teams=Teams(lanes=1, threads=2, cores=2))
    assert report.notes[0].startswith("optimize: quick runs")
    assert own.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_rounding_is_no_other_answer(load: Callable[..., Any]) -> None:
    report, call = load(model(ROUNDED))
    assert call.factor != 2
    assert report.notes[0].startswith("optimize: rounded runs")


@pytest.mark.parametrize(
    ("tried", "why"),
    [
        (variant("none", refuses), "none: it is too round"),
        (variant("none", stumbles), "none: ZeroDivisionError: of its own"),
        (variant("none", makes(Doubling), missing="no such thing here"), "none: no such thing here"),
        (SLOWER, "too little"),
        (WRONG, "wrong: it answers otherwise"),
    ],
)
def test_a_variant_that_is_of_no_use_is_left_out_and_named(load: Callable[..., Any], tried: Variant, why: str) -> None:
    report, call = load(model(tried))
    assert call.seconds == SLOW_S
    (note,) = report.notes
    assert note.startswith("optimize: the network runs as it is; tried were ")
    assert why in note


def test_other_lengths_are_tried_too(load: Callable[..., Any]) -> None:
    report, call = load(model(variant("narrow", makes(Narrow)), columns=-1))
    assert isinstance(call, OwnColumns)
    assert "narrow: it raises ValueError: four columns" in report.notes[0]


def test_nothing_is_tried_where_a_forward_takes_little(load: Callable[..., Any]) -> None:
    report, _ = load(model(variant("never", stumbles), seconds=0.0))
    assert report.notes == ()


def test_nothing_is_tried_where_that_is_turned_off(load: Callable[..., Any]) -> None:
    report, call = load(model(variant("never", stumbles)), seconds=0.0)
    assert report.notes == ()
    assert call.seconds == SLOW_S


def test_a_variant_that_is_named_is_taken_whatever_it_gains(load: Callable[..., Any]) -> None:
    _, call = load(model(SLOWER, seconds=0.0, optimize="slower"))
    assert call.seconds == 3 * SLOW_S


def test_a_variant_that_is_named_and_answers_otherwise_is_not_taken(load: Callable[..., Any]) -> None:
    _, call = load(model(WRONG, optimize="wrong"))
    assert call.factor == 2


def test_nothing_is_tried_where_copies_of_the_weights_do_not_fit(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tnxd.executors.optimizer.free_memory", lambda: 31)  # there are eight bytes of weights
    report, call = load(model(variant("never", stumbles)))
    assert call.seconds == SLOW_S
    assert report.notes[0].endswith("tried were all: 0 MiB of weights, 0 MiB of memory are free")
    monkeypatch.setattr("tnxd.executors.optimizer.free_memory", lambda: 32)
    assert load(model(FASTER))[1].seconds == 0


class Hidden(Doubling):
    """Answers no number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 0 * 0


def test_nothing_is_tried_where_no_answer_tells_a_variant_from_another(load: Callable[..., Any]) -> None:
    served = replace(model(variant("any", makes(Hidden))), factory=lambda: Hidden(SLOW_S))
    report, call = load(served)
    assert call.seconds == SLOW_S
    assert not any(note.startswith("optimize") for note in report.notes)


class Large(Doubling):
    """Runs out of memory with more than four rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 4:
            raise MemoryError("no room for five rows")
        return super().forward(x)


def test_batches_that_memory_does_not_allow_are_not_tried_for_a_variant(load: Callable[..., Any]) -> None:
    served = replace(model(variant("also large", makes(Large))), factory=lambda: Large(SLOW_S))
    report, call = load(served)
    assert call.seconds == 0
    assert report.notes[0].startswith("optimize: also large runs")
    assert report.safe_rows == 4


def test_a_variant_for_another_kind_of_device_is_not_looked_at(load: Callable[..., Any]) -> None:
    report, call = load(model(Variant("cuda", ("cuda",), "", stumbles)))
    assert report.notes == ()
    assert call.seconds == SLOW_S
