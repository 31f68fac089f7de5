"""The networks of the built-in models, in eval mode and without gradients. Nothing here knows of requests or devices.

Neither constructor reads or moves torch's global random state, and neither unpickles anything.
"""

from __future__ import annotations

import math
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

DIGITS_WEIGHTS = Path(__file__).with_name("digits.safetensors")
"""The trained weights of `DigitsNet`; `examples/digits/train.py` writes them."""

_MLP_SEED = 256_512_128


class DigitsNet(nn.Module):
    """Classifier of handwritten digits: two convolutions, one pooling, two linear layers; 38,282 parameters.

    Takes float32 [N, 64]: 8x8 scans in row-major order, values 0..16 (0 is paper, 16 is ink).
    Gives float32 [N, 10]: one score per digit, the logarithm of its odds up to a constant per row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.layers(image / 16.0)
        return scores


def mlp() -> nn.Module:
    """Float32 [N, 256] -> float32 [N, 128]: the network of the default model. Its weights are always the same."""
    with torch.device("meta"):  # no storage yet, and so no draw from the global generator
        net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(_MLP_SEED)
    for layer in net:
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)  # as nn.Linear itself would start
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return net.eval().requires_grad_(False)


def digits() -> nn.Module:
    """`DigitsNet` with its trained weights.

    Raises:
        OSError: the weights are not beside this file.
        safetensors.SafetensorError, RuntimeError: they are damaged, or those of another network.
    """
    with torch.device("meta"):
        net = DigitsNet()
    net.to_empty(device="cpu")
    net.load_state_dict(safetensors.torch.load(DIGITS_WEIGHTS.read_bytes()))  # mapped, it could change meanwhile
    return net.eval().requires_grad_(False)
