"""Weights in model.safetensors: found by their network, mapped or copied, converted, and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from factory_networks import NETWORK, TOML, X, expected, save_weights, state
from format_tools import ask, open_model, refused, tensors


def test_weights_find_their_network(tmp_path: Path) -> None:
    save_weights(tmp_path)
    model = open_model(tmp_path, TOML)
    module = model.factory()
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    np.testing.assert_allclose(ask(model, module, X)["y"], expected(X), rtol=1e-5)
    assert module.first.weight.data_ptr() == module.second.weight.data_ptr()  # type: ignore[union-attr]


def mapped_from(tensor: torch.Tensor) -> str:
    """The file that the memory of a tensor belongs to, as the kernel sees it; "" for none."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        for line in maps:
            fields = line.split()
            start, end = (int(address, 16) for address in fields[0].split("-"))
            if start <= tensor.data_ptr() < end:
                return fields[5] if len(fields) > 5 else ""
    raise LookupError("no such memory")


def test_weights_that_nobody_may_write_are_used_where_they_lie(tmp_path: Path) -> None:
    path = save_weights(tmp_path)
    path.chmod(0o444)
    model = open_model(tmp_path, TOML)
    module = model.factory()
    for name, tensor in module.state_dict().items():
        assert mapped_from(tensor) == str(path), name
    np.testing.assert_allclose(ask(model, module, X)["y"], expected(X), rtol=1e-5)


def test_weights_that_may_be_written_are_copied(tmp_path: Path) -> None:
    path = save_weights(tmp_path)
    model = open_model(tmp_path, TOML)
    module = model.factory()
    path.write_bytes(b"")  # in place: a mapping would end the process
    for tensor in module.state_dict().values():
        assert not mapped_from(tensor).startswith("/")
    np.testing.assert_allclose(ask(model, module, X)["y"], expected(X), rtol=1e-5)


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: weight for key, weight in state().items() if key != name}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (without("shift"), "'shift' is missing, which the network of net/1/net.py has"),
        (without("first.weight"), "'first.weight', 'second.weight' are missing"),
        (state(third=torch.zeros(1)), "'third' is not in the network of net/1/net.py"),
        (state(shift=torch.zeros(5)), "'shift' is [5], in the network of net/1/net.py it is [4]"),
    ],
)
def test_weights_of_another_network(tmp_path: Path, weights: dict[str, torch.Tensor], said: str) -> None:
    save_weights(tmp_path, weights)
    message = refused(tmp_path, TOML)
    assert message.startswith("net/1/model.safetensors: ")
    assert said in message


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_truncated_weights_are_named(tmp_path: Path, keep: int) -> None:
    path = save_weights(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(tmp_path, TOML).startswith("net/1/model.safetensors: damaged or incomplete")


def test_weights_of_another_datatype_are_converted(tmp_path: Path) -> None:
    halves = {name: weight.to(torch.bfloat16) for name, weight in state().items()}
    save_weights(tmp_path, halves)
    model = open_model(tmp_path, TOML)
    module = model.factory()
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}
    np.testing.assert_allclose(ask(model, module, X)["y"], expected(X, halves), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_network_runs_in_another_datatype_than_its_signature(tmp_path: Path, dtype: str) -> None:
    save_weights(tmp_path)
    model = open_model(tmp_path, f'dtype = "{dtype}"\n' + TOML)
    module = model.factory()
    assert {str(tensor.dtype) for tensor in module.state_dict().values()} == {f"torch.{dtype}"}
    got = ask(model, module, X)["y"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected(X), rtol=0.05)
    assert not np.allclose(got, expected(X), rtol=1e-6)


MANY = """\
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(10, 4)

    def forward(self, ids, weight):
        rows = self.table(ids)
        result = {RESULT}
        return result

def make():
    return Net()
"""


@pytest.mark.parametrize(
    "result",
    [
        '{"mean": (rows * weight).mean(1), "best": rows.argmax(-1), "unused": None}',
        "((rows * weight).mean(1), rows.argmax(-1))",
    ],
)
def test_several_outputs_in_another_datatype(tmp_path: Path, result: str) -> None:
    save_weights(tmp_path, {"table.weight": torch.rand(10, 4)}, MANY.replace("{RESULT}", result))
    signature = tensors("ids", "INT64", [-1, -1]) + tensors("weight", "FP32", [-1, 1, 1])
    signature += tensors("mean", "FP32", [-1, 4], "outputs") + tensors("best", "INT64", [-1, -1], "outputs")
    model = open_model(tmp_path, 'factory = "net:make"\ndtype = "bfloat16"\n' + signature)
    got = ask(model, model.factory(), np.ones((2, 3), np.int64), np.ones((2, 1, 1), np.float32))
    assert (got["mean"].dtype, got["best"].shape) == (np.float32, (2, 3))


def test_a_network_whose_buffers_are_left_without_memory(tmp_path: Path) -> None:
    network = NETWORK.replace("return Net()", "with torch.device('meta'):\n        return Net()")
    save_weights(tmp_path, network=network)
    model = open_model(tmp_path, TOML)
    np.testing.assert_allclose(ask(model, model.factory(), X)["y"], expected(X), rtol=1e-5)
    save_weights(tmp_path, without("shift"), network.replace("zeros(4))", "zeros(4), persistent=False)"))
    assert "'shift' is on the meta device" in refused(tmp_path)
