"""Demands of an exported program on the lengths of its inputs, beyond what a signature says."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sympy  # type: ignore[import-untyped]
import torch
from torch.export import ExportedProgram
from torch.utils._sympy.printers import PythonPrinter

from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument

# torch.export notes "at least 2" for an axis whose lower bound it does not know; 1 works there.
_UNKNOWN_LEAST = 2

_LENGTH = re.compile(r"L(?P<path>(?:\['[^']+'\]|\[\d+\]|\.(?!size\()\w+)+)\.size\(\)\[(?P<axis>\d+)\]")
_STEP = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.(\w+)")
_NAMES = {"math": math, "torch": torch, "inf": math.inf, "max": max, "min": min}


class Condition(NamedTuple):
    """A condition on lengths of inputs.

    Attributes:
        text: a Python expression over n0, n1, ...
        lengths: what those are: position of the input, and axis.
    """

    text: str
    lengths: tuple[tuple[int, int], ...]


class Conditions:
    """Conditions on the lengths of inputs, with their check.

    Args:
        names: of the inputs.
    """

    def __init__(self, names: Sequence[str], conditions: Iterable[Condition]) -> None:
        self.names = tuple(names)
        self.conditions = tuple(conditions)
        self._checks: list[tuple[Callable[..., Any], tuple[tuple[int, int], ...]]] = [
            (
                eval(f"lambda {', '.join(f'n{index}' for index in range(len(lengths)))}: {text}", dict(_NAMES)),
                lengths,
            )
            for text, lengths in self.conditions
        ]

    def check(self, inputs: Sequence[torch.Tensor]) -> None:
        """Hold inputs that fit the signature against the conditions.

        Raises:
            InvalidArgument: one does not hold; the sentence says it, and which lengths came.
        """
        for position, (holds, lengths) in enumerate(self._checks):
            if not holds(*[inputs[index].shape[axis] for index, axis in lengths]):
                text = self.conditions[position].text
                came = []
                for number, (index, axis) in enumerate(lengths):
                    place = f"axis {axis} of {self.names[index]!r}"
                    text = re.sub(rf"\bn{number}\b", place, text)
                    came.append(f"{place} is {inputs[index].shape[axis]}")
                raise InvalidArgument(f"the model takes only lengths where {text}; here {' and '.join(came)}")

    def on_rows(self, most: int) -> str:
        """A condition that some number of rows from 1 to `most` does not meet, in words; "" if there is none."""
        for (text, lengths), (holds, _) in zip(self.conditions, self._checks, strict=True):
            if lengths and all(axis == 0 for _, axis in lengths):
                for rows in range(1, most + 1):
                    if not holds(*[rows] * len(lengths)):
                        return re.sub(r"\bn\d+\b", "axis 0", text)
        return ""

    def without_rows(self) -> Conditions:
        """The same for a model whose rows others count, and keep to numbers for which `on_rows` has found nothing."""
        return Conditions(self.names, [item for item in self.conditions if any(axis != 0 for _, axis in item.lengths)])


def of_program(
    program: ExportedProgram, axes: Sequence[tuple[int, int, Any]], leaves: Mapping[str, int | None], label: str
) -> list[Condition]:
    """The conditions of a program: bounds and equalities of its variable axes, and what tracing it assumed.

    Args:
        axes: (position of the input, axis, length as an expression of sympy) of every variable axis.
        leaves: argument -> position of the input, in the program's order; None: it is no tensor.

    Raises:
        FailedPrecondition: it has a condition that cannot be checked.
    """
    found: dict[Condition, None] = {}
    first: dict[Any, tuple[int, int]] = {}
    for position, axis, length in axes:
        place = (position, axis)
        if length in first:
            found[Condition("n0 == n1", (place, first[length]))] = None
            continue
        first[length] = place
        least, most = bounds(program, length)
        if least:
            found[Condition(f"n0 >= {least}", (place,))] = None
        if most is not None:
            found[Condition(f"n0 <= {most}", (place,))] = None
    variable = {(position, axis) for position, axis, _ in axes}
    for code in program._guards_code:
        condition = _translate(code, leaves, label)
        if any(length in variable for length in condition.lengths):  # else the signature says it
            found[condition] = None
    return list(found)


@contextlib.contextmanager
def assumed(program: ExportedProgram) -> Iterator[list[Condition]]:
    """The conditions that a compiler adds to those of a program in the block: it decides by the example's lengths.

    torch.compile would note them as guards. Code that is compiled ahead has none, and where one does not hold it reads
    and writes beyond its tensors.

    Yields:
        A list that they are in after the block.

    Raises:
        FailedPrecondition: there is one that the lengths of the inputs do not tell.
    """
    places: dict[Any, tuple[int, int]] = {}
    environment: Any = None
    arguments = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    for position, node in enumerate(arguments):
        for axis, length in enumerate(node.meta["val"].shape):
            if isinstance(length, torch.SymInt):
                environment = length.node.shape_env
                places.setdefault(length.node.expr, (position, axis))
    before = 0 if environment is None else len(environment.guards)
    found: list[Condition] = []
    yield found
    for guard in [] if environment is None else environment.guards[before:]:
        if isinstance(guard.expr, sympy.Ne):
            continue  # it was asked whether two lengths are equal: what does not rely on it holds for equal ones, too
        symbols = sorted(guard.expr.free_symbols, key=str)
        if not places.keys() >= set(symbols):
            raise FailedPrecondition(f"the compiler assumes {guard.expr}, which cannot be checked")
        numbered = {symbol: sympy.Symbol(f"n{number}", integer=True) for number, symbol in enumerate(symbols)}
        text = PythonPrinter().doprint(guard.expr.xreplace(numbered))
        found.append(Condition(text, tuple([places[symbol] for symbol in symbols])))


def bounds(program: ExportedProgram, length: Any) -> tuple[int, int | None]:
    """Least and most of a variable length; 0 and None: there is no bound."""
    found = program.range_constraints.get(length)
    if found is None:
        return 0, None
    least = int(found.lower)
    return 0 if least <= _UNKNOWN_LEAST else least, int(found.upper) if found.upper.is_Integer else None


def _translate(code: str, leaves: Mapping[str, int | None], label: str) -> Condition:
    lengths: dict[tuple[int, int], str] = {}

    def replace(match: re.Match[str]) -> str:
        position = _position(match["path"], leaves)
        if position is None:
            raise FailedPrecondition(f"{label}: a condition on its inputs cannot be checked: {code}")
        return lengths.setdefault((position, int(match["axis"])), f"n{len(lengths)}")

    text = _LENGTH.sub(replace, code)
    return Condition(text, () if "L[" in text else tuple(lengths))  # what is left is about constants


def _position(path: str, leaves: Mapping[str, int | None]) -> int | None:
    """The input behind L['x'], L['inputs'][0], L['options']['x'], L['boxes'].scores or L['flat_args'][0]."""
    steps = [key or index or field for key, index, field in _STEP.findall(path)]
    if steps[0] == "flat_args" and steps[1].isdecimal():
        return list(leaves.values())[int(steps[1])]
    for name in (".".join(steps), "_".join(steps), steps[-1]):  # the second for *args, the third for **kwargs
        if name in leaves:
            return leaves[name]
    return None
