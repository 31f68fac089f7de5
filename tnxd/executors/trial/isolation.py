"""Isolation of requests: the call that each lane gets for a module, so that no request changes another's answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.error_text import sentence
from tnxd.events import event
from tnxd.executors.execution import SHARED
from tnxd.executors.trial.asking import Asking
from tnxd.executors.trial.copies import Call, Differentiating, Own, Serial, Sparing, duplicate
from tnxd.executors.trial.held import submodule
from tnxd.executors.trial.state import REMEDY, State, same_chance
from tnxd.executors.trial.undo import Undo, held_by
from tnxd.executors.trial.verdict import Verdict

log = logging.getLogger(__name__)


def open_with(module: torch.nn.Module, verdict: Verdict, device: torch.device) -> None:
    """Call a module that was just built for the first time, before lanes share or copy it, if it makes parts then.

    The tensors and attributes that each forward writes are put back as they were built.

    Raises:
        FailedPrecondition: they cannot be put back.
    """
    if verdict.opening is None:
        return
    undo = _undo(module, replace(verdict.state, suspected=(), suspected_beside=()))
    asking = Asking(module, verdict.model, device)
    asking.differentiates = verdict.differentiates
    with same_chance():
        asking(verdict.opening)
    undo.put_back()
    if verdict.beside is not None:
        verdict.beside.put_back()


def lane_calls(module: torch.nn.Module, verdict: Verdict) -> Callable[[], Call]:
    """A maker of calls of a module, one for each lane.

    Args:
        module: as it was built; that of the trial only if the verdict is `pristine`.

    Raises:
        FailedPrecondition: requests cannot be kept apart.
    """
    apart = _kept_apart(module, verdict)
    made = (lambda: Differentiating(apart())) if verdict.differentiates else apart
    written = verdict.written_inputs
    return (lambda: Sparing(made(), written)) if written else made


def _kept_apart(module: torch.nn.Module, verdict: Verdict) -> Callable[[], Call]:
    written, suspected = verdict.state.written, verdict.state.suspected
    if verdict.serial:
        one = Serial(module, None if verdict.kind == SHARED else _undo(module, verdict.state))
        return lambda: one
    if verdict.pristine:
        return lambda: module

    def own() -> Own:
        copied = duplicate(module, _tensors(module, (*written, *suspected)))
        return Own(copied, _undo(copied, verdict.state))

    try:
        own()
    except Exception as error:  # whatever a part of it has against being copied
        if suspected:
            raise FailedPrecondition(
                f"its code may write to {_joined(*suspected[0])!r}, and it cannot be copied for each lane: "
                f"{sentence(error)}. {REMEDY}"
            ) from None
        why = sentence(error)
        log.info(
            "%s is called by one lane at a time: %s",
            *(verdict.model.key, why),
            extra=event("called_serially", verdict.model.key, reason=why),
        )
        one = Serial(module, _undo(module, verdict.state))
        return lambda: one
    return own


def _undo(module: torch.nn.Module, state: State) -> Undo:
    """The undo of the writes of a module's forwards.

    Raises:
        FailedPrecondition: something cannot be copied: the sentence names it.
    """
    inside = [[(submodule(module, path), name) for path, name in each] for each in (state.written, state.suspected)]
    try:
        return Undo([*inside[0], *state.beside], [*inside[1], *state.suspected_beside])
    except Exception as error:  # whatever a part of it has against being copied
        told = ", ".join(map(repr, state.names[:3]))
        raise FailedPrecondition(
            f"a forward writes, or may write, to {told}, which cannot be put back: {sentence(error)}. {REMEDY}"
        ) from None


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _tensors(module: torch.nn.Module, places: Sequence[tuple[str, str]]) -> list[torch.Tensor]:
    values = [getattr(submodule(module, path), name, None) for path, name in places]
    return [each for value in values for each in ((value,) if isinstance(value, torch.Tensor) else held_by(value))]
