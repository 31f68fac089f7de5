"""A network that a factory makes, and weights for it, as tests put them into a repository."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from format_tools import tensors

NETWORK = """\
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight  # tied
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x):
        return self.second(self.first(x)) + self.shift

def make():
    return Net()
"""

TOML = 'factory = "net:make"\n' + tensors("x", "FP32", [-1, 4]) + tensors("y", "FP32", [-1, 4], "outputs")


def state(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = {
        "first.weight": torch.rand(4, 4, generator=generator),
        "first.bias": torch.rand(4, generator=generator),
        "second.bias": torch.rand(4, generator=generator),
        "shift": torch.ones(4),
    }
    return {**weights, **changed}


def save_weights(root: Path, weights: dict[str, torch.Tensor] | None = None, network: str = NETWORK) -> Path:
    version = root / "net/1"
    version.mkdir(parents=True, exist_ok=True)
    (version / "net.py").write_text(network)
    path = version / "model.safetensors"
    safetensors.torch.save_file(state() if weights is None else weights, path)
    return path


def expected(x: np.ndarray, weights: dict[str, torch.Tensor] | None = None) -> np.ndarray:
    held = {name: weight.double().numpy() for name, weight in (weights or state()).items()}
    once = x @ held["first.weight"].T + held["first.bias"]
    return once @ held["first.weight"].T + held["second.bias"] + held["shift"]


X = np.random.default_rng(4).random((3, 4)).astype(np.float32)
