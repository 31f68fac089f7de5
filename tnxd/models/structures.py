"""Structures of tensors, and the names of what is in them. No torch.

A tensor in a structure has the path to it as its name, with dots between the steps: keys of dicts, fields of
dataclasses and named tuples, positions in tuples and lists. What a model returns is called `output` if it is a tensor,
and `output_0`, `output_1`, ... if it is a tuple of them.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tnxctl.protocol.errors import FailedPrecondition

OUTPUT = "output"
"""What a model returns, if it says no name itself."""

Tree = int | dict[str, "Tree"] | tuple["Tree", ...]
"""A structure of positions."""

Inside = Callable[[object], Iterable[tuple[str, object]] | None]


def children(value: object) -> Iterable[tuple[str, object]] | None:
    """Parts of a structure, by the names of the steps; None: the value is no structure, or one of an unknown kind."""
    if isinstance(value, Mapping):  # such as the output classes of transformers, which leave None out
        return [(str(key), value[key]) for key in value]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return zip(value._fields, value, strict=True)
    if isinstance(value, (tuple, list, deque)):
        return [(str(index), part) for index, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def has_names(value: object) -> bool:
    """Whether a structure has names of its own for the values in it."""
    return not isinstance(value, (tuple, list, deque)) and children(value) is not None


def leaves(value: object, inside: Inside = children) -> dict[str, object]:
    """Everything that a model returned, by name, in order; None is left out.

    Args:
        inside: as `children`, if that is to know of more kinds.

    Raises:
        FailedPrecondition: two things have the same name.
    """
    found: dict[str, object] = {}
    top = inside(value)
    if top is None:
        items: Iterable[tuple[str, object]] = [(OUTPUT, value)]
    elif isinstance(value, (tuple, list, deque)) and not hasattr(value, "_fields"):
        items = [(f"{OUTPUT}_{step}", part) for step, part in top]
    else:
        items = top
    for name, part in items:
        for path, leaf in below(name, part, inside):
            if path in found:
                raise FailedPrecondition(f"two outputs would be called {path!r}")
            found[path] = leaf
    return found


def below(name: str, value: object, inside: Inside = children) -> Iterator[tuple[str, object]]:
    """The leaves of a structure, with paths that begin with its name; None is no leaf."""
    inner = inside(value)
    if inner is None:
        if value is not None:
            yield name, value
        return
    for step, part in inner:
        yield from below(f"{name}.{step}", part, inside)


def tree(names: Sequence[str]) -> dict[str, Tree]:
    """The arguments that inputs of such names make up: argument -> its position, or a structure of positions.

    Raises:
        FailedPrecondition: a name leads into another, or positions are missing.
    """
    top: dict[str, Any] = {}
    for position, name in enumerate(names):
        *path, last = name.split(".")
        inner = top
        for depth, step in enumerate(path):
            inner = inner.setdefault(step, {})
            if not isinstance(inner, dict):
                raise FailedPrecondition(f"{name!r} would be a part of {'.'.join(path[: depth + 1])!r}, a tensor")
        if last in inner:
            raise FailedPrecondition(f"{name!r} is a tensor, and others would be a part of it")
        inner[last] = position
    return {step: _closed(part, step) for step, part in top.items()}


def _closed(part: Any, name: str) -> Tree:
    if not isinstance(part, dict):
        return int(part)
    steps = {step: _closed(inner, f"{name}.{step}") for step, inner in part.items()}
    if not any(step.isdecimal() for step in steps):
        return steps
    for index in range(len(steps)):
        if str(index) not in steps:
            raise FailedPrecondition(f"{name!r} has {len(steps)} parts, and none of them is {f'{name}.{index}'!r}")
    return tuple(steps[str(index)] for index in range(len(steps)))
