"""Networks of real size that `models.py` measures: how each is built and asked, in a process and in a repository.

Weights are random, but for those of the sentence encoder: what is measured is how long it takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[Any]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

TOKENS = 32
STEPS, WIDTH = 32, 256
_SEED = 16


class Lstm(nn.Module):
    """Two layers of 256 cells, and a class of the last of 32 steps: float32 [N, 32, 256] -> float32 [N, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.lstm(x)[0][:, -1])
        return scores


class Mlp(nn.Module):
    """The layers of the built-in model `mlp`: float32 [N, 256] -> float32 [N, 128]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


@dataclass(frozen=True)
class Network:
    """A network and its requests.

    Attributes:
        title: in tables. build: makes it, with weights that are always the same.
        example: inputs of one row, by name and in order. output: the shape of a row of its output.
        max_batch: rows in one batch at most.
        lanes_win: whether two batches at a time, on one thread each, were found to do more than any one process.
    """

    title: str
    build: Callable[[], nn.Module]
    example: Callable[[], Mapping[str, Array]]
    output: tuple[int, ...]
    max_batch: int
    lanes_win: bool = True


def _picture() -> Mapping[str, Array]:
    return {"image": np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)}


def _sentence() -> Mapping[str, Array]:
    ids = np.random.default_rng(0).integers(1000, 30000, (1, TOKENS), np.int64)
    return {"ids": ids, "mask": np.ones_like(ids)}


def _steps() -> Mapping[str, Array]:
    return {"x": np.random.default_rng(0).standard_normal((1, STEPS, WIDTH), np.float32)}


def _row() -> Mapping[str, Array]:
    return {"input": np.random.default_rng(0).standard_normal((1, 256), np.float32)}


def _own(network: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            return network().eval().requires_grad_(False)

    return build


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        export = _module("resnet/export.py")
        if name.startswith("resnet"):
            resnet: nn.Module = export.resnet(name)
            return resnet
        with export.stand_ins("torchvision", "yaml"):
            import timm
        made: nn.Module = timm.create_model(name)
        return made

    return _own(build)


def _sentences() -> nn.Module:
    sys.path.insert(0, str(EXAMPLES / "sentences"))
    try:
        encoder: nn.Module = _module("sentences/build.py").trained_encoder()
    finally:
        sys.path.pop(0)
    return encoder


NETWORKS = {
    "resnet50": Network("ResNet-50", _timm("resnet50"), _picture, (1000,), 8),
    "mobilenet": Network("MobileNetV3", _timm("mobilenetv3_large_100"), _picture, (1000,), 16),
    "efficientnet": Network("EfficientNet-B0", _timm("efficientnet_b0"), _picture, (1000,), 16),
    "minilm": Network(f"MiniLM, {TOKENS} tokens", _sentences, _sentence, (384,), 32),
    "lstm": Network("LSTM", _own(Lstm), _steps, (16,), 64),
    "mlp": Network("MLP", _own(Mlp), _row, (128,), 64, lanes_win=False),
}
"""By the name that the daemon serves them under."""


def _module(path: str) -> ModuleType:
    spec = spec_from_file_location(f"bench_{Path(path).stem}", EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# --- as a repository -----------------------------------------------------------------------------------------

_DATATYPES = {"float32": "FP32", "int64": "INT64"}

_FACTORY = """\
from importlib.util import module_from_spec, spec_from_file_location

_spec = spec_from_file_location("real_networks_of_{name}", {path!r})
_module = module_from_spec(_spec)
import sys

sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)


def build():
    return _module.NETWORKS[{name!r}].build()
"""


def publish(repository: Path, names: list[str], optimize: str, dtype: str = "") -> None:
    """Write networks into an empty model repository, as weights with a factory.

    Args:
        optimize: for model.toml; "" for a daemon that does not know the key.
        dtype: to compute in; "": that of the weights.
    """
    import safetensors.torch

    for name in names:
        network = NETWORKS[name]
        version = repository / name / "1"
        version.mkdir(parents=True)
        state = {key: tensor.contiguous() for key, tensor in network.build().state_dict().items()}
        safetensors.torch.save_file(state, version / "model.safetensors")
        path = str(Path(__file__).resolve())
        (version / "network.py").write_text(_FACTORY.format(name=name, path=path))
        lines = ['factory = "network:build"', f"max_batch_size = {network.max_batch}"]
        lines += [f"warm_up = {[1, 4, network.max_batch]}"]
        lines += [f'optimize = "{optimize}"'] if optimize else []
        lines += [f'dtype = "{dtype}"'] if dtype else []
        for key, array in network.example().items():
            shape = [-1, *array.shape[1:]]
            lines += ["[[inputs]]", f'name = "{key}"', f'datatype = "{_DATATYPES[str(array.dtype)]}"']
            lines += [f"shape = {shape}"]
        lines += ["[[outputs]]", 'name = "output"', 'datatype = "FP32"', f"shape = {[-1, *network.output]}"]
        (repository / name / "model.toml").write_text("\n".join(lines) + "\n")
