"""Resident size of this process."""

from __future__ import annotations

import os


def resident_bytes() -> int:
    """Resident size of this process in bytes; 0 where the system does not say.

    Without what is mapped of files, and of memory that is shared with clients or with processes of models: no
    `tnxctl.malloc.trim` gives that back, and other limits are for it.
    """
    try:
        with open("/proc/self/statm", "rb") as file:
            _, resident, mapped, *_ = file.read().split()
            return (int(resident) - int(mapped)) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
