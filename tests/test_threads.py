"""Threads of batches in a real daemon: a network with convolutions says with how many it runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from conftest import Daemon
from model_repositories import Repository
from tnxctl import Client
from tnxd.executors.host import available_cores

CODE = """
import sys
import threading
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 3))

    def forward(self, x):
        if float(x[0, 0, 0, 0]) == 1234.5:  # as only the test asks
            print(f"{NAME}: {torch.get_num_threads()} on {threading.current_thread().name}", file=sys.stderr)
        return self.layers(x)
"""

TOML = """
factory = "net:Net"
max_batch_size = 4
optimize = "none"
threads = {threads}
audit = 0.0
[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, 3, 64, 64]
[[outputs]]
name = "y"
datatype = "FP32"
shape = [-1, 8, 60, 60]
"""


@pytest.mark.skipif(available_cores() < 2, reason="one core has no teams")
def test_model_says_how_many_threads_its_batches_have(run_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    repository = Repository(root)
    space: dict[str, type[torch.nn.Module]] = {}
    exec(CODE, space)
    torch.manual_seed(3)
    net = space["Net"]().eval().requires_grad_(False)
    weights = safetensors.torch.save(net.state_dict())
    for name, threads in (("narrow", 1), ("wide", 2), ("either", 0)):
        repository.settings(name, TOML.format(threads=threads))
        repository.publish(name, 1, {"model.safetensors": weights, "net.py": f"NAME = {name!r}\n{CODE}".encode()})
    daemon = run_daemon("--model-repository", str(root))
    x = np.random.default_rng(3).standard_normal((3, 3, 64, 64), np.float32)
    x[0, 0, 0, 0] = 1234.5
    with Client(daemon.endpoint, timeout=60) as client:
        for name in ("narrow", "wide", "either"):
            answer = client.predict(x, model=name).output
            np.testing.assert_allclose(answer, net.layers(torch.from_numpy(x)).numpy(), rtol=1e-4, atol=1e-2)
    log = daemon.logged("narrow: 1 on", "wide: 2 on", "either: ")
    said = {name: (int(threads), thread) for name, threads, thread in re.findall(r"(\w+): (\d+) on (\S+)", log)}
    assert said["narrow"][0] == 1
    assert said["wide"] == (2, "cpu/0")
    if said["either"][0] > 1:
        assert said["either"][1] == "cpu/0", "no other lane has a team"
    assert daemon.stop() == 0
