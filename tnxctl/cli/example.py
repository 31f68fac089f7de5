"""A call of a model to copy and run: for a shell, and for Python."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import NamedTuple

from tnxctl.cli import inputs
from tnxctl.endpoint import DEFAULT_ENDPOINT, parse_endpoint
from tnxctl.protocol.datatypes import ML_DTYPES, STORAGE, python_name
from tnxctl.protocol.wire import BYTES, ModelInfo


class Calls(NamedTuple):
    """A command line, and a program."""

    shell: str
    python: str


def calls(info: ModelInfo, model: str, endpoint: str) -> Calls | None:
    """Calls that fit the signature, with one row each: zeros or strings in Python, random values in a shell.

    Args:
        model: what the user calls it. endpoint: where the daemon is.

    Returns:
        None if the signature is not known, or has datatypes from the future.
    """
    if not info.inputs or any(spec.datatype not in STORAGE for spec in info.inputs):
        return None
    local = endpoint == parse_endpoint(DEFAULT_ENDPOINT)
    shell = ["tnxctl", "predict", *(() if local else ("--host", endpoint)), "--model", model]
    return Calls(shlex.join(shell), "\n".join(_program(info, model, "" if local else _literal(endpoint))))


def _program(info: ModelInfo, model: str, endpoint: str) -> Iterator[str]:
    if any(spec.datatype in ML_DTYPES for spec in info.inputs):
        yield "import ml_dtypes"
    yield "import numpy as np"
    yield "from tnxctl import Client"
    yield ""
    yield "inputs = {"
    for spec, shape in zip(info.inputs, inputs.example_shapes(info), strict=True):
        yield f"    {_literal(spec.name)}: {_made(spec.datatype, shape)},"
    yield "}"
    yield f"with Client({endpoint}) as tnx:"
    yield f"    result = tnx.predict(inputs, model={_literal(model)})"
    yield "for name, array in result.outputs.items():"
    yield "    print(name, array.dtype, array.shape)"


def _made(datatype: str, shape: tuple[int, ...]) -> str:
    """An expression of Python that makes an input."""
    return f'np.full({shape}, "text")' if datatype == BYTES else f"np.zeros({shape}, {python_name(datatype)})"


def _literal(value: str) -> str:
    """A string of Python, in double quotes where it needs no escapes."""
    return f'"{value}"' if value.isprintable() and not set(value) & set('"\\') else repr(value)
