"""A model of about a millisecond for one row, for servers with and without the rest of this project: torch alone.

Its weights, 11.8 MB, do not fit into the caches of a core, so that one row takes almost as long as several.
"""

from __future__ import annotations

import torch
from torch import nn

COLUMNS = 768
_LAYERS = 5
_SEED = 768


def wide() -> nn.Module:
    """Float32 [N, 768] -> float32 [N, 768]: five linear layers. Its weights are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        layers: list[nn.Module] = []
        for _ in range(_LAYERS):
            layers += [nn.Linear(COLUMNS, COLUMNS), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval().requires_grad_(False)
