"""Values to warm a model up with: from example.npz, from model.toml, or from the program itself."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tnxctl.protocol.datatypes import ML_DTYPES, STORAGE, Array, dtype_of
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument
from tnxctl.protocol.strings import array_of, elements_of
from tnxctl.protocol.wire import BYTES, MIB, TensorSpec, excerpt
from tnxd.error_text import sentence
from tnxd.models.formats.signature import Opened, Shape, Signature
from tnxd.models.repository import RepositorySource
from tnxd.models.rounding import FLOATING
from tnxd.models.settings import Range, Tensor, fits
from tnxd.models.tensors import to_array
from tnxd.models.trust import TrustedFiles

# Rows of values that model.toml describes: enough for two that differ, and no more memory than this with more.
_ROWS = 8
_ENOUGH_BYTES = MIB
# More than this is not kept of what a program was exported with.
_MOST_BYTES = 64 * MIB


def add(opened: Opened, source: RepositorySource, files: TrustedFiles) -> Opened:
    """The same with values for the inputs that something is said about.

    model.toml wins over example.npz, which wins over the inputs that a program was exported with. The shapes to warm up
    with become those of the values.

    Raises:
        TensorNextError: values do not fit the signature, or each other; the sentence names file and input.
    """
    signature = opened.signature
    found = dict(opened.example_values)
    path = files.example
    labels = dict.fromkeys(found, "")
    if path is not None:
        label = files.guard.label(path)
        stored = _stored(files, signature, label)
        found |= stored
        labels |= dict.fromkeys(stored, label)
    for index, tensor in enumerate(source.settings.inputs):
        if tensor.values is not None:
            key = f"{source.settings_label}: inputs[{index}].values"
            position = [spec.name for spec in signature.inputs].index(tensor.name)
            rows = next((len(found[name]) for name, said in labels.items() if said), 0)
            found[tensor.name] = _described(
                tensor, signature.inputs[position], signature.examples[position], signature, rows, key
            )
            labels[tensor.name] = key
    said = [name for name in found if labels[name]]
    if signature.max_batch_size:
        for name in said[1:]:
            if len(found[name]) != len(found[said[0]]):
                raise InvalidArgument(
                    f"{labels[name]}: {name!r} has {len(found[name])} rows, {said[0]!r} has {len(found[said[0]])}"
                )
    asked = {tensor.name: tensor.example for tensor in source.settings.inputs if tensor.example}
    for name in said:
        if name in asked and not _alike(found[name].shape, asked[name], signature):
            raise InvalidArgument(
                f"{labels[name]}: {name!r} has shape {list(found[name].shape)}, and the example in "
                f"{source.settings_label} {list(asked[name])}"
            )
    found = _agreeing(found, signature, said, asked)
    examples = tuple(
        found[spec.name].shape if spec.name in found else shape
        for spec, shape in zip(signature.inputs, signature.examples, strict=True)
    )
    return replace(opened, signature=replace(signature, examples=examples), example_values=found)


def of_tensors(specs: Sequence[TensorSpec], tensors: Sequence[Any]) -> dict[str, Array]:
    """Values that a program was exported with, by input. Zeros say nothing, and are left out."""
    return {
        spec.name: to_array(tensor.detach().cpu())
        for spec, tensor in zip(specs, tensors, strict=True)
        if isinstance(tensor, torch.Tensor) and tensor.numel() and bool((tensor != 0).any())
    }


def _agreeing(
    found: Mapping[str, Array], signature: Signature, said: Sequence[str], asked: Mapping[str, Shape]
) -> dict[str, Array]:
    """The program's own values without those that do not fit what model.toml and example.npz say."""
    limit = signature.max_batch_size
    rows = next((len(found[name]) for name in said), 0)
    shapes = {spec.name: spec.shape for spec in signature.inputs}

    def agrees(name: str, array: Array) -> bool:
        if not fits(array.shape, shapes[name]) or not _alike(array.shape, asked.get(name, array.shape), signature):
            return False
        return not limit or not rows or len(array) == rows

    kept = {name: array for name, array in found.items() if name in said}
    for name, array in found.items():
        if name not in said and agrees(name, array):
            # A copy, so that what it was exported with does not stay in memory for good.
            few = array[:_ROWS].copy() if limit and not rows else array.copy()
            if few.nbytes <= _MOST_BYTES:
                kept[name] = few
    return kept


def _alike(shape: Shape, other: Shape, signature: Signature) -> bool:
    """Whether shapes are the same but for the number of rows."""
    start = 1 if signature.max_batch_size else 0
    return len(shape) == len(other) and shape[start:] == other[start:]


def _stored(files: TrustedFiles, signature: Signature, label: str) -> dict[str, Array]:
    """The arrays of an example.npz. Nothing is unpickled."""
    specs = {spec.name: spec for spec in signature.inputs}
    assert files.example is not None
    found = {}
    with files.open(files.example) as file:
        try:
            if not zipfile.is_zipfile(file):
                raise FailedPrecondition(f"{label}: damaged, or not an .npz file of numpy")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                for name in archive.files:
                    if name not in specs:
                        raise FailedPrecondition(f"{label}: there is no input {excerpt(name)}, only {', '.join(specs)}")
                    found[name] = _fitting(archive[name], specs[name], signature, f"{label}: {name}")
        except FailedPrecondition:
            raise
        except Exception as error:  # numpy, zipfile and zlib raise many kinds for a damaged file
            raise FailedPrecondition(f"{label}: cannot be read: {sentence(error)}") from None
    if not found:
        raise FailedPrecondition(f"{label}: there is no array in it; the inputs are {', '.join(specs)}")
    return found


def _fitting(array: Array, spec: TensorSpec, signature: Signature, key: str) -> Array:
    if spec.datatype in ML_DTYPES and array.dtype == np.float32:  # no .npz can hold it
        array = typed(array, spec.datatype, key)
    if spec.datatype == BYTES and array.dtype.kind in "SU":  # of objects, which would be pickled, there are none
        array = typed(array, spec.datatype, key)
    dtype = STORAGE[spec.datatype]
    if array.dtype.newbyteorder("=") != dtype:
        raise FailedPrecondition(f"{key} is {array.dtype}, and the input is {spec.datatype}")
    if not fits(array.shape, spec.shape):
        raise FailedPrecondition(f"{key} has shape {list(array.shape)}, and the input {list(spec.shape)}")
    _check_rows(array, signature, key)
    return np.ascontiguousarray(array, dtype)


def _check_rows(array: Array, signature: Signature, key: str) -> None:
    if signature.max_batch_size and not 1 <= len(array) <= signature.max_batch_size:
        raise FailedPrecondition(f"{key} has {len(array)} rows: 1 to {signature.max_batch_size} are of use")


def _described(tensor: Tensor, spec: TensorSpec, example: Shape, signature: Signature, rows: int, key: str) -> Array:
    """An array as `values` of an input in model.toml says. Args: rows: that others have; 0: none has any."""
    values, datatype = tensor.values, spec.datatype
    if isinstance(values, tuple):
        try:
            array = np.array(values, object if datatype == BYTES else None)
        except ValueError:
            raise InvalidArgument(f"{key}: the lists in it differ in length") from None
        if not array.size or not fits(array.shape, spec.shape):
            raise InvalidArgument(f"{key}: has shape {list(array.shape)}, and the input {list(spec.shape)}")
        _check_rows(array, signature, key)
        return typed(array, datatype, key)
    shape = example
    if signature.max_batch_size:
        size = math.prod(example[1:]) * STORAGE[datatype].itemsize
        several = min(_ROWS, signature.max_batch_size) if size * _ROWS <= _ENOUGH_BYTES else 2
        shape = (rows or min(several, signature.max_batch_size), *example[1:])
    if not isinstance(values, Range):
        return typed(np.full(shape, values), datatype, key)
    if datatype == BYTES:
        raise InvalidArgument(f"{key}: low and high are for numbers, and {tensor.name!r} is BYTES")
    bounds = typed(np.array([values.low, values.high]), datatype, key)
    generator = np.random.default_rng(0)
    if datatype in FLOATING:
        return typed(generator.uniform(values.low, values.high, shape), datatype, key)
    drawn = generator.integers(
        int(bounds[0]), int(bounds[1]), shape, np.int64 if bounds.dtype.kind != "u" else np.uint64, endpoint=True
    )
    return drawn.astype(STORAGE[datatype])


def typed(array: Array, datatype: str, key: str) -> Array:
    """Numbers or strings of model.toml in a datatype that can hold them.

    Raises:
        InvalidArgument: it cannot; the sentence has the key and says why.
    """
    if datatype == BYTES:
        return _strings(array, key)
    dtype = dtype_of(datatype)
    if array.dtype.kind not in "biuf":
        raise InvalidArgument(f"{key}: numbers alone can stand there")
    with np.errstate(all="ignore"):
        result: Array = array.astype(dtype)
    if datatype not in FLOATING and not np.array_equal(result, array):
        odd = array[result != array].flat[0] if array.ndim else array
        raise InvalidArgument(f"{key}: {odd} is no {datatype}")
    return result.view(STORAGE[datatype])


def _strings(array: Array, key: str) -> Array:
    elements = [each.encode() if isinstance(each, str) else each for each in elements_of(array)]
    odd = next((each for each in elements if not isinstance(each, bytes)), None)
    if odd is not None:
        what = "the lists in it differ in length" if isinstance(odd, (tuple, list)) else "strings alone can stand there"
        raise InvalidArgument(f"{key}: {what}")
    return array_of([bytes(each) for each in elements], array.shape)
