"""Examples: inputs to try a model with, of its author's own values or made-up ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tnxctl.protocol.datatypes import STORAGE, Array, dtype_of
from tnxctl.protocol.strings import array_of, elements_of
from tnxctl.protocol.wire import BYTES, TensorSpec
from tnxd.device_kinds import DeviceKind
from tnxd.models.model import Model
from tnxd.models.rounding import FLOATING

Item = tuple[Array, ...]
"""The inputs of one request, in the order of the signature."""

Make = Callable[[int, int], Item]
"""Maker of an item, given its number of rows and a variant: another variant has other values where it can."""


def arguments(model: Model, item: Item) -> Item:
    """Arrays that the module is called with for one request."""
    if model.ragged is None or not model.ragged.packed:
        return item
    return tuple([array for array in model.ragged.pack([item], model.name) if array is not None])


_FRACTIONS = ((0.1, 1.0), (-3.0, 3.0), (0.0, 300.0))
"""Bounds of made-up fractions: probabilities, standardised values, and values of 8 bits."""

_INTEGERS = ((1, 3), (0, 1), (1, 1), (0, 0))
"""Bounds of made-up integers, in the order in which they are tried."""

_SMALLEST_INTEGERS = ((0, 1), (0, 0))
"""The same where an index out of range would end the device's context: as small as they can be."""

_STRINGS = (b"0", b"1", b"a few words", b"Another text, and some more words in it.")
"""Made-up strings, by the made-up integer. The first two can be read as numbers."""

Draw = Callable[[TensorSpec, tuple[int, ...], np.random.Generator, int], Array]
"""Maker of the values of a shape, for a variant."""


def examples(model: Model, kind: DeviceKind) -> Iterator[tuple[str, Make]]:
    """Makers of inputs that a model may take, with words for each: of its author's values, if these are for all inputs.

    Zeros come first, since they are small: no index is out of range and nothing overflows. Ones come next: lengths and
    divisors are 1 at least. Small random numbers come last.
    """
    if all(spec.name in model.example_values for spec in model.inputs):
        yield "the example values", _maker(model, lambda spec, shape, *_: np.zeros(shape))
        return
    yield "zeros", _maker(model, lambda spec, shape, *_: np.zeros(shape))
    yield "ones", _maker(model, lambda spec, shape, *_: np.ones(shape))
    yield "small random numbers", _maker(model, _drawing(*_integers(kind)[0]))


def telling_examples(model: Model, kind: DeviceKind, *, own: bool = True) -> Iterator[Make]:
    """Makers of inputs whose values differ, from row to row and from variant to variant, and are mostly not zero.

    An author's own numbers are used. Fractions that are all equal are not, such as the zeros that many a program is
    exported with: they say no more than a shape does.

    Args:
        kind: of the device. own: whether to use an author's fractions.
    """
    integers = _integers(kind)
    constants = any(_is_constant(value) for value in model.example_values.values())
    if own and constants and kind.survives_bad_index:  # the constants are moved on
        yield _maker(model, _drawing(*integers[0]), telling=True, moved=True)
    counts = any(spec.datatype not in FLOATING and spec.datatype != "BOOL" for spec in model.inputs)
    measures = any(spec.datatype in FLOATING for spec in model.inputs)
    for smallest, largest in _FRACTIONS if measures else _FRACTIONS[:1]:
        for least, most in integers if counts else integers[:1]:
            if most > least or measures:
                yield _maker(model, _drawing(least, most, smallest, largest), telling=True, own=own)
    if own and any(_varies(value) for value in model.example_values.values()):
        yield _maker(model, _drawing(*integers[0]))


def _integers(kind: DeviceKind) -> tuple[tuple[int, int], ...]:
    return _INTEGERS if kind.survives_bad_index else _SMALLEST_INTEGERS


def _drawing(least: int, most: int, smallest: float = 0.1, largest: float = 1.0) -> Draw:
    """Random numbers within bounds."""

    def draw(spec: TensorSpec, shape: tuple[int, ...], generator: np.random.Generator, variant: int) -> Array:
        if spec.datatype in FLOATING:
            return generator.uniform(smallest, largest, shape)
        low, high = (0, 1) if spec.datatype == "BOOL" else (least, most)
        # Moved on by the variant: so no value of one request is that of the next one.
        return low + (generator.integers(0, high - low, shape, endpoint=True) + variant) % (high - low + 1)

    return draw


def _varies(value: Array) -> bool:
    """Whether not all elements are the same."""
    return bool(value.size) and bool(np.any(value != value.flat[0]))


def _is_constant(value: Array) -> bool:
    """Whether all values are the same whole number: an option of a request, such as a task, rather than data."""
    return value.dtype.kind in "iu" and bool(value.size) and int(np.ptp(value)) == 0


def _maker(model: Model, draw: Draw, *, telling: bool = False, own: bool = True, moved: bool = False) -> Make:
    """A maker of items.

    Args:
        draw: makes values that the author has not given.
        telling: whether the author's fractions are left out where all are equal. own: whether they are used at all.
        moved: whether the author's constants are one more in every second variant.
    """

    def make(rows: int, variant: int) -> Item:
        item = []
        for position, (spec, shape) in enumerate(zip(model.inputs, model.example_shapes(rows), strict=True)):
            # The same for all variants of integers, and so that the first rows are the same, of however many.
            seed = (0 if spec.datatype not in FLOATING else variant, position)
            generator = np.random.default_rng(seed)
            given = model.example_values.get(spec.name)
            tells = given is not None and (spec.datatype not in FLOATING or (own and _varies(given)))
            if given is None and model.ragged is not None and position == model.ragged.mask:
                item.append(np.ones(shape, STORAGE[spec.datatype]))  # all of what is made up is there
            elif given is None or (telling and not tells):
                item.append(_stored(draw(spec, shape, generator, variant), spec))
            else:
                value = given + 1 if moved and variant % 2 and _is_constant(given) else given
                item.append(_varied(model, value, rows, variant, spec))
        return tuple(item)

    return make


def _varied(model: Model, own: Array, rows: int, variant: int, spec: TensorSpec) -> Array:
    """Rows of the author's values, from another row on for each variant, over again where there are too few.

    Fractions of a single row become a little smaller with each variant, so that variants differ.
    """
    array = np.take(own, np.arange(variant, variant + rows), axis=0, mode="wrap") if model.max_batch_size else own
    if variant and array.dtype.kind == "f" and (not model.max_batch_size or len(own) == 1):
        array = array * (1 - 0.1 / (1 + variant))
    return np.ascontiguousarray(array, STORAGE[spec.datatype])


def _stored(values: Array, spec: TensorSpec) -> Array:
    """Numbers as an array of the datatype, as on the wire; whole ones stand for made-up strings."""
    if spec.datatype == BYTES:
        return array_of([_STRINGS[int(value)] for value in elements_of(values)], values.shape)
    stored: Array = values.astype(dtype_of(spec.datatype)).view(STORAGE[spec.datatype])
    return stored
