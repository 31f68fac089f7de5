"""Networks that leave something behind where a trial may not look: refused, or nobody finds it."""

from __future__ import annotations

import queue
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from format_tools import ask, open_model
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxd.executors.cpu import CpuRunner, order_weights
from tnxd.executors.execution import Execution
from tnxd.executors.pool import LanePool
from tnxd.models.model import Model

SOURCE = """
import functools
import numpy as np
import torch
from torch import nn

SEEN, TABLE, COUNTS, WEIGHT = {{}}, [], [1.0], torch.ones(4)
ARRAY = np.ones(4, np.float32)

class Ring:
    def __init__(self):
        self.values = []
    def push(self, value):
        self.values = [*self.values, value][-3:]
        return sum(self.values) / len(self.values)

def remembering():
    last = torch.zeros(4)
    def step(x):
        nonlocal last
        y = x + last
        if bool((x > 2.5).any()):
            last = x[-1].clone()
        return y
    return step

def listed(x, seen=[]):
    if bool((x > 2.5).any()):
        seen.append(float(x.max()))
    return x + sum(seen)

def kept(seen, x):
    return listed(x, seen)

def noted(x):
    if bool((x > 500).any()):
        TABLE.append(1)

class Net(nn.Module):
    last = None
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.ring = Ring()
        self.step = remembering()
        self.partial = functools.partial(kept, [])
        self.masks = {{}}
        self.merged = False
        seen = []
        def hook(module, given, output):
            if bool((output > 1.5).any()):
                seen.append(output.mean())
            return output + (seen[-1] if seen else 0)
        self.hooked = nn.Identity()
        self.hooked.register_forward_hook(hook)
    def forward(self, x):
{body}

def build():
    return Net()
"""

TOML = """
factory = "net:build"
max_batch_size = 16
inputs = [{ name = "x", datatype = "FP32", shape = [-1, 4] }]
outputs = [{ name = "y", datatype = "FP32", shape = [-1, 4] }]
"""

BODIES = {
    "the last good one in a global": """
ok = x.isfinite().all(dim=1, keepdim=True)
if bool(ok.all()):
    SEEN["x"] = x[-1:].clone()
return self.layer(torch.where(ok, x, SEEN.get("x", torch.zeros(1, 4))))
""",
    "the last one in a class": """
y = self.layer(x)
if bool((x > 250).any()) and Net.last is not None:
    y = self.layer(Net.last[:1]).expand(len(x), 4)
Net.last = x.clone()
return y
""",
    "a helper": "return self.layer(x) + (self.ring.push(float(x.max())) if bool((x > 2.5).any()) else 0)",
    "a weight by another name": """
bias = self.layer.bias
if bool((x > 2.5).any()):
    torch.add(bias, x.mean(), out=bias)
return self.layer(x)
""",
    "a variable of a function around": "return self.layer(self.step(x))",
    "a default": "return self.layer(listed(x))",
    "a partial": "return self.layer(self.partial(x))",
    "a global number": """
if bool((x > 2.5).any()):
    COUNTS[0] = max(COUNTS[0], float(x.max()))
return self.layer(x) / COUNTS[0]
""",
    "a global array": """
if bool((x > 2.5).any()):
    ARRAY[:] = x[0].numpy()
return self.layer(x) * torch.from_numpy(ARRAY)
""",
    "a global tensor": """
if bool((x > 2.5).any()):
    WEIGHT.mul_(0.5)
return self.layer(x) * WEIGHT
""",
    "the scale of the first one in a global": """
if "scale" not in SEEN:
    SEEN["scale"] = 1 / x.abs().mean().clamp(min=0.5)
return self.layer(x) * SEEN["scale"]
""",
    "the scale of the first one in a new global": """
global SCALE
if "SCALE" not in globals():
    SCALE = 1 / x.abs().mean().clamp(min=0.5)
return self.layer(x) * SCALE
""",
    "the scale of the first one in a class": """
if Net.last is None:
    Net.last = 1 / x.abs().mean().clamp(min=0.5)
return self.layer(x) * Net.last
""",
    "rarely, a global": """
if bool((x > 500).any()):
    SEEN["n"] = SEEN.get("n", 0) + 1
return self.layer(x) + SEEN.get("n", 0)
""",
    "rarely, through a function": """
noted(x)
return self.layer(x) + len(TABLE)
""",
    "rarely, a class": """
y = self.layer(x) + (0 if Net.last is None else Net.last)
if bool((x > 500).any()):
    Net.last = x.mean()
return y
""",
    "rarely, a new global": """
global SCALE
y = self.layer(x) + globals().get("SCALE", 0)
if bool((x > 500).any()):
    SCALE = x.mean()
return y
""",
    "a range that the first one decides": """
if not self.masks:
    self.masks["scale"] = 255.0 if bool(x.amax() > 1) else 1.0
return self.layer(x / self.masks["scale"])
""",
    "a hook": "return self.hooked(self.layer(x))",
    "weights merged once": """
if not self.merged:
    self.layer.weight.data += torch.arange(16.0).view(4, 4) / 16
    self.merged = True
return self.layer(x)
""",
    "masks by length": """
n = len(x)
if n > 8 and n not in self.masks:
    self.masks[n] = torch.ones(n, 1)
return self.layer(x) * (self.masks[n] if n > 8 else 1)
""",
    "a weight changed and put back": """
weight = self.layer.weight.clone()
self.layer.weight.mul_(2)
y = self.layer(x)
self.layer.weight.copy_(weight)
return y
""",
}

SERVED = {"masks by length", "a weight changed and put back", "weights merged once"}
"""Those that leave nothing behind that matters."""


def published(root: Path, body: str) -> Model:
    folder = root / "net/1"
    folder.mkdir(parents=True)
    (folder / "net.py").write_text(
        SOURCE.format(body="\n".join(f"        {line}" for line in body.strip().splitlines()))
    )
    generator = torch.Generator().manual_seed(3)
    weights = {
        "layer.weight": torch.randn(4, 4, generator=generator),
        "layer.bias": torch.randn(4, generator=generator),
    }
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(weights))
    return open_model(root, TOML)


def alone(root: Path, x: Array) -> Array:
    """The answer of a network that was never asked before."""
    model = open_model(root)
    return ask(model, model.factory(), x)["y"]


def lanes_of(done: queue.Queue[Execution]) -> LanePool:
    return LanePool(
        *("cpu", "cpu", ""),
        make_runner=CpuRunner,
        lanes=2,
        inline=None,
        arrange=order_weights,
        memory_mb=lambda: (0.0, 0.0),
        on_done=done.put,
    )


@pytest.mark.parametrize("name", BODIES)
def test_nobody_finds_what_a_request_leaves_behind(tmp_path: Path, name: str) -> None:
    model = published(tmp_path, BODIES[name])
    done: queue.Queue[Execution] = queue.Queue()
    lanes = lanes_of(done)
    try:
        lanes.load(model)
    except FailedPrecondition:
        assert name not in SERVED
        return
    generator = np.random.default_rng(1)
    for number in range(24):
        x = generator.uniform(-1, (1, 3, 1000)[number % 3], (1 + number % 12, 4)).astype(np.float32)
        if number % 5 == 0:
            x[0, 0] = np.nan
        lanes.submit(Execution(number // 2 % 2, 0, model, [(x,)], [len(x)], ()))
        outcome = done.get(timeout=60).outcomes[0]
        assert not isinstance(outcome, TensorNextError), outcome
        np.testing.assert_allclose(outcome[0], alone(tmp_path, x), rtol=1e-3, atol=1e-3, err_msg=f"request {number}")
