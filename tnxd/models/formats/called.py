"""Calls of what was made of an exported network: by a file beside it, which says how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from tnxd.models.formats.conditions import Condition, Conditions

CALLED = "called.json"
"""Name of that file."""


class Called(msgspec.Struct, frozen=True):
    """Call of a program that was made of an exported network.

    Attributes:
        inputs: names of the signature's inputs, in order. conditions: what it demands of their lengths.
        outputs: positions of the signature's outputs among those of the program.
        bounded: whether the last of those says if all indices were in range.
    """

    inputs: tuple[str, ...]
    conditions: tuple[Condition, ...]
    outputs: tuple[int, ...]
    bounded: bool

    def wanted(self, found: int) -> list[int]:
        """Positions of the outputs that `Program` wants. Args: found: outputs of the program."""
        return [*self.outputs, *([found - 1] if self.bounded else [])]

    def write(self, folder: Path) -> None:
        """Write it into the folder of an artifact."""
        Path(folder, CALLED).write_bytes(msgspec.json.encode(self))

    @classmethod
    def read(cls, folder: Path) -> Called:
        """The call that `write` wrote."""
        return msgspec.json.decode(Path(folder, CALLED).read_bytes(), type=cls)


class Program(torch.nn.Module):
    """A program in the place of a network.

    Args:
        run: takes the inputs in order, and returns the outputs that `Called.wanted` names. called: how to call it.
    """

    def __init__(self, run: Callable[..., Sequence[torch.Tensor]], called: Called) -> None:
        super().__init__()
        self._run = run
        self._conditions = Conditions(called.inputs, called.conditions)
        self._bounded = called.bounded

    def forward(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        self._conditions.check(inputs)
        answers = self._run(*inputs)
        if not self._bounded:
            return answers
        if not answers[-1]:
            raise IndexError("an index is out of range")
        return answers[:-1]
