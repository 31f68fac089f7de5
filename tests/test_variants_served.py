"""Variants of networks behind a real daemon: what comes from clients is answered as the network itself would."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import safetensors.torch
import torch

from conftest import Daemon, serving_daemon
from format_tools import tensors
from tnxctl import Client
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import Internal
from tnxd.models.formats import compiling, converting

NETWORK = """\
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(10, 4)

    def forward(self, ids, x, k):
        x = torch.remainder(x, -0.7)
        more = 3 if ids.shape[1] > 40 else 2
        return self.table(ids).sum(1) * more + x.gather(1, k).sum(1, keepdim=True)

def make():
    return Net()
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

VARIANTS = (
    pytest.param("onnxruntime", marks=pytest.mark.skipif(bool(converting.missing()), reason="packages are missing")),
    pytest.param("inductor", marks=pytest.mark.skipif(bool(compiling.missing()), reason="no compiler")),
)
WEIGHT = torch.arange(40.0).reshape(10, 4)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, str]]:
    folder = tmp_path_factory.mktemp("variant")
    version = folder / "models/net/1"
    version.mkdir(parents=True)
    (version / "net.py").write_text(NETWORK)
    safetensors.torch.save_file({"table.weight": WEIGHT}, version / "model.safetensors")
    (folder / "models/net/model.toml").write_text(
        f'factory = "net:make"\nmax_batch_size = 8\naudit = 1.0\noptimize = "{request.param}"\nwarm_up = [1]\n'
        + tensors("ids", "INT64", [-1, -1])
        + tensors("x", "FP32", [-1, 5])
        + tensors("k", "INT64", [-1, 2])
        + tensors("y", "FP32", [-1, 4], "outputs")
    )
    (folder / "tnxd.toml").write_text(f'cache_directory = "{folder}/cache"\n')
    options = ("--model-repository", str(folder / "models"), "--config", str(folder / "tnxd.toml"))
    with serving_daemon(folder / "log", *options) as daemon:
        with Client(daemon.endpoint, timeout=60) as client:
            assert any(f"optimize: {request.param} runs" in note for note in client.models()[0].notes)
        yield daemon, request.param


def ask(client: Client, ids: list[int], k: tuple[int, int] = (0, 4), x: float = 0.5) -> Array:
    inputs = {"ids": np.array([ids], np.int64), "x": np.full((1, 5), x, np.float32), "k": np.array([k])}
    output: Array = client.predict(inputs, model="net").output
    return output


def expected(ids: list[int], x: float = 0.5) -> Array:
    rest = torch.remainder(torch.full((1, 1), x), -0.7).numpy()
    return WEIGHT.numpy()[ids].sum(0, keepdims=True) * (3 if len(ids) > 40 else 2) + 2 * rest


def test_an_index_out_of_range_fails_one_request_and_others_are_answered(variant: tuple[Daemon, str]) -> None:
    with Client(variant[0].endpoint, timeout=60) as client:
        for ids, k in (([3, 10], (0, 4)), ([3, -1], (0, 4)), ([3, 2**62], (0, 4)), ([3], (0, 5)), ([3], (-1, 0))):
            with pytest.raises(Internal, match=r"out of (range|bounds)"):
                ask(client, ids, k)
            np.testing.assert_allclose(ask(client, [9, 0]), expected([9, 0]), rtol=1e-5)


def test_lengths_that_the_export_did_not_think_of_are_answered(variant: tuple[Daemon, str]) -> None:
    with Client(variant[0].endpoint, timeout=60) as client:
        for length in (1, 2, 40, 41, 100, 0):
            np.testing.assert_allclose(ask(client, [1] * length), expected([1] * length), rtol=1e-5)


def test_what_no_trial_has_seen_is_found_by_the_audit_and_answered_by_the_network_from_then_on(
    variant: tuple[Daemon, str],
) -> None:
    """onnxruntime has another remainder of large numbers than torch; inductor the same."""
    daemon, name = variant
    with Client(daemon.endpoint, timeout=60) as client:
        ask(client, [1], x=2.0**31)
        if name == "onnxruntime":
            daemon.logged("net@1: the network runs as it is from now on: onnxruntime answered otherwise: output 'y'")
            (info,) = [model for model in client.models() if model.name == "net"]
            assert any("the network runs as it is now" in note for note in info.notes)
        np.testing.assert_allclose(ask(client, [1], x=2.0**31), expected([1], 2.0**31), rtol=1e-5)
