"""Lanes of a device: what scheduling and executors agree on about them."""

from __future__ import annotations

from typing import NamedTuple

INLINE = -1
"""The calling thread. Lanes of a device's own are 0, 1, ..."""

BACKGROUND = -2
"""The lane for work that nobody waits for: a thread of the device that the operating system lets run last."""


class Teams(NamedTuple):
    """Teams of threads on the lanes of a CPU, of which every other batch has one core.

    A lane that has run a batch with several threads keeps the others. So few lanes have a team, and each always the
    same one.

    Attributes:
        lanes: how many lanes, the first ones, may run a batch wide, that is, with a team; 0: none.
        threads: of a team. cores: that all lanes share.
    """

    lanes: int = 0
    threads: int = 1
    cores: int = 1


NO_TEAMS = Teams()
"""Of a device that knows no width of batches."""
