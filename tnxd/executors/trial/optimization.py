"""Optimization: the fastest variant of a module that gives the same answers.

A variant that the lane would run is held against the module itself: its answers on examples that differ, in two sizes
of a batch and in other lengths, and then its time, by turns with the module's, since a machine is faster at one time
than at another. The least time of several counts: what others do at the same time only adds to it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.device_kinds import KINDS
from tnxd.executors.trial.copies import Call
from tnxd.executors.trial.examples import Item, telling_examples
from tnxd.executors.trial.lane_comparison import answer_of
from tnxd.executors.trial.verdict import Verdict
from tnxd.models.model import Model
from tnxd.models.rounding import difference

WORTH_US = 2000.0
"""A module whose smallest batch takes less, in microseconds, is left as it is, unless model.toml names a variant."""

GAIN = 0.9
"""A variant is taken if it needs at most this part of the module's time."""

_ALLOWED = 1e-4
"""Difference between the answers of a variant and of the module, relative to the largest value of an output: the
variants of docs/performance.md differ by 1e-6 at most. A module that computes in 16 bits has its own tolerance."""

_FULL_PRECISION = 1e-3
"""A tolerance below this is that of a module that computes in 32 bits or more."""

_SIZES = (1, 8)
_MAKERS = 2
_VARIANTS = 2
_LONGER = 3
_TRIES = 5
_SECONDS = 4.0
"""Time after which no more tries are made for a size, once there were two."""


Pair = tuple[float, float]
"""Seconds of a module, and of a variant of it."""


class Outcome(NamedTuple):
    """Outcome of a comparison.

    Attributes:
        seconds: rows -> least time of the module for a batch, and of the variant.
    """

    seconds: dict[int, Pair]

    @property
    def parts(self) -> dict[int, float]:
        """Rows -> part of the module's time that the variant takes."""
        return {rows: variant_s / module_s for rows, (module_s, variant_s) in self.seconds.items()}

    @property
    def part(self) -> float:
        """Part of the module's time, as the geometric mean over the sizes."""
        return math.exp(sum(map(math.log, self.parts.values())) / len(self.seconds))

    def with_team(self, seconds: Pair, *, always: bool) -> Outcome:
        """The outcome where the smallest batch may have a team: each takes its better time.

        Args:
            seconds: with that team. always: whether each batch has it, so that no other time counts.
        """
        rows = min(self.seconds)
        module_s, variant_s = seconds if always else map(min, self.seconds[rows], seconds)
        return Outcome({**self.seconds, rows: (module_s, variant_s)})


def compare(module: Call, variant: Call, verdict: Verdict, device: torch.device, most_rows: int) -> Outcome:
    """Hold a variant against the module, on the calling thread.

    Args:
        most_rows: of a batch: with more, memory may end.

    Raises:
        FailedPrecondition: it answers otherwise, or raises; the sentence says how.
    """
    model = verdict.model
    sizes = [rows for rows in _SIZES if rows <= max(min(model.max_batch_size, most_rows), 1)]
    allowed = min(verdict.tolerance, _ALLOWED) if verdict.tolerance < _FULL_PRECISION else verdict.tolerance
    for described, item in _items(model, verdict, device, sizes):
        try:
            expected = answer_of(module, described, device, item)[1]
        except Exception as error:  # a length, for one, that the network does not take
            if described is model:
                raise FailedPrecondition(f"the network itself raises {type(error).__name__}") from None
            continue
        try:
            found = answer_of(variant, described, device, item)[1]
        except Exception as error:
            raise FailedPrecondition(f"it raises {type(error).__name__}: {error}") from None
        apart = difference(model.outputs, expected, found, allowed)
        if apart is not None:
            raise FailedPrecondition(f"it answers otherwise: {apart.text}")
    assert verdict.make is not None
    return Outcome({rows: _least(module, variant, model, device, verdict.make(rows, 0)) for rows in sizes})


def _items(model: Model, verdict: Verdict, device: torch.device, sizes: Sequence[int]) -> Iterator[tuple[Model, Item]]:
    """Inputs to compare answers on, each with the model that takes it."""
    known = verdict.telling[:_MAKERS]
    longer = _longer(model)
    made = [] if longer is None else list(islice(telling_examples(longer, KINDS[device.type]), _MAKERS))
    for described, makes in ((model, known), (longer or model, made)):
        for make in makes:
            for rows in sizes:
                for number in range(_VARIANTS):
                    yield described, make(rows, number)


def _longer(model: Model) -> Model | None:
    """The same model with longer examples; None if it has no axes of any length."""
    first = 1 if model.max_batch_size else 0
    shapes = model.example_shapes(1)
    longer = tuple(
        tuple(have + _LONGER if want == -1 and axis >= first else have for axis, (have, want) in pairs)
        for pairs in (
            list(enumerate(zip(shape, spec.shape, strict=True)))
            for shape, spec in zip(shapes, model.inputs, strict=True)
        )
    )
    return None if longer == tuple(map(tuple, shapes)) else replace(model, examples=longer, example_values={})


def _least(module: Call, variant: Call, model: Model, device: torch.device, item: Item) -> Pair:
    """The least time of a module, and of a variant."""
    best = [math.inf, math.inf]
    began = time.perf_counter()
    for count in range(_TRIES):
        for index, call in enumerate((module, variant)):
            start = time.perf_counter()
            answer_of(call, model, device, item)
            best[index] = min(best[index], time.perf_counter() - start)
        if count and time.perf_counter() - began > _SECONDS:
            break
    return best[0], best[1]
