"""ONNX models: signatures, answers, and files beside them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from format_tools import ask, open_model, refused, tensors
from tnxctl.protocol.errors import FailedPrecondition
from tnxctl.protocol.wire import TensorSpec
from tnxd.advice import installing

HAVE_ONNX = importlib.util.find_spec("onnxruntime") is not None and importlib.util.find_spec("onnx") is not None

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
