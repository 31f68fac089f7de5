"""ONNX files: tensors beside them, tensors without a rank, and outputs that are left out."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from format_tools import ask, open_model, refused, source, tensors
from tnxd.models import onnxfile
from tnxd.models.onnxfile import OnnxFile
from tnxd.models.trust import TrustedFiles

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None,
    reason="needs onnx and onnxruntime",
)


def save(root: Path, *, rank: bool = True, external: bool = False, nested: bool = False) -> Path:
    """y = x + w and s, the sum of all x. Args: rank: whether that of x and y is known. nested: w is in a branch."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    path = root / "net/1/model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    w = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    shape: Any = ["rows", 4] if rank else None
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    if nested:
        branches = {
            name: helper.make_graph(
                [helper.make_node(kind, ["x", "w"], [name])],
                name,
                [],
                [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
                [w],
            )
            for name, kind in (("then", "Add"), ("otherwise", "Sub"))
        }
        yes = numpy_helper.from_array(np.array(True))
        nodes = [
            helper.make_node("Constant", [], ["yes"], value=yes),
            helper.make_node("If", ["yes"], ["y"], then_branch=branches["then"], else_branch=branches["otherwise"]),
        ]
    nodes.append(helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0))
    nodes.append(helper.make_node("SequenceConstruct", ["x"], ["all"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, []),
            helper.make_tensor_sequence_value_info("all", TensorProto.FLOAT, None),
        ],
        [] if nested else [w],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if external:
        tensor = model.graph.node[1].attribute[0].g.initializer[0] if nested else model.graph.initializer[0]
        (path.parent / "weights.bin").write_bytes(tensor.raw_data)
        onnx.external_data_helper.set_external_data(tensor, "weights.bin", offset=0, length=16)
        tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    return path


Y = tensors("y", "FP32", [-1, 4], "outputs")
X = np.ones((2, 4), np.float32)


def test_files_that_the_model_does_not_name_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, external=True)
    (path.parent / "checkpoint.bin").write_bytes(bytes(1 << 20))
    read: list[str] = []
    opened = TrustedFiles.open

    def watched(self: TrustedFiles, path: Path) -> Any:
        read.append(path.name)
        return opened(self, path)

    (tmp_path / "net/model.toml").write_text(Y)
    assert source(tmp_path).nbytes == path.stat().st_size + 16
    monkeypatch.setattr(TrustedFiles, "open", watched)
    model = open_model(tmp_path)
    assert ask(model, model.factory(), X)["y"].tolist() == [[1, 2, 3, 4]] * 2
    assert "weights.bin" in read
    assert "checkpoint.bin" not in read


def test_tensors_of_a_branch_are_found(tmp_path: Path) -> None:
    path = save(tmp_path, external=True, nested=True)
    assert onnxfile.read(path.read_bytes()) == OnnxFile({"weights.bin"}, set())


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("../weights.bin", "net/1/model.onnx: its tensors are in '../weights.bin', which leads out of the version"),
        ("/etc/passwd", "net/1/model.onnx: its tensors are in '/etc/passwd', which leads out of the version"),
        ("other.bin", "net/1/model.onnx: its tensors are in 'other.bin', which is missing"),
    ],
)
def test_tensors_elsewhere(tmp_path: Path, location: str, said: str) -> None:
    import onnx

    path = save(tmp_path, external=True)
    model = onnx.load(str(path), load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    path.write_bytes(model.SerializeToString())
    assert refused(tmp_path) == said


def test_an_unknown_rank_is_said_by_model_toml(tmp_path: Path) -> None:
    save(tmp_path, rank=False)
    assert refused(tmp_path, Y) == (
        "net/1/model.onnx: 'x' has any number of axes: its shape has to stand in net/model.toml, under [[inputs]]"
    )
    x = tensors("x", "FP32", [-1, 4])
    s = tensors("s", "FP32", [], "outputs")
    model = open_model(tmp_path, x + s)
    assert (model.inputs[0].shape, model.max_batch_size) == ((-1, 4), 0)
    assert ask(model, model.factory(), X)["s"].tolist() == 8
    model = open_model(tmp_path, "max_batch_size = 8\n" + x + Y)
    assert ask(model, model.factory(), X)["y"].tolist() == [[1, 2, 3, 4]] * 2


def test_an_output_that_cannot_be_served_is_left_out(tmp_path: Path) -> None:
    save(tmp_path)
    assert "'all' is a seq(tensor(float)), which cannot be served" in refused(tmp_path)
    model = open_model(tmp_path, Y)
    assert [spec.name for spec in model.outputs] == ["y"]
    assert model.max_batch_size == 64  # s has no rows, and no say
    assert ask(model, model.factory(), X)["y"].tolist() == [[1, 2, 3, 4]] * 2
    assert "outputs[0].name: net/1/model.onnx has no 'z'" in refused(tmp_path, Y.replace('"y"', '"z"'))


@given(st.binary(max_size=200))
def test_whatever_is_in_a_file(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        onnxfile.read(content)


@pytest.mark.parametrize("keep", [1, 40, -20])
def test_a_damaged_file_counts_as_it_is(tmp_path: Path, keep: int) -> None:
    path = save(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"does not end|longer than"):
        onnxfile.read(path.read_bytes())
    assert onnxfile.size(path) == path.stat().st_size


def test_callers_with_several_threads_have_a_session_of_as_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them polls: that would take cores from others."""
    import onnxruntime
    import torch

    made: list[tuple[int, int, str]] = []
    actual = onnxruntime.InferenceSession

    def record(content: object, options: Any, **more: Any) -> object:
        spinning = options.get_session_config_entry("session.intra_op.allow_spinning")
        made.append((options.intra_op_num_threads, options.inter_op_num_threads, spinning))
        return actual(content, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    save(tmp_path)
    network = open_model(tmp_path, Y).factory()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            (y,) = network(torch.from_numpy(X))
            assert y.tolist() == [[1.0, 2.0, 3.0, 4.0]] * 2
    finally:
        torch.set_num_threads(before)
    assert made == [(1, 1, "0"), (2, 1, "0")]
