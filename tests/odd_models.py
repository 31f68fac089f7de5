"""Daemon whose models misbehave on command, beside the built-in ones: run as a program."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from tnxctl.protocol.wire import TensorSpec
from tnxd.cli import main
from tnxd.models.builtin import BUILTIN
from tnxd.models.model import Model
from unprintable import Unprintable

WIDTH = 4


def answer(first: float, x: torch.Tensor) -> Any:
    """The answer of a model to a batch in which some row begins with `first`."""
    doubled = x * 2
    if first == 1:
        raise ValueError("poisoned row\nwith a second line")
    if first == 2:
        sys.exit(3)
    if first == 3:
        raise KeyboardInterrupt
    if first == 4:
        return doubled[:, :2]  # not the width of the signature
    if first == 5:
        return doubled.double()
    if first == 6:
        return doubled[:-1]  # a row short
    if first == 7:
        return None
    if first == 8:
        return {"other": doubled}
    if first == 9:
        return (doubled, doubled)
    if first == 10:
        return "text"
    if first == 11:
        raise torch.OutOfMemoryError("made up")
    if first == 12:
        raise ValueError("a lone surrogate \ud800 has no UTF-8")
    if first == 13:
        raise Unprintable
    return doubled


class Odd(torch.nn.Module):
    """Doubles its input, or does what the first value of a row commands."""

    def forward(self, x: torch.Tensor) -> Any:
        commands = [value for value in x[:, 0].tolist() if 0 < value < 100] if x.shape[1] else []
        return answer(commands[0] if commands else 0.0, x)


def wait_for_release(name: str) -> None:
    """Wait until somebody opens and closes the fifo whose path is in that environment variable."""
    with open(os.environ[name], "rb") as fifo:
        fifo.read()


class Wait(torch.nn.Module):
    """Comes back when its fifo is released, if a row begins with 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] and bool((x[:, 0] == 1).any()):
            wait_for_release("RUN_FIFO")
        return x * 2


class Busy(torch.nn.Module):
    """Computes for ever, inside torch, if a row begins with 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while x.shape[0] and bool((x[:, 0] == 1).any()):
            torch.ones(300, 300) @ torch.ones(300, 300)
        return x * 2


class InPlace(torch.nn.Module):
    """Writes what it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)


class Twice(torch.nn.Module):
    """Two inputs of any length, three outputs as a dict."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = ids * mask
        return {
            "any": mask.bool().any(dim=1),
            "total": kept.sum(dim=1),
            "half": kept.to(torch.bfloat16) / 2,
        }


def slow() -> torch.nn.Module:
    wait_for_release("LOAD_FIFO")
    return torch.nn.Identity()


def fails() -> torch.nn.Module:
    raise RuntimeError("these weights are broken")


def add(name: str, make: Callable[[], torch.nn.Module], **options: Any) -> None:
    options = {
        "inputs": (TensorSpec("x", "FP32", (-1, WIDTH)),),
        "outputs": (TensorSpec("y", "FP32", (-1, WIDTH)),),
        "max_batch_size": 16,
        **options,
    }
    BUILTIN[name] = Model(name=name, version="1", factory=make, **options)


VECTOR = {"inputs": (TensorSpec("x", "FP32", (-1,)),), "outputs": (TensorSpec("y", "FP32", (-1,)),)}

add("odd", Odd)
add("wait", Wait, audit=0.0)  # an audit would wait at the fifo, too, and take a release that is meant for a request
add("hangs", Wait, audit=0.0, time_limit_s=1.5)
add("busy", Busy)
add("in-place", InPlace, **VECTOR, max_batch_size=0)
add("slow", slow)
add("broken", fails)
add(
    "wide",
    torch.nn.Identity,
    inputs=(TensorSpec("x", "FP32", (-1, -1)),),
    outputs=(TensorSpec("y", "FP32", (-1, -1)),),
)
add("whole", torch.nn.Identity, **VECTOR, max_batch_size=0)
add(
    "twice",
    Twice,
    inputs=(TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("mask", "INT64", (-1, -1))),
    outputs=(
        TensorSpec("total", "INT64", (-1,)),
        TensorSpec("any", "BOOL", (-1,)),
        TensorSpec("half", "BF16", (-1, -1)),
    ),
)

if __name__ == "__main__":
    main(prog_name="tnxd")
