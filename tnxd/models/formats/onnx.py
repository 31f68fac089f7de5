"""model.onnx, run by onnxruntime behind a torch module, on the CPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from tnxctl.errors import FailedPrecondition, InvalidArgument
from tnxctl.wire import TensorSpec
from tnxd.executors.tensors import to_array
from tnxd.models.formats import optional
from tnxd.models.formats.signature import Found, Opened, settle
from tnxd.models.repository import RepositorySource
from tnxd.models.trust import TrustedFiles
from tnxd.sentences import first_line

FILE = "model.onnx"

DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
}
"""What onnxruntime calls them -> datatype. Its bfloat16 has no numpy array."""


class Session(torch.nn.Module):
    """An onnxruntime session that is called like a network. It has no parameters that torch knows of.

    Args:
        session: an `onnxruntime.InferenceSession`.
        file: what to call it in errors.
    """

    def __init__(self, session: Any, file: str) -> None:
        super().__init__()
        self._session = session
        self._file = file
        self._inputs = [node.name for node in session.get_inputs()]
        self._refused = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state").InvalidArgument

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        feed = dict(zip(self._inputs, map(to_array, inputs), strict=True))
        try:
            return tuple([torch.from_numpy(output) for output in self._session.run(None, feed)])
        except self._refused as error:
            raise InvalidArgument(f"{self._file} does not take these inputs: {error}") from None


def read(source: RepositorySource, files: TrustedFiles) -> Opened:
    """See `tnxd.models.formats.opening.read`."""
    label = files.label(FILE)
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        raise FailedPrecondition(f"{label} needs onnxruntime: pip install 'tensornext[onnx]'") from None
    first: list[Any] = [_open(runtime, files, label)]
    signature = settle(_describe(first[0], label), source.settings, source.settings_label, label)
    signature = optional.settle(signature, source.settings, source.settings_label, label, None)

    def build() -> torch.nn.Module:
        return Session(first.pop() if first else _open(runtime, files, label), label).eval()

    return Opened(signature, build, devices=("cpu",))


def _open(runtime: Any, files: TrustedFiles, label: str) -> Any:
    options = runtime.SessionOptions()
    # The lanes share the cores already: each of them runs a batch on its own thread, which its session does not leave.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; what it warns of are its own optimizations
    model = _content(files, files.directory / FILE)
    # Large models have their tensors in files beside them. By path, onnxruntime would map those, and go on to use what
    # is written over them later; what it gets here, it copies. Given no files at all, it would look for them in the
    # current directory: so the model is among them.
    others = files.identities.keys() - {files.directory / FILE}
    read = {FILE: model, **{str(path.relative_to(files.directory)): _content(files, path) for path in others}}
    options.add_external_initializers_from_files_in_memory(
        list(read), list(read.values()), [len(content) for content in read.values()]
    )
    try:
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes have no base in common
        raise FailedPrecondition(f"{label}: onnxruntime cannot load it: {first_line(error)}") from None


def _content(files: TrustedFiles, path: Path) -> bytes:
    with files.open(path) as file:
        return file.read()


def _describe(session: Any, label: str) -> Found:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    rows = {node.shape[0] if node.shape else None for node in (*inputs, *outputs)}
    return Found(
        tuple(_spec(node, label) for node in inputs),
        tuple(_spec(node, label) for node in outputs),
        counts_rows=len(rows) == 1 and isinstance(rows.pop(), str),  # one name: one length
    )


def _spec(node: Any, label: str) -> TensorSpec:
    datatype = DATATYPES.get(node.type)
    if datatype is None:
        raise FailedPrecondition(f"{label}: {node.name!r} is a {node.type}, which cannot be served")
    return TensorSpec(node.name, datatype, tuple(axis if isinstance(axis, int) else -1 for axis in node.shape))
