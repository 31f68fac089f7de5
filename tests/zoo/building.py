"""Exhibits as files in a model repository, written as their makers would."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from tnxctl.protocol.datatypes import Array
from tnxd.models.tensors import TORCH_DTYPES
from zoo.case import CORE, FACTORY, ONNX, PT2, SCRIPT, Case, Exhibit

DATATYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def flatten(result: Any, name: str = "output") -> dict[str, torch.Tensor]:
    """Tensors of a result by the names that they get: `output`, `output_1`, `output_1.0`, `logits`, `hidden.0`."""
    if isinstance(result, torch.Tensor):
        return {name: result}
    named: dict[str, torch.Tensor] = {}
    if isinstance(result, Mapping):
        fields = {str(key): value for key, value in result.items()}
    else:
        keys: Sequence[str] = getattr(result, "_fields", None) or [f"output_{index}" for index in range(len(result))]
        fields = dict(zip(keys, result, strict=True))
    for key, value in fields.items():
        if value is not None:
            named |= _nested(value, key)
    return named


def _nested(value: Any, name: str) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    return {
        key: leaf for at, inner in pairs if inner is not None for key, leaf in _nested(inner, f"{name}.{at}").items()
    }


def write(exhibit: Exhibit, root: Path) -> None:
    """Put an exhibit into a repository."""
    case = exhibit.case
    folder = root / exhibit.name / "1"
    folder.mkdir(parents=True)
    network = case.make()
    with quiet():
        {PT2: _pt2, CORE: _pt2, SCRIPT: _script, FACTORY: _factory, ONNX: _onnx}[exhibit.format](
            exhibit, network, folder
        )
    lines = case.toml
    if exhibit.format == FACTORY:
        lines = f'factory = "{case.file.stem}:{case.network.__name__}"\n{lines}'
    if exhibit.variant == "shared":
        lines = f'state = "shared"\n{lines}'
    if exhibit.variant == "asked":
        lines = f"max_batch_size = 16\n{lines}"
    if exhibit.format in (FACTORY, SCRIPT):
        lines += signature(case)
    if lines:
        (root / exhibit.name / "model.toml").write_text(lines)
    if case.example:
        values = {given.name: to_numpy(x) for given, x in zip(case.inputs, case.draw(999, case.rows[1]), strict=True)}
        np.savez(folder / "example.npz", **values)


def signature(case: Case) -> str:
    """Blocks of model.toml."""
    blocks = []
    for given, x in zip(case.inputs, case.draw(0, case.rows[0]), strict=True):
        shape = [-1 if isinstance(axis, str) else axis for axis in given.shape]
        example = f"example = {list(x.shape)}\n" if case.sizes and -1 in shape and not case.example else ""
        blocks.append(
            f'[[inputs]]\nname = "{given.name}"\ndatatype = "{DATATYPES[x.dtype]}"\nshape = {shape}\n{example}'
        )
    for name, (dtype, shape) in outputs(case).items():
        blocks.append(f'[[outputs]]\nname = "{name}"\ndatatype = "{DATATYPES[dtype]}"\nshape = {list(shape)}\n')
    return "\n" + "\n".join(blocks)


def outputs(case: Case) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Datatypes and shapes of outputs: an axis that differs between two requests is one of any length."""
    weights = {name: weight.clone() for name, weight in case.make().state_dict().items()}
    first, second = (
        run(case, case.fresh(weights), case.draw(seed, rows)) for seed, rows in ((0, case.rows[0]), (1, case.rows[1]))
    )
    return {
        name: (
            one.dtype,
            case.outputs.get(name)
            or tuple(a if a == b else -1 for a, b in zip(one.shape, second[name].shape, strict=True)),
        )
        for name, one in first.items()
    }


def run(case: Case, network: nn.Module, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs of plain torch for inputs, which stay as they are; nothing changes them any more."""
    result = flatten(network(*case.nest(*[x.clone() for x in inputs])))
    return {name: tensor.detach().clone() for name, tensor in result.items()}


def _pt2(exhibit: Exhibit, network: nn.Module, folder: Path) -> None:
    case = exhibit.case
    program = torch.export.export(network, case.nest(*case.draw(0, case.rows[1])), dynamic_shapes=_dynamic(case))
    if exhibit.format == CORE:
        program = program.run_decompositions()
    torch.export.save(program, folder / "model.pt2")


def _dynamic(case: Case) -> tuple[Any, ...]:
    """As README says it: axis 0 is a `Dim`. Other axes are for torch.export to find out about."""
    first = case.inputs[0].shape[0] if case.inputs[0].shape else 0
    rows = torch.export.Dim(first) if isinstance(first, str) and not case.auto else torch.export.Dim.AUTO
    axes = [
        {
            axis: rows if length == first else torch.export.Dim.AUTO
            for axis, length in enumerate(given.shape)
            if isinstance(length, str)
        }
        for given in case.inputs
    ]
    return case.nest(*axes)


def _script(exhibit: Exhibit, network: nn.Module, folder: Path) -> None:
    case = exhibit.case
    inputs = case.draw(0, case.rows[1])
    if case.scripted:
        module = torch.jit.script(network)
    else:
        as_made = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        module = torch.jit.trace(network, tuple(x.clone() for x in inputs), check_trace=False, strict=False)
        module.load_state_dict(as_made, strict=False)  # to trace it was to run it
    torch.jit.save(module, folder / "model.pt")


def _factory(exhibit: Exhibit, network: nn.Module, folder: Path) -> None:
    weights: dict[str, torch.Tensor] = {}
    places = set()
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) not in places:
            weights[name] = tensor.detach().clone().contiguous()
        places.add(id(tensor))
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    shutil.copy(exhibit.case.file, folder)


def _onnx(exhibit: Exhibit, network: nn.Module, folder: Path) -> None:
    case = exhibit.case
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            network,
            case.nest(*case.draw(0, case.rows[1])),
            folder / "model.onnx",
            dynamo=True,
            dynamic_shapes=_dynamic(case),
            external_data=False,
            verbose=False,
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters have to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def to_numpy(tensor: torch.Tensor) -> Array:
    """As tnxctl takes it."""
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        patterns: Array = tensor.contiguous().view(torch.int16).numpy()
        return patterns.view(ml_dtypes.bfloat16)
    array: Array = tensor.contiguous().numpy()
    return array


def to_torch(array: Array) -> torch.Tensor:
    """As tnxctl gives it."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
