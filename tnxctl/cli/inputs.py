"""Random inputs that fit a model's signature."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from tnxctl.casting import dtype_of
from tnxctl.protocol import wire
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, Unavailable
from tnxctl.protocol.wire import BYTES

if TYPE_CHECKING:
    from numpy.random import Generator


_WORDS = ("a", "the", "one", "of", "in", "time", "light", "river", "stone", "letter", "morning", "seven")
_MOST_WORDS = 8


def known(model: wire.ModelInfo) -> wire.ModelInfo:
    """A version of a model, checked to have a known signature.

    Raises:
        FailedPrecondition: it is not loaded; the sentence tells why.
        Unavailable: it is being loaded.
    """
    if model.inputs:
        return model
    title = f"{model.name}@{model.version}"
    if model.status == "starting":
        raise Unavailable(f"model {title!r} is still being loaded")
    if model.error:
        raise FailedPrecondition(f"model {title!r} is not loaded: {model.error}")
    raise FailedPrecondition(f"model {title!r} is {model.status}; tnxctl models load {title}")


def random_inputs(
    model: wire.ModelInfo,
    *,
    batch_size: int | None,
    input_dim: int | None,
    seed: int,
    rows_option: str = "--batch-size",
) -> dict[str, Array]:
    """One array per input of the model.

    Floating-point values come from the standard normal distribution. Integers and booleans are 0 or 1: larger ones
    could be out of range for a model that looks them up in a table. Strings are a few words each.

    Args:
        batch_size: rows, for a model that batches; None is 1.
        input_dim: length of the last axis, whatever the signature says; None keeps to the signature.
        seed: of the generator.
        rows_option: what `batch_size` is called on the command line.

    Raises:
        click.UsageError: an option does not apply to this model, or the inputs are too large for a message.
        Unimplemented: the signature has a datatype from the future.
    """
    import numpy as np

    specs = [
        wire.TensorSpec(spec.name, spec.datatype, shape)
        for spec, shape in zip(model.inputs, example_shapes(model, batch_size, input_dim), strict=True)
    ]
    if batch_size is not None and not model.max_batch_size:
        raise click.UsageError(f"{rows_option} does not apply to model {model.name!r}: it takes no batch axis")
    if input_dim is not None and not any(_has_features(spec, model) for spec in specs):
        raise click.UsageError(f"--input-dim does not apply to model {model.name!r}: it has no axis but the rows")
    size = sum(dtype_of(spec.datatype).itemsize * math.prod(spec.shape) for spec in specs)
    limit = wire.Limits().message_bytes
    if size > limit:
        raise click.UsageError(f"inputs of {size} bytes are too large: a message may have {limit}")
    elements = sum(math.prod(spec.shape) for spec in specs if spec.datatype == BYTES)
    if elements > wire.Limits().strings:
        raise click.UsageError(f"inputs of {elements} strings are too many: a message may have {wire.Limits().strings}")
    generator = np.random.default_rng(seed)
    return {spec.name: _draw(spec, generator) for spec in specs}


def example_shapes(
    model: wire.ModelInfo, batch_size: int | None = None, input_dim: int | None = None
) -> list[tuple[int, ...]]:
    """A shape for each input: one that the daemon knows to work, else one row and length 1 for other variable axes.

    Args:
        batch_size, input_dim: see `random_inputs`.
    """
    shapes = []
    for index, spec in enumerate(model.inputs):
        shape = [1 if length < 0 else length for length in spec.shape]
        known = model.example_shapes[index] if index < len(model.example_shapes) else ()
        if len(known) == len(shape) and min(known, default=0) >= 0:
            shape = list(known)
        if model.max_batch_size and shape and batch_size is not None:
            shape[0] = batch_size
        if input_dim is not None and _has_features(spec, model):
            shape[-1] = input_dim
        shapes.append(tuple(shape))
    return shapes


def _has_features(spec: wire.TensorSpec, model: wire.ModelInfo) -> bool:
    """Whether the last axis is another one than the axis that counts rows."""
    return len(spec.shape) > (1 if model.max_batch_size else 0)


def _draw(spec: wire.TensorSpec, generator: Generator) -> Array:
    if spec.datatype == BYTES:
        return _words(spec.shape, generator)
    dtype = dtype_of(spec.datatype)
    if spec.datatype == "BOOL" or "INT" in spec.datatype:
        return generator.integers(0, 2, spec.shape).astype(dtype)
    return generator.standard_normal(spec.shape).astype(dtype)


def _words(shape: tuple[int, ...], generator: Generator) -> Array:
    from tnxctl.protocol.strings import array_of

    counts = generator.integers(1, _MOST_WORDS, math.prod(shape), endpoint=True)
    texts = [" ".join(generator.choice(_WORDS, count)).encode() for count in counts]
    return array_of(texts, shape)
