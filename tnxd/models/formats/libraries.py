"""Libraries that a model needs beside torch: operators, and classes of outputs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.error_text import sentence
from tnxd.models.process_state import monkey_patches

_OWN = {name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()} | {
    # These come with the parts of torch that have them, later.
    "higher_order",
    "inductor",
    "prim",
    "prims",
    "quantized_decomposed",
}
"""Namespaces of operators that are there before any model is loaded."""


def load(names: Sequence[str], label: str) -> None:
    """Import what model.toml asks for.

    Raises:
        FailedPrecondition: one cannot be imported, or replaces a function of torch; says LABEL, key and why.
    """
    for index, name in enumerate(names):
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a module may raise anything
            raise FailedPrecondition(f"{label}: imports[{index}]: {name!r}: {sentence(error)}") from error
        replaced = monkey_patches.undo()
        if replaced:
            raise FailedPrecondition(
                f"{label}: imports[{index}]: {monkey_patches.sentence(f'importing {name}', replaced)}"
            )


def note(namespaces: Iterator[str], names: Sequence[str], file: str) -> tuple[str, ...]:
    """A note for the operator about a model that works by luck.

    Args:
        namespaces: of the operators that it uses. names: what model.toml asks for. file: what to call the model.
    """
    foreign = sorted(set(namespaces) - _OWN)
    if not foreign or names:
        return ()
    return (
        f"{file} uses operators of {', '.join(foreign)}, which are there only because another model has imported them: "
        f"the library that has them belongs into imports of model.toml",
    )


def of_program(program: ExportedProgram) -> Iterator[str]:
    """Namespaces of the operators that an exported program uses."""
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, torch._ops.OpOverload):
                    yield node.target.namespace


def of_script(module: torch.jit.ScriptModule) -> Iterator[str]:
    """Namespaces of the operators that a TorchScript module uses."""
    graph = module.inlined_graph  # which its nodes do not keep alive
    blocks: list[Any] = [graph]
    while blocks:
        for node in blocks.pop().nodes():
            yield node.kind().partition("::")[0]
            blocks += node.blocks()
