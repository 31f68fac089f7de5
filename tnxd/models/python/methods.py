"""Methods of the class `Model` of a model.py: what they have to be, found out before they are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tnxctl.protocol.errors import FailedPrecondition


def method_of(made: object, name: str, whose: str, *, needed: bool = False) -> Callable[..., Any] | None:
    """A method of an object of the class; None: it has none of that name.

    Args:
        whose: what to call it in errors. needed: whether it has to be there.

    Raises:
        FailedPrecondition: it is not there though it is needed, or cannot be called as it would be.
    """
    method = getattr(made, name, None)
    if method is None and not needed:
        return None
    if not callable(method):
        raise FailedPrecondition(f"{whose} is not there: it gets the inputs by name, and returns the outputs")
    if inspect.iscoroutinefunction(method):
        raise FailedPrecondition(f"{whose} is async: nobody awaits it; a lane's thread may block")
    if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
        raise FailedPrecondition(f"{whose} yields: answers are returned whole")
    if name == "load":
        _fits(method, whose, [object()], {}, "takes one argument, the context: def load(self, context)")
    return method  # type: ignore[no-any-return]


def parameters_of(method: Callable[..., Any], inputs: Sequence[str], whose: str) -> dict[str, Any]:
    """Parameters of the method that gets the inputs, with their defaults; `Parameter.empty`: none.

    Raises:
        FailedPrecondition: it does not take these inputs.
    """
    parameters = _fits(method, whose, [], dict.fromkeys(inputs), f"does not take the inputs of model.toml, {inputs}")
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _fits(
    method: Callable[..., Any], whose: str, given: Sequence[Any], named: Mapping[str, Any], what: str
) -> list[inspect.Parameter]:
    """Parameters of a method. Raises FailedPrecondition: it cannot be called so."""
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError) as error:
        if inspect.ismethod(method):
            raise FailedPrecondition(f"{whose} {what}: {error}") from None
        return []  # of a callable that is not made in Python
    try:
        signature.bind(*given, **named)
    except TypeError as error:
        raise FailedPrecondition(f"{whose}{signature} {what}: {error}") from None
    return list(signature.parameters.values())
