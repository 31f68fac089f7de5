"""Model files of every format: their signatures, their answers, and what is wrong with them."""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
import py_compile
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.export import Dim

from format_tools import ask, open_model, save_program, source, tensors
from model_repositories import load_example
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument, PermissionDenied, TensorNextError
from tnxctl.protocol.wire import TensorSpec
from tnxd.advice import installing
from tnxd.models import networks, repository
from tnxd.models.formats import opening
from tnxd.models.formats.exported import Program
from tnxd.models.formats.modules import _ROOT

HAVE_ONNX = importlib.util.find_spec("onnxruntime") is not None and importlib.util.find_spec("onnx") is not None

ROWS = Dim("rows", max=32)
LENGTH = Dim("length", min=3, max=512)


def refused(root: Path, toml: str = "") -> str:
    """The error that opening the only model of a repository, or building it, ends with."""
    with pytest.raises(TensorNextError) as caught:
        open_model(root, toml).factory()
    return caught.value.message


# --- one network in all formats ------------------------------------------------------------------------------


def test_the_digits_in_every_format_give_equal_answers(tmp_path: Path) -> None:
    load_example("digits", "save_formats").build(tmp_path)
    scans = (np.random.default_rng(1).random((5, 64)) * 16).astype(np.float32)
    with torch.inference_mode():
        expected = networks.digits()(torch.from_numpy(scans)).numpy()
    signatures = set()
    for version, kind in (("1", "pt2"), ("2", "safetensors"), ("3", "torchscript")):
        model = open_model(tmp_path, name="digits", version=version)
        assert model.format == kind
        signatures.add((model.inputs, model.outputs, model.max_batch_size))
        np.testing.assert_array_equal(ask(model, model.factory(), scans)["scores"], expected)
    assert signatures == {((TensorSpec("image", "FP32", (-1, 64)),), (TensorSpec("scores", "FP32", (-1, 10)),), 64)}


def test_model_toml_arrives_in_the_model(tmp_path: Path) -> None:
    save_program(tmp_path / "net/1/model.pt2", networks.DigitsNet().eval(), (torch.zeros(2, 64),), ({0: ROWS},))
    model = open_model(
        tmp_path,
        'max_batch_size = 16\nmax_delay_us = 100\ndevices = ["cpu", "cuda:1"]\nreplicas = 2\nwarm_up = [1, 16]\n'
        "time_limit_s = 3.0\ndeadline_us = 5000.0\npriority = 3",
    )
    assert (model.max_batch_size, model.max_delay_us, model.devices, model.replicas) == (16, 100, ("cpu", "cuda:1"), 2)
    assert (model.warm_up, model.time_limit_s, model.deadline_us, model.priority) == ((1, 16), 3.0, 5000.0, 3)


# --- model.pt2 -----------------------------------------------------------------------------------------------


class Encoder(torch.nn.Module):
    """Several inputs and outputs of all kinds; one input by keyword alone."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = ids * mask
        return {
            "total": kept.sum(1) * scale.sum(),
            "any": mask.any(1),
            "half": kept.to(torch.bfloat16) / 2,
            "positions": ids + torch.arange(ids.shape[1]),
        }


def save_encoder(root: Path) -> None:
    ids = torch.ones(2, 5, dtype=torch.int64)
    save_program(
        root / "net/1/model.pt2",
        Encoder(),
        (ids, ids.bool()),
        {"ids": {0: ROWS, 1: LENGTH}, "mask": {0: ROWS, 1: LENGTH}, "scale": {0: ROWS}},
        {"scale": torch.ones(2)},
    )


def test_a_program_knows_its_signature(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    model = open_model(tmp_path)
    assert model.inputs == (
        TensorSpec("ids", "INT64", (-1, -1)),
        TensorSpec("mask", "BOOL", (-1, -1)),
        TensorSpec("scale", "FP32", (-1,)),
    )
    assert set(model.outputs) == {
        TensorSpec("total", "FP32", (-1,)),
        TensorSpec("any", "BOOL", (-1,)),
        TensorSpec("half", "BF16", (-1, -1)),
        TensorSpec("positions", "INT64", (-1, -1)),
    }
    assert model.max_batch_size == 32
    assert model.examples[0][1] == model.examples[1][1] == 5  # as exported
    ids = np.arange(12, dtype=np.int64).reshape(3, 4)
    got = ask(model, model.factory(), ids, ids % 2 == 0, np.ones(3, np.float32))
    np.testing.assert_array_equal(got["total"], [6, 30, 54])
    np.testing.assert_array_equal(got["any"], [True] * 3)
    np.testing.assert_array_equal(got["positions"], ids + np.arange(4))
    half = torch.from_numpy(got["half"].copy()).view(torch.bfloat16)
    assert torch.equal(half.float(), torch.from_numpy(ids * (ids % 2 == 0) / 2).float())


@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [
        ((2, 5), (2, 4), "axis 1 of 'mask' == axis 1 of 'ids'; here axis 1 of 'mask' is 4 and axis 1 of 'ids' is 5"),
        ((2, 2), (2, 2), "only lengths where axis 1 of 'ids' >= 3; here axis 1 of 'ids' is 2"),
        ((2, 513), (2, 513), "only lengths where axis 1 of 'ids' <= 512; here axis 1 of 'ids' is 513"),
    ],
)
def test_lengths_that_a_program_does_not_take(
    tmp_path: Path, ids: tuple[int, ...], mask: tuple[int, ...], said: str
) -> None:
    save_encoder(tmp_path)
    model = open_model(tmp_path)
    with pytest.raises(InvalidArgument, match=said):
        ask(model, model.factory(), np.ones(ids, np.int64), np.ones(mask, bool), np.ones(2, np.float32))


class Two(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return x + y, x.sum(-1)


class Product(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.T


class Scaled(torch.nn.Module):
    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return x * factor


def save_two(root: Path, first: Any = None, second: Any = None) -> None:
    dynamic = (first or {0: ROWS}, second or {0: ROWS})
    save_program(root / "net/1/model.pt2", Two(), (torch.zeros(6, 4), torch.zeros(6, 4)), dynamic)


@pytest.mark.parametrize(
    ("rows", "limit"),
    [
        (Dim("rows"), 64),
        (Dim("rows", min=1, max=8), 8),
        (Dim("rows", max=1000), 64),
        (Dim("rows", min=4), 0),
        (Dim.AUTO, 64),
        (None, 0),
    ],
)
def test_the_batch_limit_follows_from_the_program(tmp_path: Path, rows: Any, limit: int) -> None:
    save_two(tmp_path, {0: rows}, {0: rows})
    model = open_model(tmp_path)
    assert model.max_batch_size == limit
    module = model.factory()
    count = 6 if rows is None else model.examples[0][0]
    for length in [1, limit] if limit else [count]:
        x = np.ones((length, 4), np.float32)
        assert ask(model, module, x, x)["output_1"].shape == (length,)


def test_modules_beside_a_program_are_none_of_its_business(tmp_path: Path) -> None:
    save_two(tmp_path)
    (tmp_path / "net/convert.py").write_text("")
    (tmp_path / "net/convert.py").chmod(0o664)
    open_model(tmp_path).factory()


def test_a_program_that_was_exported_for_one_row(tmp_path: Path) -> None:
    save_program(tmp_path / "net/1/model.pt2", networks.DigitsNet().eval(), (torch.zeros(1, 64),))
    model = open_model(tmp_path)
    assert (model.inputs[0].shape, model.max_batch_size) == ((1, 64), 0)
    assert ask(model, model.factory(), np.zeros((1, 64), np.float32))["output"].shape == (1, 10)


def test_rows_that_depend_on_each_other_do_not_batch(tmp_path: Path) -> None:
    save_program(tmp_path / "net/1/model.pt2", Product(), (torch.zeros(3, 4),), ({0: Dim("rows")},))
    model = open_model(tmp_path)
    assert (model.outputs[0].shape, model.max_batch_size) == ((-1, -1), 0)
    assert ask(model, model.factory(), np.ones((2, 4), np.float32))["output"].tolist() == [[4, 4], [4, 4]]
    assert "rows depend on each other" in refused(tmp_path, "max_batch_size = 4")


class Uneven(torch.nn.Module):
    """Doubles batches whose number of rows is even, and not 70."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] % 2 == 0 and x.shape[0] != 70 else x


class NotSeventy(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[0] == 70 else x * 2


def test_a_program_for_some_numbers_of_rows_does_not_batch(tmp_path: Path) -> None:
    save_program(tmp_path / "net/1/model.pt2", Uneven(), (torch.zeros(2, 4),), ({0: Dim.AUTO},))
    model = open_model(tmp_path)
    assert model.max_batch_size == 0
    module = model.factory()
    assert ask(model, module, np.ones((4, 4), np.float32))["output"].tolist() == [[2.0] * 4] * 4
    for rows in (1, 3):
        with pytest.raises(InvalidArgument, match=r"axis 0 of 'x' % 2\) == 0; here axis 0 of 'x' is"):
            ask(model, module, np.ones((rows, 4), np.float32))
    assert "max_batch_size: 8, but in net/1/model.pt2 not every number of rows will do: (axis 0 % 2) == 0" in refused(
        tmp_path, "max_batch_size = 8"
    )


def test_numbers_of_rows_beyond_the_limit_do_not_matter(tmp_path: Path) -> None:
    save_program(tmp_path / "net/1/model.pt2", NotSeventy(), (torch.zeros(2, 4),), ({0: Dim.AUTO},))
    assert open_model(tmp_path).max_batch_size == 64
    assert open_model(tmp_path, "max_batch_size = 69").max_batch_size == 69
    assert "not every number of rows will do: axis 0 != 70" in refused(tmp_path, "max_batch_size = 70")


def test_a_scalar_has_no_rows(tmp_path: Path) -> None:
    save_program(
        tmp_path / "net/1/model.pt2", Scaled(), (torch.zeros(3, 4), torch.tensor(2.0)), ({0: Dim("rows")}, None)
    )
    model = open_model(tmp_path)
    assert (model.inputs[1].shape, model.max_batch_size) == ((), 0)
    got = ask(model, model.factory(), np.ones((2, 4), np.float32), np.array(3, np.float32))
    assert got["output"].tolist() == [[3.0] * 4] * 2


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        (
            "max_batch_size = 33",
            "net/model.toml: max_batch_size: 33 is more than the 32 rows that net/1/model.pt2 takes",
        ),
        ("max_batch_size = 8\nwarm_up = [9]", "warm_up: 9 is more than 8"),
        (tensors("x z", "FP32", [-1, 4]), "inputs[1].name: net/1/model.pt2 has no 'z', only x, y"),
        (tensors("x", "FP32", [-1, 4]), "inputs: 1 tensors, and net/1/model.pt2 has 2: x, y"),
        (tensors("x y", "INT64", [-1, 4]), "inputs: 'x' is FP32 in net/1/model.pt2, not INT64"),
        (tensors("x y", "FP32", [-1, 5]), "inputs: 'x' is [-1, 4] in net/1/model.pt2, not [-1, 5]"),
        (tensors("x y", "FP32", [-1, -1]), "not [-1, -1]"),
        (tensors("x y", "FP32", [2, 4]) + "", "max_batch_size"),
    ],
)
def test_model_toml_contradicts_a_program(tmp_path: Path, toml: str, said: str) -> None:
    save_two(tmp_path)
    if "[2, 4]" in toml:
        toml = "max_batch_size = 8\n" + toml
    assert said in refused(tmp_path, toml)


def test_model_toml_narrows_a_program_and_names_its_outputs(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    blocks = tensors("ids", "INT64", [-1, 7]) + tensors("mask", "BOOL", [-1, -1]) + tensors("scale", "FP32", [-1])
    model = open_model(tmp_path, blocks)
    assert [spec.shape for spec in model.inputs] == [(-1, 7), (-1, -1), (-1,)]
    assert model.examples[0][1] == 7
    save_two(tmp_path)
    named = open_model(tmp_path, tensors("sum", "FP32", [-1, 4], "outputs") + tensors("total", "FP32", [-1], "outputs"))
    x = np.ones((2, 4), np.float32)
    assert ask(named, named.factory(), x, x)["total"].tolist() == [4.0, 4.0]


def test_an_example_comes_from_model_toml_first(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    blocks = tensors("ids", "INT64", [-1, -1]) + "example = [1, 9]\n" + tensors("mask", "BOOL", [-1, -1])
    model = open_model(tmp_path, blocks + "example = [1, 9]\n" + tensors("scale", "FP32", [-1]))
    assert model.example_shapes(3) == [(3, 9), (3, 9), (3,)]
    assert model.example_group == (9, 9)


class Eighths(torch.nn.Module):
    """Takes only multiples of 8, and y has an eighth of x's length; small ones take another way."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small = y.shape[0] <= 3
        return torch.nn.functional.avg_pool1d(x, 8) + y, x * 0 if small else x


def test_lengths_that_follow_from_others(tmp_path: Path) -> None:
    eighth = Dim("eighth", max=100)
    save_program(
        tmp_path / "net/1/model.pt2",
        Eighths(),
        (torch.zeros(1, 80), torch.zeros(10)),
        ({1: 8 * eighth}, {0: Dim("eighth", min=4, max=100)}),
    )
    model = open_model(tmp_path)
    module = model.factory()
    got = ask(model, module, np.ones((1, 40), np.float32), np.ones(5, np.float32))
    assert got["output_0"].tolist() == [[2.0] * 5]
    for x, y in ((41, 5), (48, 5), (24, 3), (808, 101)):
        with pytest.raises(InvalidArgument, match="the model takes only lengths where"):
            ask(model, module, np.ones((1, x), np.float32), np.ones(y, np.float32))


class Switched(torch.nn.Module):
    def forward(self, x: torch.Tensor, double: bool = False, extra: torch.Tensor | None = None) -> torch.Tensor:
        return x * 2 if double else x


def test_arguments_that_are_no_tensors_are_what_they_were(tmp_path: Path) -> None:
    save_program(tmp_path / "net/1/model.pt2", Switched(), (torch.zeros(3, 4), True, None), ({0: ROWS}, None, None))
    model = open_model(tmp_path)
    assert [spec.name for spec in model.inputs] == ["x"]
    assert ask(model, model.factory(), np.ones((1, 4), np.float32))["output"].tolist() == [[2.0] * 4]


class Complex(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.complex(x, x)


class Silent(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return {"none": None, "three": 3}


class Deaf(torch.nn.Module):
    def forward(self, options: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.ones(3)


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return {"a": {"b": x + 1}, "a.b": x + 2}


@pytest.mark.parametrize(
    ("network", "args", "said"),
    [
        (Complex(), (torch.zeros(2),), "'output' is torch.complex64, which cannot be served"),
        (Silent(), (torch.zeros(2),), "net/1/model.pt2: returns no tensor: there is nothing to serve"),
        (Deaf(), ({},), "net/1/model.pt2: takes no tensor: there is nothing to serve"),
        (Twice(), (torch.zeros(2),), "net/1/model.pt2: two outputs would be called 'a.b'"),
    ],
)
def test_programs_that_cannot_be_served(tmp_path: Path, network: torch.nn.Module, args: Any, said: str) -> None:
    save_program(tmp_path / "net/1/model.pt2", network, args)
    assert said in refused(tmp_path)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # torch about itself
def test_a_decomposed_program_with_side_effects(tmp_path: Path) -> None:
    class Inverse(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(x)

    rows = torch.export.Dim("rows")
    program = torch.export.export(Inverse(), (torch.ones(2, 1, 1),), dynamic_shapes=({0: rows},)).run_decompositions()
    path = tmp_path / "net/1/model.pt2"
    path.parent.mkdir(parents=True)
    torch.export.save(program, path)
    model = open_model(tmp_path)
    assert [spec.name for spec in model.inputs] == ["x"]
    module = model.factory()
    np.testing.assert_array_equal(ask(model, module, np.full((3, 1, 1), 4, np.float32))["output"], 0.25)
    with pytest.raises(RuntimeError, match="singular"):
        module(torch.zeros(1, 1, 1))


def test_a_program_that_was_exported_in_training_mode_has_a_note(tmp_path: Path) -> None:
    save_program(tmp_path / "net/1/model.pt2", networks.DigitsNet().train(), (torch.zeros(2, 64),))
    assert ["dropout makes answers random" in note for note in open_model(tmp_path).notes] == [True]


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_damaged_program_is_named(tmp_path: Path, keep: int) -> None:
    save_two(tmp_path)
    path = tmp_path / "net/1/model.pt2"
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(tmp_path).startswith("net/1/model.pt2: ")


def test_another_zip_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "net/1").mkdir(parents=True)
    torch.save({"a": torch.zeros(1)}, tmp_path / "net/1/model.pt2")
    assert refused(tmp_path).startswith(f"net/1/model.pt2: torch {torch.__version__} cannot load it")


def test_every_device_gets_its_own_program_and_none_is_kept(tmp_path: Path) -> None:
    save_program(tmp_path / "net/1/model.pt2", networks.DigitsNet().eval(), (torch.zeros(2, 64),), ({0: ROWS},))
    model = open_model(tmp_path)
    first, second = model.factory(), model.factory()
    assert sum(weight.numel() for weight in first.buffers()) == 38_282
    for one, other in zip(first.buffers(), second.buffers(), strict=True):
        assert not one.requires_grad
        assert one.data_ptr() != other.data_ptr()
        assert torch.equal(one, other)
    gone = weakref.ref(next(first.buffers()))
    gc.disable()  # what lives when the daemon has started is never looked at by the collector
    try:
        del first, one
        assert gone() is None
    finally:
        gc.enable()


def test_a_program_moves_with_the_tensors_that_it_makes(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    module = open_model(tmp_path).factory()
    assert isinstance(module, Program)
    moved = module.to(torch.device("meta"))
    ids = torch.ones(2, 4, dtype=torch.int64, device="meta")
    assert all(output.is_meta for output in moved(ids, ids.bool(), torch.ones(2, device="meta")))


def test_a_program_that_changed_since_it_was_opened_is_not_built(tmp_path: Path) -> None:
    save_two(tmp_path)
    model = open_model(tmp_path)
    model.factory()
    save_two(tmp_path)
    with pytest.raises(FailedPrecondition, match=r"net/1/model.pt2 changed"):
        model.factory()


# --- model.safetensors ---------------------------------------------------------------------------------------

NETWORK = """\
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight  # tied
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x):
        return self.second(self.first(x)) + self.shift

def make():
    return Net()
"""
TOML = 'factory = "net:make"\n' + tensors("x", "FP32", [-1, 4]) + tensors("y", "FP32", [-1, 4], "outputs")


def state(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = {
        "first.weight": torch.rand(4, 4, generator=generator),
        "first.bias": torch.rand(4, generator=generator),
        "second.bias": torch.rand(4, generator=generator),
        "shift": torch.ones(4),
    }
    return {**weights, **changed}


def save_weights(root: Path, weights: dict[str, torch.Tensor] | None = None, network: str = NETWORK) -> Path:
    version = root / "net/1"
    version.mkdir(parents=True, exist_ok=True)
    (version / "net.py").write_text(network)
    path = version / "model.safetensors"
    safetensors.torch.save_file(state() if weights is None else weights, path)
    return path


def expected(x: np.ndarray, weights: dict[str, torch.Tensor] | None = None) -> np.ndarray:
    held = {name: weight.double().numpy() for name, weight in (weights or state()).items()}
    once = x @ held["first.weight"].T + held["first.bias"]
    return once @ held["first.weight"].T + held["second.bias"] + held["shift"]


X = np.random.default_rng(4).random((3, 4)).astype(np.float32)


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


# --- factories -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("def make():\n    raise OSError('no licence')", "net/1/net.py: make() raised OSError: no licence"),
        ("def make():\n    raise SystemExit(3)", "net/1/net.py: make() raised SystemExit: 3"),
        ("def make():\n    return 3", "net/1/net.py: make() returned int, not a torch.nn.Module"),
        ("def other():\n    pass", "net/1/net.py: the factory 'make' is not in it"),
        ("make = 3", "net/1/net.py: the factory 'make' is not callable"),
        ("def make(:", "net/1/net.py: importing it raised SyntaxError"),
        ("import no_such_package", "net/1/net.py: importing it raised ModuleNotFoundError"),
        ("raise ValueError('on import')", "net/1/net.py: importing it raised ValueError: on import"),
    ],
)
def test_a_factory_that_fails_is_named(tmp_path: Path, network: str, said: str) -> None:
    save_weights(tmp_path, network=network)
    assert said in refused(tmp_path, TOML)


def test_a_factory_that_is_not_there(tmp_path: Path) -> None:
    save_weights(tmp_path)
    message = refused(tmp_path, TOML.replace("net:make", "nett:make"))
    assert message == "net/model.toml: factory: there is no nett.py in net/1 or net"


LAYERS = "SHIFT = {}\n"
WITH_SIBLINGS = """\
import torch
from . import layers
from .parts.inner import ONE
from .parts import TWO

class Net(torch.nn.Module):
    def forward(self, x):
        from .late import LATE
        return x + layers.SHIFT + ONE + TWO + LATE

def make():
    return Net()
"""


def save_siblings(root: Path, version: str, shift: int) -> None:
    folder = root / "net" / version
    (folder / "parts").mkdir(parents=True)
    (folder / "net.py").write_text(WITH_SIBLINGS)
    (folder / "layers.py").write_text(f"SHIFT = {shift}")
    (folder / "late.py").write_text("LATE = 1")
    (folder / "parts/__init__.py").write_text("from .inner import ONE\nTWO = ONE * 2")
    (folder / "parts/inner.py").write_text("ONE = 1")
    safetensors.torch.save_file({}, folder / "model.safetensors")


def private() -> set[str]:
    return {name for name in sys.modules if name.startswith(f"{_ROOT}.")}


@pytest.fixture
def _no_module_stays() -> Iterator[None]:
    gc.collect()
    before, path = private(), list(sys.path)
    yield
    gc.collect()
    assert private() == before
    assert sys.path == path


@pytest.mark.usefixtures("_no_module_stays")
def test_modules_import_their_siblings_and_versions_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    save_siblings(tmp_path, "1", 10)
    save_siblings(tmp_path, "2", 20)
    models = {version: open_model(tmp_path, 'versions = "all"\n' + TOML, version=version) for version in "12"}
    modules = {version: model.factory() for version, model in models.items()}
    again = models["1"].factory()
    assert type(again) is type(modules["1"])  # executed once per model
    for version, shift in (("1", 14), ("2", 24)):
        got = ask(models[version], modules[version], np.zeros((1, 4), np.float32))
        assert got["y"].tolist() == [[shift] * 4]
    assert "layers" not in sys.modules
    assert not list(tmp_path.rglob("*.pyc"))


@pytest.mark.usefixtures("_no_module_stays")
@pytest.mark.parametrize("planted", ["net", "layers", "late", "parts/__init__", "parts/inner"])
def test_bytecode_in_the_repository_is_not_run(tmp_path: Path, planted: str) -> None:
    save_siblings(tmp_path, "1", 10)
    version = tmp_path / "net/1"
    (tmp_path / "net/model.toml").write_text(TOML)
    files = sorted(path for path in version.rglob("*") if path.is_file())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(version)}\n" for path in files]
    (version / "SHA256SUMS").write_text("".join(sums))
    place = (version / planted).parent / "__pycache__"
    place.mkdir()
    source = tmp_path / ".planted.py"
    source.write_text("raise RuntimeError('planted')")
    py_compile.compile(
        str(source),
        cfile=str(place / f"{Path(planted).name}.{sys.implementation.cache_tag}.pyc"),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    catalog = repository.scan(tmp_path, opening.open_model, require_manifest=True)
    assert catalog.failures == {}
    model = catalog.entries["net"].sources["1"].open(0)
    assert ask(model, model.factory(), np.zeros((1, 4), np.float32))["y"].tolist() == [[14] * 4]


def test_versions_share_modules_in_the_directory_of_the_model(tmp_path: Path) -> None:
    path = save_weights(tmp_path)
    (path.parent / "net.py").rename(tmp_path / "net/net.py")
    model = open_model(tmp_path, TOML)
    np.testing.assert_allclose(ask(model, model.factory(), X)["y"], expected(X), rtol=1e-5)
    (path.parent / "SHA256SUMS").write_text("")
    with pytest.raises(PermissionDenied, match="does not list"):
        open_model(tmp_path)


def test_a_module_that_changed_since_the_check_is_not_executed(tmp_path: Path) -> None:
    late = "calls = []\ndef make():\n    calls.append(1)\n    if len(calls) > 1: from . import late\n    return Net()\n"
    path = save_weights(tmp_path, network=NETWORK.partition("def make")[0] + late).parent / "late.py"
    path.write_text("")
    model = open_model(tmp_path, TOML)
    model.factory()
    path.write_text("raise RuntimeError('another one')")
    with pytest.raises(FailedPrecondition, match=r"net/1/late.py changed"):
        model.factory()


# --- model.pt ------------------------------------------------------------------------------------------------


def save_torchscript(root: Path, network: torch.nn.Module) -> Path:
    (root / "net/1").mkdir(parents=True, exist_ok=True)
    path = root / "net/1/model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(str(path))
    return path


DIGITS = tensors("image", "FP32", [-1, 64]) + tensors("scores", "FP32", [-1, 10], "outputs")


def test_torchscript_has_its_deprecation_said_and_raises_no_warning(tmp_path: Path) -> None:
    save_torchscript(tmp_path, networks.digits().train())
    with warnings.catch_warnings(record=True) as caught:
        model = open_model(tmp_path, DIGITS)
        module = model.factory()
    assert caught == []
    assert "TorchScript is deprecated" in model.notes[0]
    scans = np.ones((2, 64), np.float32)
    with torch.inference_mode():
        wanted = networks.digits()(torch.from_numpy(scans)).numpy()
    np.testing.assert_array_equal(ask(model, module, scans)["scores"], wanted)


def test_torchscript_in_another_datatype(tmp_path: Path) -> None:
    save_torchscript(tmp_path, networks.digits())
    model = open_model(tmp_path, 'dtype = "bfloat16"\n' + DIGITS)
    module = model.factory()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert ask(model, module, np.ones((2, 64), np.float32))["scores"].dtype == np.float32


@pytest.mark.parametrize("keep", [0, 1000, -100])
def test_damaged_torchscript_is_named(tmp_path: Path, keep: int) -> None:
    path = save_torchscript(tmp_path, networks.digits())
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(tmp_path, DIGITS).startswith("net/1/model.pt: damaged, or not TorchScript")


# --- model.onnx ----------------------------------------------------------------------------------------------

needs_onnx = pytest.mark.skipif(not HAVE_ONNX, reason="onnx and onnxruntime are not installed")


def save_onnx(
    root: Path,
    rows: Any = "rows",
    out_rows: Any = "rows",
    *,
    kind: str = "FLOAT",
    width: int = 4,
    external: bool = False,
) -> Path:
    """y = x + w for x [rows, width], and z, which says where x is positive. Args: external: w is in weights.bin."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    (root / "net/1").mkdir(parents=True, exist_ok=True)
    path = root / "net/1/model.onnx"
    element = getattr(TensorProto, kind)
    w = numpy_helper.from_array(np.arange(width).astype(helper.tensor_dtype_to_np_dtype(element)), "w")
    zero = numpy_helper.from_array(np.zeros((), helper.tensor_dtype_to_np_dtype(element)))
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "w"], ["y"]),
            helper.make_node("Constant", [], ["zero"], value=zero),
            helper.make_node("Greater", ["x", "zero"], ["z"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", element, [rows, width])],
        [
            helper.make_tensor_value_info("y", element, [out_rows, width]),
            helper.make_tensor_value_info("z", TensorProto.BOOL, [out_rows, width]),
        ],
        [w],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path), save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


@needs_onnx
@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("kind", ["FLOAT", "INT64", "FLOAT16"])
def test_onnx(tmp_path: Path, kind: str, external: bool) -> None:
    save_onnx(tmp_path, kind=kind, external=external)
    model = open_model(tmp_path)
    datatype = {"FLOAT": "FP32", "INT64": "INT64", "FLOAT16": "FP16"}[kind]
    assert model.inputs == (TensorSpec("x", datatype, (-1, 4)),)
    assert model.outputs == (TensorSpec("y", datatype, (-1, 4)), TensorSpec("z", "BOOL", (-1, 4)))
    assert (model.max_batch_size, model.devices) == (64, ("cpu",))
    module = model.factory()
    for rows in (1, 3):
        x = np.ones((rows, 4), {"FP32": np.float32, "INT64": np.int64, "FP16": np.float16}[datatype])
        got = ask(model, module, x)
        assert got["y"].tolist() == [[1, 2, 3, 4]] * rows
        assert got["z"].all()


@needs_onnx
@pytest.mark.parametrize("change", ["overwritten", "truncated"])
def test_tensors_beside_onnx_are_what_they_were(tmp_path: Path, change: str) -> None:
    path = save_onnx(tmp_path, external=True).parent / "weights.bin"
    model = open_model(tmp_path)
    module = model.factory()
    # In place: a mapping would answer with the new contents, or end the process.
    path.write_bytes(bytes(path.stat().st_size) if change == "overwritten" else b"")
    assert ask(model, module, np.ones((1, 4), np.float32))["y"].tolist() == [[1, 2, 3, 4]]
    with pytest.raises(FailedPrecondition, match=r"net/1/weights.bin changed"):
        model.factory()


@needs_onnx
def test_tensors_beside_onnx_are_not_sought_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_onnx(tmp_path / "models", width=1024, external=True).parent / "weights.bin"
    path.rename(tmp_path / "weights.bin")
    monkeypatch.chdir(tmp_path)
    assert refused(tmp_path / "models") == "net/1/model.onnx: its tensors are in 'weights.bin', which is missing"


@needs_onnx
@pytest.mark.parametrize(("rows", "out_rows", "limit"), [("n", "m", 0), (None, None, 0), (2, 2, 0), ("n", "n", 64)])
def test_onnx_counts_rows_only_where_one_name_says_so(tmp_path: Path, rows: Any, out_rows: Any, limit: int) -> None:
    save_onnx(tmp_path, rows, out_rows)
    assert open_model(tmp_path).max_batch_size == limit
    if rows == 2:
        assert "max_batch_size: 8, but 'x' is [2, 4]" in refused(tmp_path, "max_batch_size = 8")
    else:
        assert open_model(tmp_path, "max_batch_size = 8").max_batch_size == 8


@needs_onnx
def test_onnx_that_model_toml_narrows(tmp_path: Path) -> None:
    save_onnx(tmp_path)
    assert open_model(tmp_path, tensors("x", "FP32", [1, 4])).max_batch_size == 0
    assert "has no 'w', only x" in refused(tmp_path, tensors("w", "FP32", [-1, 4]))


@needs_onnx
@pytest.mark.parametrize("keep", [0, 50])
def test_damaged_onnx_is_named(tmp_path: Path, keep: int) -> None:
    path = save_onnx(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(tmp_path).startswith("net/1/model.onnx: onnxruntime cannot load it: ")


@needs_onnx
def test_onnx_with_a_datatype_that_has_no_array(tmp_path: Path) -> None:
    save_onnx(tmp_path, kind="BFLOAT16")
    assert "net/1/model.onnx: " in refused(tmp_path)


def test_onnx_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net/1").mkdir(parents=True)
    (tmp_path / "net/1/model.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert refused(tmp_path) == f"net/1/model.onnx needs onnxruntime: {installing('onnxruntime')}"


# --- whatever the format -------------------------------------------------------------------------------------


def test_a_version_that_went_away_after_the_scan(tmp_path: Path) -> None:
    path = save_weights(tmp_path)
    (tmp_path / "net/model.toml").write_text(TOML)
    found = source(tmp_path)
    path.unlink()
    with pytest.raises(FailedPrecondition, match=r"net/1/model.safetensors is missing"):
        found.open(0).factory()
    (path.parent / "net.py").unlink()
    os.rmdir(path.parent)
    with pytest.raises(FailedPrecondition, match="No such file"):
        found.open(0)
