"""Cost surface: expected times of batches over their rows and their length, learned from the batches that ran."""

from __future__ import annotations

from tnxd.scheduling.costs import CostCurve


class CostSurface:
    """Execution time over rows and length of one model on one device, in microseconds.

    There is a curve over the rows for each power of two of the length, about ten in all, and a straight line between
    two of them. With a curve for each length that comes, each would learn from few batches, and too slowly.
    """

    __slots__ = ("_curves",)

    def __init__(self) -> None:
        self._curves: dict[int, CostCurve] = {}  # by the exponent of the length

    def mean(self, rows: int, length: int) -> float:
        """Expected microseconds of a batch; 0 as long as nothing was observed. Args: length: at least 1."""
        below = length.bit_length() - 1
        short_us = self._at(below, rows)
        share = (length >> below) and (length - (1 << below)) / (1 << below)
        return short_us + share * (self._at(below + 1, rows) - short_us) if share else short_us

    def observe(self, rows: int, length: int, micros: float) -> None:
        """Record how long a batch took. The curves on both sides are wrong by the same factor, as far as is known."""
        below = length.bit_length() - 1
        if length == 1 << below:
            self._curve(below).observe(rows, micros)
            return
        expected = self.mean(rows, length)
        factor = micros / expected if expected else 1.0
        for exponent in (below, below + 1):
            self._curve(exponent).observe(rows, factor * (self._at(exponent, rows) or micros))

    @property
    def known(self) -> bool:
        """Whether anything was observed."""
        return bool(self._curves)

    def _curve(self, exponent: int) -> CostCurve:
        curve = self._curves.get(exponent)
        if curve is None:
            curve = self._curves[exponent] = CostCurve()
        return curve

    def _at(self, exponent: int, rows: int) -> float:
        """Expected microseconds at a power of two. Where it has no curve, the nearest with as many tokens stands in."""
        curve = self._curves.get(exponent)
        if curve is not None and curve.known:
            return curve.mean(rows)
        known = [other for other, curve in self._curves.items() if curve.known]
        if not known:
            return 0.0
        nearest = min(known, key=lambda other: abs(other - exponent))
        tokens = rows << exponent
        return self._curves[nearest].mean(max(tokens >> nearest, 1) if rows else 0)


class CostSurfaces:
    """Cost surfaces of models whose batches are padded, by device, model and group."""

    def __init__(self) -> None:
        self._surfaces: dict[tuple[str, str], dict[tuple[int, ...], CostSurface]] = {}

    def add(self, device: str, model: str) -> None:
        """Have surfaces for a model on a device."""
        self._surfaces.setdefault((device, model), {})

    def find(self, device: str, model: str, group: tuple[int, ...] = ()) -> CostSurface | None:
        """Cost surface, an empty one at first; None for a model whose batches have one length."""
        surfaces = self._surfaces.get((device, model))
        return None if surfaces is None else surfaces.setdefault(group, CostSurface())

    def forget(self, model: str) -> None:
        """Drop all surfaces of a model."""
        self._surfaces = {key: surfaces for key, surfaces in self._surfaces.items() if key[1] != model}
