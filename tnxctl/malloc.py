"""Memory that the C library keeps when it is freed, instead of giving it back to the system."""

from __future__ import annotations

import ctypes
import os

# Parameters of mallopt (malloc.h of glibc), and the environment variable of each.
_KEPT = {
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**30),
    "MALLOC_ARENA_MAX": (-8, 1),
}
_TUNABLES = "GLIBC_TUNABLES"


def keep_freed() -> None:
    """Have the C library keep what is freed, for the next that asks. To be called before there are other threads.

    By default glibc returns each block of over 32 MiB as it is freed, and of over 128 KiB at worst, since that limit
    follows what a process has freed so far. The kernel then clears every page anew. A forward of ResNet-50 with 16
    rows on two threads took 19,000 page faults a row and 1.4 times as long; with the limit at its lowest, two forwards
    of 8 rows side by side took 30,000 and 1.6 times as long. A request of 1 MiB through the bridge took 365 of them
    and 1.4 times as long. One arena for all threads holds what one of them has freed for the others, and no block is
    too large for it. `trim` gives back what is kept.

    An operator who has set one of these in the environment has it so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and _TUNABLES not in os.environ and not _KEPT.keys() & os.environ.keys():
        for parameter, value in _KEPT.values():
            mallopt(parameter, value)


def trim() -> None:
    """Return free memory of the C library to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
