"""onnxruntime for networks of torch: converted by a process of its own, run by a session on the CPU.

onnxruntime takes 0.3 to 0.8 of the time of eager torch for the networks of docs/performance.md: it joins layers, and
keeps weights in the order that its kernels want.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.advice import installing
from tnxd.error_text import first_line
from tnxd.models.formats import artifacts
from tnxd.models.formats.compiler_process import compile_in_child
from tnxd.models.formats.conditions import Condition, Conditions
from tnxd.models.formats.onnx import Session, session_options
from tnxd.models.repository import RepositorySource
from tnxd.models.variants import Build, Variant, Workshop

CONVERTED = "model.onnx"
"""Name of the converted network."""

CALLED = "called.json"
"""Name of the file that says how to call it."""


class Called(msgspec.Struct, frozen=True):
    """Call of a converted network.

    Attributes:
        inputs: names of the signature's inputs, in order. conditions: what it demands of their lengths.
        outputs: positions of the signature's outputs among those of the converted network.
        bounded: whether the last of those says if all indices were in range.
    """

    inputs: tuple[str, ...]
    conditions: tuple[Condition, ...]
    outputs: tuple[int, ...]
    bounded: bool


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
    called = msgspec.json.decode(Path(folder, CALLED).read_bytes(), type=Called)

    def opened(count: int) -> Any:
        options = session_options(runtime, count)
        return runtime.InferenceSession(str(folder / CONVERTED), options, providers=["CPUExecutionProvider"])

    try:
        session = opened(1)
        wide = session if threads == 1 else opened(threads)  # now, since the folder may go
    except Exception as error:  # onnxruntime's own classes have no base in common
        raise FailedPrecondition(f"onnxruntime cannot load it: {first_line(error)}") from None
    names = [node.name for node in session.get_outputs()]
    wanted = [names[position] for position in called.outputs] + names[-1:] * called.bounded
    return Converted(
        Session(session, lambda _: wide, wanted, CONVERTED),
        Conditions(called.inputs, called.conditions),
        bounded=called.bounded,
    )


class Converted(torch.nn.Module):
    """A converted network.

    Args:
        session: runs it. conditions: what it demands of the lengths of its inputs.
        bounded: whether the last output of the session says if all indices were in range.
    """

    def __init__(self, session: Session, conditions: Conditions, *, bounded: bool) -> None:
        super().__init__()
        self._session = session
        self._conditions = conditions
        self._bounded = bounded

    def forward(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        self._conditions.check(inputs)
        answers: Sequence[torch.Tensor] = self._session(*inputs)
        if not self._bounded:
            return answers
        if not answers[-1]:
            raise IndexError("an index is out of range")
        return answers[:-1]
