"""TensorNext's light half: the client, the command tool and the wire protocol. No torch.

    from tnxctl import Client

    with Client("192.168.1.100", timeout=5.0) as tnx:
        result = tnx.predict(x, model="digits")
        print(result.output, result.device)

The names in `__all__` are imported when they are first used, so `import tnxctl` alone costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tnxctl.aio import AsyncClient
    from tnxctl.client import Client
    from tnxctl.protocol.errors import (
        AlreadyExists,
        Cancelled,
        DeadlineExceeded,
        FailedPrecondition,
        Internal,
        InvalidArgument,
        NotFound,
        PermissionDenied,
        ResourceExhausted,
        TensorNextError,
        Unauthenticated,
        Unavailable,
        Unimplemented,
        Unknown,
    )
    from tnxctl.results import Result

__version__ = "0.1.0"

__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "FailedPrecondition",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "PermissionDenied",
    "ResourceExhausted",
    "Result",
    "TensorNextError",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unknown",
]

# Where each name lives; the errors, all the others, share one module.
_MODULES = {"AsyncClient": "tnxctl.aio", "Client": "tnxctl.client", "Result": "tnxctl.results"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_MODULES.get(name, "tnxctl.protocol.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
