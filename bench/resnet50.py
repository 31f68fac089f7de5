"""ResNet-50 in plain torch: 25.6 million parameters, float32 [N, 3, 224, 224] -> float32 [N, 1000].

The layers are those of https://arxiv.org/abs/1512.03385 with the stride in the middle of a block, as torchvision has
them. The weights are random: what is measured is how long it takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Stages = Sequence[tuple[int, int, int]]
"""Width, blocks, and stride of the first block, of each."""

STAGES: Stages = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
_GROWTH = 4  # of the width, from the inside of a block to its output


def _convolution(channels: int, width: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(width))


class Block(nn.Module):
    """Three convolutions, and a way around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * _GROWTH
        self.inside = nn.Sequential(
            _convolution(channels, width, 1),
            nn.ReLU(),
            _convolution(width, width, 3, stride),
            nn.ReLU(),
            _convolution(width, out, 1),
        )
        self.around = nn.Identity() if channels == out and stride == 1 else _convolution(channels, out, 1, stride)

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(self.inside(image) + self.around(image))


class ResNet50(nn.Module):
    """The whole network. Args: stages: fewer or narrower ones make a network of the same kind that takes less time."""

    def __init__(self, stages: Stages = STAGES) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
        channels = 64
        for width, blocks, stride in stages:
            for number in range(blocks):
                layers.append(Block(channels, width, stride if number == 0 else 1))
                channels = width * _GROWTH
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.layers(image)
        return scores
