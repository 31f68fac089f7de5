"""Plain torch tensors, of any device, over memory of this process: through DLPack, which asks no driver.

Layout of the structures: dlpack.h, version 0.8.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable, Sequence

import torch

_CPU, _CUDA = 1, 2
_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _BOOL = 0, 1, 2, 4, 5, 6

_TYPES = {
    torch.bool: _BOOL,
    torch.uint8: _UINT,
    torch.uint16: _UINT,
    torch.uint32: _UINT,
    torch.uint64: _UINT,
    torch.int8: _INT,
    torch.int16: _INT,
    torch.int32: _INT,
    torch.int64: _INT,
    torch.float16: _FLOAT,
    torch.float32: _FLOAT,
    torch.float64: _FLOAT,
    torch.bfloat16: _BFLOAT,
    torch.complex64: _COMPLEX,
    torch.complex128: _COMPLEX,
}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_living: dict[int, tuple[_Managed, Callable[[], None]]] = {}
"""By the address of the structure: what torch holds, and what is called when it lets go."""


def _let_go(managed: int) -> None:
    found = _living.pop(managed, None)
    if found is not None:
        found[1]()


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_let_go)

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


@atexit.register
def _leave_alone() -> None:
    """Let tensors that outlive the interpreter call nothing."""
    for managed, _ in list(_living.values()):
        managed.deleter = None


def tensor(
    address: int,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    cuda: int | None,
    *,
    on_free: Callable[[], None],
) -> torch.Tensor:
    """A tensor over memory at an address.

    Args:
        cuda: number of its CUDA device; None: it is on the CPU.
        on_free: called when the last tensor that shares its storage is gone, by any thread, at any moment; keeps the
            memory alive until then.
    """
    count = len(size)
    shape = (ctypes.c_int64 * count)(*size)
    strides = (ctypes.c_int64 * count)(*stride)
    managed = _Managed()
    described = managed.tensor
    described.data = address
    described.device_type, described.device_id = (_CPU, 0) if cuda is None else (_CUDA, cuda)
    described.ndim = count
    described.code, described.bits, described.lanes = _TYPES[dtype], dtype.itemsize * 8, 1
    described.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
    described.strides = ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = ctypes.cast(_DELETER, ctypes.c_void_p)
    where = ctypes.addressof(managed)
    _living[where] = (managed, on_free)
    made: torch.Tensor = torch._C._from_dlpack(_new_capsule(where, b"dltensor", None))  # type: ignore[attr-defined]
    return made
