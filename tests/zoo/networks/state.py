"""Networks that remember: an answer depends on what was asked before."""

from __future__ import annotations

import collections
import functools
import itertools
import os
import threading
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 8


class BufferCopy(nn.Module):
    """Adds the first row of the request before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x + self.last
        self.last.copy_(x[0])
        return out


class BufferAdd(nn.Module):
    """Adds the sum of all that came before, its own included."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x.sum(0))
        return x + self.total


class BufferSlice(nn.Module):
    """Keeps a mean in one column of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(WIDTH, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x + self.table[:, 0]
        self.table[:, 0] = x.mean(0)
        return out


class BufferIndexPut(nn.Module):
    """Keeps a vector for each kind; the kind is the largest column of the first row."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(2, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = (x[0, :1] > 0).long()
        out = x + self.memory[kind]
        self.memory[kind] = x[:1]
        return out


class BufferScatter(nn.Module):
    """Counts classes with scatter_add_."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kinds = x.argmax(1)
        out = x + self.counts
        self.counts.scatter_add_(0, kinds, torch.ones_like(kinds, dtype=x.dtype))
        return out


class BufferOut(nn.Module):
    """Accumulates with out=."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.add(self.sums, x[0], out=self.sums)
        return x + self.sums


class BufferSet(nn.Module):
    """Gives a buffer other memory with set_."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x + self.last
        self.last.set_(x[0].clone())
        return out


class BufferAssigned(nn.Module):
    """A moving average, assigned anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.average = 0.9 * self.average + 0.1 * x.mean(0)
        return x - self.average


class BufferNonPersistent(nn.Module):
    """Remembers in a buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("recent", torch.zeros(WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x * (1 + self.recent)
        self.recent.mul_(0.5).add_(x[0])
        return out


class BufferView(nn.Module):
    """Writes to a view that it made of its buffer when it was built."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pair", torch.zeros(2, WIDTH), persistent=False)
        self.front = self.pair[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x + self.pair.sum(0)
        self.front.copy_(x[0])
        return out


class BufferObserver(nn.Module):
    """Scales by the least and most that it has ever seen, as an observer of a quantizer does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.low.copy_(torch.minimum(self.low, x.amin()))
        self.high.copy_(torch.maximum(self.high, x.amax()))
        return (x - self.low) / (self.high - self.low)


class BufferNumpy(nn.Module):
    """Writes to a buffer through numpy, which torch does not notice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x + self.last
        self.last.numpy()[:] = x[0].numpy()
        return out


class ParameterData(nn.Module):
    """Replaces a parameter's data."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x + self.bias
        self.bias.data = x[0].clone()
        return out


class ParameterNoGrad(nn.Module):
    """Trains a parameter while it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x + self.bias
        with torch.no_grad():
            self.bias += 0.5 * x.mean(0)
        return out


class AttributeTensor(nn.Module):
    """Keeps a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.previous = torch.zeros(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x * self.scale + self.previous
        self.previous = x[0].clone()
        return out


class AttributeNumber(nn.Module):
    """Keeps a number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.peak = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.peak = max(self.peak, float(x.abs().max()))
        return x * self.scale / self.peak


class AttributeList(nn.Module):
    """Appends to a list, and reads its end."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x * self.scale + (self.seen[-1] if self.seen else 0)
        self.seen.append(x[0].clone())
        return out


class AttributeDict(nn.Module):
    """Keeps what came last in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.memory: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x * self.scale + self.memory.get("last", torch.zeros(()))
        self.memory["last"] = x[0].clone()
        return out


class AttributeDeque(nn.Module):
    """Smooths over a window of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.window: collections.deque[torch.Tensor] = collections.deque(maxlen=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.window.append(x.mean(0))
        return x * self.scale - torch.stack(list(self.window)).mean(0)


class AttributeIterator(nn.Module):
    """Takes the next number of an iterator."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.steps = itertools.count()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + next(self.steps)


class Tracker:
    """Something that is no module."""

    def __init__(self) -> None:
        self.last = torch.zeros(WIDTH)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        before, self.last = self.last, x[0].clone()
        return before


class AttributeObject(nn.Module):
    """Keeps its memory in an object that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.tracker = Tracker()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.tracker.update(x)


class Slotted:
    """Something whose attributes stand in no dict."""

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last = torch.zeros(WIDTH)


class AttributeSlots(nn.Module):
    """Keeps its memory in an object with slots."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.slotted = Slotted()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x * self.scale + self.slotted.last
        self.slotted.last = x[0].clone()
        return out


class Submodule(nn.Module):
    """Its memory is two modules deep."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.ReLU(), BufferCopy()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


MEMORY: dict[str, torch.Tensor] = {}


class ModuleGlobal(nn.Module):
    """Keeps what came last in a global of its file."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x * self.scale + MEMORY.get("last", torch.zeros(()))
        MEMORY["last"] = x[0].clone()
        return out


_step = 0


class ModuleGlobalNumber(nn.Module):
    """Counts its calls in a global of its file."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global _step
        _step += 1
        return x * self.scale * _step


class Closure(nn.Module):
    """Keeps what came last in a variable of the function that made a function."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        last = torch.zeros(WIDTH)

        def remember(x: torch.Tensor) -> torch.Tensor:
            nonlocal last
            before, last = last, x[0].clone()
            return before

        self.remember = remember

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.remember(x)


class ByShape:
    """Stands for a tensor, but is equal to every other one of its shape."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByShape) and self.tensor.shape == other.tensor.shape

    def __hash__(self) -> int:
        return hash(tuple(self.tensor.shape))


@functools.lru_cache
def statistics(key: ByShape) -> torch.Tensor:
    return key.tensor.mean(0)


class LruCache(nn.Module):
    """A cache whose key is too small: all requests of one shape get what the first one got."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale - statistics(ByShape(x))


class ClassAttribute(nn.Module):
    """Keeps what came last on its class."""

    last: Any = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x * self.scale + type(self).last
        type(self).last = x[0].clone()
        return out


_local = threading.local()


class ThreadLocal(nn.Module):
    """Keeps what came last on its thread."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x * self.scale + getattr(_local, "last", torch.zeros(()))
        _local.last = x[0].clone()
        return out


class DefaultArgument(nn.Module):
    """Keeps what came last in an argument's default."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor, memory: dict[str, torch.Tensor] = {}) -> torch.Tensor:  # noqa: B006
        out = x * self.scale + memory.get("last", torch.zeros(()))
        memory["last"] = x[0].clone()
        return out


class Environment(nn.Module):
    """Keeps a number in the environment of the process."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x * self.scale + float(os.environ.get("ZOO_LAST", "0"))
        os.environ["ZOO_LAST"] = str(float(x[0, 0]))
        return out


class EveryTenth(nn.Module):
    """Answers otherwise every tenth time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.scale * (2 if self.calls % 10 == 0 else 1)


class Recurrent(nn.Module):
    """A GRU that goes on where it stopped, as in robots and in speech."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.hidden: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, hidden = self.cell(x[None], self.hidden)
        self.hidden = hidden
        return out[0]


class KeyValueCache(nn.Module):
    """Attends to all that it was ever given, up to 512 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("cache", torch.zeros(512, WIDTH), persistent=False)
        self.filled = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.filled + len(x) > len(self.cache):
            self.filled = 0
        self.cache[self.filled : self.filled + len(x)] = x
        self.filled += len(x)
        keys = self.cache[: self.filled]
        return torch.softmax(self.query(x) @ keys.T, -1) @ keys


class Sometimes(nn.Module):
    """Writes only when a value is beyond 500, which few are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x + self.offset
        if bool((x > 500).any()):
            self.offset.copy_(x[0])
        return out


class SometimesAttribute(nn.Module):
    """The same with an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.offset = torch.zeros(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x * self.scale + self.offset
        if bool((x > 500).any()):
            self.offset = x[0].clone()
        return out


class WhereWrites(nn.Module):
    """The same without a branch: it always writes, mostly what was there."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x + self.offset
        self.offset.copy_(torch.where((x > 500).any(), x[0], self.offset))
        return out


class TrainingStatistics(nn.Module):
    """A batch norm left in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)

    def train(self, mode: bool = True) -> TrainingStatistics:
        return super().train(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x[:, None])).flatten(1)


class RunningStatistics(nn.Module):
    """Statistics that go on running, and are what it normalizes with."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(WIDTH))
        self.register_buffer("running_var", torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.batch_norm(x, self.running_mean, self.running_var, training=False)
        self.running_mean.lerp_(x.mean(0), 0.1)
        return out


class StoredGenerator(nn.Module):
    """Draws noise from a generator of its own, made once with a seed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.generator = torch.Generator().manual_seed(7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + torch.randn(WIDTH, generator=self.generator)
