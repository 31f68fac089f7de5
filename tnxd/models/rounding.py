"""Rounding: how far two computations of the same answer may be apart. No torch.

A forward of one row and one of many take other kernels and add in another order. What they differ by grows with the
depth of a network, but it stays far below what a row that depends on its neighbours shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tnxctl.protocol.datatypes import Array, as_float
from tnxctl.protocol.wire import TensorSpec, excerpt
from tnxd.device_kinds import DeviceKind

_ROUNDING = {"FP64": 1e-8, "FP32": 2e-4, "FP16": 2e-2, "BF16": 6e-2}
"""Datatype -> tolerated difference, relative to the largest value of the output: some hundred units in the last place,
which is ten times what ResNet-50 and MiniLM show between one row and 64."""

_UNUSUAL = 1e4
"""Times the median: larger values do not set the scale of an output."""

_MANY = 64
"""Values along the last axis that say how large such values are: of fewer, all may be small by chance."""

_LOOSER = 10.0
"""Times the tolerance, for what is relative to the values of one place of the last axis."""

_LEAST_SHARE = 1e-3
"""Least share of the scale of an output for one place of its last axis: below that lies the rounding of the others."""

FLOATING = frozenset(_ROUNDING)
"""Datatypes whose values are rounded."""

_ROUNDING_TF32 = 1e-2
"""For FP32 on a device that has TF32, see `DeviceKind`."""


def tolerance(datatypes: Iterable[str], kind: DeviceKind) -> float:
    """The tolerated difference, relative to the largest value of an output, where a model computes in `datatypes`.

    Args:
        kind: of the device.
    """
    found = [_ROUNDING[datatype] for datatype in datatypes if datatype in _ROUNDING]
    coarsest = max(found, default=_ROUNDING["FP32"])
    return max(coarsest, _ROUNDING_TF32) if kind.has_tf32 and coarsest > _ROUNDING["FP64"] else coarsest


@dataclass(frozen=True)
class Difference:
    """A difference between two answers that rounding does not explain.

    Attributes:
        text: it, in words: the output and both values.
        counted: whether the values count or choose, and were not rounded themselves: a near tie may have decided.
    """

    text: str
    counted: bool = False


def difference(
    specs: Sequence[TensorSpec], first: Sequence[Array], second: Sequence[Array], allowed: float
) -> Difference | None:
    """The first output in which two answers differ by more than rounding; None if there is none.

    Args:
        specs: the outputs. first, second: arrays as on the wire (see `tnxctl.protocol.datatypes.STORAGE`).
        allowed: relative to the largest value of the output.
    """
    for spec, one, other in zip(specs, first, second, strict=True):
        found = _in_output(spec, one, other, allowed)
        if found is not None:
            return found
    return None


def _in_output(spec: TensorSpec, one: Array, other: Array, allowed: float) -> Difference | None:
    if one.shape != other.shape:
        return Difference(f"output {spec.name!r} has shape {list(one.shape)} and {list(other.shape)}")
    if one.size == 0 or np.array_equal(one, other):
        return None
    if spec.datatype not in _ROUNDING:
        place = np.unravel_index(int(np.argmax(one != other)), one.shape)
        return Difference(_told(spec, place, one[place], other[place]), counted=True)
    left, right = as_float(one, spec.datatype), as_float(other, spec.datatype)
    finite = np.isfinite(left)
    unlike = (finite != np.isfinite(right)) | (~finite & (left != right) & ~(np.isnan(left) & np.isnan(right)))
    if unlike.any():
        place = np.unravel_index(int(np.argmax(unlike)), one.shape)
        return Difference(_told(spec, place, left[place], right[place]))
    apart = np.where(finite, np.abs(np.where(finite, left, 0) - np.where(finite, right, 0)), 0)
    sizes = np.where(finite, np.abs(left), 0)
    # What stands for "masked", such as -1e9, is no measure for the others.
    usual = float(np.median(sizes[sizes > 0])) if (sizes > 0).any() else 0.0
    scale = float(np.max(sizes, where=sizes <= _UNUSUAL * usual, initial=0.0))
    beyond = apart - allowed * np.maximum(scale, sizes)
    width = one.shape[-1] if one.ndim > 1 else one.size
    if one.size >= _MANY * width:  # as boxes with their scores are: 640 pixels are no measure for a probability
        own = np.max(sizes.reshape(-1, width), axis=0)
        own = np.maximum(np.where(own <= scale, own, scale), _LEAST_SHARE * scale)
        beyond = np.maximum(beyond, apart - _LOOSER * allowed * np.maximum(own, sizes))
    place = np.unravel_index(int(np.argmax(beyond)), one.shape)
    if float(beyond[place]) <= 0:
        return None
    return Difference(_told(spec, place, left[place], right[place]))


def _told(spec: TensorSpec, place: Sequence[np.intp], one: object, other: object) -> str:
    shown = [excerpt(each) if isinstance(each, bytes) else f"{each:.9g}" for each in (one, other)]
    return f"output {spec.name!r}{[int(axis) for axis in place]} is {shown[0]} and {shown[1]}"
