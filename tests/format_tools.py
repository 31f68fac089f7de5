"""Helpers for tests of model formats: repositories with one model, and answers of what comes out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.wire import TensorSpec
from tnxd.models import repository
from tnxd.models.formats import opening
from tnxd.models.model import Model
from tnxd.models.repository import RepositorySource
from tnxd.models.tensors import check_outputs, to_array, to_tensor


def source(root: Path, name: str = "net", version: str = "1") -> RepositorySource:
    """A version in a repository. Raises AssertionError: it is not there, or has a mistake."""
    catalog = repository.scan(root, opening.open_model)
    assert catalog.failures == {}
    found = catalog.entries[name].sources[version]
    assert isinstance(found, RepositorySource)
    return found


def open_model(root: Path, toml: str = "", name: str = "net", version: str = "1") -> Model:
    """A version in a repository, opened. Args: toml: written as its model.toml before, if not empty."""
    if toml:
        (root / name / "model.toml").write_text(toml)
    return source(root, name, version).open(0)


def refused(root: Path, toml: str = "", name: str = "net") -> str:
    """The error that keeps the only version of a model from being served: of the scan, of opening or of building it."""
    if toml:
        (root / name / "model.toml").write_text(toml)
    failures = list(repository.scan(root).failures.values())
    if failures:
        return failures[0]
    try:
        source(root, name).open(0).factory()
    except TensorNextError as error:
        return error.message
    raise AssertionError("nothing is wrong with it")


def tensors(names: str, datatype: str, shape: list[int], kind: str = "inputs") -> str:
    """Blocks of model.toml for tensors that differ only in their names."""
    return "".join(f'[[{kind}]]\nname = "{name}"\ndatatype = "{datatype}"\nshape = {shape}\n' for name in names.split())


def ask(model: Model, module: torch.nn.Module, *arrays: Array | None) -> dict[str, Array]:
    """Outputs by name, as an executor gets them: held against the signature before and after.

    Args:
        arrays: in the order of the inputs; None is left out of the request.
    """
    pairs = [(spec, array) for spec, array in zip(model.inputs, arrays, strict=True) if array is not None]
    specs = [TensorSpec(spec.name, spec.datatype, array.shape) for spec, array in pairs]
    bound = model.bind(specs, [array for _, array in pairs])
    with torch.inference_mode():
        inputs = [
            None if array is None else to_tensor(array, spec.datatype)
            for array, spec in zip(bound.arrays, model.inputs, strict=True)
        ]
        outputs = check_outputs(model, module(*inputs), bound.rows)
    return {spec.name: to_array(output) for spec, output in zip(model.outputs, outputs, strict=True)}


def save_program(
    path: Path,
    network: torch.nn.Module,
    args: tuple[Any, ...],
    dynamic_shapes: Any = None,
    kwargs: dict[str, Any] | None = None,
) -> None:
    """Export a network into a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    program = torch.export.export(network, args, kwargs, dynamic_shapes=dynamic_shapes)
    torch.export.save(program, path)
