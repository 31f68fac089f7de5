"""Out of memory: exceptions that say so, of any device and of any library."""

from __future__ import annotations

import torch

# Only torch has a class, for its CUDA allocator. These are the words of its allocator for the CPU (on Windows the
# second), of C++ as torch and onnxruntime pass it on, of onnxruntime's arena, of NVIDIA's libraries, which allocate
# for themselves, and of torch's allocator for MPS. TorchScript has them within a longer text.
_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
    "Failed to allocate memory for requested buffer",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)

_MOST_CAUSES = 8  # a chain of causes may be a circle


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or one of its causes (`raise ... from`), says that memory has run out."""
    cause: BaseException | None = error
    for _ in range(_MOST_CAUSES):
        if cause is None:
            return False
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)) or any(text in _text(cause) for text in _TEXTS):
            return True
        cause = cause.__cause__
    return False


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a model's own class may not know how
        return ""
