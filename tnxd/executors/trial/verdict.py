"""The verdict of a trial: what may be promised about a version on a device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tnxctl.protocol.errors import FailedPrecondition
from tnxctl.protocol.frames import Array
from tnxd.executors.execution import PURE, SHARED
from tnxd.executors.trial.examples import Item, Make
from tnxd.executors.trial.held import Place
from tnxd.executors.trial.state import State
from tnxd.executors.trial.undo import Beside
from tnxd.models.model import Model


@dataclass(frozen=True)
class Verdict:
    """The outcome of a trial.

    Attributes:
        model: as it may be served: without a batch axis where that does not count rows.
        state: of the module.
        serial: whether one lane may call it at a time.
        make: makes inputs that it takes; None: no example was one.
        tolerance: difference that rounding makes, relative to the largest value of an output.
        written_inputs: positions of inputs that a forward writes to.
        known: inputs of two requests and their answers; (): these cannot be repeated.
        differentiates: whether it runs outside of inference mode.
        beside: the code beside the weights, as it was imported. telling: examples whose values and answers differ.
        opening: what to ask a module first, if that makes it what it is from then on.
        notes: what an operator should know.
    """

    model: Model
    state: State
    serial: bool
    make: Make | None
    tolerance: float
    notes: tuple[str, ...] = ()
    written_inputs: frozenset[int] = frozenset()
    known: tuple[tuple[Item, Sequence[Array]], ...] = ()
    differentiates: bool = False
    beside: Beside | None = None
    telling: tuple[Make, ...] = ()
    opening: Item | None = None

    def writing(self, places: Sequence[Place]) -> Verdict:
        """The verdict for a module that was seen to write these places, too: nothing of that is to be left behind."""
        places = [place for place in places if not _is_cache(place)]
        state = self.state.with_written(places)
        if self.beside is not None and state.kind != PURE:
            self.beside.put_back()
        return replace(self, state=state, serial=self.serial or state.outside)

    @property
    def kind(self) -> str:
        """PURE, SCRATCH or SHARED."""
        return SHARED if self.model.state == SHARED else self.state.kind

    def one_at_a_time(self, why: str) -> Verdict:
        """The verdict for a module that lanes cannot call at the same time."""
        note = f"one lane at a time calls it: with a lane each, two requests had other answers than alone: {why}"
        return replace(self, serial=True, notes=(*self.notes, note))

    @property
    def pristine(self) -> bool:
        """Whether the module is after the trial as it was built."""
        return self.kind == PURE and not self.serial


def without_rows(verdict: Verdict, why: str) -> Verdict:
    """The verdict for a model whose rows are found to depend on each other.

    Raises:
        FailedPrecondition: model.toml asks for batches.
    """
    what = f"axis 0 does not count rows: {why}"
    if verdict.model.batching_asked:
        raise FailedPrecondition(f"max_batch_size: {verdict.model.max_batch_size}, but {what}")
    return whole(verdict, f"no batches: {what}")


def whole(verdict: Verdict, note: str) -> Verdict:
    """The verdict for a model whose requests are never batched and never cut."""
    make = verdict.make
    rows = verdict.model.example_rows
    assert make is not None
    return replace(
        verdict,
        model=verdict.model.unbatched(),
        make=lambda _, variant: make(rows, variant),
        notes=(*verdict.notes, note),
    )


def about(state: State) -> tuple[str, ...]:
    """Notes about a state that is not pure."""
    if state.kind == PURE:
        return ()
    told = ", ".join(map(repr, state.names[:3])) + (" and more" if len(state.names) > 3 else "") or "what nobody sees"
    how = "one lane at a time calls it" if state.outside else "each lane has a copy of its own"
    return (f"a forward writes, or may write, to {told}: {how}",)


def _is_cache(place: Place) -> bool:
    """Whether a place is the cache of a function: it gives the same answer to the same arguments."""
    return isinstance(getattr(place.holder, place.attribute, None), functools._lru_cache_wrapper)
