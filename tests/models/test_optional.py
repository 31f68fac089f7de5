"""Inputs that a request may leave out."""

from __future__ import annotations

import queue
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import Dim

from format_tools import ask, open_model, refused, save_program, tensors
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import TensorSpec
from tnxd.deployment.traffic import signature_difference
from tnxd.executors.batching import Staging
from tnxd.executors.cpu import CpuRunner
from tnxd.executors.execution import Execution
from tnxd.executors.pool import LanePool
from tnxd.models.formats import ignore_warnings_about_torch_itself
from tnxd.models.model import BoundInputs, Model

ROWS = Dim("rows", min=1, max=32)
OUTPUT = tensors("y", "FP32", [-1, 2], "outputs")

NETWORK = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(()))
    def forward(self, x, mask=None, scale=torch.full((1,), 3.0), cache=None, more=None):
        y = x * scale + self.bias
        if mask is not None:
            y = y * mask
        if cache is not None:
            y = y + cache[0]["key"]
        return y if more is None else y + more

make = Net
"""


def save_factory(root: Path) -> None:
    (root / "net/1").mkdir(parents=True)
    safetensors.torch.save_file({"bias": torch.tensor(100.0)}, root / "net/1/model.safetensors")
    (root / "net/1/code.py").write_text(NETWORK)


def full(value: float, rows: int = 1) -> Array:
    return np.full((rows, 2), value, np.float32)


def first(answer: dict[str, Array]) -> float:
    return float(answer["y"][0, 0])


def test_arguments_of_a_factory_that_have_a_default(tmp_path: Path) -> None:
    save_factory(tmp_path)
    text = 'factory = "code:make"\n' + tensors("x mask scale cache.0.key", "FP32", [-1, 2]) + OUTPUT
    model = open_model(tmp_path, text)
    assert dict(model.optional) == {"mask": None, "scale": None, "cache.0.key": None}
    assert model.notes == ("a request may leave out 'mask', 'scale', 'cache.0.key'",)
    module = model.factory()
    assert first(ask(model, module, full(1), None, None, None)) == 103
    assert first(ask(model, module, full(1), full(2), None, None)) == 206
    assert first(ask(model, module, full(1), None, full(5), None)) == 105
    assert first(ask(model, module, full(1), full(2), full(5), full(7))) == 217
    with pytest.raises(InvalidArgument, match="needs the input 'x', which did not come"):
        ask(model, module, None, full(2), None, None)
    with pytest.raises(InvalidArgument, match="needs the input 'x', which did not come"):
        ask(model, module, None, None, None, None)


def test_an_input_that_model_toml_calls_optional(tmp_path: Path) -> None:
    save_factory(tmp_path)
    text = 'factory = "code:make"\n' + tensors("x mask", "FP32", [-1, 2]) + "optional = true\n" + OUTPUT
    model = open_model(tmp_path, text)
    assert first(ask(model, model.factory(), full(1), None)) == 103
    model = open_model(tmp_path, text.replace("optional = true", "default = 0.5"))
    assert first(ask(model, model.factory(), full(1), None)) == 51.5
    assert first(ask(model, model.factory(), full(1), full(2))) == 206
    said = refused(tmp_path, 'optimize = "inductor"\n' + text)
    assert said.startswith("net/model.toml: inputs[1].optional: optimize: inductor always needs a tensor there")


def test_model_toml_can_ask_for_an_input_all_the_same(tmp_path: Path) -> None:
    save_factory(tmp_path)
    text = 'factory = "code:make"\n' + tensors("x mask", "FP32", [-1, 2]) + "optional = false\n" + OUTPUT
    model = open_model(tmp_path, text)
    assert model.optional == {}
    with pytest.raises(InvalidArgument, match="needs the input 'mask', which did not come"):
        ask(model, model.factory(), full(1), None)


def test_a_version_that_needs_more_is_another_signature() -> None:
    needs = replace(EITHER, optional={"a": None})
    assert signature_difference(EITHER, needs) == "input 'b' may not be left out any more"
    assert signature_difference(needs, EITHER) == ""


def test_a_lone_tensor_without_a_name_is_the_one_that_is_needed(tmp_path: Path) -> None:
    save_factory(tmp_path)
    model = open_model(tmp_path, 'factory = "code:make"\n' + tensors("x mask", "FP32", [-1, 2]) + OUTPUT)
    bound = model.bind([TensorSpec("", "FP32", (1, 2))], [full(1)])
    assert [array is None for array in bound.arrays] == [False, True]


class Scripted(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, pair: tuple[Tensor, Tensor] | None = None) -> Tensor:
        y = x * 2
        if mask is not None:
            y = y * mask
        if pair is not None:
            y = y + pair[0] + pair[1]
        return y


def test_torchscript_with_optional_arguments(tmp_path: Path) -> None:
    ignore_warnings_about_torch_itself()
    (tmp_path / "net/1").mkdir(parents=True)
    torch.jit.save(torch.jit.script(Scripted()), tmp_path / "net/1/model.pt")
    model = open_model(tmp_path, tensors("x mask pair.0 pair.1", "FP32", [-1, 2]) + OUTPUT)
    module = model.factory()
    assert first(ask(model, module, full(1), None, None, None)) == 2
    assert first(ask(model, module, full(1), full(5), None, None)) == 10
    assert first(ask(model, module, full(1), None, full(5), full(6))) == 13


class Masked(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"y": (ids + 1) * mask}


def test_a_number_fills_what_a_program_needs(tmp_path: Path) -> None:
    length = Dim("length", min=2, max=100)
    shapes = ({0: ROWS, 1: length}, {0: ROWS, 1: length})
    save_program(tmp_path / "net/1/model.pt2", Masked(), (torch.zeros(2, 5), torch.zeros(2, 5)), shapes)
    both = tensors("ids mask", "FP32", [-1, -1])
    said = refused(tmp_path, both + "optional = true\n")
    assert said.startswith("net/model.toml: inputs[1].optional: net/1/model.pt2 always needs a tensor there")
    model = open_model(tmp_path, both + "default = 2\n")
    module = model.factory()
    ids = np.ones((3, 7), np.float32)
    assert ask(model, module, ids, None)["y"].tolist() == [[4.0] * 7] * 3
    assert ask(model, module, ids, ids * 5)["y"].tolist() == [[10.0] * 7] * 3
    alone = model.bind([TensorSpec("ids", "FP32", (3, 7))], [ids])
    together = model.bind([TensorSpec(name, "FP32", (3, 7)) for name in ("ids", "mask")], [ids, ids])
    assert alone.group == together.group  # they may share a batch


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("default = 1.5", "net/model.toml: inputs[0].default: 1.5 is no INT64"),
        ("default = [1]", "net/model.toml: inputs[0].default: expected"),
        ("optional = 1", "net/model.toml: inputs[0].optional: expected bool"),
    ],
)
def test_defaults_that_do_not_fit(tmp_path: Path, line: str, said: str) -> None:
    save_program(tmp_path / "net/1/model.pt2", nn.Identity(), (torch.zeros(2, dtype=torch.int64),))
    assert refused(tmp_path, tensors("input", "INT64", [2]) + line).startswith(said)


def test_an_output_is_not_optional(tmp_path: Path) -> None:
    save_program(tmp_path / "net/1/model.pt2", nn.Identity(), (torch.zeros(2),))
    text = tensors("output", "FP32", [2], "outputs") + "optional = true"
    assert refused(tmp_path, text) == "net/model.toml: outputs[0].optional: only an input has one"


class Either(nn.Module):
    """Whichever came, with what the other would have been."""

    def forward(self, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        if a is None:
            assert b is not None
            return b * 10
        return a if b is None else a + b * 10


EITHER = Model(
    "either",
    "1",
    (TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "FP32", (-1, 2))),
    (TensorSpec("y", "FP32", (-1, 2)),),
    8,
    factory=Either,
    optional={"a": None, "b": None},
)


def bound(**inputs: Array) -> BoundInputs:
    specs = [TensorSpec(name, "FP32", array.shape) for name, array in inputs.items()]
    return EITHER.bind(specs, list(inputs.values()))


def test_requests_with_other_inputs_do_not_share_a_batch() -> None:
    groups = [bound(a=full(1)).group, bound(b=full(1)).group, bound(a=full(1), b=full(1)).group]
    assert len(set(groups)) == 3


@pytest.mark.parametrize("inputs", [{"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 2.0}])
@pytest.mark.parametrize("rows", [[2], [1, 3], [20]])
def test_a_batch_without_an_input(inputs: dict[str, float], rows: list[int]) -> None:
    done: queue.SimpleQueue[Execution] = queue.SimpleQueue()
    pool = LanePool(
        "cpu",
        "cpu",
        "",
        make_runner=CpuRunner,
        lanes=1,
        inline=None,
        place=lambda module: module,
        memory_mb=lambda: (0.0, 0.0),
        on_done=done.put,
    )
    pool.load(EITHER)
    requests = [
        bound(**{name: full(value + index, count) for name, value in inputs.items()})
        for index, count in enumerate(rows)
    ]
    items = [request.arrays for request in requests]
    pool.submit(Execution(0, 0, EITHER, items, rows, requests[0].group))
    outcomes: list[Any] = done.get(timeout=60).outcomes
    for index, (outcome, count) in enumerate(zip(outcomes, rows, strict=True)):
        expected = sum((value + index) * {"a": 1, "b": 10}[name] for name, value in inputs.items())
        np.testing.assert_array_equal(outcome[0], full(expected, count))


def test_staging_keeps_no_buffer_for_an_input_that_did_not_come() -> None:
    shapes = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        shapes.append(shape)
        return np.zeros(shape, dtype)

    staging = Staging(allocate)
    for _ in range(2):
        gathered = staging.gather("m", EITHER.inputs, (-1,), [(None, full(1)), (None, full(2, 2))], 3)
        assert gathered[0] is None
        assert gathered[1] is not None
        assert gathered[1].tolist() == [[1, 1], [2, 2], [2, 2]]
    assert shapes == [(4, 2)]
