"""Team of a thread: those that OpenMP keeps for it, each kept on a core of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Team:
    """The threads that work on wide batches beside one thread, which alone calls this.

    A team that has as many threads as there are cores needs all of them. Where a core is busy for a moment, as with the
    answer to a client, the kernel wakes a thread of the team on the core of the one that wakes it, and mostly leaves it
    there. Then each of the two polls through its time slice while the other has something to do: 10 ms become 50. So
    each thread of the team but the caller has a core that it may not leave. The caller may: what a model starts on its
    thread, such as a pool of threads, takes over where it may run.

    Without effect where a team has fewer threads than there are cores, where OpenMP's functions are not found, and
    where the system does not let a thread choose its cores.
    """

    def __init__(self) -> None:
        self._threads = 0
        self._core = -1
        self._others: list[int] = []

    def spread(self, threads: int) -> None:
        """Keep the other threads off the core that the caller is on. To be called before each wide batch.

        Args:
            threads: of the batch, the caller's included.
        """
        core = current_core()
        if threads == self._threads and core == self._core:
            return
        self._core = core
        cores = _own_cores()
        if len(cores) != threads:
            return
        # OpenMP may have started threads, and ended others whose ids belong to other programs by now.
        if threads != self._threads or not all(_is_ours(thread) for thread in self._others):
            self._others = other_members(threads)
            self._threads = threads
        with contextlib.suppress(OSError):  # a filter of system calls, or another program has just taken the core away
            for thread, other in zip(self._others, sorted(cores - {core}), strict=False):
                os.sched_setaffinity(thread, {other})


class _OpenMP(NamedTuple):
    """Functions of OpenMP's library, the one that torch uses. Attributes: number: of a thread in its team."""

    parallel: ctypes._NamedFuncPointer
    number: ctypes._NamedFuncPointer


@cache
def _openmp() -> _OpenMP | None:
    with contextlib.suppress(OSError, AttributeError):  # another system, or a torch that was built without OpenMP
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel, number = library.GOMP_parallel, library.omp_get_thread_num
        parallel.argtypes = [_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return _OpenMP(parallel, number)
    return None


def other_members(threads: int) -> list[int]:
    """Thread ids of the caller's team of that size, without its own; none where OpenMP's functions are not found."""
    openmp = _openmp()
    members: list[tuple[int, int]] = []
    if openmp is not None:
        body = _Body(lambda _: members.append((openmp.number(), threading.get_native_id())))
        openmp.parallel(body, None, threads, 0)
    return [thread for number, thread in sorted(members) if number]


def _is_ours(thread: int) -> bool:
    return os.path.exists(f"/proc/self/task/{thread}")


@cache
def _sched_getcpu() -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), "sched_getcpu", None)


def current_core() -> int:
    """The core that the calling thread is on; -1 where the system does not tell."""
    function = _sched_getcpu()
    return -1 if function is None else int(function())


def _own_cores() -> set[int]:
    """Cores that the calling thread may run on; none where threads cannot choose."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
