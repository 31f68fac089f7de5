"""Structures, optional inputs and causes, through a daemon."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import Dim

from conftest import Daemon, serving_daemon
from format_tools import save_program, tensors
from tnxctl import Client
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import Internal
from tnxd.models.formats import ignore_warnings_about_torch_itself

NETWORK = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(()))
    def forward(self, x, mask=None, cache=None):
        y = x if mask is None else x * mask
        y = y if cache is None else y + cache[0]["key"]
        return {"y": y, "cache": [{"key": y + self.bias, "none": None}]}

make = Net
"""


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert bool(x.sum() < 5), "too much"
        return x


class Deep(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return pair[0] + pair[1], {"low": pair[0], "high": pair[1]}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("structures")
    root = folder / "models"
    for name in ("optional", "fails"):
        (root / name / "1").mkdir(parents=True)
    safetensors.torch.save_file({"bias": torch.tensor(0.5)}, root / "optional/1/model.safetensors")
    (root / "optional/1/code.py").write_text(NETWORK)
    (root / "optional/model.toml").write_text(
        'factory = "code:make"\nmax_batch_size = 16\nmax_delay_us = 2000\n'
        + tensors("x mask cache.0.key", "FP32", [-1, 2])
        + tensors("cache.0.key y", "FP32", [-1, 2], "outputs")
    )
    ignore_warnings_about_torch_itself()
    torch.jit.save(torch.jit.script(Fails()), root / "fails/1/model.pt")
    (root / "fails/model.toml").write_text(
        "max_batch_size = 0\n" + tensors("x", "FP32", [-1, 2]) + tensors("y", "FP32", [-1, 2], "outputs")
    )
    rows = Dim("rows", min=1, max=32)
    save_program(root / "deep/1/model.pt2", Deep(), ((torch.ones(2, 2), torch.ones(2, 2)),), (({0: rows}, {0: rows}),))
    with serving_daemon(folder / "log", "--model-repository", str(root)) as running:
        yield running


def full(value: float, rows: int = 1) -> Array:
    return np.full((rows, 2), value, np.float32)


def test_clients_that_leave_out_other_inputs_get_their_own_answers(daemon: Daemon) -> None:
    def ask(number: int) -> None:
        inputs = {"x": full(number)}
        expected = float(number)
        if number % 2:
            inputs["mask"] = full(3)
            expected *= 3
        if number % 3 == 0:
            inputs["cache.0.key"] = full(1000)
            expected += 1000
        with Client(daemon.endpoint, timeout=60) as client:
            for _ in range(20):
                outputs = client.predict(inputs, model="optional").outputs
                assert set(outputs) == {"y", "cache.0.key"}
                assert (outputs["y"] == expected).all()
                assert (outputs["cache.0.key"] == expected + 0.5).all()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))


def test_a_program_with_structures(daemon: Daemon) -> None:
    with Client(daemon.endpoint, timeout=60) as client:
        outputs = client.predict({"pair.1": full(2, 3), "pair.0": full(1, 3)}, model="deep").outputs
        assert {name: float(array[2, 0]) for name, array in outputs.items()} == {
            "output_0": 3.0,
            "output_1.low": 1.0,
            "output_1.high": 2.0,
        }


def test_the_cause_in_torchscript_reaches_the_client(daemon: Daemon) -> None:
    with Client(daemon.endpoint, timeout=60) as client:
        with pytest.raises(Internal, match=r"model 'fails' raised AssertionError: too much$"):
            client.predict(full(9), model="fails")
        assert (client.predict(full(1), model="fails").output == 1).all()
