"""A library that brings an operator, as torchvision brings nms."""

from __future__ import annotations

import torch


@torch.library.custom_op("zoo::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@triple.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Triples(torch.nn.Module):
    """Uses the operator."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = triple(x)
        return result
