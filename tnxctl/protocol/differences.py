"""Differences between the answers of two versions, output by output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tnxctl.protocol.datatypes import Array, as_float
from tnxctl.protocol.fields import BYTES, TensorSpec
from tnxctl.protocol.replies import OutputDifference


@dataclass
class DifferenceTally:
    """Differences in one output, summed up."""

    spec: TensorSpec
    elements: int = 0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    finite: int = 0
    rows: int = 0
    agreeing: int = 0
    misfits: int = 0

    def add(self, baseline: Array, candidate: Array) -> None:
        """Compare two answers, as arrays that are kept as `STORAGE` says."""
        if baseline.shape != candidate.shape or baseline.dtype != candidate.dtype:
            self.misfits += 1
            return
        self.elements += baseline.size
        if self.spec.datatype == BYTES:  # equal elements are 0 apart, others 1
            self._add_apart(np.not_equal(baseline, candidate).astype(np.float64))
            return
        first, second = as_float(baseline, self.spec.datatype), as_float(candidate, self.spec.datatype)
        finite = np.isfinite(first) & np.isfinite(second)
        if not np.array_equal(np.isfinite(first), np.isfinite(second)):
            self.misfits += 1
        self._add_apart(np.abs(first[finite] - second[finite]))
        if first.ndim > 1 and first.shape[-1] > 1 and first.size:
            agreeing = first.argmax(axis=-1) == second.argmax(axis=-1)
            self.rows += agreeing.size
            self.agreeing += int(agreeing.sum())

    def _add_apart(self, apart: Array) -> None:
        if apart.size:
            self.max_abs = max(self.max_abs, float(apart.max()))
            self.sum_abs += float(apart.sum())
            self.finite += apart.size

    def report(self) -> OutputDifference:
        """Results so far."""
        return OutputDifference(
            name=self.spec.name,
            elements=self.elements,
            max_abs=self.max_abs,
            mean_abs=self.sum_abs / self.finite if self.finite else 0.0,
            argmax_agreement=self.agreeing / self.rows if self.rows else None,
            misfits=self.misfits,
        )
