"""Models with strings at load: signatures, values to warm up with, the trial, and what torch cannot have."""

from __future__ import annotations

import queue
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import string_models
from format_tools import ask, open_model, refused, tensors
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, Internal, InvalidArgument
from tnxctl.protocol.strings import array_of
from tnxctl.protocol.wire import Limits, TensorSpec
from tnxd.executors.cpu import CpuRunner
from tnxd.executors.execution import LoadReport
from tnxd.executors.pool import LanePool
from tnxd.executors.trial.copies import cloned
from tnxd.models.formats import ignore_warnings_about_torch_itself
from tnxd.models.model import Model
from tnxd.models.rounding import difference
from tnxd.models.sizes import check_message_sizes, row_nbytes
from tnxd.models.tensors import check_outputs, empty_outputs

STRINGS = (TensorSpec("y", "BYTES", (-1,)),)


def strings(*elements: bytes) -> Array:
    return array_of(elements, (len(elements),))


def loaded(model: Model) -> LoadReport:
    """Findings of a device about a model."""
    done: queue.SimpleQueue[object] = queue.SimpleQueue()
    pool = LanePool(
        *("cpu", "cpu", ""),
        make_runner=lambda: CpuRunner(1),
        lanes=1,
        inline=None,
        memory_mb=lambda: (1e6, 1e6),
        on_done=done.put,
    )
    return pool.load(model)


# --- torch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
def test_torch_has_no_strings(tmp_path: Path, kind: str, file: str) -> None:
    (tmp_path / "net/1").mkdir(parents=True)
    if file == "model.pt":
        ignore_warnings_about_torch_itself()
        torch.jit.script(torch.nn.Identity()).save(str(tmp_path / "net/1/model.pt"))
    else:
        safetensors.torch.save_file({}, tmp_path / "net/1" / file)
        (tmp_path / "net/1/code.py").write_text("import torch\nmake = torch.nn.Identity\n")
    datatypes = {"inputs": "FP32", "outputs": "FP32", kind: "BYTES"}
    toml = tensors("input", datatypes["inputs"], [-1]) + tensors("y", datatypes["outputs"], [-1], "outputs")
    factory = "" if file == "model.pt" else 'factory = "code:make"\n'
    said = refused(tmp_path, factory + toml)
    name = "input" if kind == "inputs" else "y"
    assert said.startswith(f"net/model.toml: {kind}: {name!r} is BYTES, and torch has no strings")


# --- ONNX --------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    string_models.save_all(tmp_path)
    return tmp_path


def test_an_onnx_model_takes_text(root: Path) -> None:
    model = open_model(root, name="mixed")
    assert [spec.datatype for spec in model.inputs] == ["BYTES", "FP32"]
    assert (model.text, model.devices, model.max_batch_size) == (("text",), ("cpu",), 64)
    assert model.reply_row_nbytes == 0
    assert model.returns_strings
    answer = ask(model, model.factory(), array_of(["é".encode()], (1, 1)), np.ones((1, 1), np.float32))
    assert answer["same"].tolist() == [["é".encode()]]
    with pytest.raises(InvalidArgument, match="input 'text' takes text: row 0 is not UTF-8"):
        ask(model, model.factory(), array_of([b"\xff"], (1, 1)), np.ones((1, 1), np.float32))


@pytest.mark.parametrize("name", ["echo", "table", "upper", "animals", "names", "words", "mixed", "twice"])
def test_the_trial_finds_them_pure_and_lets_them_batch(root: Path, name: str) -> None:
    report = loaded(open_model(root, name=name))
    assert (report.warmed, report.batches, report.serial, report.state) == (True, True, False, "pure")
    assert report.notes == ()


def test_text_that_has_to_be_numbers_is_found(root: Path) -> None:
    from onnx import TensorProto, helper

    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    string_models.save(root, "cast", cast, [("x", "STRING", ["n"])], [("y", "FLOAT", ["n"])])
    report = loaded(open_model(root, name="cast"))
    assert (report.warmed, report.batches) == (True, True)


def test_values_of_an_author_as_arrays_and_in_model_toml(root: Path) -> None:
    for array in (np.array(["wölf", "b"]), np.array(["wölf".encode(), b"b"])):
        np.savez(root / "upper/example.npz", texts=array)
        model = open_model(root, name="upper")
        assert model.example_values["texts"].tolist() == ["wölf".encode(), b"b"]
        assert model.example_values["texts"].dtype == object
        assert loaded(model).warmed
    model = open_model(root, name="mixed")
    assert model.example_values["text"].tolist() == [[b"one"], [b"two"]]
    assert model.optional["text"].tolist() == b"nothing"  # type: ignore[union-attr]
    assert loaded(model).batches


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("values = 1", "echo/model.toml: inputs[0].values: strings alone can stand there"),
        ('values = ["a", 1]', "echo/model.toml: inputs[0].values: strings alone can stand there"),
        ('values = [["a"], "b"]', "echo/model.toml: inputs[0].values: the lists in it differ in length"),
        ('values = [["a"]]', "echo/model.toml: inputs[0].values: has shape [1, 1], and the input [-1]"),
        ("values = { low = 0, high = 1 }", "echo/model.toml: inputs[0].values: low and high are for numbers"),
        ("default = 0", "echo/model.toml: inputs[0].default: strings alone can stand there"),
    ],
)
def test_values_that_are_no_strings(root: Path, line: str, said: str) -> None:
    assert refused(root, tensors("texts", "BYTES", [-1]) + line, "echo").startswith(said)


def test_a_string_is_no_default_of_a_number(root: Path) -> None:
    said = refused(root, tensors("numbers", "INT64", [-1, 1]) + 'default = "one"', "names")
    assert said.startswith("names/model.toml: inputs[0].default: numbers alone can stand there")


def test_an_example_of_numbers_is_no_example_of_strings(root: Path) -> None:
    np.savez(root / "echo/example.npz", texts=np.ones(2))
    assert refused(root, name="echo") == "echo/example.npz: texts is float64, and the input is BYTES"


def test_a_model_that_needs_more_strings_than_a_message_may_have(root: Path) -> None:
    model = Model("m", "1", (TensorSpec("x", "BYTES", (-1, 11)),), STRINGS, 4, torch.nn.Identity)
    check_message_sizes(model, Limits(strings=11))
    with pytest.raises(
        FailedPrecondition, match=r"the inputs of one row would take 11 strings, and limits\.strings is 10"
    ):
        check_message_sizes(model, Limits(strings=10))
    assert row_nbytes((TensorSpec("a", "FP32", (-1, 3)), *STRINGS), batches=True) == 0


# --- answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (torch.zeros(2), "output 'y' is torch.float32, its signature says BYTES"),
        (np.zeros(2), "output 'y' is float64, its signature says BYTES: a numpy array of objects, each a bytes"),
        (np.array(["a", "b"]), "output 'y' is <U1, its signature says BYTES"),
        (np.array(["a", b"b"], object), "output 'y' is BYTES, and has an element that is str"),
        (strings(b"a"), "output 'y' has shape [1], not [2]"),
        ({"y": "text"}, "output 'y' is str, its signature says BYTES"),
    ],
)
def test_an_answer_that_is_not_what_the_signature_says(raw: object, why: str) -> None:
    model = Model("m", "1", STRINGS, STRINGS, 4, torch.nn.Identity)
    with pytest.raises(Internal) as caught:
        check_outputs(model, raw, 2)
    assert why in caught.value.message


def test_an_array_is_no_tensor() -> None:
    specs = (TensorSpec("y", "FP32", (-1,)),)
    with pytest.raises(Internal, match="output 'y' is ndarray, not a tensor"):
        check_outputs(Model("m", "1", specs, specs, 4, torch.nn.Identity), np.zeros(2, np.float32), 2)


def test_answers_of_no_rows() -> None:
    (array,) = empty_outputs(Model("m", "1", STRINGS, STRINGS, 4, torch.nn.Identity)) or []
    assert (array.dtype, array.shape) == (np.dtype(object), (0,))


def test_strings_are_compared_as_they_are() -> None:
    assert difference(STRINGS, [strings(b"a", b"b")], [strings(b"a", b"b")], 1.0) is None
    found = difference(STRINGS, [strings(b"a", b"b")], [strings(b"a", b"\xff" * 100)], 1.0)
    assert found is not None
    assert found.text.startswith(r"output 'y'[1] is b'b' and b'\xff")
    assert len(found.text) < 150
    assert found.counted


def test_what_a_lane_answers_is_its_own() -> None:
    kept = strings(b"a")
    (copy,) = cloned((kept,))
    kept[0] = b"b"
    assert copy.tolist() == [b"a"]
