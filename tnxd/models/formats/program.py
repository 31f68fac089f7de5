"""Programs of torch.export as modules: a graph that runs as it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from tnxd.models.formats.description import Description
from tnxd.models.formats.writes import STORING, written_inputs

_READ_ON = torch.device("cpu")  # where torch.export.load puts a program


class Program(torch.nn.Module):
    """An exported program that is called with its tensors in order, and returns a tuple of tensors.

    It runs the program's graph as it is, with weights as arguments. What `ExportedProgram.module` makes of it checks
    and nests arguments, and looks up every weight by name, in each call: that takes longer than a small network.

    Attributes:
        held: parameter, buffer or constant of the program -> name of the buffer that holds it here.
    """

    def __init__(self, program: ExportedProgram, description: Description) -> None:
        super().__init__()
        self.description = description
        self._program = program
        self._run = program.graph_module.forward
        weights: dict[str, int] = {}
        for spec in program.graph_signature.input_specs:
            if spec.target is None or spec.target in weights:
                continue
            weights[spec.target] = len(weights)
            held = program.constants if spec.target in program.constants else program.state_dict
            self.register_buffer(f"weight_{weights[spec.target]}", held[spec.target].detach())  # its own name has dots
        self.held = {name: f"weight_{index}" for name, index in weights.items()}
        leaves = iter(description.leaves)
        self._constants: list[Any] = []
        self._order: list[int] = []
        """Of the graph's arguments: which of the weights, inputs and constants, counted in that order."""
        for spec in program.graph_signature.input_specs:
            if spec.target is not None:
                self._order.append(weights[spec.target])
                continue
            position, constant = next(leaves)
            if position < 0:
                self._order.append(len(weights) + len(description.found.inputs) + len(self._constants))
                self._constants.append(constant)
            else:
                self._order.append(len(weights) + position)
        outputs = program.graph_signature.output_specs
        own = [index for index, spec in enumerate(outputs) if spec.kind is OutputKind.USER_OUTPUT]
        self._returned = [own[position] for position in description.returned]
        self._stored = [
            (index, weights[spec.target])
            for index, spec in enumerate(outputs)
            if spec.kind in STORING and spec.target is not None
        ]
        """Of the graph's results: what its caller has to put into which of the weights."""
        self._plain = self._returned == list(range(len(outputs)))
        self._copied = sorted({description.leaves[position][0] for position in written_inputs(program)} - {-1})
        """Inputs that the graph works on in place: they are the request's, and not for it to change."""

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.description.conditions.check(inputs)
        values: list[Any] = [*self._buffers.values(), *inputs, *self._constants]
        for position in self._copied:
            values[position - len(inputs) - len(self._constants)] = inputs[position].clone()
        results: tuple[torch.Tensor, ...] = self._run(*[values[index] for index in self._order])
        if self._plain:
            return results
        for index, weight in self._stored:
            values[weight].copy_(results[index])
        return tuple([results[index] for index in self._returned])

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        """The same program over copies of its tensors. The graph is shared: it holds nothing."""
        made = memo[id(self)] = Program.__new__(Program)
        made.__dict__ = {**vars(self), "_buffers": copy.deepcopy(self._buffers, memo)}
        return made

    def train(self, mode: bool = True) -> Program:
        """Nothing: a program is what it was when it was exported."""
        return self

    def to(self, device: torch.device) -> Program:  # type: ignore[override]
        """The program on another device. Tensors that it makes are made there, too."""
        if device == _READ_ON:
            return self
        from torch.export.passes import move_to_device_pass

        moved = move_to_device_pass(self._program, device)
        moved.graph_module.recompile()
        return Program(moved, self.description)
