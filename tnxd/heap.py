"""Memory that the C library keeps after it has been freed."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Have the C library return free memory to the system. glibc keeps freed blocks of up to 32 MiB otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
