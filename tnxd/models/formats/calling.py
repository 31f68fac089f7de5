"""Inputs in order -> the arguments that a network of Python or TorchScript takes."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.models import structures
from tnxd.models.formats.signature import Signature
from tnxd.models.structures import Tree


class Arguments(torch.nn.Module):
    """A network that is called with tensors in order, and gets them in structures: `cache.0.key` is a part of `cache`.

    Where an input did not come, and None stands for it, the network gets the default of its own `forward`; a structure
    of which nothing came is left out as a whole.

    Args:
        names: of the inputs.
    """

    def __init__(self, network: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self._trees = list(structures.tree(names).values())
        self._defaults = list(defaults(network).values())

    def forward(self, *inputs: torch.Tensor | None) -> Any:
        arguments = []
        for position, part in enumerate(self._trees):
            argument = _filled(part, inputs)
            if argument is None and position < len(self._defaults):
                default = self._defaults[position]
                argument = None if default is inspect.Parameter.empty else default
            arguments.append(argument)
        return self.network(*arguments)


def check_names(signature: Signature, label: str) -> None:
    """Check that the names of inputs make up structures. Raises FailedPrecondition: they do not; says LABEL and why."""
    try:
        structures.tree([spec.name for spec in signature.inputs])
    except FailedPrecondition as error:
        raise FailedPrecondition(f"{label}: inputs: {error.message}") from None


def arranged(network: torch.nn.Module, names: Sequence[str], optional: Collection[str] = ()) -> torch.nn.Module:
    """The network itself, if it takes its inputs just as they come.

    Args:
        optional: inputs that may not come.
    """
    return Arguments(network, names) if optional or any("." in name for name in names) else network


def defaults(network: torch.nn.Module) -> dict[str, Any]:
    """The arguments of a network by name, and what stands for one that is left out; `Parameter.empty`: nothing does."""
    if isinstance(network, torch.jit.ScriptModule):
        return {
            argument.name: argument.default_value if argument.has_default_value() else inspect.Parameter.empty
            for argument in network.forward.schema.arguments[1:]  # type: ignore[attr-defined]
        }
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):  # of a callable that is not made in Python
        return {}
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind in positional}


def _filled(part: Tree, inputs: Sequence[torch.Tensor | None]) -> Any:
    if isinstance(part, int):
        return inputs[part]
    if isinstance(part, dict):
        filled = {step: _filled(inner, inputs) for step, inner in part.items()}
        return filled if any(value is not None for value in filled.values()) else None
    values = tuple([_filled(inner, inputs) for inner in part])  # TorchScript takes a tuple for a list, too
    return values if any(value is not None for value in values) else None
