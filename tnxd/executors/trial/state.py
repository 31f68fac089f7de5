"""Whether an answer depends on earlier requests, found out by running a module.

*Pure*: no forward changes what the module holds. *Scratch*: it does, but what it writes is not read by the next one.
*Stateful*: an answer depends on what was asked before. That is refused, unless it is meant to be *shared*.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tnxctl.errors import FailedPrecondition, TensorNextError
from tnxctl.frames import Array
from tnxd.executors.execution import PURE, SCRATCH
from tnxd.executors.tensors import to_array
from tnxd.executors.trial.examples import Item
from tnxd.executors.trial.held import Held, Place, memory
from tnxd.executors.trial.suspects import suspects
from tnxd.models.model import Model
from tnxd.noise import Difference, difference
from tnxd.sentences import sentence

Answer = tuple[list[torch.Tensor], list[Array]]
"""What the module returned, and a copy of it."""

Ask = Callable[[Item], Answer]
"""Runs the module once. Raises what it raises."""

_MOST_CALLS = 24
_MOST_SECONDS = 0.3
"""For a module that looks pure: a counter that changes every tenth answer shows within so many calls."""

_SEED = 20_261_128


@dataclass(frozen=True)
class State:
    """What a forward does to what the module holds.

    Attributes:
        kind: PURE or SCRATCH.
        written: attributes that it writes: (path of the module within the network, attribute).
        unread: those of them whose tensors are written before they are read.
        names: what it writes, for people.
        outside: whether it also writes outside of the network, or to what nobody sees: it cannot be copied for a lane.
        random: whether answers differ by chance.
    """

    kind: str
    written: tuple[tuple[str, str], ...] = ()
    unread: frozenset[tuple[str, str]] = frozenset()
    names: tuple[str, ...] = ()
    outside: bool = False
    random: bool = False


def find_state(module: torch.nn.Module, model: Model, ask: Ask, first: Item, second: Item, allowed: float) -> State:
    """Find out what forwards of a module do to what it holds.

    Args:
        module: as it was built, and called at least once: what it makes at the first call is no state.
        ask: runs it. first, second: inputs of one request each, with different values where possible.
        allowed: difference that rounding may make, relative to the largest value of an output.

    Raises:
        FailedPrecondition: an answer depends on earlier requests, or may: the sentence names what holds it.
    """

    def differ(one: Sequence[Array], other: Sequence[Array]) -> Difference | None:
        return difference(model.outputs, one, other, allowed)

    with same_chance():
        before = Held(module)
        raw, alone = seeded(ask, first)
        _, other = seeded(ask, second)
        kept = [to_array(tensor.cpu()) for tensor in raw]
        reused = differ(kept, alone) is not None
        apart = None
        began = time.monotonic()
        for call in range(_MOST_CALLS):
            again = seeded(ask, first if call % 2 == 0 else second)[1]
            apart = differ(alone if call % 2 == 0 else other, again)
            if apart is not None or (call and time.monotonic() - began > _MOST_SECONDS):
                break
        after = Held(module)
        changed = before.changed(after)
        names = [place.name for place in changed] or list(model.writes)
        if apart is not None:
            raise _stateful(model, names, apart.text)
        _check_graph(model, before, after, changed)
        inside = {(place.owner, place.attribute) for place in changed if place.owner is not None}
        written = tuple(dict.fromkeys([*inside, *suspects(module)]))
        unread = frozenset(_unread(module, model, ask, first, alone, changed, differ))
        outside = any(place.owner is None for place in changed) or (reused and not changed) or not after.complete
        kind = SCRATCH if written or outside or reused else PURE
        told = dict.fromkeys([place.name for place in changed])
        told |= dict.fromkeys([".".join(filter(None, place)) for place in written if place not in inside])
    return State(kind, written, unread, tuple(told), outside, random=_is_random(ask, first, differ))


def _check_graph(model: Model, before: Held, after: Held, changed: Sequence[Place]) -> None:
    """Whether all that the graph of a program may write to has been written: what it does otherwise is not known."""
    seen = {place.name.rpartition(".")[2] for place in changed} | {place.name for place in changed}
    for name in model.writes:
        if name not in seen and name.rpartition(".")[2] not in seen:
            raise FailedPrecondition(
                f"it may write to {name!r}, but did not for any example: whether an answer depends on earlier "
                f'requests cannot be told. state = "shared" in model.toml serves it one request at a time'
            )


def _unread(
    module: torch.nn.Module,
    model: Model,
    ask: Ask,
    first: Item,
    alone: Sequence[Array],
    changed: Sequence[Place],
    differ: Callable[[Sequence[Array], Sequence[Array]], Difference | None],
) -> Iterator[tuple[str, str]]:
    """Attributes with tensors that may hold anything before a forward: it makes no difference to its answer."""
    places = {place.name for place in changed}
    if not places:
        return
    held = list(Held(module, contents=False).tensors)
    weights = {memory(tensor) for place, tensor in held if place.name not in places}
    generator = torch.Generator().manual_seed(_SEED)
    for place, tensor in held:
        if place.name in places and not tensor.is_meta and memory(tensor) not in weights:
            _disturb(tensor, generator)
    try:
        disturbed = seeded(ask, first)[1]
    except TensorNextError as error:
        raise _stateful(model, sorted(places), f"with other values there: {sentence(error)}") from None
    apart = differ(alone, disturbed)
    if apart is not None:
        raise _stateful(model, sorted(places), apart.text)
    for place in changed:
        if place.owner is not None:
            yield place.owner, place.attribute


def _disturb(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Put other values in place of those that a tensor has, of the same order of magnitude."""
    if tensor.dtype is torch.bool:
        tensor.logical_not_()
    elif tensor.is_floating_point() or tensor.is_complex():
        noise = torch.rand(tensor.shape, dtype=torch.float32, generator=generator).to(tensor.device)
        tensor.copy_((3 * noise + 1).to(tensor.dtype))
    else:
        tensor.add_(1)


def _stateful(model: Model, names: Sequence[str], how: str) -> FailedPrecondition:
    through = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    what = f"through {through}" if names else "through something that it holds out of sight"
    return FailedPrecondition(
        f"an answer depends on earlier requests, {what}: the same input gave different answers, {how}. "
        f'state = "shared" in model.toml serves it so, one request at a time'
    )


def _is_random(ask: Ask, item: Item, differ: Callable[[Sequence[Array], Sequence[Array]], Difference | None]) -> bool:
    """Whether answers differ by chance: drawn from the generators of the process."""
    return differ(ask(item)[1], ask(item)[1]) is not None


@contextlib.contextmanager
def same_chance() -> Iterator[None]:
    """Put the generators of the process back in the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)


def seeded(ask: Ask, item: Item) -> Answer:
    """Run it with the same random numbers as ever. What others draw meanwhile is foreseeable."""
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    return ask(item)
