"""Parts that the servers of real networks share: how they are set up, the forward, how requests share one.

A request is the bytes of the arrays of one row, one after the other, as raw as `compare.py` sends them. An answer is
the bytes of its row of the output, and those of `TRAILER`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Row = list[Array]

TRAILER = np.dtype([("pid", "<i8"), ("rows", "<i8"), ("us", "<f8")])
"""Process that computed the answer, rows of the forward, and microseconds that this took."""

MIME_TYPE = "application/octet-stream"

PATIENCE_SECONDS = 60
"""Time that a request may take. Both servers give up sooner by themselves, as soon as large batches wait in line."""

_SETUP = "BENCH_SETUP"


@dataclass(frozen=True)
class Setup:
    """Setup of a server.

    Attributes:
        network: key of `real_networks.NETWORKS`.
        workers: processes that compute. threads: of each. rows: most requests in a batch, 1 for no batching.
        sorted_rows: a batch is sorted by length and computed in groups of so many; 0: all of it together.
        packages: folders with packages of the network, which the environment of the server lacks.
    """

    network: str
    workers: int
    threads: int
    rows: int
    sorted_rows: int = 0
    packages: tuple[str, ...] = ()

    def text(self) -> str:
        """As an argument of a server."""
        return json.dumps(asdict(self))


def set_up(configuration: str) -> Setup:
    """The setup in an argument, which is then known to the processes that this one starts, too."""
    os.environ[_SETUP] = configuration
    return _setup()


def _setup() -> Setup:
    found = json.loads(os.environ[_SETUP])
    return Setup(**{**found, "packages": tuple(found["packages"])})


class Served:
    """The network of this process, as `set_up` was told, warmed up."""

    def __init__(self) -> None:
        self._setup = setup = _setup()
        sys.path.append(str(Path(__file__).resolve().parent.parent))
        sys.path.extend(setup.packages)  # last: what the environment has itself counts
        import torch

        from real_networks import NETWORKS

        torch.set_num_threads(setup.threads)
        network = NETWORKS[setup.network]
        self._examples = list(network.example().values())
        self._bytes = sum(array.nbytes for array in self._examples)
        self._net = network.build()
        for rows in sorted({1, setup.rows}):
            self.answer([self._examples] * rows)

    def parse(self, body: bytes) -> Row:
        """The arrays of a request. Where they are shorter or longer than the example, their second axes are."""
        arrays, start = [], 0
        for example in self._examples:
            shape = (1, example.shape[1] * len(body) // self._bytes, *example.shape[2:])
            count = int(np.prod(shape))
            arrays.append(np.frombuffer(body, example.dtype, count, start).reshape(shape))
            start += arrays[-1].nbytes
        return arrays

    def answer(self, rows: Sequence[Row]) -> list[bytes]:
        """The answers of requests that came as one batch, in their order."""
        order = list(range(len(rows)))
        if self._setup.sorted_rows:
            order.sort(key=lambda number: rows[number][0].shape[1])
        step = self._setup.sorted_rows or len(rows)
        answers = [b""] * len(rows)
        for first in range(0, len(rows), step):
            part = order[first : first + step]
            began = time.perf_counter()
            output = self._forward([rows[number] for number in part])
            us = 1e6 * (time.perf_counter() - began)
            trailer = np.array((os.getpid(), len(part), us), TRAILER).tobytes()
            for number, row in zip(part, output, strict=True):
                answers[number] = row.tobytes() + trailer
        return answers

    def _forward(self, rows: Sequence[Row]) -> Array:
        import torch

        with torch.inference_mode():
            tensors = [torch.from_numpy(together(arrays)) for arrays in zip(*rows, strict=True)]
            output: Array = self._net(*tensors).numpy()
        return output


def together(arrays: Sequence[Array]) -> Array:
    """Arrays of one row each as one, padded with zeros to the longest; in memory that torch may have."""
    longest = max(array.shape[1] for array in arrays)
    if all(array.shape[1] == longest for array in arrays):
        return np.concatenate(arrays)
    padded = np.zeros((len(arrays), longest, *arrays[0].shape[2:]), arrays[0].dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: array.shape[1]] = array[0]
    return padded
