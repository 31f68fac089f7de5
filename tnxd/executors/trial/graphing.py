"""Batches that are worth a graph: captured on a lane, held against the model itself, and measured beside it.

See `tnxd.executors.graphs`. It is done on the threads of the lanes that serve, between their batches and in small
steps: a graph belongs to the stream that it was captured on, and so does what libraries set up beside it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from statistics import median
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from tnxctl.protocol.errors import FailedPrecondition, ResourceExhausted, Unavailable
from tnxctl.protocol.wire import MIB
from tnxd.error_text import sentence
from tnxd.events import event
from tnxd.executors.execution import LoadReport
from tnxd.executors.graphs import Bucket, GraphRunner
from tnxd.executors.lane import TURN_S, Lane
from tnxd.executors.runner import Runner
from tnxd.executors.trial.examples import Item
from tnxd.executors.trial.host_waits import HostWaits
from tnxd.executors.trial.lengths import row_of_length
from tnxd.executors.trial.verdict import Verdict
from tnxd.executors.trial.warmup import MEMORY_SHARE, answer, run_example, warm_up_sizes
from tnxd.models.file_formats import PYTHON
from tnxd.models.model import Model
from tnxd.models.process_state.restoration import settings_restored
from tnxd.models.rounding import difference
from tnxd.models.tensors import on_device

log = logging.getLogger(__name__)

T = TypeVar("T")

_LONG_US = 20_000.0
"""A batch that takes longer needs no graph: its kernels are started while others run."""

_WARM_UPS = 3
"""Runs before a capture: libraries choose their ways and take their workspaces in the first ones."""

_NO_MEMORY = "no memory is left"

_ROUNDS = 5
"""Times that a batch is run each way."""

_AS_FAST = 1.02
"""Part of the model's own time that a graph may take: closer than that is noise, and it leaves Python to others."""

_SECONDS = 20.0
"""Time after which nothing more of a model is measured. What is not measured has no graph."""


class Gain(NamedTuple):
    """Gain by the graph of a bucket.

    Attributes:
        graph_us, full_us: of a batch that fills it, with the graph and without, in microseconds.
        least: rows, or tokens, from which on a batch is as fast with it.
    """

    graph_us: float
    full_us: float
    least: float


def least_units(graph_us: float, small_us: float, full_us: float, small: int, full: int) -> float | None:
    """Rows, or tokens, from which on a batch is as fast with the graph of its bucket; None: it never is.

    A graph takes the same time whatever is in it. Without it, the time is taken to grow evenly between the smallest and
    the largest batch of the bucket.

    Args:
        small_us, full_us: of these two without a graph. small, full: rows, or tokens, of both.
    """
    enough_us = graph_us / _AS_FAST
    if small_us >= enough_us:
        return float(small)
    if full_us < enough_us:
        return None
    return small + (full - small) * (enough_us - small_us) / (full_us - small_us)


def graph_lanes(lanes: Sequence[Lane], verdict: Verdict, report: LoadReport) -> LoadReport:
    """Give lanes that serve their graphs of a model, which they have a call for, and are warm.

    The first lane finds out which buckets are worth it, the others capture the same. Nothing that goes wrong here fails
    a load: the model itself runs then.

    Args:
        lanes: all that serve on the device, with graphs or all without.

    Returns:
        The report, with the times of graphs, and with notes on them.
    """
    first, *others = lanes
    model, device = verdict.model, first.runner.device
    if not isinstance(first.runner, GraphRunner) or not model.graphs:
        return report
    why = _against(verdict, report)
    if why:
        return report._replace(notes=(*report.notes, f"graphs: none: {why}"))
    trial = _LaneTrial(first, verdict, len(lanes))
    try:
        buckets = _buckets(model, report)
        trial.screen(buckets[0])
        trial.capture(buckets)
        gains = trial.measure()
        trial.use(gains)
    except BaseException as error:  # whatever a device, or a model, has against it
        trial.give_up()
        why = sentence(error)
        log.info(
            "%s on %s: no graphs: %s",
            *(model.key, device, why),
            extra=event("no_graphs", model.key, device=device, reason=why),
        )
        return report._replace(notes=(*report.notes, f"graphs: none: {why}"))
    notes = [trial.note(gains)]
    for number, lane in enumerate(others, 1):
        trial = _LaneTrial(lane, verdict, len(lanes))
        try:
            trial.capture(list(gains))
            trial.use(gains)
        except BaseException as error:
            trial.give_up()
            why = sentence(error)
            log.warning(
                "%s on %s: lane %d has no graphs: %s",
                *(model.key, device, number, why),
                extra=event("no_graphs", model.key, device=device, lane=number, reason=why),
            )
            notes.append(f"graphs: lane {number} has none: {why}")
    return _with_times(report, gains, model)._replace(notes=(*report.notes, *notes))


def _against(verdict: Verdict, report: LoadReport) -> str:
    """Why forwards of a model must not be captured, or cannot; "" if that is not known."""
    model = verdict.model
    reasons = (
        (model.format == PYTHON.name, "its Python is to run for every batch"),
        (model.takes_strings or model.returns_strings, "strings are on the host"),
        (not verdict.pristine, "a forward writes, or one lane at a time calls it"),
        (verdict.state.random, "its answers are drawn at random"),
        (verdict.differentiates, "it differentiates while it answers"),
        (model.joins and not model.pads, "a packed batch may have any number of tokens"),
        (not (verdict.known and report.costs), "no answer of it is known to hold graphs against"),
    )
    return next((why for found, why in reasons if found), "")


def _buckets(model: Model, report: LoadReport) -> list[Bucket]:
    """Sizes that may be worth a graph: those that the warm-up ran, and between them as far as lengths go.

    Raises:
        FailedPrecondition: there is none.
    """
    sizes, measured = zip(*sorted(report.costs), strict=True)
    micros = np.minimum.accumulate(measured[::-1])[::-1]  # a batch that took longer than a larger one was held up
    if not model.max_batch_size:
        buckets = [Bucket(0)]
    elif not model.pads:
        buckets = [Bucket(rows) for rows in sizes]
    else:
        assert model.ragged is not None
        buckets = [
            Bucket(rows, length)
            for rows in warm_up_sizes(model.max_batch_size)
            for length in warm_up_sizes(model.ragged.max_length)
            if rows * length <= min(model.max_units, sizes[-1])
        ]
    short = [bucket for bucket in buckets if np.interp(bucket.units, sizes, micros) <= _LONG_US]
    if not short:
        raise FailedPrecondition(f"a batch takes {micros[0] / 1e3:.0f} ms, and needs none")
    return short


class _LaneTrial:
    """Graphs of one model on one lane, as far as they are made.

    Attributes:
        left_out: why buckets have no graph.
    """

    def __init__(self, lane: Lane, verdict: Verdict, lanes: int) -> None:
        self.left_out: dict[Bucket, str] = {}
        self._lane = lane
        self._verdict = verdict
        self._model = verdict.model
        self._lanes = lanes
        self._buckets: list[Bucket] = []
        assert verdict.make is not None
        self._make = verdict.telling[0] if verdict.telling else verdict.make

    def _on_lane(self, function: Callable[[GraphRunner], T]) -> T:
        """Have the lane's thread do a step, between its batches."""

        def step(runner: Runner) -> T:
            assert isinstance(runner, GraphRunner)
            with settings_restored("a forward"):
                return function(runner)

        return self._lane.call(step, TURN_S)

    def _item(self, size: Bucket, variant: int) -> Item:
        if size.length:
            return row_of_length(self._model, self._make, size.rows, size.length, variant)
        return self._make(size.rows or self._model.example_rows, variant)

    def _tensors(self, runner: GraphRunner, item: Item) -> list[torch.Tensor]:
        return [
            on_device(array, spec.datatype, runner.torch_device)  # type: ignore[misc]  # there are no strings
            for array, spec in zip(item, self._model.inputs, strict=True)
        ]

    def _least(self, bucket: Bucket) -> Bucket:
        """The smallest batch that comes to a bucket."""
        rows = max([each.rows for each in self._buckets if each.rows < bucket.rows], default=0) + 1
        length = max([each.length for each in self._buckets if each.length < bucket.length], default=0) + 1
        return Bucket(min(rows, bucket.rows), min(length, bucket.length))

    def screen(self, size: Bucket) -> None:
        """Look for operators that ask for values on the host, bring some, or make shapes of some: none can be captured.

        A capture would find out as well. But one that fails leaves torch with memory that it never frees.

        Raises:
            FailedPrecondition: there is one.
        """

        def look(runner: GraphRunner) -> str:
            looking = HostWaits()
            call = runner.calls[self._model.key]
            inputs = self._tensors(runner, self._item(size, 0))
            with suppress(Exception), looking:  # what cannot be looked at may be captured all the same
                call(*inputs)
            return looking.found

        found = self._on_lane(look)
        if found:
            raise FailedPrecondition(f"a forward waits for values ({found})")

    def capture(self, buckets: Sequence[Bucket]) -> None:
        """Capture graphs, and hold their answers against those of the model itself.

        The largest come first: the others compute in their memory.

        Raises:
            FailedPrecondition: a graph answers otherwise, or there is none.
            Exception: whatever the model raised while it was captured.
        """
        self._buckets = sorted(buckets, key=lambda bucket: bucket.units, reverse=True)
        self._on_lane(self._open)
        for bucket in self._buckets:
            why = self._on_lane(partial(self._measure_memory, bucket))
            for _ in range(_WARM_UPS - 1):
                why = why or self._on_lane(partial(self._run, bucket))
            why = why or self._on_lane(partial(self._capture, bucket))
            if why:
                self.left_out[bucket] = why
                continue
            for size, variant in ((bucket, 0), (self._least(bucket), 1), (bucket, 1)):
                self._on_lane(partial(self._compare, bucket, size, variant))
        if len(self.left_out) == len(self._buckets):
            raise FailedPrecondition(_reasons(self.left_out))

    def _open(self, runner: GraphRunner) -> None:
        runner.open_graphs(self._model, [array.shape for array in self._item(self._buckets[-1], 0)])

    def _measure_memory(self, bucket: Bucket, runner: GraphRunner) -> str:
        """Run a batch that fills a bucket. Returns why it should have no graph, "" if nothing speaks against it."""
        with runner.measured() as peak:
            why = self._run(bucket, runner)
        left, nbytes = runner.memory_left() * MEMORY_SHARE / self._lanes, peak.nbytes * runner.depth
        return why or (f"would take {nbytes / MIB:.0f} MiB of memory" if left and nbytes > left else "")

    def _run(self, bucket: Bucket, runner: GraphRunner) -> str:
        try:
            execution = run_example(runner, self._model, self._item(bucket, 0))
        except ResourceExhausted:
            return _NO_MEMORY
        return _NO_MEMORY if execution.exhausted else ""

    def _capture(self, bucket: Bucket, runner: GraphRunner) -> str:
        """Capture the graphs of a bucket. Returns why not, where memory ran out."""
        try:
            runner.capture(self._model, self._item(bucket, 0), bucket)
        except BaseException as error:
            if runner.is_exhausted(error):
                return _NO_MEMORY
            raise
        return ""

    def _compare(self, bucket: Bucket, size: Bucket, variant: int, runner: GraphRunner) -> None:
        """Raises FailedPrecondition: a graph of a bucket answers a batch of that size otherwise."""
        item = self._item(size, variant)
        expected = answer(run_example(runner, self._model, item))
        for _ in range(runner.depth):
            with self._in_use(runner):
                found = answer(run_example(runner, self._model, item))
            apart = difference(self._model.outputs, expected, found, self._verdict.tolerance)
            if apart is not None and not (apart.counted and size != bucket):
                raise FailedPrecondition(f"its graph answers otherwise: {apart.text}")

    @contextmanager
    def _in_use(self, runner: GraphRunner) -> Iterator[None]:
        """Have a lane use the graphs within a block, on its thread."""
        graphs = runner.graphs[self._model.key]
        graphs.in_use = True
        try:
            yield
        finally:
            graphs.in_use = False

    def measure(self) -> dict[Bucket, Gain]:
        """Run batches both ways, by turns.

        Returns:
            Buckets that gain by their graphs, by growing size.

        Raises:
            FailedPrecondition: none does.
        """
        gains: dict[Bucket, Gain] = {}
        until = time.monotonic() + _SECONDS
        for bucket in [each for each in reversed(self._buckets) if each not in self.left_out]:
            if time.monotonic() > until:
                self.left_out[bucket] = "not measured, for want of time"
                continue
            rounds = [self._on_lane(partial(self._run_both, bucket)) for _ in range(_ROUNDS)]
            graph_us, small_us, full_us = (median(each) for each in zip(*rounds, strict=True))
            least = least_units(graph_us, small_us, full_us, self._least(bucket).units, bucket.units)
            if least is None:
                self.left_out[bucket] = "not as fast"
            else:
                gains[bucket] = Gain(graph_us, full_us, least)
        if not gains:
            raise FailedPrecondition(f"they gain nothing: {_reasons(self.left_out)}")
        return gains

    def _run_both(self, bucket: Bucket, runner: GraphRunner) -> tuple[float, float, float]:
        full, small = (self._item(size, 0) for size in (bucket, self._least(bucket)))
        with self._in_use(runner):
            graph_us = run_example(runner, self._model, full).run_us
        small_us, full_us = (run_example(runner, self._model, item).run_us for item in (small, full))
        return graph_us, small_us, full_us

    def use(self, gains: Mapping[Bucket, Gain]) -> None:
        """Have the lane run batches as graphs from now on, where they gain by it, and free all others."""

        def use(runner: GraphRunner) -> None:
            graphs = runner.graphs[self._model.key]
            if runner.calls.get(self._model.key) is not graphs.call:
                raise Unavailable("the load was given up meanwhile")
            for bucket in graphs.buckets:
                if bucket in gains:
                    graphs.use_from(bucket, gains[bucket].least)
                else:
                    graphs.drop(bucket)
            graphs.in_use = True

        self._on_lane(use)

    def give_up(self) -> None:
        """Free the graphs; where the lane is busy, when the model goes."""
        with suppress(Unavailable):
            self._on_lane(lambda runner: runner.forget_graphs(self._model.key))

    def note(self, gains: Mapping[Bucket, Gain]) -> str:
        """Sentence about what graphs gain, and which batches have none."""
        parts = []
        for bucket, gain in gains.items():
            least = "" if gain.least <= self._least(bucket).units else f" (from {math.ceil(gain.least)})"
            parts.append(f"{bucket}: {gain.graph_us / gain.full_us:.2f}{least}")
        by = "rows x length" if self._model.pads else "rows"
        rest = f"; without: {_reasons(self.left_out)}" if self.left_out else ""
        return f"graphs: parts of the time by {by} {', '.join(parts)}{rest}"


def _reasons(left_out: dict[Bucket, str]) -> str:
    """Reasons, with the buckets of each."""
    return "; ".join(
        f"{', '.join([str(bucket) for bucket, why in left_out.items() if why == reason])} {reason}"
        for reason in dict.fromkeys(left_out.values())
    )


def _with_times(report: LoadReport, gains: Mapping[Bucket, Gain], model: Model) -> LoadReport:
    """A report with the times of graphs in the place of those of the model itself."""
    if not model.pads:
        found = {max(bucket.rows, 1): gain.graph_us for bucket, gain in gains.items()}
        return report._replace(costs=[(rows, found.get(rows, micros)) for rows, micros in report.costs])
    padded = [
        (rows, length, gain.graph_us if (gain := gains.get(Bucket(rows, length))) else micros)
        for rows, length, micros in report.padded
    ]
    costs = [(tokens, micros) for (tokens, _), (_, _, micros) in zip(report.costs, padded, strict=True)]
    return report._replace(costs=costs, padded=padded)
