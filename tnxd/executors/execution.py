"""What travels between the server and an executor: a batch on its way, and what came of it. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tnxctl.errors import TensorNextError
from tnxctl.frames import Array
from tnxd.models.model import Model
from tnxd.work import Batch

Outcome = tuple[Array, ...] | TensorNextError
"""What one request gets: its outputs in the order of the model's signature, or an error."""


class Execution:
    """One batch on one lane.

    Attributes:
        batch: what the scheduler decided.
        model: what to run.
        items: inputs per request, in the order of the model's signature. rows: their lengths along axis 0.
        group: lengths of the variable axes, the same for all items.
        outcomes: per request, filled by the executor.
        started_ns, finished_ns: of the monotonic clock (`time.perf_counter_ns`).
        gather_us, h2d_us, compute_us, d2h_us: stages; they sum to finished - started.
        latency_us: the forward on the device.
        memory_free_mb: of a GPU, in MiB, when the batch was done; 0 on a CPU.
        fatal: what went wrong for good with the device, if it did: nothing can run there any more.
    """

    __slots__ = (
        "batch",
        "compute_us",
        "d2h_us",
        "fatal",
        "finished_ns",
        "gather_us",
        "group",
        "h2d_us",
        "items",
        "latency_us",
        "memory_free_mb",
        "model",
        "outcomes",
        "rows",
        "started_ns",
    )

    def __init__(
        self,
        batch: Batch,
        model: Model,
        items: Sequence[tuple[Array, ...]],
        rows: Sequence[int],
        group: tuple[int, ...],
    ) -> None:
        self.batch = batch
        self.model = model
        self.items = items
        self.rows = rows
        self.group = group
        self.outcomes: list[Outcome] = []
        self.started_ns = 0
        self.finished_ns = 0
        self.gather_us = 0.0
        self.h2d_us = 0.0
        self.compute_us = 0.0
        self.d2h_us = 0.0
        self.latency_us = 0.0
        self.memory_free_mb = 0.0
        self.fatal = ""


class Executor(Protocol):
    """A device that runs batches."""

    name: str
    kind: str
    description: str
    lanes: int

    def load(self, model: Model) -> list[tuple[int, float]]:
        """Put a replica on the device and warm it up on every lane. Blocks.

        Returns:
            (rows, microseconds) of warm-up batches, for the cost model.

        Raises:
            Exception: whatever the model raised; the device goes on without it.
        """

    def submit(self, execution: Execution) -> None:
        """Run the execution on the lane that its batch names; `on_done` is called from there when it is over."""

    def run_inline(self, execution: Execution) -> None:
        """Run the execution on the calling thread, which called `adopt_thread` before. CPU only."""

    def adopt_thread(self) -> None:
        """Prepare the calling thread for `run_inline`."""

    def memory_mb(self) -> tuple[float, float]:
        """Free and total memory of the device in MiB. Never blocks."""
