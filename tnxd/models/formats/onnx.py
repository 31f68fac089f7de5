"""model.onnx, run by onnxruntime behind a torch module, on the CPU."""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument
from tnxctl.protocol.strings import array_of, as_text, elements_of
from tnxctl.protocol.wire import BYTES, TensorSpec, excerpt
from tnxd.advice import installing
from tnxd.error_text import first_line
from tnxd.events import event
from tnxd.models import onnxfile
from tnxd.models.file_formats import ONNX
from tnxd.models.formats import optional
from tnxd.models.formats.signature import FileSignature, Opened, resolve
from tnxd.models.onnxfile import OnnxFile
from tnxd.models.repository import RepositorySource
from tnxd.models.settings import Settings, Tensor
from tnxd.models.tensors import Value, to_array
from tnxd.models.trust import TrustedFiles

log = logging.getLogger(__name__)

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
    "tensor(string)": BYTES,
}
"""What onnxruntime calls them -> datatype. Its bfloat16 has no numpy array."""


class Session(torch.nn.Module):
    """An onnxruntime session that is called like a network. It has no parameters that torch knows of.

    Args:
        session: an `onnxruntime.InferenceSession` of one thread.
        widen: makes one of so many threads, for callers that torch allows as many.
        outputs: names of those to compute.
        file: what to call it in errors.
    """

    def __init__(self, session: Any, widen: Callable[[int], Any], outputs: Sequence[str], file: str) -> None:
        super().__init__()
        self._session = session
        self._widen = widen
        self._wide: dict[int, Any] = {}
        self._widening = threading.Lock()
        self._outputs = list(outputs)
        self._file = file
        self._inputs = [node.name for node in session.get_inputs()]
        self._refused = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state").InvalidArgument

    def forward(self, *inputs: Value) -> tuple[Value, ...]:
        threads = torch.get_num_threads()
        session = self._session if threads == 1 else self._of(threads)
        feed = dict(zip(self._inputs, map(_fed, inputs), strict=True))
        try:
            return tuple([_returned(output) for output in session.run(self._outputs, feed)])
        except self._refused as error:
            raise InvalidArgument(f"{self._file} does not take these inputs: {error}") from None

    def _of(self, threads: int) -> Any:
        """The session of so many threads, which is made when it is first wanted: in warm-up, if at all.

        It is the one of one thread if the files are no longer those that were read.
        """
        session = self._wide.get(threads)
        if session is None:
            with self._widening:
                session = self._wide.get(threads)
                if session is None:
                    try:
                        session = self._widen(threads)
                    except (FailedPrecondition, OSError) as error:
                        about = event("runs_on_one_thread", file=self._file, reason=str(error))
                        log.warning("%s runs on one thread: %s", self._file, error, extra=about)
                        session = self._session
                    self._wide[threads] = session
        return session


def _fed(value: Value) -> Array:
    """An input as onnxruntime takes it: a BYTES tensor as `str`, of which it takes objects alone."""
    return to_array(value) if isinstance(value, torch.Tensor) else as_text(value)


def _returned(output: Array) -> Value:
    """An output of onnxruntime, which returns strings as `str`."""
    if not output.dtype.hasobject:
        return torch.from_numpy(output)
    return array_of([element.encode() for element in elements_of(output)], output.shape)


def read(source: RepositorySource, files: TrustedFiles) -> Opened:
    """See `tnxd.models.formats.opening.read`."""
    settings, label = source.settings, files.label(ONNX.file)
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        raise FailedPrecondition(f"{label} needs onnxruntime: {installing('onnxruntime')}") from None
    session, said = _open(runtime, files, label)
    first: list[Any] = [session]
    found = _describe(session, said, settings, source.settings_label, label)
    signature = optional.resolve(
        resolve(found, settings, source.settings_label, label), settings, source.settings_label, label, None
    )
    outputs = [found.outputs[position].name for position in signature.returned]
    del session

    def build() -> torch.nn.Module:
        session = first.pop() if first else _open(runtime, files, label)[0]
        return Session(session, lambda threads: _open(runtime, files, label, threads)[0], outputs, label).eval()

    text = tuple(spec.name for spec in signature.inputs if spec.datatype == BYTES)
    return Opened(signature, build, text=text)


def session_options(runtime: Any, threads: int = 1) -> Any:
    """Options of a session that shares the cores with lanes. Args: runtime: the module `onnxruntime`."""
    options = runtime.SessionOptions()
    # With one thread a session does not leave that of the lane. Others of a team, which wait for work by polling, would
    # take the cores from other lanes, and from the thread that serves.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Fatal ones alone: each error is raised as well, and the line that it writes to stderr itself passes no log that
    # bounds it. A request with an index out of range makes one.
    options.log_severity_level = 4
    return options


def _open(runtime: Any, files: TrustedFiles, label: str, threads: int = 1) -> tuple[Any, OnnxFile]:
    options = session_options(runtime, threads)
    model = _content(files, files.directory / ONNX.file)
    try:
        said = onnxfile.read(model)
    except (ValueError, RecursionError):
        said = OnnxFile()  # it is damaged, which onnxruntime says better
    # Large models have their tensors in files beside them. By path, onnxruntime would map those, and go on to use what
    # is written over them later; what it gets here, it copies. Given no files at all, it would look for them in the
    # current directory: so the model is among them.
    read = {ONNX.file: model}
    for name in sorted(said.beside):
        path = Path(os.path.normpath(files.directory / name))
        if not path.is_relative_to(files.directory):
            raise FailedPrecondition(f"{label}: its tensors are in {excerpt(name)}, which leads out of the version")
        if path not in files.identities:
            raise FailedPrecondition(f"{label}: its tensors are in {excerpt(name)}, which is missing")
        read[name] = _content(files, path)
    options.add_external_initializers_from_files_in_memory(
        list(read), list(read.values()), [len(content) for content in read.values()]
    )
    try:
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"]), said
    except Exception as error:  # onnxruntime's own classes have no base in common
        raise FailedPrecondition(f"{label}: onnxruntime cannot load it: {first_line(error)}") from None


def _content(files: TrustedFiles, path: Path) -> bytes:
    with files.open(path) as file:
        return file.read()


def _describe(session: Any, said: OnnxFile, settings: Settings, settings_label: str, label: str) -> FileSignature:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    wanted = {tensor.name for tensor in settings.outputs}
    if wanted:
        unknown = not wanted <= {node.name for node in outputs}  # which is said later
        outputs = [node for node in outputs if node.name in wanted or (unknown and node.type in DATATYPES)]
    rows = {node.shape[0] if node.shape else None for node in (*inputs, *outputs)}

    def specs(nodes: Sequence[Any], declared: Sequence[Tensor], key: str) -> tuple[TensorSpec, ...]:
        shapes = {tensor.name: tensor.shape for tensor in declared}
        found = []
        for node in nodes:
            shape = tuple(axis if isinstance(axis, int) else -1 for axis in node.shape)
            if not shape and node.name in said.unranked:
                if node.name not in shapes:
                    raise FailedPrecondition(
                        f"{label}: {node.name!r} has any number of axes: its shape has to stand in {settings_label}, "
                        f"under [[{key}]]"
                    )
                shape = shapes[node.name]
            found.append(_spec(node, shape, label))
        return tuple(found)

    return FileSignature(
        specs(inputs, settings.inputs, "inputs"),
        specs(outputs, settings.outputs, "outputs"),
        counts_rows=len(rows) == 1 and isinstance(rows.pop(), str),  # one name: one length
    )


def _spec(node: Any, shape: tuple[int, ...], label: str) -> TensorSpec:
    datatype = DATATYPES.get(node.type)
    if datatype is None:
        raise FailedPrecondition(f"{label}: {node.name!r} is a {node.type}, which cannot be served")
    return TensorSpec(node.name, datatype, shape)
