"""OpenMP: how threads of a team wait for work, which libgomp reads from the environment when it is loaded."""

from __future__ import annotations

import os

_SPIN_COUNT = "GOMP_SPINCOUNT"
_POLICY = "OMP_WAIT_POLICY"

# By default a thread of a team polls for some 2 ms after a forward before it sleeps, on a core that the next batch or
# the serving thread may want. With this many rounds there is none of that, and a forward takes as long as before.
_ROUNDS = "10000"


def settle_waiting() -> None:
    """Settle how threads of a team wait, unless the operator has. To be called before torch is imported."""
    if _SPIN_COUNT not in os.environ and _POLICY not in os.environ:
        os.environ[_SPIN_COUNT] = _ROUNDS
