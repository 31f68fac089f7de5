"""An exception that models may raise. A module of its own: those that import it have nothing else in common."""

from __future__ import annotations


class Unprintable(Exception):
    """Fails even to say what failed."""

    def __str__(self) -> str:
        raise RuntimeError("not even that")
