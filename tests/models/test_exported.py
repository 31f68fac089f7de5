"""Programs of torch.export: signatures, lengths, rows, and what cannot be served."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import Dim

from format_tools import ask, open_model, refused, save_program, tensors
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument
from tnxctl.protocol.wire import TensorSpec
from tnxd.models import networks
from tnxd.models.formats.program import Program

ROWS = Dim("rows", max=32)

LENGTH = Dim("length", min=3, max=512)


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
