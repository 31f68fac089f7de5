"""Affinity of a thread: the cores that it may run on, told apart from those that an operator gives the process."""

from __future__ import annotations

import contextlib
import os
import threading


class Affinity:
    """Affinity of the calling thread, now. Raises AttributeError where threads have none.

    Equal to a later one if the thread has the same cores, or has all those that the other threads have: then somebody
    has given others to the whole process (taskset -a, a control group), which is not for a model's neighbours to undo.
    """

    __hash__ = None  # type: ignore[assignment]  # what it is equal to depends on other threads

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0)

    def __eq__(self, later: object) -> bool:
        if not isinstance(later, Affinity):
            return NotImplemented
        return later._cores == self._cores or later._cores == _cores_of_others()

    def restore(self) -> None:
        """Let the calling thread run where the others may; without others, where it could then."""
        os.sched_setaffinity(0, _cores_of_others() or self._cores)


def _cores_of_others() -> set[int]:
    own = threading.get_native_id()
    cores: set[int] = set()
    for name in os.listdir("/proc/self/task"):
        if int(name) != own:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                cores |= os.sched_getaffinity(int(name))
    return cores
