"""Memory of this process, and what the C library keeps of it after it has been freed."""

from __future__ import annotations

import ctypes
import os


def trim() -> None:
    """Have the C library return free memory to the system. glibc keeps freed blocks of up to 32 MiB otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Memory that this process has in RAM; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
