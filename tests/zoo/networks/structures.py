"""Networks that take and give more than a flat list of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH = 8


class NestedOut(nn.Module):
    """A tensor, and a tuple of a tensor and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x), (x * 2, [x * 3, x.sum(1)])


class NestedMapping(nn.Module):
    """A dict with a list and a dict in it, as models with hidden states return it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = torch.relu(self.layer(x))
        return {"logits": hidden.sum(1), "hidden": [x * 2, hidden], "more": {"mean": x.mean(1)}}


class ListOut(nn.Module):
    """A list of feature maps."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x * factor for factor in (1.0, 2.0, 3.0)]


class WithNone(nn.Module):
    """Nothing at all where there is no loss."""

    def forward(self, x: torch.Tensor) -> Any:
        return x * 2, None, x * 3


class PairIn(nn.Module):
    """A tuple of tensors in."""

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return pair[0] - 2 * pair[1]


class MappingIn(nn.Module):
    """A dict of tensors in."""

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["x"] - 2 * batch["y"]


class ListIn(nn.Module):
    """A list of tensors in, and one by itself."""

    def forward(self, features: list[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        return torch.stack(features, 1) * scale[:, None, None]


class Optional(nn.Module):
    """A second input that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH) * 2)

    def forward(self, x: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        return x * self.scale if offset is None else x * self.scale + offset


class Keyword(nn.Module):
    """An input that has to be given by name."""

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        return x * scale


class Doubles(nn.Module):
    """Twice its input, by a buffer, so that it has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)
