"""Verdict of a trial: the promises that hold for a version on a device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition
from tnxd.executors.execution import PURE, SHARED
from tnxd.executors.trial.examples import Item, Make
from tnxd.executors.trial.held import Place
from tnxd.executors.trial.state import State
from tnxd.executors.trial.undo import Beside
from tnxd.models.model import Model


@dataclass(frozen=True)
class Verdict:
    """Outcome of a trial.

    Attributes:
        model: the model as it may be served: without a batch axis where axis 0 does not count rows.
        state: of the module.
        serial: whether one lane at a time may call the module.
        make: makes inputs that the module takes; None: no example was taken.
        tolerance: difference that rounding makes, relative to the largest value of an output.
        notes: sentences for an operator.
        written_inputs: positions of inputs that a forward writes to.
        known: inputs of two requests and their answers; (): the answers cannot be repeated.
        differentiates: whether the module runs outside of inference mode.
        beside: the code beside the weights, as it was imported.
        telling: makers of examples whose values and answers differ.
        opening: the first item for a module that makes parts of itself at its first call; None: it makes none.
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
        """This verdict, for a module that was seen to write these places, too: its writes are to be undone."""
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
        """This verdict, for a module that lanes cannot call at the same time. Args: why: a difference, in words."""
        note = f"one lane at a time calls it: with a lane each, two requests had other answers than alone: {why}"
        return replace(self, serial=True, notes=(*self.notes, note))

    def by_length(self, why: str) -> Verdict:
        """This verdict, for a model whose answers change when rows are padded. Args: why: a difference, in words.

        Raises:
            FailedPrecondition: it is not padded, but packed.
        """
        ragged = self.model.ragged
        assert ragged is not None
        if ragged.packed:
            raise FailedPrecondition(
                f"{self.model.name}/model.toml: ragged.packed: a row alone and among others, {why}"
            )
        note = f"not padded, so that only requests of equal lengths share a batch: alone and padded, {why}"
        return replace(self, model=replace(self.model, ragged=ragged.apart()), notes=(*self.notes, note))

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
