"""Errors of a process that runs a model. They concern a whole batch, and none of its requests more than another."""

from __future__ import annotations

from tnxctl.protocol.errors import Internal, ResourceExhausted, TensorNextError, Unavailable


class ProcessError(TensorNextError):
    """Root of these errors: a batch that ends with one is not run again in parts."""


class ProcessLost(ProcessError, Internal):
    """The process ended, or was ended, while it ran the batch."""

    code = Internal.code


class ProcessFull(ProcessError, ResourceExhausted):
    """The process had no memory left within its limit."""

    code = ResourceExhausted.code


class ProcessAway(ProcessError, Unavailable):
    """The process is being started again."""

    code = Unavailable.code
