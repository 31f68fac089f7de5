"""onnxruntime for networks of torch: converted by a process of its own, run by a session on the CPU.

onnxruntime takes 0.3 to 0.8 of the time of eager torch for the networks of docs/performance.md: it joins layers, and
keeps weights in the order that its kernels want.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.advice import installing
from tnxd.error_text import first_line
from tnxd.models.formats import artifacts
from tnxd.models.formats.called import Called, Program
from tnxd.models.formats.compiler_process import compile_in_child
from tnxd.models.formats.onnx import Session, session_options
from tnxd.models.repository import RepositorySource
from tnxd.models.variants import Build, Variant, Workshop

CONVERTED = "model.onnx"
"""Name of the converted network."""


def missing() -> str:
    """Packages that conversion needs and this computer lacks, in words; "" if none."""
    lacking = [name for name in ("onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(lacking)} not installed: {installing(*lacking)}" if lacking else ""


def variant(source: RepositorySource) -> Variant:
    """The variant of a network that onnxruntime runs."""
    return Variant("onnxruntime", ("cpu",), missing(), functools.partial(_make, source))


def _make(source: RepositorySource, build: Build, workshop: Workshop) -> torch.nn.Module:
    if any(tensor.dtype is torch.bfloat16 for tensor in build().state_dict().values()):  # before a minute is spent
        raise FailedPrecondition("onnxruntime computes in bfloat16 on no CPU")

    def compile_into(folder: Path) -> None:
        compile_in_child(source, "onnxruntime", workshop.device, folder, workshop.seconds)

    name = "" if workshop.cache is None else artifacts.key(source, *_made_by())
    with artifacts.folder(workshop.cache, name, compile_into) as folder:
        return _load(folder, workshop.threads)


def _made_by() -> list[str]:
    """Names and versions of what an artifact comes from: others may do what these cannot."""
    return [f"{name} {importlib.metadata.version(name)}" for name in ("onnxruntime", "onnxscript", "torch")]


def _load(folder: Path, threads: int) -> torch.nn.Module:
    runtime = importlib.import_module("onnxruntime")
    called = Called.read(folder)

    def opened(count: int) -> Any:
        options = session_options(runtime, count)
        return runtime.InferenceSession(str(folder / CONVERTED), options, providers=["CPUExecutionProvider"])

    try:
        session = opened(1)
        wide = session if threads == 1 else opened(threads)  # now, since the folder may go
    except Exception as error:  # onnxruntime's own classes have no base in common
        raise FailedPrecondition(f"onnxruntime cannot load it: {first_line(error)}") from None
    names = [node.name for node in session.get_outputs()]
    wanted = [names[position] for position in called.wanted(len(names))]
    return Program(Session(session, lambda _: wide, wanted, CONVERTED), called)
