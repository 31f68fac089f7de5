"""Times that the lanes of devices were busy."""

from __future__ import annotations

import time
from collections import Counter

from tnxd.executors.execution import Execution
from tnxd.lanes import BACKGROUND, INLINE
from tnxd.scheduling.device import Batch


class LaneTimes:
    """Times that batches ran, by device. Background batches, which take what lanes leave, do not count.

    Attributes:
        running: what is on lanes now, background batches too.
    """

    def __init__(self) -> None:
        self.running: dict[Execution, Batch] = {}
        self._busy_ns: Counter[str] = Counter()
        self._inline_ns: Counter[str] = Counter()

    def add(self, execution: Execution, batch: Batch) -> None:
        """Count an execution that is over."""
        lane = batch.lane
        if lane == INLINE:
            self._inline_ns[batch.device.name] += execution.finished_ns - execution.started_ns
        elif lane != BACKGROUND:
            self._busy_ns[batch.device.name] += (execution.finished_ns - execution.started_ns) * batch.threads

    def busy_us(self) -> Counter[str]:
        """Microseconds that lanes were busy, by device, up to now. A wide batch counts once for each of its threads."""
        now_ns = time.perf_counter_ns()
        busy_ns = self._busy_ns.copy()
        for execution, batch in self.running.items():
            started_ns = execution.started_ns  # another thread writes these
            if batch.lane != BACKGROUND and started_ns:
                until_ns = min(execution.finished_ns or now_ns, now_ns)
                busy_ns[batch.device.name] += max(until_ns - started_ns, 0) * batch.threads
        return Counter({name: nanoseconds // 1000 for name, nanoseconds in busy_ns.items()})

    def inline_us(self, device: str) -> float:
        """Microseconds that batches ran on the serving thread."""
        return self._inline_ns[device] / 1e3
