"""Rounding of a lower precision: how far the answers of a module are from those in the datatype of its weights."""

from __future__ import annotations

import math

import numpy as np
import torch

from tnxctl.protocol.datatypes import as_float
from tnxd.executors.trial.copies import Call
from tnxd.executors.trial.lane_comparison import answer_of
from tnxd.executors.trial.verdict import Verdict
from tnxd.models.rounding import FLOATING

_VARIANTS = 3


def largest_difference(module: Call, reference: Call, verdict: Verdict, device: torch.device) -> float | None:
    """The largest difference between the answers of two modules, relative to the largest value of an output.

    Returns:
        Infinity where the module's answer is no number and the reference's is; None where there is nothing to compare,
        since the reference has a number for no example.
    """
    largest: float | None = None
    model = verdict.model
    for make in verdict.telling:  # the first one for which there is something to compare
        for number in range(_VARIANTS):
            item = make(1, number)
            pairs = zip(
                model.outputs,
                answer_of(module, model, device, item)[1],
                answer_of(reference, model, device, item)[1],
                strict=True,
            )
            for spec, found, wanted in pairs:
                if spec.datatype not in FLOATING:
                    continue
                right = as_float(wanted, spec.datatype)
                numbers = np.isfinite(right)
                if numbers.any():
                    right, left = right[numbers], as_float(found, spec.datatype)[numbers]
                    apart = float(np.max(np.abs(left - right))) if np.isfinite(left).all() else math.inf
                    largest = max(largest or 0.0, apart / max(float(np.max(np.abs(right))), 1e-30))
        if largest is not None:
            break
    return largest
