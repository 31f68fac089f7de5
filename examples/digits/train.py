"""Train the classifier that the built-in model `digits` serves, and keep the scans that it never saw.

    python examples/digits/train.py

needs scikit-learn (the extra `test`), takes some seconds on one core, and rewrites `tnxd/models/digits.safetensors`
(the weights) and `examples/digits/scans.npz` (held-out scans and their labels). On one machine every run writes the
same bytes.

The data are the 1,797 scans of scikit-learn's `load_digits`, which are the test set of "Optical Recognition of
Handwritten Digits" by E. Alpaydin and C. Kaynak (1998), UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49, licensed CC BY 4.0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tnxd.models.networks import DIGITS_WEIGHTS, DigitsNet

SCANS = Path(__file__).with_name("scans.npz")

HELD_OUT = 382
"""The last rows of the data set, never trained on.

The labels show that rows come in blocks of about 130, each starting with fresh runs through the digits, which suggests
one writer per block. This cut falls between two blocks, so the held-out scans are most likely by hands that training
has not seen. That is harder than a random split, and closer to what a user's own scans will be.
"""

SEED = 0
BATCH = 64
PEAK_LEARNING_RATE = 5e-3


def load_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scans (float32 [N, 64], 0..16) and labels (int64 [N]) to train on, then those held out."""
    data = load_digits()
    scans = torch.tensor(data.data, dtype=torch.float32)
    labels = torch.tensor(data.target, dtype=torch.int64)
    return scans[:-HELD_OUT], labels[:-HELD_OUT], scans[-HELD_OUT:], labels[-HELD_OUT:]


def shifted(scans: Tensor, generator: torch.Generator) -> Tensor:
    """The scans [N, 64], each moved by -1, 0 or 1 pixel along both axes, with blank paper coming in."""
    count = len(scans)
    padded = nn.functional.pad(scans.view(count, 8, 8), (1, 1, 1, 1))
    rows, columns = (torch.randint(3, (count, 1), generator=generator) + torch.arange(8) for _ in range(2))
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].reshape(count, 64)


def train(scans: Tensor, labels: Tensor, epochs: int) -> DigitsNet:
    """A network trained on `scans`, a new small shift of each in every epoch."""
    torch.manual_seed(SEED)  # for the initial weights
    net = DigitsNet()
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-3)
    steps = epochs * -(-len(scans) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(scans), generator=generator), BATCH):
            scores = net(shifted(scans[chosen], generator))
            loss = nn.functional.cross_entropy(scores, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.inference_mode()
def accuracy(net: nn.Module, scans: Tensor, labels: Tensor) -> float:
    """The share of scans whose highest score is that of their label, 0..1."""
    return float((net(scans).argmax(dim=1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the classifier behind the built-in model `digits`.")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training scans (default: 30)")
    parser.add_argument("--weights", type=Path, default=DIGITS_WEIGHTS, help="where the weights go (safetensors)")
    parser.add_argument("--scans", type=Path, default=SCANS, help="where the held-out scans go (npz)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # one order of summation, one result
    scans, labels, held_out_scans, held_out_labels = load_split()
    net = train(scans, labels, args.epochs)
    print(f"trained on {len(scans)} scans, {args.epochs} epochs: {accuracy(net, scans, labels):.2%} of them right")
    print(f"held out {HELD_OUT} scans: {accuracy(net, held_out_scans, held_out_labels):.2%} right")

    args.weights.write_bytes(safetensors.torch.save(net.state_dict()))  # save_file would leave mode 0600
    np.savez_compressed(args.scans, scans=held_out_scans.numpy(), labels=held_out_labels.numpy().astype(np.uint8))
    for path in (args.weights, args.scans):
        print(f"wrote {path} ({path.stat().st_size / 1000:.1f} kB)")


if __name__ == "__main__":
    main()
