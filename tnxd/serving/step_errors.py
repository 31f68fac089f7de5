"""Errors of the steps of a pipeline, as the client of the whole is told of them."""

from __future__ import annotations

from tnxctl.protocol.errors import TensorNextError, from_code


def of_step(name: str, what: str) -> str:
    """A sentence that begins with the name of the step."""
    return f"step {name!r}: {what}"


def error_of_step(name: str, error: TensorNextError) -> TensorNextError:
    """The error of a step as that of the whole."""
    return from_code(error.code, of_step(name, error.message), error.retry_after_s)
