"""Structures that models take and return, and the names of what is in them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from format_tools import ask, open_model, refused, save_program, tensors
from tnxctl.protocol.errors import FailedPrecondition, Internal, InvalidArgument
from tnxctl.protocol.wire import TensorSpec
from tnxd.models import structures
from tnxd.models.formats import ignore_warnings_about_torch_itself
from tnxd.models.formats.exporting import export
from tnxd.models.formats.signature import Signature
from tnxd.models.tensors import pick

ROWS = Dim("rows", min=1, max=32)


class Pair(NamedTuple):
    low: Any
    high: Any


@dataclasses.dataclass
class Detections:
    boxes: Any
    scores: Any = None


class ModelOutput(OrderedDict[str, Any]):
    """An output as in transformers: fields by key, by attribute and by position; what is None is not in it."""

    def __init__(self, **fields: Any) -> None:
        super().__init__({name: value for name, value in fields.items() if value is not None})


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (1, ["output"]),
        ((1,), ["output_0"]),
        ([1, (2, [3])], ["output_0", "output_1.0", "output_1.1.0"]),
        ((1, None, 2), ["output_0", "output_2"]),
        ({"a": 1, "b": {"c": (2, 3)}, 4: 5}, ["a", "b.c.0", "b.c.1", "4"]),
        (Pair(1, Pair(2, 3)), ["low", "high.low", "high.high"]),
        ([{"boxes": 1, "labels": 2}], ["output_0.boxes", "output_0.labels"]),
        (Detections(1), ["boxes"]),
        (ModelOutput(loss=None, logits=1, hidden_states=(2, 3)), ["logits", "hidden_states.0", "hidden_states.1"]),
        (deque([1, 2]), ["output_0", "output_1"]),
        (defaultdict(list, a=1), ["a"]),
        ({}, []),
        (None, []),
    ],
)
def test_names_in_structures(value: object, names: list[str]) -> None:
    assert list(structures.leaves(value)) == names


def test_arguments_made_of_names() -> None:
    names = ["x", "cache.0.key", "cache.0.value", "cache.1.key", "cache.1.value", "options.scale"]
    assert structures.tree(names) == {
        "x": 0,
        "cache": ({"key": 1, "value": 2}, {"key": 3, "value": 4}),
        "options": {"scale": 5},
    }


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["x.1"], "'x' has 1 parts, and none of them is 'x.0'"),
        (["x.0", "x.2"], "'x' has 2 parts, and none of them is 'x.1'"),
        (["x", "x.0"], "'x.0' would be a part of 'x', a tensor"),
        (["x.0", "x"], "'x' is a tensor, and others would be a part of it"),
        (["x.0", "x.key"], "'x' has 2 parts, and none of them is 'x.1'"),
    ],
)
def test_names_that_make_up_nothing(names: list[str], said: str) -> None:
    with pytest.raises(FailedPrecondition, match=said):
        structures.tree(names)


# --- what a module returns -----------------------------------------------------------------------------------

A, B, C = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)


@pytest.mark.parametrize(
    ("raw", "names", "expected"),
    [
        (A, ["y"], [A]),
        ([A], ["y"], [A]),
        ((A, None), ["y"], [A]),
        ((A, (B, C)), ["x", "y", "z"], [A, B, C]),
        ((A, (B, C)), ["output_1.1"], [C]),
        ((A, 3, {"n": B}), ["x", "y"], [A, B]),
        ({"a": A, "b": {"c": B}}, ["b.c"], [B]),
        (ModelOutput(logits=A, hidden_states=(B, C)), ["hidden_states.1", "logits"], [C, A]),
        (Detections(A, B), ["scores"], [B]),
        (Pair(A, B), ["high", "low"], [B, A]),
        ([{"boxes": A}, {"boxes": B}], ["output_1.boxes"], [B]),
        ((A, A), ["x", "y"], [A, A]),
    ],
)
def test_outputs_out_of_structures(raw: object, names: list[str], expected: list[Tensor]) -> None:
    found = pick(raw, names, "net")
    assert len(found) == len(expected)
    assert all(one is other for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("raw", "names", "said"),
    [
        ((A, (B, C)), ["x", "y"], r"returned 3 outputs, its signature has 2: \['output_0', 'output_1.0', 'output_1.1'"),
        ({"a": A}, ["y"], r"did not return the output 'y', only \['a'\]"),
        ({"a": (A, B)}, ["a"], r"did not return the output 'a', \['a.0', 'a.1'\] within it"),
        (Detections(A), ["scores"], r"did not return the output 'scores', only \['boxes'\]"),
        (3, ["y"], "returned int, not tensors"),
        (None, ["y"], "returned NoneType, not tensors"),
        ({"a": {"b": A}, "a.b": A}, ["a.b"], "two outputs would be called 'a.b'"),
    ],
)
def test_outputs_that_are_not_there(raw: object, names: list[str], said: str) -> None:
    with pytest.raises(Internal, match=said):
        pick(raw, names, "net")


# --- programs ------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Takes and returns structures of all kinds, with a condition on a length within one."""

    def forward(self, x: Tensor, pair: Any, options: Any, *, cache: Any) -> Any:
        if options["scale"].shape[0] % 2 == 0:
            x = x + 1
        y = x + pair[0] + pair[1]
        return {"sums": [y, {"more": y + cache[0]["key"]}], "none": None, "three": 3}, Pair(x, y)


DEEP = (torch.zeros(2, 4), (torch.ones(2, 4), torch.ones(2, 4)), {"scale": torch.ones(2)})


def save_deep(root: Path) -> None:
    program = torch.export.export(
        Deep(),
        DEEP,
        {"cache": [{"key": torch.ones(2, 4)}]},
        dynamic_shapes=(
            {0: ROWS},
            ({0: ROWS}, {0: ROWS}),
            {"scale": {0: Dim.AUTO}},
            [{"key": {0: ROWS}}],
        ),
    )
    (root / "net/1").mkdir(parents=True)
    torch.export.save(program, root / "net/1/model.pt2")


@pytest.fixture
def _pair_registered() -> Iterator[None]:
    pytree._register_namedtuple(Pair, serialized_type_name="test_structures.Pair")
    yield
    pytree._deregister_pytree_node(Pair)


@pytest.mark.usefixtures("_pair_registered")
def test_a_program_with_structures(tmp_path: Path) -> None:
    save_deep(tmp_path)
    model = open_model(tmp_path)
    assert [spec.name for spec in model.inputs] == ["x", "pair.0", "pair.1", "options.scale", "cache.0.key"]
    assert [spec.name for spec in model.outputs] == [
        "output_0.sums.0",
        "output_0.sums.1.more",
        "output_1.low",
        "output_1.high",
    ]
    assert model.notes == ("net/1/model.pt2: the output 'output_0.three' is '3', no tensor, and is left out",)
    module = model.factory()
    ones = np.ones((3, 4), np.float32)
    got = ask(model, module, ones, ones * 2, ones * 3, np.ones(4, np.float32), ones * 5)
    assert [float(array[0, 0]) for array in got.values()] == [7.0, 12.0, 2.0, 7.0]
    with pytest.raises(InvalidArgument, match=r"axis 0 of 'options.scale' % 2"):
        ask(model, module, ones, ones, ones, np.ones(3, np.float32), ones)


@pytest.mark.usefixtures("_pair_registered")
def test_outputs_that_model_toml_leaves_out(tmp_path: Path) -> None:
    save_deep(tmp_path)
    text = tensors("output_1.high output_0.sums.0", "FP32", [-1, 4], "outputs")
    model = open_model(tmp_path, text)
    assert [spec.name for spec in model.outputs] == ["output_0.sums.0", "output_1.high"]
    ones = np.ones((3, 4), np.float32)
    got = ask(model, model.factory(), ones, ones * 2, ones * 3, np.ones(4, np.float32), ones * 5)
    assert [float(array[0, 0]) for array in got.values()] == [7.0, 7.0]
    said = refused(tmp_path, tensors("some", "FP32", [-1, 4], "outputs"))
    assert said.startswith(
        "net/model.toml: outputs: 1 tensors, and net/1/model.pt2 has 4; to leave some out, take from"
    )
    assert "output_0.sums.0" in said


class WithMean(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x * 2, "mean": x.mean(), "wave": torch.complex(x, x)}


def test_an_output_that_is_left_out_has_no_say(tmp_path: Path) -> None:
    save_program(tmp_path / "net/1/model.pt2", WithMean(), (torch.zeros(2, 4),), ({0: ROWS},))
    assert "'wave' is torch.complex64, which cannot be served" in refused(tmp_path)
    model = open_model(tmp_path, tensors("y", "FP32", [-1, 4], "outputs"))
    assert model.max_batch_size == 32
    assert ask(model, model.factory(), np.ones((1, 4), np.float32))["y"].tolist() == [[2.0] * 4]
    assert "net/model.toml: outputs[0].name: net/1/model.pt2 has no 'z'" in refused(
        tmp_path, tensors("z", "FP32", [-1, 4], "outputs")
    )


class Odd(nn.Module):
    """One tensor twice, an input, None, and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        y = x + 1
        return y, y, x, None, self.weight


def test_a_program_that_returns_what_it_was_given(tmp_path: Path) -> None:
    save_program(tmp_path / "net/1/model.pt2", Odd(), (torch.zeros(2, 4),))
    model = open_model(tmp_path)
    got = ask(model, model.factory(), np.full((2, 4), 5, np.float32))
    assert {name: float(array.ravel()[0]) for name, array in got.items()} == {
        "output_0": 6.0,
        "output_1": 6.0,
        "output_2": 5.0,
        "output_4": 1.0,
    }


class Many(nn.Module):
    def forward(self, **inputs: Tensor) -> Any:
        return sum(inputs.values())


def test_a_program_with_a_hundred_inputs_opens(tmp_path: Path) -> None:
    given = {f"x{index}": torch.ones(2) for index in range(100)}
    save_program(tmp_path / "net/1/model.pt2", Many(), (), kwargs=given)
    model = open_model(tmp_path)
    assert [spec.name for spec in model.inputs] == list(given)
    got = ask(model, model.factory(), *[np.full(2, index, np.float32) for index in range(100)])
    assert got["output"].tolist() == [4950.0] * 2


class Empty(nn.Module):
    def forward(self, x: Tensor, options: dict[str, Tensor]) -> Tensor:
        return x + 1


def test_a_dict_without_inputs(tmp_path: Path) -> None:
    save_program(tmp_path / "net/1/model.pt2", Empty(), (torch.ones(2), {}))
    model = open_model(tmp_path)
    assert [spec.name for spec in model.inputs] == ["x"]
    assert ask(model, model.factory(), np.ones(2, np.float32))["output"].tolist() == [2.0, 2.0]


class Wrapper:
    """Torch alone knows what is in it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner


class Wraps(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return Wrapper([x + 1, x + 2])


def test_a_class_that_torch_alone_takes_apart(tmp_path: Path) -> None:
    pytree.register_pytree_node(
        Wrapper,
        lambda value: ([value.inner], None),
        lambda values, _: Wrapper(next(iter(values))),
        serialized_type_name="test_structures.Wrapper",
    )
    try:
        save_program(tmp_path / "net/1/model.pt2", Wraps(), (torch.ones(2),))
        assert [spec.name for spec in open_model(tmp_path).outputs] == ["0.0", "0.1"]
    finally:
        pytree._deregister_pytree_node(Wrapper)


# --- TorchScript and factories -------------------------------------------------------------------------------


class Scripted(nn.Module):
    def forward(
        self,
        x: Tensor,
        pair: tuple[Tensor, Tensor],
        many: list[Tensor],
        named: dict[str, Tensor],
    ) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        return x + pair[0] * pair[1], [many[0], many[1]], {"a": named["a"]}


INPUTS = "x pair.0 pair.1 many.0 many.1 named.a"
OUTPUTS = "sum output_1.0 output_1.1 output_2.a"


def numbers() -> list[np.ndarray]:
    return [np.full((1, 2), value, np.float32) for value in (1, 2, 3, 4, 5, 6)]


def test_torchscript_with_structures(tmp_path: Path) -> None:
    (tmp_path / "net/1").mkdir(parents=True)
    ignore_warnings_about_torch_itself()
    torch.jit.save(torch.jit.script(Scripted()), tmp_path / "net/1/model.pt")
    text = tensors(INPUTS, "FP32", [-1, 2]) + tensors(OUTPUTS, "FP32", [-1, 2], "outputs")
    for dtype in ("", 'dtype = "bfloat16"\n'):
        model = open_model(tmp_path, dtype + text)
        got = ask(model, model.factory(), *numbers())
        assert {name: float(array[0, 0]) for name, array in got.items()} == {
            "sum": 7.0,
            "output_1.0": 4.0,
            "output_1.1": 5.0,
            "output_2.a": 6.0,
        }
    text = tensors("x y.1", "FP32", [-1, 2]) + tensors("sum", "FP32", [-1, 2], "outputs")
    assert refused(tmp_path, text) == "net/model.toml: inputs: 'y' has 1 parts, and none of them is 'y.0'"


NETWORK = """
import dataclasses, torch

@dataclasses.dataclass
class Out:
    logits: torch.Tensor
    hidden: object = None

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))
    def forward(self, x, cache):
        return Out(x * self.scale, [layer["key"] + layer["value"] for layer in cache])

make = Net
"""


def test_a_factory_with_structures(tmp_path: Path) -> None:
    (tmp_path / "net/1").mkdir(parents=True)
    safetensors.torch.save_file({"scale": torch.tensor(2.0)}, tmp_path / "net/1/model.safetensors")
    (tmp_path / "net/1/code.py").write_text(NETWORK)
    text = 'factory = "code:make"\n' + tensors("x cache.0.key cache.0.value cache.1.key cache.1.value", "FP32", [-1, 2])
    model = open_model(tmp_path, text + tensors("hidden.1 logits", "FP32", [-1, 2], "outputs"))
    got = ask(model, model.factory(), *numbers()[:5])
    assert {name: float(array[0, 0]) for name, array in got.items()} == {"hidden.1": 9.0, "logits": 2.0}


class Detects(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return Detections(x + 1, {"more": [x + 2]})


def test_a_network_is_exported_with_its_outputs_in_order() -> None:
    rows = (-1, 2)
    signature = Signature(
        (TensorSpec("x", "FP32", rows),),
        (TensorSpec("scores.more.0", "FP32", rows), TensorSpec("boxes", "FP32", rows)),
        8,
        ((2, 2),),
        (0, 1),
    )
    program = export(Detects(), signature, torch.device("cpu"))  # which has no pytree of the class
    scores, boxes = program.module()(torch.zeros(3, 2))
    assert (float(scores[0, 0]), float(boxes[0, 0])) == (2.0, 1.0)
