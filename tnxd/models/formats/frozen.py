"""Frozen networks: machine code of inductor with the weights in it, in a shared library for a CPU.

Where weights are known, inductor folds into them what depends on nothing else, such as batch normalisation, and has
oneDNN compute a layer together with what follows it. docs/performance.md has what that gains over code that gets its
weights as arguments.
"""

from __future__ import annotations

import _ctypes
import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tnxctl.protocol.errors import FailedPrecondition

# torch's own functions between tensors and what the C interface takes; code that inductor writes calls them, too.
_handles: Any = torch._C._aoti

_to_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_to_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)

_OTHERS = 2
"""Threads that may call a network beside one for each core: the one that serves, and one that loads a version."""


class Frozen:
    """A frozen network.

    It is called by its C interface (torch/csrc/inductor/aoti_runtime/interface.h), which ctypes does without the GIL.
    torch's own loader of such libraries holds it for all of a forward: nothing else could go on, on any lane.

    Args:
        file: the library. It is read here, and may be deleted.
        wanted: positions of the outputs to return, given how many there are.

    Raises:
        FailedPrecondition: this process cannot load it.
    """

    def __init__(self, file: Path, wanted: Callable[[int], Sequence[int]]) -> None:
        try:
            library = ctypes.CDLL(str(file))
        except OSError as error:
            raise FailedPrecondition(f"the compiled network cannot be loaded: {error}") from error
        # No thread may wait within the library: one that failed there wakes none that waits.
        count = (os.cpu_count() or 1) + _OTHERS
        self._turns = threading.BoundedSemaphore(count)
        self._library = library
        self._container = ctypes.c_void_p()
        # Not at the end of the process: a thread that hangs may still be in there.
        weakref.finalize(self, _close, library, self._container).atexit = False
        self._call(
            "AOTInductorModelContainerCreateWithDevice",
            *(ctypes.byref(self._container), ctypes.c_size_t(count), b"cpu", None),
        )
        _give_back_weights(library)
        self._inputs = self._number("Inputs")
        self._outputs = self._number("Outputs")
        self._wanted = wanted(self._outputs)

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Run it, on as many threads as torch has for the calling one. Only the number of inputs is checked.

        Raises:
            RuntimeError: it failed, or takes another number of inputs.
        """
        if len(inputs) != self._inputs:  # the library would end the process
            raise RuntimeError(f"the compiled network takes {self._inputs} tensors; here are {len(inputs)}")
        # The code reads memory as that of an array whose last axis is dense.
        held = [tensor.contiguous() for tensor in inputs]
        given = [_to_pointer(handle, None) for handle in _handles.unsafe_alloc_void_ptrs_from_tensors(held)]
        answers = (ctypes.c_void_p * self._outputs)()
        with self._turns:
            self._call(
                "AOTInductorModelContainerRun",
                *(self._container, (ctypes.c_void_p * len(given))(*given), ctypes.c_size_t(len(given))),
                *(answers, ctypes.c_size_t(self._outputs), None, None),
            )
        capsules = [_to_capsule(answer, None, None) for answer in answers]
        tensors = _handles.alloc_tensors_by_stealing_from_void_ptrs(capsules)
        return [tensors[position] for position in self._wanted]

    def _number(self, what: str) -> int:
        found = ctypes.c_size_t()
        self._call(f"AOTInductorModelContainerGetNum{what}", self._container, ctypes.byref(found))
        return found.value

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self._library, name)(*arguments):
            raise RuntimeError(f"the compiled network failed: {_reason(self._library)}")


def _reason(library: ctypes.CDLL) -> str:
    """Words about the last failure of a thread, where this version of torch keeps them."""
    said = ctypes.c_char_p()
    ask = getattr(library, "AOTInductorGetLastError", None)
    if ask is None or ask(ctypes.byref(said)) or not said.value:
        return "its reason is on stderr"
    return said.value.decode("utf-8", "replace")


def _give_back_weights(library: ctypes.CDLL) -> None:
    """Give back the memory of the weights in the library: the container has copied them.

    Nor is there any once the network is gone. glibc unmaps no library as long as a thread lives that has called it, if
    that has variables for each thread, as this one has for its last error.
    """
    try:
        first, last = (
            ctypes.addressof(ctypes.c_char.in_dll(library, f"_binary_constants_bin_{end}")) for end in ("start", "end")
        )
    except ValueError:  # other versions of torch may call them otherwise
        return
    first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    length = last // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:  # nothing has written there, so that whoever reads it would read it from the file again
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _close(library: ctypes.CDLL, container: ctypes.c_void_p) -> None:
    """Free the weights, if there are any yet, and unmap the code, unless a thread that called it still lives."""
    if container:
        library.AOTInductorModelContainerDelete(container)
    _ctypes.dlclose(library._handle)
