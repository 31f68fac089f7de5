"""channels_last: a network of convolutions over pictures whose channels lie side by side in memory."""

from __future__ import annotations

from typing import Any

import torch

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.models.variants import Build, Variant, Workshop

_AXES = 4
"""Of a picture in a batch: rows, channels, height, width."""


class ChannelsLast(torch.nn.Module):
    """A network whose weights and pictures are channels_last.

    Args:
        network: changed in place.
    """

    keeps_layout = True
    """Its weights lie in memory as they should."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network
        for weight in _pictures(network):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, *inputs: torch.Tensor | None) -> Any:
        return self.network(
            *[
                tensor.contiguous(memory_format=torch.channels_last)
                if tensor is not None and tensor.dim() == _AXES
                else tensor
                for tensor in inputs
            ]
        )


def variant() -> Variant:
    """The variant with channels_last."""
    return Variant("channels_last", ("cpu", "cuda"), "", _make)


def _make(build: Build, _: Workshop) -> torch.nn.Module:
    network = build()
    if not _pictures(network):
        raise FailedPrecondition("it has no convolutions over pictures")
    return ChannelsLast(network)


def _pictures(network: torch.nn.Module) -> list[torch.Tensor]:
    """Weights of convolutions over pictures, which have as many axes as those."""
    return [weight for weight in (*network.parameters(), *network.buffers()) if weight.dim() == _AXES]
