"""Model repositories for tests: small models whose answers tell which weights they have, or which version they are."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import safetensors.torch
import torch

from format_tools import save_program
from tnxctl import Client
from tnxctl.protocol.datatypes import Array

EXAMPLES = Path(__file__).parents[1] / "examples"

WIDTH = 8

SIGNATURE = f"""
[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, {WIDTH}]

[[outputs]]
name = "low"
datatype = "FP32"
shape = [-1, {WIDTH}]

[[outputs]]
name = "high"
datatype = "FP32"
shape = [-1, {WIDTH}]
"""

MODEL_TOML = 'factory = "network:scaled"\nmax_batch_size = 16\nwarm_up = [1, 16]\n' + SIGNATURE
"""model.toml of a `Scaled`."""

NETWORK = """\
import torch


class Scaled(torch.nn.Module):
    def __init__(self, elements):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(elements))
        self.multiply = self.scaled  # as many modules do: it refers to itself, and only the collector frees it

    def scaled(self, x):
        return x * self.weight.amin(), x * self.weight.amax()

    def forward(self, x):
        return self.multiply(x)


def scaled():
    {before}
    return Scaled({elements})
"""
"""The module of the factory. `before` is a statement to run first."""


SAYS = """
import torch

class Says(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.answer = torch.nn.Parameter(torch.zeros(()))
    def forward(self, x):
        {before}
        return x * 0 + self.answer

make = Says
"""
"""A module whose answer is a number that it has as its only weight. `before` is a statement to run first."""

HANGS_AT_7 = "import threading\n        if bool((x == 7).any()): threading.Event().wait()"
"""For `put`: the network never comes back from an input with a 7."""

SAYS_TOML = """
factory = "says:make"
max_batch_size = 8
inputs = [{ name = "x", datatype = "FP32", shape = [-1, 2] }]
outputs = [{ name = "y", datatype = "FP32", shape = [-1, 2] }]
"""

ONE_ROW = np.zeros((1, 2), np.float32)
"""An input of `Says`."""


class Scaled(torch.nn.Module):
    """Multiplies its input with its smallest and with its largest weight: with two numbers only if they are mixed."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * self.weight.amin(), x * self.weight.amax()


class Repository:
    """A model repository in a directory that a test may write.

    Args:
        root: where; made if it is not there.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root

    def settings(self, name: str, text: str = MODEL_TOML) -> None:
        """Write model.toml of a model."""
        (self.root / name).mkdir(exist_ok=True)
        (self.root / name / "model.toml").write_text(text)

    def publish(self, name: str, version: int | str, files: dict[str, bytes]) -> Path:
        """Put a version in place of the one that may be there, complete at once; returns its directory.

        The daemon that looks while files are being written would see half of them: they are written into a hidden
        directory, which then takes the name.
        """
        staged = self.root / name / f".staged-{version}"
        staged.mkdir(parents=True)
        for file, content in files.items():
            (staged / file).write_bytes(content)
        target = self.root / name / str(version)
        if target.exists():
            self.remove(name, version)
        return staged.rename(target)

    def remove(self, name: str, version: int | str) -> None:
        """Take a version away, all at once."""
        shutil.rmtree((self.root / name / str(version)).rename(self.root / name / f".removed-{version}"))

    def discard(self, name: str) -> None:
        """Take a model away."""
        shutil.rmtree(self.root / name)


def scaled(scale: float, mib: float = 0.001, *, before: str = "pass") -> dict[str, bytes]:
    """Files of a version that multiplies with `scale`, as safetensors and a factory.

    Args:
        mib: size of the weights in MiB.
        before: Python statement that the factory runs first.
    """
    elements = max(int(mib * 2**20 / 4), 1)
    return {
        "model.safetensors": safetensors.torch.save({"weight": torch.full((elements,), scale)}),
        "network.py": NETWORK.format(elements=elements, before=before).encode(),
    }


def scaled_program(path: Path, scale: float, mib: float = 0.001) -> dict[str, bytes]:
    """The same as one exported program. Args: path: where it may be written meanwhile."""
    net = Scaled(torch.full((max(int(mib * 2**20 / 4), 1),), scale))
    return {"model.pt2": exported(path, net, torch.zeros(2, WIDTH), max_batch=16)}


def exported(path: Path, net: torch.nn.Module, x: torch.Tensor, max_batch: int) -> bytes:
    """The content of a model.pt2 with one input whose axis 0 counts rows."""
    file = path / "model.pt2"
    save_program(file, net, (x,), ({0: torch.export.Dim("batch", min=1, max=max_batch)},))
    content = file.read_bytes()
    file.unlink()
    return content


def put(
    root: Path, name: str, version: int, *, answer: float | None = None, before: str = "pass", more: str = ""
) -> None:
    """Publish a model that answers with its version, or with `answer`.

    Args:
        before: Python statement that `forward` runs first. more: lines for its model.toml.
    """
    repository = Repository(root)
    weights = {"answer": torch.tensor(float(version if answer is None else answer))}
    files = {"model.safetensors": safetensors.torch.save(weights), "says.py": SAYS.format(before=before).encode()}
    repository.settings(name, f"{SAYS_TOML}{more}\n")
    repository.publish(name, version, files)


def says(client: Client, model: str = "net", **options: object) -> float:
    """The answer of a model that was `put`."""
    return float(client.predict(ONE_ROW, model=model, **options).output[0, 0])  # type: ignore[arg-type]


def rows(*values: float) -> Array:
    """An input of `Scaled`, one row for each value."""
    return np.repeat(np.array(values, np.float32)[:, None], WIDTH, axis=1)


def load_example(folder: str, script: str) -> ModuleType:
    """A script of the examples as a module; what lies beside it can be imported."""
    path = EXAMPLES / folder / f"{script}.py"
    spec = importlib.util.spec_from_file_location(f"{folder}_{script}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def rss_mb(pid: int) -> float:
    """Memory of a process in MiB that is in RAM, mapped files included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)
