"""Put a ResNet-50 into a model repository, as one exported program.

    pip install --no-deps timm
    python examples/resnet/export.py models/
    tnxd --model-repository models/

The weights are random, always the same: this shows the serving of a network of real size, not what is in a picture.
Give timm's name of another one (`--network resnet18`) for a network of the same kind.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch
from torch import nn

MAX_BATCH = 8
SIDE = 224
SEED = 50

NAME = "resnet"
MODEL_TOML = """\
# Signature and batch limit are known from the exported program.
warm_up = [1, 8]
"""


def resnet(network: str = "resnet50") -> nn.Module:
    """Float32 [N, 3, SIDE, SIDE] -> float32 [N, 1000], in eval mode and without gradients.

    Its weights are random and always the same; the global random state is left alone.
    """
    # timm transforms pictures with torchvision and reads lists with yaml, and imports both whatever is wanted of it.
    with stand_ins("torchvision", "yaml"):
        import timm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        # As for training, each block's last scale would be 0, and its convolutions would not matter.
        net: nn.Module = timm.create_model(network, zero_init_last=False)
    return net.eval().requires_grad_(False)


def build(repository: Path, network: str = "resnet50") -> Path:
    """Write the model into a repository, which is made if it is not there; returns its directory."""
    net = resnet(network)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    program = torch.export.export(net, (torch.zeros(2, 3, SIDE, SIDE),), dynamic_shapes=({0: batch},))
    model = repository / NAME
    (model / "1").mkdir(parents=True, exist_ok=True)
    (model / "model.toml").write_text(MODEL_TOML)
    torch.export.save(program, model / "1" / "model.pt2")
    return model


# --- packages that are imported but not used -----------------------------------------------------------------


class _Unusable(type):
    """A class of a package that is not installed: it has every attribute that is asked for, and no instances."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unusable(name, (), {})

    def __call__(cls, *args: object, **kwargs: object) -> NoReturn:
        raise ImportError(f"{cls.__name__} is of a package that is not installed")


class _StandIn(ModuleType):
    """A module of a package that is not installed. It holds whatever class is asked for."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unusable(name, (), {})


class _StandIns(MetaPathFinder, Loader):
    """Finds all modules of some packages."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        found = name.partition(".")[0] in self._packages
        return ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def stand_ins(*packages: str) -> Iterator[None]:
    """Within the block, those of these packages that are not installed can be imported, but not used."""
    finder = _StandIns([package for package in packages if importlib.util.find_spec(package) is None])
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]


def main() -> None:
    parser = argparse.ArgumentParser(description="Put a ResNet with random weights into a model repository.")
    parser.add_argument("repository", type=Path, help="directory that `tnxd --model-repository` serves")
    parser.add_argument("--network", default="resnet50", help="timm's name of it (default: resnet50)")
    args = parser.parse_args()
    path = build(args.repository, args.network) / "1" / "model.pt2"
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
