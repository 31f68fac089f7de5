"""Memory of this process: its resident size, and freed memory that the C library keeps."""

from __future__ import annotations

import ctypes
import os


def trim() -> None:
    """Return free memory of the C library to the system. glibc keeps freed blocks of up to 32 MiB otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Resident size of this process in bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
