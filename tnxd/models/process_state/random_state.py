"""States of the random generators that all models share: torch's, Python's and numpy's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from tnxd.models.process_state.setter_calls import NUMPY_SEED, PYTHON_SEED


class RandomState:
    """Snapshot of the shared generators."""

    def __init__(self) -> None:
        self._seed = torch.initial_seed()
        self._python = random.getstate()
        self._numpy = _numpy_state()

    def reseed(self) -> bool:
        """Seed the generators from the system: torch's if it was seeded, the others if they were used at all.

        Not the old state: others have drawn from it meanwhile, and would draw the same numbers twice.

        Returns:
            Whether torch's was seeded.
        """
        if random.getstate() != self._python:
            random.seed()
        if _numpy_state() != self._numpy:
            np.random.seed()
        if torch.initial_seed() == self._seed:
            return False
        torch.seed()
        return True


def hashes() -> dict[str, int]:
    """Hashes of the states of Python's and numpy's generators, which do not tell their seeds; by what sets them."""
    return {
        PYTHON_SEED: hash(random.getstate()),
        NUMPY_SEED: hash(_numpy_state()),
    }


def _numpy_state() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return (kind, np.asarray(keys).tobytes(), *rest)
