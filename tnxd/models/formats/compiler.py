"""The compiler: a process of its own that reads a model, exports it and has inductor compile it.

The code is one C++ function per model (`cpp_wrapper`), which releases the GIL for the whole forward and may run on
several threads at a time, with as many OpenMP threads as its caller is allowed (`cpp.dynamic_threads`).

Called as `python -m tnxd.models.formats.compiler FOLDER DEVICE`, with a pickled source as its input.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from pathlib import Path

import torch

from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxd.models.formats.compiling import ARTIFACT, ORDER, tensors
from tnxd.models.formats.description import describe
from tnxd.models.formats.exporting import export
from tnxd.models.formats.opening import read
from tnxd.models.repository import RepositorySource

_OPTIONS = {"config_patches": {"cpp_wrapper": True, "cpp.dynamic_threads": True, "compile_threads": 1}}


def compile_into(source: RepositorySource, device: torch.device, folder: Path) -> None:
    """Compile a version, and write its code and how to call it into a folder, for `tnxd.models.formats.compiling`.

    Raises:
        FailedPrecondition: something in it cannot be compiled; the sentence says what.
    """
    import torch._inductor  # late: it sets environment variables

    opened = read(source)
    network = opened.build().to(device)
    # Exported anew, too: what torch has loaded from a file lacks what inductor needs to know about its axes.
    program = export(network, opened.signature, device)
    description = describe(program, "the exported network")
    for spec, found in zip(opened.signature.inputs, description.found.inputs, strict=True):
        if spec.shape != found.shape:
            raise FailedPrecondition(
                f"input {spec.name!r} would be fixed at {list(found.shape)}, not {list(spec.shape)}"
            )
    conditions = description.conditions
    if opened.signature.max_batch_size:
        conditions = conditions.without_rows()
    returned = {spec.name: at for at, spec in zip(description.returned, description.found.outputs, strict=True)}
    wanted = [spec.name for spec in opened.signature.outputs]
    named = description.found.named_outputs
    if not (returned.keys() >= set(wanted) if named else len(returned) == len(wanted)):
        raise FailedPrecondition(f"the network returns {list(returned)}, its signature has {wanted}")
    if not named:
        wanted = list(returned)
    graph = program.graph_module
    for node in graph.graph.nodes:
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]  # where inductor looks for the axes
    arguments = [node for node in graph.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        artifact = torch._inductor.standalone_compile(
            graph, [node.meta["val"] for node in arguments], dynamic_shapes="from_graph", options=_OPTIONS
        )
    artifact.save(path=str(folder / ARTIFACT), format="binary")
    weights = tensors(network)
    targets = [spec.target or "" for spec in program.graph_signature.input_specs]
    constants = {name: program.constants[name] for name in targets if name and name not in weights}
    order = {
        "arguments": targets,
        "constants": constants,
        "outputs": [returned[name] for name in wanted],
        "names": [spec.name for spec in opened.signature.inputs],
        "conditions": [tuple(condition) for condition in conditions.conditions],
    }
    torch.save(order, folder / ORDER)


def _end_with_the_daemon() -> None:
    """Wait for the end of the input, which is the daemon's."""
    os.read(0, 1)  # not sys.stdin: a thread that waits there holds its lock, and the interpreter could not end
    os._exit(1)


def main() -> None:
    folder, device = sys.argv[1:]
    source: RepositorySource = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_the_daemon, daemon=True).start()
    os.nice(10)  # what is served goes first
    try:
        compile_into(source, torch.device(device), Path(folder))
    except TensorNextError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
