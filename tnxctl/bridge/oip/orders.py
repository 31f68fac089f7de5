"""Orders of the Open Inference Protocol, to load and to unload models: parameters that are not supported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tnxctl.protocol.errors import Unimplemented
from tnxctl.protocol.limits import excerpt


def check_load(parameters: Iterable[str]) -> None:
    """Check the names of the parameters of an order to load. Raises Unimplemented: there is one."""
    for name in parameters:
        raise Unimplemented(
            f"parameter {excerpt(name)}: models are loaded from the daemon's model repository, and with the settings "
            f"that they have there"
        )


def check_unload(parameters: Mapping[str, object]) -> None:
    """Check the parameters of an order to unload. Raises Unimplemented: one says something else than the default."""
    for name, value in parameters.items():
        if name != "unload_dependents" or value is not False:
            raise Unimplemented(f"parameter {excerpt(name)}: {excerpt(value)} is not supported")
