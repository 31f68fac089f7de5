"""Time limits of the daemon, as far as models have to know them."""

from __future__ import annotations

import math
from dataclasses import dataclass

PROCESS_END_S = 5.0
"""Seconds after which a process that was killed has ended, unless the kernel holds it."""


@dataclass(frozen=True)
class TimeLimits:
    """Time limits, in seconds. Attributes: load_s: of a load with warm-up. batch_s: of a batch that has none itself."""

    load_s: float = math.inf
    batch_s: float = math.inf
