"""Networks that write to what they hold before they read it, or that fill caches which change no answer."""

from __future__ import annotations

import functools
import time
import warnings
from typing import Any

import torch
from torch import nn

WIDTH = 64


class Blocks(nn.Module):
    """Layers that take a while, so that two lanes are in the same forward at the same time."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        time.sleep(0.002)  # a larger network would take as long, and leave the interpreter to others meanwhile
        return x


class LargeOutput(nn.Module):
    """Returns a tensor of 1 M floats that it made once, as fast inference code does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("out", torch.zeros(1024, 1024), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.out.copy_(x.expand(1024, 1024) * self.scale)
        return self.out


class SmallOutput(nn.Module):
    """Returns a tensor that it made once, or the first rows of it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.register_buffer("out", torch.zeros(128, WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.out[: x.shape[0]]
        out.copy_(self.blocks(x) + x)
        return out


class OutKeyword(nn.Module):
    """Multiplies into a tensor that it made once."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.product = torch.zeros(128, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self.product[: len(x)]
        torch.mm(x, self.weight, out=product)
        return self.blocks(x) + product


class OutputList(nn.Module):
    """Collects its outputs in a list that it keeps and clears."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.outputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.outputs.clear()
        for layer in self.blocks.layers:
            x = torch.tanh(layer(x))
            self.outputs.append(x)
        time.sleep(0.002)
        return torch.cat(self.outputs, 1)


class Attribute(nn.Module):
    """One method leaves a tensor for another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.weight = nn.Parameter(torch.ones(WIDTH) * 2)

    def embed(self, x: torch.Tensor) -> None:
        self.hidden = x * self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.embed(x)
        mixed = self.blocks(x)
        return mixed + self.hidden


class AttributeDict(nn.Module):
    """One layer leaves a tensor for another in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.context: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.context["skip"] = x * 2
        return self.blocks(x) + self.context["skip"]


class ModuleGlobal(nn.Module):
    """One method leaves a tensor for another in a global of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CONTEXT["skip"] = x * 2
        return self.blocks(x) + CONTEXT["skip"]


CONTEXT: dict[str, torch.Tensor] = {}


class Hooks(nn.Module):
    """Takes what layers gave from hooks, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.features: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self.blocks.layers):
            layer.register_forward_hook(functools.partial(self.keep, index))

    def keep(self, index: int, layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.features[index] = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x) + self.features[0] + self.features[3] * 2


class Static(nn.Module):
    """Copies its input into memory that it made once, as code around CUDA graphs does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.register_buffer("static_input", torch.zeros(128, WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        static = self.static_input[: x.shape[0]]
        static.copy_(x)
        return self.blocks(static) + static


class ResetState(nn.Module):
    """A recurrent network that begins anew with each request, and keeps its state on itself meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def reset(self, rows: int) -> None:
        self.state = torch.zeros(rows, WIDTH)

    def step(self, x: torch.Tensor) -> None:
        self.state = self.cell(x, self.state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.reset(len(x))
        for _ in range(6):
            self.step(x)
            time.sleep(0.0005)
        return self.state


class ResetBuffer(nn.Module):
    """Zeroes a buffer, then adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.register_buffer("sums", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sums.zero_()
        mixed = self.blocks(x)
        for weight in (0.25, 0.75):
            self.sums.add_(weight * x.mean(0))
        return mixed + x - self.sums


class RotaryGrows(nn.Module):
    """A table of angles that grows with the longest sequence so far."""

    def __init__(self) -> None:
        super().__init__()
        self.cached = 0
        self.register_buffer("cosine", torch.zeros(0, WIDTH), persistent=False)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        if length > self.cached:
            angles = torch.arange(length)[:, None] / 100.0 ** (torch.arange(WIDTH) / WIDTH)
            self.cosine = angles.cos()
            self.cached = length
        return self.proj(x) * self.cosine[:length]


class RotaryExact(nn.Module):
    """A table of angles that is made anew whenever the length is another one than before."""

    def __init__(self) -> None:
        super().__init__()
        self.cached = 0
        self.cosine = torch.zeros(0)
        self.blocks = Blocks()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        if length != self.cached:
            self.cached = length
            angles = torch.arange(length)[:, None] / 100.0 ** (torch.arange(WIDTH) / WIDTH)
            self.cosine = angles.cos()
        return self.blocks(x) * self.cosine


class MaskByLength(nn.Module):
    """Keeps a mask for each length that has come."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[int, torch.Tensor] = {}
        self.proj = nn.Linear(WIDTH, WIDTH)

    def mask(self, length: int) -> torch.Tensor:
        if length not in self.masks:
            self.masks[length] = torch.full((length, length), float("-inf")).triu(1)
        return self.masks[length]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.proj(x) @ x.transpose(1, 2) / 8 + self.mask(x.shape[1])
        return scores.softmax(-1) @ x


@functools.lru_cache(maxsize=4)
def grid(length: int) -> torch.Tensor:
    return torch.linspace(-1, 1, length)


class LruCache(nn.Module):
    """A cache whose key says all."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) + grid(x.shape[1])[:, None]


class Inspected(nn.Module):
    """Leaves its attention to whoever wants to look at it; it never reads it itself."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.last_attention: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attention = (self.proj(x) @ x.transpose(1, 2)).softmax(-1)
        self.last_attention = attention
        return attention @ x


class Counts(nn.Module):
    """Counts its calls for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.calls = 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.steps += 1
        return self.blocks(x) + x


class WeightNorm(nn.Module):
    """The old weight_norm, whose hook sets an attribute in each forward."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would rather have the new one
            self.layer = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x))


class SpectralNorm(nn.Module):
    """The old spectral_norm, whose hook does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x))


class Parametrized(nn.Module):
    """The new weight_norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x))


class LazyOnce(nn.Module):
    """Makes a constant when it is first called."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.window: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.window is None:
            self.window = torch.hann_window(WIDTH)
        return self.proj(x) * self.window


class InferenceFlag(nn.Module):
    """Sets a flag for its layers, and sets it back."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.double = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.double = bool(x.shape[0] % 2)
        mixed = self.blocks(x)
        return mixed * 2 if self.double else mixed
