"""What a batch is expected to cost, learned from the batches that ran."""

from __future__ import annotations

_WEIGHT = 0.1  # of the newest observation in the moving average: about the last twenty batches count


class CostModel:
    """Mean execution time per device, model and batch size, as an exponentially weighted average.

    Batch sizes share a bucket per power of two, and a bucket that nothing has filled yet is answered from the next
    larger one that has: a small batch costs at most as much as a large one.
    """

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], dict[int, float]] = {}

    def observe(self, device: str, model: str, rows: int, micros: float) -> None:
        """Record that a batch of `rows` took `micros` microseconds from its gather to its outputs."""
        buckets = self._buckets.setdefault((device, model), {})
        bucket = rows.bit_length()
        known = buckets.get(bucket)
        buckets[bucket] = micros if known is None else known + _WEIGHT * (micros - known)

    def predict(self, device: str, model: str, rows: int) -> float | None:
        """Expected microseconds for a batch of `rows`; None as long as nothing of that size or larger has run."""
        buckets = self._buckets.get((device, model))
        if buckets is None:
            return None
        bucket = rows.bit_length()
        known = buckets.get(bucket)
        if known is not None:
            return known
        larger = [size for size in buckets if size > bucket]
        return buckets[min(larger)] if larger else None
