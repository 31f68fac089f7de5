"""Models of texts of all lengths for tests: one that a mask tells where a text ends, and others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from tnxctl.protocol.datatypes import Array

NETWORKS = """\
import time

import torch
from torch import nn


class Masked(nn.Module):
    '''Mean of what is embedded, and twice each of it: masked.'''

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(64, 4))

    def forward(self, ids, mask):
        kept = mask[..., None].to(self.table.dtype)
        x = self.table[ids] * kept
        return x.sum(1) / kept.sum(1).clamp(min=1), 2 * x


class Slow(Masked):
    '''The same, but a batch takes milliseconds, so that it is worth to plan.'''

    def forward(self, ids, mask):
        time.sleep(0.004)
        return super().forward(ids, mask)


class Short(Masked):
    '''The same for up to 32 places.'''

    def forward(self, ids, mask):
        return super().forward(ids + torch.zeros(32, dtype=torch.int64)[torch.arange(ids.shape[1])], mask)


class Recurrent(nn.Module):
    '''Last state of a recurrence that nobody tells where a text ends.'''

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(64, 4))

    def forward(self, ids, mask):
        state = torch.zeros(len(ids), 4)
        for place in range(ids.shape[1]):
            state = torch.tanh(state + self.table[ids[:, place]])
        return state, 2 * self.table[ids]


class Packed(nn.Module):
    '''The mean again, of tokens that come one after the other.'''

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(64, 4))

    def forward(self, ids, offsets):
        x = self.table[ids]
        return torch.stack([part.sum(0) / max(len(part), 1) for part in x.tensor_split(offsets[1:-1])])


class Crosstalk(Packed):
    '''A packed model that takes all texts for one.'''

    def forward(self, ids, offsets):
        return self.table[ids].mean(0).expand(len(offsets) - 1, 4)
"""

SIGNATURE = """
optimize = "none"
max_batch_size = 8
inputs = [
    { name = "ids", datatype = "INT64", shape = [-1, -1] },
    { name = "mask", datatype = "INT64", shape = [-1, -1] },
]
"""

MEAN = '{ name = "mean", datatype = "FP32", shape = [-1, 4] }'
TOKENS = '{ name = "tokens", datatype = "FP32", shape = [-1, -1, 4] }'

PADDED = """
[ragged]
max_length = 64
mask = "mask"
inputs = { ids = { pad = 0 }, mask = { pad = 0 } }
outputs = { tokens = 1 }
"""

PACKED = """
[ragged]
max_length = 64
mask = "mask"
inputs = { ids = {}, mask = {} }
packed = true
"""


def put(
    root: Path, name: str, factory: str, ragged: str, *, outputs: str = f"{MEAN}, {TOKENS}", more: str = ""
) -> Path:
    """Add a model to a repository. Args: ragged: what model.toml says about it. more: first lines of model.toml."""
    version = root / name / "1"
    version.mkdir(parents=True)
    (version / "networks.py").write_text(NETWORKS)
    weights = torch.from_numpy(TABLE)
    (version / "model.safetensors").write_bytes(safetensors.torch.save({"table": weights}))
    toml = f'factory = "networks:{factory}"\n{SIGNATURE}outputs = [{outputs}]\n{ragged}'
    (root / name / "model.toml").write_text(toml)
    return root / name


TABLE: Array = np.random.default_rng(3).uniform(-1, 1, (64, 4)).astype(np.float32)


def text(length: int, first: int = 1) -> dict[str, Array]:
    """A request of one text. Args: first: token; the others follow."""
    ids = (np.arange(first, first + length)[None] % 64).astype(np.int64)
    return {"ids": ids, "mask": np.ones_like(ids)}


def mean(length: int, first: int = 1) -> Array:
    """The answer to `text`, about."""
    found: Array = TABLE[text(length, first)["ids"][0]].mean(0)
    return found
