"""Rounding of a lower precision: how far the answers of a module are from those in the datatype of its weights."""

from __future__ import annotations

import numpy as np
import torch

from tnxctl.protocol.datatypes import as_float
from tnxd.executors.trial.copies import Call
from tnxd.executors.trial.lane_comparison import answer_of
from tnxd.executors.trial.verdict import Verdict
from tnxd.models.rounding import FLOATING

_VARIANTS = 3


def largest_difference(module: Call, reference: Call, verdict: Verdict, device: torch.device) -> float:
    """The largest difference between the answers of two modules, relative to the largest value of an output."""
    largest = 0.0
    model = verdict.model
    for make in verdict.telling[:1]:
        for number in range(_VARIANTS):
            item = make(1, number)
            pairs = zip(
                model.outputs,
                answer_of(module, model, device, item)[1],
                answer_of(reference, model, device, item)[1],
                strict=True,
            )
            for spec, found, wanted in pairs:
                if spec.datatype in FLOATING and wanted.size:
                    right = as_float(wanted, spec.datatype)
                    apart = np.abs(as_float(found, spec.datatype) - right)
                    largest = max(largest, float(np.max(apart)) / max(float(np.max(np.abs(right))), 1e-30))
    return largest
