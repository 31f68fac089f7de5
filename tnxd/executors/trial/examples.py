"""Inputs to try a model with: its author's own values, or made up ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tnxctl.frames import STORAGE, Array
from tnxctl.wire import TensorSpec
from tnxd.models.model import Model

Item = tuple[Array, ...]
"""The inputs of one request, in the order of the signature."""

Make = Callable[[int, int], Item]
"""Makes the item of so many rows; the second number is a variant: another one has other values where it can."""

_FRACTION_BITS_LOST = 16  # of FP32, in BF16


def examples(model: Model) -> Iterator[tuple[str, Make]]:
    """Ways to make inputs, by what to call them: the author's own values if there are some, else several to be tried.

    Zeros come first, since they are small: no index is out of range and nothing overflows. Lengths and divisors are
    1 at least, which ones are. Small random numbers are what is left.
    """
    if model.example_values:
        yield "the example values", lambda rows, variant: _own(model, rows, variant)
        return
    yield "zeros", lambda rows, variant: _filled(model, rows, 0)
    yield "ones", lambda rows, variant: _filled(model, rows, 1)
    yield "small random numbers", lambda rows, variant: _drawn(model, rows, variant, 1, 4)


def telling_examples(model: Model) -> Iterator[tuple[str, Make]]:
    """Ways to make inputs whose values differ from row to row and from variant to variant, none of them zero."""
    if model.example_values:
        yield "the example values", lambda rows, variant: _own(model, rows, variant)
        return
    for least, beyond in ((1, 4), (0, 2), (1, 2), (0, 1)):
        # Of integers alone, those of one value tell nothing apart.
        if beyond - least > 1 or any(spec.datatype in ("FP64", "FP32", "FP16", "BF16") for spec in model.inputs):
            integers = f"integers from {least} to {beyond - 1}" if beyond - least > 1 else f"integers of {least}"
            yield f"random numbers, {integers}", _drawing(model, least, beyond)


def _drawing(model: Model, least: int, beyond: int) -> Make:
    return lambda rows, variant: _drawn(model, rows, variant, least, beyond)


def _filled(model: Model, rows: int, value: int) -> Item:
    return tuple(
        _stored(np.full(shape, value, np.float64), spec)
        for shape, spec in zip(model.example_shapes(rows), model.inputs, strict=True)
    )


def _drawn(model: Model, rows: int, variant: int, least: int, beyond: int) -> Item:
    generator = np.random.default_rng(variant)
    item = []
    for shape, spec in zip(model.example_shapes(rows), model.inputs, strict=True):
        if STORAGE[spec.datatype].kind in "ui" and spec.datatype != "BF16":
            item.append(generator.integers(least, beyond, shape).astype(STORAGE[spec.datatype]))
        elif spec.datatype == "BOOL":
            item.append(generator.integers(0, 2, shape).astype(np.bool_))
        else:
            item.append(_stored(generator.uniform(0.1, 1.0, shape), spec))
    return tuple(item)


def _own(model: Model, rows: int, variant: int) -> Item:
    """Rows of the author's values, from another one on for each variant, over again where there are too few.

    Where there is one row alone, what is a fraction becomes a little smaller, so that variants differ.
    """
    item = []
    for value, spec in zip(model.example_values, model.inputs, strict=True):
        array = value
        if model.max_batch_size:
            array = np.take(value, np.arange(variant, variant + rows), axis=0, mode="wrap")
        if (not model.max_batch_size or len(value) == 1) and array.dtype.kind == "f" and variant:
            array = (array * (1 - 0.1 / (1 + variant))).astype(array.dtype)
        item.append(np.ascontiguousarray(array, STORAGE[spec.datatype]))
    return tuple(item)


def _stored(values: Array, spec: TensorSpec) -> Array:
    """Numbers as an array of the datatype, as on the wire."""
    if spec.datatype == "BF16":
        patterns: Array = (values.astype(np.float32).view(np.uint32) >> _FRACTION_BITS_LOST).astype(np.uint16)
        return patterns
    stored: Array = values.astype(STORAGE[spec.datatype])
    return stored
