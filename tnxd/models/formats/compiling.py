"""inductor: a network as machine code for this computer, compiled by a process of its own.

Tracing and compiling take a minute of Python that would hold the GIL, and change torch's global state: that has no
place beside lanes that serve. So a child process reads the model, exports it with its variable axes and compiles it;
the daemon loads the result, which never traces or compiles again, whatever shapes come: there are no guards.

The child is `tnxd.models.formats.compiler`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.models.formats import ignore_warnings_about_torch_itself
from tnxd.models.formats.conditions import Condition, Conditions
from tnxd.models.formats.signature import Opened
from tnxd.models.repository import RepositorySource

log = logging.getLogger(__name__)

ARTIFACT = "artifact"
"""Name of what inductor saves: the code."""

ORDER = "order.pt"
"""Name of the file that says how to call it."""

_COMPILER = "tnxd.models.formats.compiler"  # not imported: it opens models, and compiling is a part of that
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_KEPT = os.environ.get(_CACHE, "")
"""Where the operator wants compiled code to be kept. torch later puts a directory there that anybody may have made."""

_loading = threading.Lock()  # torch looks up its cache directory in the environment


def missing() -> str:
    """Things that inductor needs and this computer lacks, in words; "" if nothing."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no header files of Python (python3-dev)"
    return ""


def lazily(source: RepositorySource, opened: Opened) -> Callable[[], torch.nn.Module]:
    """A factory of modules that are compiled for the device they are on when they are first called."""
    return lambda: Compiled(opened.build(), source)


class Compiled(torch.nn.Module):
    """A compiled network. The first call compiles it, and others wait for that.

    Args:
        network: holds its weights, on the device to run on. source: what the child reads.
    """

    keeps_layout = True
    """Its code was made for weights that lie in memory as they do."""

    def __init__(self, network: torch.nn.Module, source: RepositorySource) -> None:
        super().__init__()
        self.network = network
        self._source = source
        self._compiling = threading.Lock()
        self._run: Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]] | None = None

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self._run is None:
            with self._compiling:
                if self._run is None:
                    self._run = self._compile(next(iter(inputs)).device)
        return self._run(inputs)

    def train(self, mode: bool = True) -> Compiled:
        """Nothing: it was compiled for one mode."""
        return self

    def to(self, device: torch.device) -> Compiled:  # type: ignore[override]
        """The same on another device, to be compiled there."""
        return Compiled(self.network.to(device), self._source)

    def _compile(self, device: torch.device) -> Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]:
        title = f"{self._source.name}@{self._source.version}"
        begin = time.monotonic()
        with _workplace() as (folder, environment):
            _run_child(self._source, device, folder, environment)
            compiled = time.monotonic()
            run = _load(folder, environment[_CACHE], self.network, device)
        log.info(
            "%s compiled for %s by inductor in %.1f s, loaded in %.1f s",
            title,
            device,
            compiled - begin,
            time.monotonic() - compiled,
        )
        return run


@contextlib.contextmanager
def _workplace() -> Iterator[tuple[Path, dict[str, str]]]:
    """A directory that nobody else can write to, for what is compiled, and the child's environment.

    It can go once the code is loaded. Whoever sets TORCHINDUCTOR_CACHE_DIR keeps it from run to run.
    """
    with tempfile.TemporaryDirectory(prefix="tnxd-inductor-") as folder:
        yield Path(folder), {**os.environ, _CACHE: _KEPT or str(Path(folder, "cache"))}


def _run_child(source: RepositorySource, device: torch.device, folder: Path, environment: dict[str, str]) -> None:
    # The input stays open: its end tells the child that the daemon is gone.
    with subprocess.Popen(
        [sys.executable, "-m", _COMPILER, str(folder), str(device)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # an interrupt from the terminal is for the daemon
    ) as child:
        assert child.stdin is not None
        assert child.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(pickle.dumps(source))  # from a process to its own child: nothing comes from outside
            child.stdin.flush()
        said = child.stderr.read().decode("utf-8", "replace").strip()
        code = child.wait()
    if code:
        log.error("the compiler of %s@%s ended with %d:\n%s", source.name, source.version, code, said)
        if code < 0:
            last = f"the compiler was ended by signal {-code}"
        else:
            last = said.splitlines()[-1] if said else f"the compiler ended with {code}"
        raise FailedPrecondition(f"{source.guard.label(source.directory)}: compile: {last}")


def _load(
    folder: Path, cache: str, network: torch.nn.Module, device: torch.device
) -> Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]:
    """The code that the child wrote, as a function of the inputs."""
    ignore_warnings_about_torch_itself()
    # Warm-up calls this within its inference mode, in which tensors would be made that nothing else can use.
    with torch.inference_mode(False), _loading, _environment(_CACHE, cache):
        from torch._inductor import CompiledArtifact  # type: ignore[attr-defined]  # it is exported, but not by __all__

        order: dict[str, Any] = torch.load(folder / ORDER, weights_only=True, map_location=device)
        artifact = CompiledArtifact.load(path=str(folder / ARTIFACT), format="binary")
    weights = tensors(network)
    arguments = [weights[name] if name in weights else order["constants"].get(name) for name in order["arguments"]]
    places = [index for index, name in enumerate(order["arguments"]) if not name]
    outputs: list[int] = order["outputs"]
    conditions = Conditions(order["names"], [Condition(*condition) for condition in order["conditions"]])

    def run(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        conditions.check(inputs)  # the code does not check, and would read beyond its tensors
        full = list(arguments)
        for place, tensor in zip(places, inputs, strict=True):
            full[place] = tensor
        results = artifact(*full)
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
