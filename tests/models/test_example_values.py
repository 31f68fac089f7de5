"""Values to warm up with: example.npz, `values` in model.toml, and the inputs that a program was exported with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from format_tools import open_model, refused, save_program, source
from tnxctl.protocol.datatypes import Array
from tnxd.models import repository

ROWS = Dim("rows", min=1, max=32)


class Embeds(nn.Module):
    """Takes indices below 10 and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 3)

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        return self.table(ids) * scale


def save(root: Path, ids: Tensor | None = None) -> None:
    """A model "net" of `Embeds`. Args: ids: to export it with; zeros without."""
    ids = torch.zeros(2, 5, dtype=torch.int64) if ids is None else ids
    length = Dim("length", min=1, max=100)
    save_program(
        root / "net/1/model.pt2", Embeds().eval(), (ids, torch.zeros(len(ids), 1, 1)), ({0: ROWS, 1: length}, {0: ROWS})
    )


def toml(values: str, more: str = "") -> str:
    """Blocks for the inputs of `Embeds`. Args: values: of ids, as TOML. more: for the scale."""
    return (
        f'[[inputs]]\nname = "ids"\ndatatype = "INT64"\nshape = [-1, -1]\nvalues = {values}\n'
        f'[[inputs]]\nname = "scale"\ndatatype = "FP32"\nshape = [-1, 1, 1]\n{more}\n'
    )


IDS = np.array([[1, 2, 3, 9], [4, 5, 6, 7], [9, 9, 0, 1]])


@pytest.mark.parametrize("place", ["net/1", "net"])
def test_an_example_beside_the_model(tmp_path: Path, place: str) -> None:
    save(tmp_path)
    np.savez(tmp_path / place / "example.npz", ids=IDS)
    model = open_model(tmp_path)
    assert list(model.example_values) == ["ids"]
    np.testing.assert_array_equal(model.example_values["ids"], IDS)
    assert model.example_shapes(7) == [(7, 4), (7, 1, 1)]
    assert model.example_group == (4,)


def test_the_versions_own_example_comes_first(tmp_path: Path) -> None:
    save(tmp_path)
    np.savez(tmp_path / "net/example.npz", ids=IDS * 0)
    np.savez(tmp_path / "net/1/example.npz", ids=IDS)
    np.testing.assert_array_equal(open_model(tmp_path).example_values["ids"], IDS)


def test_a_changed_example_is_another_content(tmp_path: Path) -> None:
    save(tmp_path)
    before = source(tmp_path)
    np.savez(tmp_path / "net/example.npz", ids=IDS)
    assert source(tmp_path).stamp != before.stamp


def test_a_pinned_version_has_its_own_example_alone(tmp_path: Path) -> None:
    save(tmp_path)
    np.savez(tmp_path / "net/example.npz", ids=IDS)
    digest = hashlib.sha256((tmp_path / "net/1/model.pt2").read_bytes()).hexdigest()
    (tmp_path / "net/1/SHA256SUMS").write_text(f"{digest}  model.pt2\n")
    assert open_model(tmp_path).example_values == {}
    np.savez(tmp_path / "net/1/example.npz", ids=IDS)
    assert "SHA256SUMS does not list example.npz" in refused(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"idx": IDS}, "net/1/example.npz: there is no input 'idx', only ids, scale"),
        ({"ids": IDS.astype(np.int32)}, "net/1/example.npz: ids is int32, and the input is INT64"),
        ({"ids": IDS[0]}, "net/1/example.npz: ids has shape [4], and the input [-1, -1]"),
        (
            {"scale": np.ones((2, 1, 2), np.float32)},
            "net/1/example.npz: scale has shape [2, 1, 2], and the input [-1, 1, 1]",
        ),
        ({"ids": IDS[:0]}, "net/1/example.npz: ids has 0 rows: 1 to 32 are of use"),
        ({"ids": np.zeros((33, 2), np.int64)}, "net/1/example.npz: ids has 33 rows: 1 to 32 are of use"),
        (
            {"ids": IDS, "scale": np.ones((2, 1, 1), np.float32)},
            "net/1/example.npz: 'scale' has 2 rows, 'ids' has 3",
        ),
        ({"ids": np.array([[object()]])}, "net/1/example.npz: cannot be read: ValueError: Object arrays"),
    ],
)
def test_an_example_that_does_not_fit(tmp_path: Path, arrays: dict[str, Array], said: str) -> None:
    save(tmp_path)
    np.savez(tmp_path / "net/1/example.npz", allow_pickle=True, **arrays)
    assert refused(tmp_path).startswith(said)


@pytest.mark.parametrize("keep", [0, 30, -8])
def test_a_damaged_example_is_named(tmp_path: Path, keep: int) -> None:
    save(tmp_path)
    path = tmp_path / "net/1/example.npz"
    np.savez(path, ids=IDS)
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(tmp_path).startswith("net/1/example.npz: ")


def test_an_example_that_is_no_file(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "net/example.npz").mkdir()
    assert "net/example.npz is not a file" in repository.scan(tmp_path).failures.values()


def test_an_example_that_others_may_write_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    np.savez(tmp_path / "net/example.npz", ids=IDS)
    (tmp_path / "net/example.npz").chmod(0o666)
    assert refused(tmp_path).startswith("net/example.npz is writable by others")


def test_values_in_model_toml(tmp_path: Path) -> None:
    save(tmp_path)
    np.savez(tmp_path / "net/example.npz", ids=IDS, scale=np.full((3, 1, 1), 2, np.float32))
    found = open_model(tmp_path, toml("[[1, 2], [3, 4], [5, 6]]", "values = 0.5")).example_values
    assert found["ids"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert found["ids"].dtype == np.int64
    assert found["scale"].tolist() == [[[0.5]]] * 3


def test_random_values_stay_between_their_bounds(tmp_path: Path) -> None:
    save(tmp_path)
    model = open_model(tmp_path, toml("{ low = 8, high = 9 }", "values = { low = -1.5, high = 0 }"))
    ids, scale = model.example_values["ids"], model.example_values["scale"]
    assert ids.shape == (8, 5)
    assert set(ids.ravel()) == {8, 9}
    assert scale.shape == (8, 1, 1)
    assert len(set(scale.ravel())) == 8
    assert scale.min() >= -1.5
    assert scale.max() <= 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("[1, 2]", "net/model.toml: inputs[0].values: has shape [2], and the input [-1, -1]"),
        ("[[1, 2], [3]]", "net/model.toml: inputs[0].values: the lists in it differ in length"),
        ("[[1.5, 2]]", "net/model.toml: inputs[0].values: 1.5 is no INT64"),
        ("1.5", "net/model.toml: inputs[0].values: 1.5 is no INT64"),
        ('[["a"]]', "net/model.toml: inputs[0].values: numbers alone can stand there"),
        ("{ low = 3, high = 2.0 }", "net/model.toml: inputs[0].values: low is 3, above high, 2.0"),
        ("{ low = 0.5, high = 2.0 }", "net/model.toml: inputs[0].values: 0.5 is no INT64"),
        ('"a"', "net/model.toml: inputs[0].values: numbers alone can stand there"),
        ("1979-05-27", "net/model.toml: inputs[0].values: expected"),
        ("{ low = 3 }", "net/model.toml: inputs[0].values.high: is missing"),
    ],
)
def test_values_that_do_not_fit(tmp_path: Path, values: str, said: str) -> None:
    save(tmp_path)
    assert refused(tmp_path, toml(values)).startswith(said)


def test_a_program_brings_what_it_was_exported_with(tmp_path: Path) -> None:
    save(tmp_path, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    found = open_model(tmp_path).example_values
    assert list(found) == ["ids"]  # a scale of zeros says nothing
    assert found["ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    save(tmp_path, torch.ones(20, 5, dtype=torch.int64))
    assert open_model(tmp_path).example_values["ids"].shape == (8, 5)  # a few rows are enough
    save(tmp_path, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    # It gives way to what model.toml says about the shape, or about the other inputs.
    text = toml("1", "values = [[[1]], [[2]], [[3]]]").replace("values = 1", "example = [1, 7]")
    found = open_model(tmp_path, text).example_values
    assert list(found) == ["scale"]


def test_bfloat16_comes_as_float32(tmp_path: Path) -> None:
    (tmp_path / "net/1").mkdir(parents=True)
    program = torch.export.export(nn.ReLU(), (torch.zeros(2, dtype=torch.bfloat16),))
    torch.export.save(program, tmp_path / "net/1/model.pt2")
    np.savez(tmp_path / "net/example.npz", input=np.array([1.0, -2.0], np.float32))
    found = open_model(tmp_path).example_values["input"]
    assert found.dtype == np.uint16
    assert found.tolist() == [0x3F80, 0xC000]


def test_state_and_audit_arrive_in_the_model(tmp_path: Path) -> None:
    save(tmp_path)
    model = open_model(tmp_path)
    assert (model.state, model.audit, model.batching_asked) == ("", 0.001, False)
    model = open_model(tmp_path, 'state = "shared"\naudit = 0.5\n')
    assert (model.state, model.audit, model.batching_asked) == ("shared", 0.5, False)
    assert open_model(tmp_path, "max_batch_size = 4").batching_asked
    assert refused(tmp_path, 'state = "shared"\nmax_batch_size = 4\n').startswith(
        "net/model.toml: max_batch_size: 4, but with state"
    )
    for text in ('state = "mine"', "audit = 1.5"):
        assert f"{text.partition(' ')[0]}: expected" in refused(tmp_path, text)
