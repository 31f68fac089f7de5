"""Put the digits classifier into a model repository, once in each format that the daemon serves.

    python examples/digits/save_formats.py models/
    tnxd --model-repository models/

Version 1 is an exported program, version 2 weights with a factory, version 3 TorchScript; `--onnx` adds version 4 (it
needs the packages onnx and onnxscript, and the daemon onnxruntime). All give the same answers.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from tnxd.models import networks

MAX_BATCH = 64

NAME = "digits"
MODEL_TOML = f"""\
versions = "all"
factory = "network:DigitsNet"   # of version 2; the others need none
max_batch_size = {MAX_BATCH}

[[inputs]]
name = "image"
datatype = "FP32"
shape = [-1, 64]

[[outputs]]
name = "scores"
datatype = "FP32"
shape = [-1, 10]
"""

NETWORK = """\
from tnxd.models.networks import DigitsNet  # any module of your own that makes the network

__all__ = ["DigitsNet"]
"""


def save_program(net: nn.Module, folder: Path) -> None:
    """model.pt2: `torch.export`."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    program = torch.export.export(net, (torch.zeros(2, 64),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "model.pt2")


def save_weights(net: nn.Module, folder: Path) -> None:
    """model.safetensors, and the module of the factory."""
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(net.state_dict()))
    (folder / "network.py").write_text(NETWORK)


def save_torchscript(net: nn.Module, folder: Path) -> None:
    """model.pt: TorchScript, which torch has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a category that changes from release to release
        torch.jit.save(torch.jit.script(net), folder / "model.pt")


def save_onnx(net: nn.Module, folder: Path) -> None:
    """model.onnx. Raises ImportError if a package is missing."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about what torch itself uses
        torch.onnx.export(
            net,
            (torch.zeros(2, 64),),
            folder / "model.onnx",
            input_names=["image"],
            output_names=["scores"],
            dynamic_shapes=({0: batch},),
            external_data=False,
            verbose=False,
        )


FORMATS = (save_program, save_weights, save_torchscript, save_onnx)
"""Version 1, 2, ..."""


def build(repository: Path, *, onnx: bool = False) -> Path:
    """Write the model into a repository, which is made if it is not there; returns its directory."""
    model = repository / NAME
    model.mkdir(parents=True, exist_ok=True)
    (model / "model.toml").write_text(MODEL_TOML)
    for version, save in enumerate(FORMATS, 1):
        if save is not save_onnx or onnx:
            folder = model / str(version)
            folder.mkdir(exist_ok=True)
            save(networks.digits(), folder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the digits classifier into a model repository.")
    parser.add_argument("repository", type=Path, help="directory that `tnxd --model-repository` serves")
    parser.add_argument("--onnx", action="store_true", help="add version 4, as ONNX")
    args = parser.parse_args()
    for path in sorted(build(args.repository, onnx=args.onnx).rglob("*.*")):
        print(f"wrote {path} ({path.stat().st_size / 1000:.1f} kB)")


if __name__ == "__main__":
    main()
