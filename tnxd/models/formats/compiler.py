"""The compiler: a process of its own that reads a version, exports its network, and has others compile or convert it.

Called as `python -m tnxd.models.formats.compiler NAME FOLDER DEVICE`, with a pickled source as its input; NAME is one
of COMPILERS.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.export import ExportedProgram

from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxd.error_text import sentence
from tnxd.models.formats import conditions, ignore_warnings_about_torch_itself
from tnxd.models.formats.called import Called
from tnxd.models.formats.compiler_process import REFUSED
from tnxd.models.formats.compiling import ARTIFACT, LIBRARY, ORDER, tensors
from tnxd.models.formats.conditions import Condition, Conditions
from tnxd.models.formats.converting import CONVERTED
from tnxd.models.formats.description import describe
from tnxd.models.formats.exporting import export
from tnxd.models.formats.indices import keep_within
from tnxd.models.formats.opening import read
from tnxd.models.formats.signature import Signature
from tnxd.models.repository import RepositorySource

# `cpp.dynamic_threads`: as many OpenMP threads as the caller is allowed.
_OPTIONS = {"cpp.dynamic_threads": True, "compile_threads": 1}


class _Exported(NamedTuple):
    """An exported network.

    Attributes:
        returned: of each output of the signature, its position among all that the program returns.
        conditions: demands on the lengths of its inputs.
        bounded: whether its last output says if all indices were in range, see `tnxd.models.formats.indices`.
    """

    network: torch.nn.Module
    signature: Signature
    program: ExportedProgram
    returned: tuple[int, ...]
    conditions: Conditions
    bounded: bool

    def called(self, assumed: Sequence[Condition] = ()) -> Called:
        """The call of what is made of it. Args: assumed: conditions that were added."""
        conditions = (*self.conditions.conditions, *assumed)
        return Called(self.conditions.names, conditions, self.returned, self.bounded)


def _export(source: RepositorySource, device: torch.device) -> _Exported:
    opened = read(source)
    signature = opened.signature
    network = opened.build().to(device)
    # Exported anew, too: what torch has loaded from a file lacks what inductor needs to know about its axes.
    program = export(network, signature, device)
    description = describe(program, "the exported network")
    for spec, found in zip(signature.inputs, description.found.inputs, strict=True):
        if spec.shape != found.shape:
            raise FailedPrecondition(
                f"input {spec.name!r} would be fixed at {list(found.shape)}, not {list(spec.shape)}"
            )
    # Those of rows, too: the trial may find that axis 0 counts none.
    demands = Conditions([spec.name for spec in signature.inputs], description.conditions.conditions)
    returned = {spec.name: at for at, spec in zip(description.returned, description.found.outputs, strict=True)}
    wanted = [spec.name for spec in signature.outputs]
    named = description.found.named_outputs
    if not (returned.keys() >= set(wanted) if named else len(returned) == len(wanted)):
        raise FailedPrecondition(f"the network returns {list(returned)}, its signature has {wanted}")
    if not named:
        wanted = list(returned)
    positions = tuple([returned[name] for name in wanted])
    return _Exported(network, signature, program, positions, demands, keep_within(program))


def compile_into(source: RepositorySource, device: torch.device, folder: Path) -> None:
    """Have inductor compile a version. Writes its code and how to call it, for `tnxd.models.formats.compiling`.

    Raises:
        FailedPrecondition: something in it cannot be compiled; the sentence says what.
    """
    import torch._inductor  # late: it sets environment variables

    exported = _export(source, device)
    graph = exported.program.graph_module
    for node in graph.graph.nodes:
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]  # where inductor looks for the axes
    arguments = [node for node in graph.graph.nodes if node.op == "placeholder"]
    with torch.no_grad(), conditions.assumed(exported.program) as assumed:
        artifact = torch._inductor.standalone_compile(
            graph,
            [node.meta["val"] for node in arguments],
            dynamic_shapes="from_graph",
            # One C++ function per model, which releases the GIL for the whole forward and may run on several threads.
            options={"config_patches": {**_OPTIONS, "cpp_wrapper": True}},
        )
    artifact.save(path=str(folder / ARTIFACT), format="binary")
    weights = tensors(exported.network)
    targets = [spec.target or "" for spec in exported.program.graph_signature.input_specs]
    constants = {name: exported.program.constants[name] for name in targets if name and name not in weights}
    order = {
        "arguments": targets,
        "constants": constants,
        "outputs": list(exported.returned),
        "bounded": exported.bounded,
        "names": list(exported.conditions.names),
        "conditions": [tuple(condition) for condition in (*exported.conditions.conditions, *assumed)],
    }
    torch.save(order, folder / ORDER)


def freeze_into(source: RepositorySource, device: torch.device, folder: Path) -> None:
    """Have inductor compile a version with its weights. Writes a library, for `tnxd.models.formats.frozen`.

    Raises:
        FailedPrecondition: something in it cannot be compiled; the sentence says what.
    """
    import torch._inductor  # late: it sets environment variables

    exported = _export(source, device)
    package = folder / "package.pt2"
    with torch.no_grad(), conditions.assumed(exported.program) as assumed:  # with gradients, nothing is frozen
        torch._inductor.aoti_compile_and_package(
            exported.program, package_path=str(package), inductor_configs={**_OPTIONS, "freezing": True}
        )
    with zipfile.ZipFile(package) as files:
        (name,) = [name for name in files.namelist() if name.endswith(".so")]
        unknown = _only_in_torch(files, name)
        if unknown:
            raise FailedPrecondition(f"it uses {', '.join(unknown)}, which torch does not offer to compiled code")
        with files.open(name) as code, Path(folder, LIBRARY).open("wb") as file:
            shutil.copyfileobj(code, file)
    package.unlink()
    exported.called(assumed).write(folder)


def _only_in_torch(files: zipfile.ZipFile, library: str) -> list[str]:
    """Operators that torch's loader would have to run for a library: torch has no C function for them."""
    name = f"{library.removesuffix('.so')}.json"
    nodes = json.loads(files.read(name))["nodes"] if name in files.namelist() else []
    return sorted({node["node"]["target"] for node in nodes})


def convert_into(source: RepositorySource, device: torch.device, folder: Path) -> None:
    """Convert a version to ONNX. Writes it and how to call it, for `tnxd.models.formats.converting`.

    Raises:
        FailedPrecondition: something in it cannot be converted; the sentence says what.
    """
    exported = _export(source, device)
    ignore_warnings_about_torch_itself()
    try:
        with torch.no_grad():
            converted = torch.onnx.export(exported.program, dynamo=True, verbose=False)
    except MemoryError:
        raise
    except Exception as error:  # whatever torch or onnxscript stumbles over
        raise FailedPrecondition(f"torch.onnx cannot convert it: {sentence(error)}") from error
    assert converted is not None
    converted.save(folder / CONVERTED, external_data=True)  # a full disk says nothing about the network
    inputs = len(converted.model.graph.inputs)
    if inputs != len(exported.signature.inputs):
        raise FailedPrecondition(f"converted, it has {inputs} inputs in place of {len(exported.signature.inputs)}")
    exported.called().write(folder)


COMPILERS: dict[str, Callable[[RepositorySource, torch.device, Path], None]] = {
    "inductor": compile_into,
    "frozen": freeze_into,
    "onnxruntime": convert_into,
}
"""Functions that write an artifact into a folder, by what they make."""


def _end_with_the_daemon() -> None:
    """Wait for the end of the input, which is the daemon's."""
    os.read(0, 1)  # not sys.stdin: a thread that waits there holds its lock, and the interpreter could not end
    os.killpg(0, signal.SIGKILL)  # compilers that were started, too: the group is this process's own


def main() -> None:
    name, folder, device = sys.argv[1:]
    source: RepositorySource = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_the_daemon, daemon=True).start()
    os.nice(10)  # what is served goes first
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # and is the last to go where memory runs out
    try:
        COMPILERS[name](source, torch.device(device), Path(folder))
    except TensorNextError as error:
        print(error.message, file=sys.stderr)
        sys.exit(REFUSED)
    except Exception as error:  # whatever torch stumbles over: its traceback may end with any line
        sys.exit(sentence(error))


if __name__ == "__main__":
    main()
