"""Errors, as one tree. Every error that reaches a user derives from TensorNextError.

    TensorNextError
    ├── InvalidArgument     the request can never work as it stands: fix the named value (also a ValueError)
    ├── NotFound            no such model, version or device
    ├── AlreadyExists       a request with this id is still in flight on the same connection
    ├── FailedPrecondition  right request, wrong state: the model could not be loaded
    ├── PermissionDenied    the peer may not do this
    ├── Unauthenticated     the peer did not show who it is
    ├── ResourceExhausted   a queue or a memory limit is full: slow down, then try again
    ├── DeadlineExceeded    the time allowed is over (also a TimeoutError)
    ├── Cancelled           the caller withdrew the request
    ├── Unimplemented       a verb or a protocol version that this daemon does not speak
    ├── Unavailable         nobody answers, or the daemon is draining: try again later (also a ConnectionError)
    ├── Internal            the model or the daemon failed; the request itself was well formed
    └── Unknown             a code that this client does not know

Each class is one status code of gRPC (https://grpc.io/docs/guides/status-codes/), whose names travel on
the wire: a client in any language finds documented meanings for them.
"""

from __future__ import annotations

from typing import ClassVar


class TensorNextError(Exception):
    """Root of the tree.

    Attributes:
        code: the canonical gRPC name that stands for this class on the wire.
        message: one sentence that says what was wrong with which value.
        retry_after_s: the same request may well succeed that many seconds later; None says nothing about that.
    """

    code: ClassVar[str] = "UNKNOWN"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class Unknown(TensorNextError):
    code = "UNKNOWN"


class InvalidArgument(TensorNextError, ValueError):
    code = "INVALID_ARGUMENT"


class NotFound(TensorNextError):
    code = "NOT_FOUND"


class AlreadyExists(TensorNextError):
    code = "ALREADY_EXISTS"


class FailedPrecondition(TensorNextError):
    code = "FAILED_PRECONDITION"


class PermissionDenied(TensorNextError):
    code = "PERMISSION_DENIED"


class Unauthenticated(TensorNextError):
    code = "UNAUTHENTICATED"


class ResourceExhausted(TensorNextError):
    code = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(TensorNextError, TimeoutError):
    code = "DEADLINE_EXCEEDED"


class Cancelled(TensorNextError):
    code = "CANCELLED"


class Unimplemented(TensorNextError):
    code = "UNIMPLEMENTED"


class Unavailable(TensorNextError, ConnectionError):
    code = "UNAVAILABLE"


class Internal(TensorNextError):
    code = "INTERNAL"


_BY_CODE: dict[str, type[TensorNextError]] = {cls.code: cls for cls in TensorNextError.__subclasses__()}


def from_code(code: str, message: str, retry_after_s: float | None = None) -> TensorNextError:
    """The error that a peer named: an instance of the class for `code`, or Unknown for a code from the future."""
    cls = _BY_CODE.get(code)
    if cls is None:
        cls, message = Unknown, f"{code}: {message}"
    return cls(message, retry_after_s=retry_after_s)
