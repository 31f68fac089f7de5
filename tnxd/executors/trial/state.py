"""State of a module: whether an answer depends on earlier requests, found out by running the module.

*Pure*: a forward changes nothing that the module holds. *Scratch*: a forward writes, and the next one does not read
that. *Stateful*: an answer depends on earlier requests. That is refused, unless the state is meant to be *shared*.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition
from tnxd.device_kinds import KINDS
from tnxd.error_text import sentence
from tnxd.executors.execution import PURE, SCRATCH
from tnxd.executors.exhaustion import is_out_of_memory
from tnxd.executors.trial.examples import Item
from tnxd.executors.trial.held import HOOKS, Held, Place, memory, short
from tnxd.executors.trial.suspects import suspects, suspects_beside
from tnxd.models.model import Model
from tnxd.models.rounding import Difference, difference
from tnxd.models.tensors import Value, copied

Answer = tuple[list[Value], list[Array]]
"""The outputs that the module returned, and copies of them."""

Ask = Callable[[Item], Answer]
"""Runs the module once, and raises whatever the module raises."""

Differ = Callable[[Sequence[Array], Sequence[Array]], Difference | None]

_MOST_CALLS = 24
_MOST_SECONDS = 0.3
"""Calls, and seconds, for a module that looks pure: a counter that changes every tenth answer shows within them."""

_ORDER = (0, 0, 1, 1, 0)
"""Order of the two inputs: each after itself and after the other one, so that anything left behind shows."""

REMEDY = 'state = "shared" in model.toml serves it so, one request at a time'

_SEED = 20_261_128


@dataclass(frozen=True)
class State:
    """Writes of a module's forwards.

    Attributes:
        kind: PURE or SCRATCH.
        written: attributes that a forward was seen to write: (path of the module within the network, attribute).
        suspected: attributes that a forward may write besides.
        beside, suspected_beside: the same for class attributes and globals: (class or Python module, name).
        names: all of these, for people.
        outside: whether a forward also writes outside of the network, or out of sight. Such a module cannot be copied
            for a lane.
        random: whether answers differ by chance.
    """

    kind: str
    written: tuple[tuple[str, str], ...] = ()
    suspected: tuple[tuple[str, str], ...] = ()
    names: tuple[str, ...] = ()
    outside: bool = False
    random: bool = False
    beside: tuple[tuple[Any, str], ...] = ()
    suspected_beside: tuple[tuple[Any, str], ...] = ()

    def with_written(self, places: Sequence[Place]) -> State:
        """This state, with places that forwards have written, too."""
        if not places:
            return self
        beside = {(id(holder), name): (holder, name) for holder, name in self.beside}
        beside |= {
            (id(place.holder), place.attribute): (place.holder, place.attribute) for place in places if place.holder
        }
        inside = [(place.owner, place.attribute) for place in places if place.owner is not None]
        written = tuple(dict.fromkeys([*self.written, *inside]))
        return replace(
            self,
            kind=SCRATCH,
            written=written,
            suspected=tuple(each for each in self.suspected if each not in written),
            names=tuple(dict.fromkeys([*(place.name for place in places), *self.names])),
            outside=self.outside or any(place.owner is None or place.attribute in HOOKS for place in places),
            beside=tuple(beside.values()),
        )


def find_state(module: torch.nn.Module, model: Model, ask: Ask, first: Item, second: Item, allowed: float) -> State:
    """Find the state of a module by running it.

    Args:
        module: called at least once: the things that it makes at the first call are no state.
        ask: runs the module. first, second: inputs of one request each, with different values where possible.
        allowed: difference that rounding may make, relative to the largest value of an output.

    Raises:
        FailedPrecondition: an answer depends on earlier requests, or may: the sentence names what holds it.
    """

    def differ(one: Sequence[Array], other: Sequence[Array]) -> Difference | None:
        return difference(model.outputs, one, other, allowed)

    with same_chance():
        seeded(ask, first)
        before = Held(module, model.writes)
        raw, alone = seeded(ask, first)
        other = seeded(ask, second)[1]
        apart = _repeated(ask, [(first, alone), (second, other)], differ)
        reused = differ([copied(value) for value in raw], alone) is not None
        seeded(ask, second)  # so that what an input left behind is not what was there before
        after = Held(module, model.writes)
        changed = before.changed(after)
        if model.state == "random":
            apart = None
        if apart is not None and (changed or not (after.draws or _draws(ask, first))):
            raise stateful([place.name for place in changed] or model.writes, apart.text)
        check_graph(model, changed)
        suspected, beside = tuple(suspects(module)), tuple(suspects_beside(module))
        other_content = [place for place in changed if not before.has_same_content(after, place.name)]
        _disturbed(module, model, ask, first, alone, other_content, differ)
        hidden = (reused and not changed) or not after.complete
        return State(
            SCRATCH if suspected or beside or hidden else PURE,
            suspected=suspected,
            suspected_beside=beside,
            names=(
                *(".".join(filter(None, each)) for each in suspected),
                *(f"{short(holder)}.{name}" for holder, name in beside),
            ),
            outside=hidden or bool(beside),
            random=differ(ask(first)[1], ask(first)[1]) is not None,
        ).with_written(changed)


def _draws(ask: Ask, item: Item) -> bool:
    """Whether a forward draws random numbers from the generators of the process. Lanes may draw meanwhile, too."""
    seeded(lambda _: ([], []), item)
    states = _generators()
    ask(item)
    return _generators() != states


def _generators() -> tuple[object, ...]:
    return random.getstate(), torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state())


def _repeated(ask: Ask, known: Sequence[tuple[Item, list[Array]]], differ: Differ) -> Difference | None:
    """The difference between an answer and that to the same input before, if there is one."""
    began = time.monotonic()
    for call in range(_MOST_CALLS):
        item, answer = known[_ORDER[call % len(_ORDER)]]
        apart = differ(answer, seeded(ask, item)[1])
        if apart is not None or (call >= len(_ORDER) and time.monotonic() - began > _MOST_SECONDS):
            return apart
    return None


def check_graph(model: Model, changed: Sequence[Place]) -> None:
    """Check that a program has written to all tensors that its graph may write to.

    Raises:
        FailedPrecondition: it has not: whether an answer depends on that tensor is not known.
    """
    written = {place.name for place in changed}
    for name in model.writes:
        if name not in written:
            raise FailedPrecondition(
                f"it may write to {name!r}, but did not for any example: whether an answer depends on earlier "
                f"requests cannot be told. {REMEDY}"
            )


def _disturbed(
    module: torch.nn.Module,
    model: Model,
    ask: Ask,
    item: Item,
    answer: Sequence[Array],
    changed: Sequence[Place],
    differ: Differ,
) -> None:
    """Check that a forward writes the tensors that it changes before it reads them: other values there are put in.

    Raises:
        FailedPrecondition: they make a difference.
    """
    places = {place.name for place in changed}
    held = list(Held(module, model.writes, contents=False).tensors) if places else []
    weights = {memory(tensor) for place, tensor in held if place.name not in places}
    disturbed = []
    generator = torch.Generator().manual_seed(_SEED)
    for place, tensor in held:
        if place.name in places and not tensor.is_meta and memory(tensor) not in weights:
            _disturb(tensor, generator)
            disturbed.append(place.name)
    if not disturbed:
        return
    try:
        apart = differ(answer, seeded(ask, item)[1])
    except Exception as error:  # whatever it has against these values
        blame(error)
        raise stateful(disturbed, f"with other values there it raises {sentence(error)}") from None
    if apart is not None:
        raise stateful(disturbed, apart.text)


def _disturb(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Put other values in place of those that a tensor has, of the same order of magnitude."""
    if tensor.dtype is torch.bool:
        tensor.logical_not_()
    elif tensor.is_floating_point() or tensor.is_complex():
        noise = torch.rand(tensor.shape, dtype=torch.float32, generator=generator).to(tensor.device)
        tensor.copy_((3 * noise + 1).to(tensor.dtype))
    else:
        tensor.copy_((tensor.to(torch.int64) + 1).to(tensor.dtype))  # unsigned ones cannot be added to


def stateful(names: Sequence[str], how: str) -> FailedPrecondition:
    """The error that an answer depends on earlier requests.

    Args:
        names: of the state that earlier requests left. how: the difference, in words.
    """
    through = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    what = f"through {through}" if names else "through something that it holds out of sight"
    return FailedPrecondition(
        f"an answer depends on earlier requests, {what}: the same input gave different answers, {how}. {REMEDY}"
    )


def blame(error: Exception) -> None:
    """Raise an error again that says nothing about the model: the device is lost, or memory has run out."""
    if isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
        raise error


@contextlib.contextmanager
def same_chance() -> Iterator[None]:
    """Give the generators of the process an unforeseeable seed in the end.

    Their state of before is not restored: lanes that sample have drawn from it meanwhile, and would draw it twice.
    """
    try:
        yield
    finally:
        random.seed()
        np.random.seed()
        torch.default_generator.seed()
        for device in _devices_with_generators():
            device.seed_all()


def seeded(ask: Ask, item: Item) -> Answer:
    """Run a module with the same random numbers at every call. Lanes that draw meanwhile draw foreseeable ones."""
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.default_generator.manual_seed(_SEED)
    for device in _devices_with_generators():
        device.manual_seed_all(_SEED)
    return ask(item)


def _devices_with_generators() -> list[Any]:
    """torch's modules of the kinds of devices that have generators and are in use. Others would remember each seed."""
    modules = [torch.get_device_module(kind.name) for kind in KINDS.values() if kind.has_generator]
    return [module for module in modules if module.is_initialized()]
