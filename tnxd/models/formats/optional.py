"""Inputs that a request may leave out, and what stands for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import InvalidArgument
from tnxd.models import structures
from tnxd.models.formats.examples import typed
from tnxd.models.formats.signature import Signature
from tnxd.models.settings import Settings


def resolve(
    signature: Signature, settings: Settings, label: str, file: str, arguments: Mapping[str, Any] | None
) -> Signature:
    """The same with what model.toml and the network's own code say about inputs that may be left out.

    Args:
        label, file: what to call model.toml and the model file in errors.
        arguments: of the network -> its default, or `inspect.Parameter.empty`; None: it always needs every tensor.

    Raises:
        InvalidArgument: model.toml says what cannot be; the sentence names file and key.
    """
    optional: dict[str, Array | None] = {}
    if arguments is not None:
        trees = structures.tree([spec.name for spec in signature.inputs])
        for name, default in zip(trees, arguments.values(), strict=False):
            if default is not inspect.Parameter.empty:
                inputs = [spec.name for spec in signature.inputs if spec.name.split(".")[0] == name]
                optional.update(dict.fromkeys(inputs))
    for index, tensor in enumerate(settings.inputs):
        key = f"{label}: inputs[{index}]"
        if tensor.default is not None:
            optional[tensor.name] = typed(np.array(tensor.default), tensor.datatype, f"{key}.default")
        elif tensor.optional and arguments is None:
            raise InvalidArgument(
                f"{key}.optional: {file} always needs a tensor there: say which number fills it, as default = 0"
            )
        elif tensor.optional:
            optional[tensor.name] = None
        elif tensor.optional is False:
            optional.pop(tensor.name, None)
    return replace(signature, optional=optional)


def notes(signature: Signature) -> tuple[str, ...]:
    """Notes for the operator about the inputs that may be left out."""
    if not signature.optional:
        return ()
    names = ", ".join(map(repr, signature.optional))
    return (f"a request may leave out {names}",)
