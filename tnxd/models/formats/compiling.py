"""inductor: a network as machine code for this computer, compiled by a process of its own.

The daemon loads what `tnxd.models.formats.compiler` made, with the network's variable axes. That never traces or
compiles again, whatever shapes come: there are no guards. On a CPU the weights are in it, see
`tnxd.models.formats.frozen`; elsewhere it takes those of the network.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.models.formats import artifacts, ignore_warnings_about_torch_itself
from tnxd.models.formats.called import Called, Program
from tnxd.models.formats.compiler_process import compile_in_child
from tnxd.models.formats.conditions import Condition, Conditions
from tnxd.models.formats.frozen import Frozen
from tnxd.models.repository import RepositorySource
from tnxd.models.variants import Build, Variant, Workshop

ARTIFACT = "artifact"
"""Name of what inductor saves: the code."""

LIBRARY = "network.so"
"""Name of the code with the weights in it."""

ORDER = "order.pt"
"""Name of the file that says how to call it."""

_FROZEN = frozenset({"cpu"})
"""Kinds of devices for which the weights are compiled in: the C interface of `Frozen` was tried on no other."""

_OWN_CACHE = "cache"
"""Name of inductor's own cache, beside that."""

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_KEPT = os.environ.get(_CACHE, "")
"""Where the operator wants compiled code to be kept. torch later puts a directory there that anybody may have made."""

_loading = threading.Lock()  # torch looks up its cache directory in the environment


def missing() -> str:
    """Things that inductor needs and this computer lacks, in words; "" if nothing."""
    compiler = os.environ.get("CXX", "g++")
    return f"no C++ compiler ({compiler})" if shutil.which(compiler) is None else ""


def has_python_headers() -> bool:
    """Whether code can be compiled that takes the weights of the network: it calls Python. What is frozen does not."""
    return Path(sysconfig.get_path("include"), "Python.h").exists()


def variant(source: RepositorySource) -> Variant:
    """The variant of a network that inductor compiles."""
    return Variant("inductor", ("cpu", "cuda"), missing(), functools.partial(_make, source), beside="onnxruntime")


def _make(source: RepositorySource, build: Build, workshop: Workshop) -> torch.nn.Module:
    frozen = workshop.device.type in _FROZEN
    if not frozen and not has_python_headers():
        raise FailedPrecondition("no header files of Python (python3-dev)")

    def compile_into(folder: Path) -> None:
        # Whoever sets TORCHINDUCTOR_CACHE_DIR keeps it from run to run.
        own = folder / _OWN_CACHE
        environment = {**os.environ, _CACHE: _KEPT or str(own)}
        compiler = "frozen" if frozen else "inductor"
        compile_in_child(source, compiler, workshop.device, folder, workshop.seconds, environment)
        if frozen:
            shutil.rmtree(own, ignore_errors=True)  # all of it is in the library

    capability = torch.backends.cpu.get_cpu_capability()
    made_for = str(workshop.device), torch.__version__, platform.processor(), capability, _instructions()
    name = "" if workshop.cache is None else artifacts.key(source, "inductor", *made_for)
    with artifacts.folder(workshop.cache, name, compile_into) as folder:
        if frozen:
            called = Called.read(folder)
            return Program(Frozen(folder / LIBRARY, called.wanted), called)
        network = build()
        return Compiled(network, _load(folder, _KEPT or str(folder / _OWN_CACHE), network, workshop.device))


def _instructions() -> str:
    """Instructions that this processor has, which the compiler is told to use (-march=native); "" if not known.

    A directory of a user may be shared by machines, and what runs on one would end the process on another (SIGILL).
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):  # x86, Arm
                return " ".join(sorted(value.split()))
    return ""


_Run = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]


class Compiled(torch.nn.Module):
    """A compiled network. Args: network: holds its weights. run: the code."""

    def __init__(self, network: torch.nn.Module, run: _Run) -> None:
        super().__init__()
        self.network = network
        self._run = run

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._run(inputs)


def _load(folder: Path, cache: str, network: torch.nn.Module, device: torch.device) -> _Run:
    """The code that the child wrote, as a function of the inputs."""
    ignore_warnings_about_torch_itself()
    with torch.inference_mode(False), _loading, _environment(_CACHE, cache):
        from torch._inductor import CompiledArtifact  # type: ignore[attr-defined]  # it is exported, but not by __all__

        order: dict[str, Any] = torch.load(folder / ORDER, weights_only=True, map_location=device)
        artifact = CompiledArtifact.load(path=str(folder / ARTIFACT), format="binary")
    weights = tensors(network)
    arguments = [weights[name] if name in weights else order["constants"].get(name) for name in order["arguments"]]
    places = [index for index, name in enumerate(order["arguments"]) if not name]
    outputs: list[int] = order["outputs"]
    bounded: bool = order["bounded"]
    conditions = Conditions(order["names"], [Condition(*condition) for condition in order["conditions"]])

    def run(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        conditions.check(inputs)  # the code does not check, and would read beyond its tensors
        full = list(arguments)
        for place, tensor in zip(places, inputs, strict=True):
            full[place] = tensor
        results = artifact(*full)
        if bounded and not results[-1]:
            raise IndexError("an index is out of range")
        return tuple([results[index] for index in outputs])

    return run


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def tensors(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers by the names that `tnxd.models.formats.exporting.export` gives them."""
    named = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    return {f"network.{name}": tensor for name, tensor in named}
