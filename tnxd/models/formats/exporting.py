"""Exporting: from a network to a program of torch.export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from tnxctl.protocol.errors import FailedPrecondition, Internal
from tnxd.error_text import sentence
from tnxd.models.formats.signature import Signature
from tnxd.models.tensors import TORCH_DTYPES, pick


class _Positional(torch.nn.Module):
    """Network that takes its inputs in order, whatever their names, and returns its outputs in order.

    Args:
        outputs: their names.
    """

    def __init__(self, network: torch.nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self._outputs = outputs

    def forward(self, *inputs: torch.Tensor) -> Any:
        raw = self.network(*inputs)
        try:
            return tuple(pick(raw, self._outputs, ""))  # torch.export does not know every class that holds them
        except Internal:
            return raw  # whoever compares the two says what is wrong


def export(network: torch.nn.Module, signature: Signature, device: torch.device) -> ExportedProgram:
    """A network as a program whose axes vary as its signature says, if they can.

    Its weights are called as in a module that has the network as its attribute `network`.

    Args:
        device: that the network is on.

    Raises:
        FailedPrecondition: torch.export cannot follow it.
    """
    inputs, dimensions = [], []
    rows = Dim("rows", min=1, max=max(signature.max_batch_size, 2))
    for spec, example in zip(signature.inputs, signature.examples, strict=True):
        # An axis of length 1 or 0 would be taken as fixed.
        shape = [max(have, 2) if want == -1 else want for have, want in zip(example, spec.shape, strict=True)]
        dynamic: dict[int, Any] = {axis: Dim.AUTO for axis, length in enumerate(spec.shape) if length == -1}
        if signature.max_batch_size:
            shape[0] = 2
            dynamic[0] = rows
        inputs.append(torch.zeros(shape, dtype=TORCH_DTYPES[spec.datatype], device=device))
        dimensions.append(dynamic)
    try:
        return torch.export.export(
            _Positional(network, [spec.name for spec in signature.outputs]),
            tuple(inputs),
            dynamic_shapes=(tuple(dimensions),),
            strict=False,
        )
    except MemoryError:
        raise  # another time there may be more
    except Exception as error:
        raise FailedPrecondition(f"torch.export cannot follow the network: {sentence(error)}") from error
