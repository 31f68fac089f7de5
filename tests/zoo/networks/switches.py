"""A network that answers with the switches of the process that it runs in."""

from __future__ import annotations

import gc
import hashlib
import locale
import logging
import os
import random
import signal
import socket
import sys
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import nn


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


SWITCHES: dict[str, Callable[[], object]] = {
    "default dtype": torch.get_default_dtype,
    "default device": torch.get_default_device,
    "grad mode": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "autocast": lambda: torch.is_autocast_enabled("cpu"),
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "matmul precision": torch.get_float32_matmul_precision,
    "threads": torch.get_num_threads,
    "anomaly mode": torch.is_anomaly_enabled,
    "denormals": lambda: bool(torch.tensor(1e-310, dtype=torch.float64) * 1.0 > 0),
    "mkldnn": lambda: torch._C._get_mkldnn_enabled(),
    "random state of torch": lambda: torch.default_generator.get_state().numpy().tobytes(),
    "random state of Python": random.getstate,
    "random state of numpy": lambda: str(np.random.get_state(legacy=False)),
    "level of logging": lambda: (logging.root.level, logging.root.manager.disable),
    "handlers of logging": lambda: [id(handler) for handler in logging.root.handlers],
    "warnings": lambda: [str(entry) for entry in warnings.filters],
    "signal handlers": lambda: [
        str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    ],
    "working directory": os.getcwd,
    # What torch sets for itself when it compiles is its own affair.
    "environment": lambda: sorted(
        each for each in os.environ.items() if not each[0].startswith(("TORCH", "_TORCH", "TRITON_"))
    ),
    "umask": _umask,
    "locale": locale.getlocale,
    "recursion limit": sys.getrecursionlimit,
    "standard output": lambda: (id(sys.stdout), id(sys.stderr)),
    "sys.path": lambda: list(sys.path),
    "excepthook": lambda: id(sys.excepthook),
    "garbage collection": gc.isenabled,
    "errors of numpy": np.geterr,
    "timeout of sockets": socket.getdefaulttimeout,
}


def number(value: object) -> float:
    """A number that stands for a value."""
    return float(int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:4]))


class Switches(nn.Module):
    """One number for each switch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [number(read()) for read in SWITCHES.values()]
        return torch.tensor(values, dtype=torch.float64, device="cpu")
