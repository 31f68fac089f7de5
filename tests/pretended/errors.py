"""Exceptions of pretended devices, as torch raises them."""

from __future__ import annotations

import torch

# Of CUDA's runtime (driver_types.h).
INVALID_VALUE = 1
OUT_OF_MEMORY = 2
ASSERT = 710
LAUNCH_FAILURE = 719
CAPTURE_UNSUPPORTED = 900
CAPTURE_INVALIDATED = 901
CAPTURED_EVENT = 907

_TEXTS = {
    INVALID_VALUE: "invalid argument",
    OUT_OF_MEMORY: "out of memory",
    ASSERT: "device-side assert triggered",
    LAUNCH_FAILURE: "unspecified launch failure",
    CAPTURE_UNSUPPORTED: "operation not permitted when stream is capturing",
    CAPTURE_INVALIDATED: "operation failed due to a previous error during capture",
    CAPTURED_EVENT: "operation not permitted on an event last recorded in a capturing stream",
}


class Unpretended(Exception):
    """Something that the pretended device cannot do: a gap of the pretence, not a defect of the program."""


def cuda_error(code: int) -> torch.AcceleratorError:
    """The exception that torch raises for an error of CUDA's runtime."""
    error = torch.AcceleratorError(f"CUDA error: {_TEXTS[code]}\n(the device is pretended)")
    error.error_code = code
    return error
