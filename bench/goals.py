"""Promises of the project, held against what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from report import Ratio


class Goal(msgspec.Struct, frozen=True):
    """A promise and how it stands. `ratio` is None where what it needs was not measured."""

    promise: str
    over: str
    bound: float
    at_most: bool
    ratio: Ratio | None

    @property
    def is_met(self) -> bool | None:
        if self.ratio is None:
            return None
        return self.ratio.median <= self.bound if self.at_most else self.ratio.median >= self.bound


def goals_text(goals: Sequence[Goal]) -> str:
    """All goals, for a terminal."""
    lines = ["Goals: TensorNext over something else, median of the rounds and their range"]
    for goal in goals:
        state = {None: "not measured", True: "met", False: "missed"}[goal.is_met]
        bound = f"{'at most' if goal.at_most else 'at least'} {goal.bound:g}"
        lines.append(f"  {goal.promise + ':':<28} {goal.ratio or '-'!s:<22} {bound:<14} {state:<13} over {goal.over}")
    return "\n".join(lines)
