"""Replicas: which of several GPUs get one of a model, and in which order. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

_MOST = 0.9
"""Part of the free memory that weights may take: batches need some, too."""


class Places(NamedTuple):
    """GPUs for a model, those with the most free memory first.

    Attributes:
        roomy: those with room for its weights: each gets a replica.
        full: the others. They are tried by turns, until there is one replica.
    """

    roomy: list[str]
    full: list[str]


def places(free: Mapping[str, float], nbytes: int) -> Places:
    """Places for the replicas of a model. Args: free: bytes, by GPU. nbytes: of the weights, as far as is known."""
    order = sorted(free, key=lambda name: -free[name])
    return Places(
        [name for name in order if nbytes <= _MOST * free[name]],
        [name for name in order if nbytes > _MOST * free[name]],
    )
