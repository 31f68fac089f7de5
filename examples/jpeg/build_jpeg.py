"""Put a pipeline into a model repository that takes JPEG files of handwritten digits, and answers with their labels.

    pip install pillow
    python examples/jpeg/build_jpeg.py models/
    tnxd --model-repository models/

The files are decoded in a process of their own. The network is that of the built-in model `digits`, exported.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch

from tnxd.models import networks

HERE = Path(__file__).parent


def build(repository: Path) -> None:
    """Write the decoder, the classifier, the labeller and the pipeline. Args: repository: made if it is not there."""
    decoder = add(repository, "decoder")
    # What is made up to try a model with is no JPEG. This file is tried instead.
    np.savez(decoder / "example.npz", jpeg=np.array([(HERE / "seven.jpg").read_bytes()]))
    add(repository, "labeller")
    classifier = directory(repository, "classifier")
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(networks.digits(), (torch.zeros(2, 64),), dynamic_shapes=({0: rows},))
    torch.export.save(program, classifier / "model.pt2")
    shutil.copyfile(HERE / "pipeline.toml", directory(repository, "digit") / "pipeline.toml")


def add(repository: Path, name: str) -> Path:
    """Write a step in Python; returns the directory of its version."""
    version = directory(repository, name)
    shutil.copyfile(HERE / f"{name}.toml", version.parent / "model.toml")
    shutil.copyfile(HERE / f"{name}.py", version / "model.py")
    return version


def directory(repository: Path, name: str) -> Path:
    """The directory of version 1, made if it is not there."""
    version = repository / name / "1"
    version.mkdir(parents=True, exist_ok=True)
    return version


def main() -> None:
    parser = argparse.ArgumentParser(description="Put a pipeline into a model repository: JPEG in, label out.")
    parser.add_argument("repository", type=Path, help="directory that `tnxd --model-repository` serves")
    args = parser.parse_args()
    build(args.repository)
    print(f"wrote decoder, classifier, labeller and digit into {args.repository}")


if __name__ == "__main__":
    main()
