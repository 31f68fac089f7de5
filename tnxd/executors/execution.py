"""Contract between the server and its executors: executions, load reports, the interface of an executor. No torch.

An execution has no more than an executor needs: not the requests, and nothing of the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import TensorNextError
from tnxd.lanes import Teams
from tnxd.models.model import Item, Model

PURE = "pure"
SCRATCH = "scratch"
SHARED = "shared"
STATES = (PURE, SCRATCH, SHARED)
"""State of a module between two requests. PURE: a forward changes nothing. SCRATCH: a forward writes, and no other
request reads that. SHARED: all requests share it, as its author wants."""

Outcome = tuple[Array, ...] | TensorNextError
"""Outcome of one request: its outputs in the order of the model's signature, or an error."""


@dataclass(slots=True, eq=False)
class Execution:
    """One batch on one lane, and its outcome.

    Attributes:
        lane: index below the executor's lane count, or a number of `tnxd.lanes`.
        max_rows: most rows of one forward, since more ran out of memory; 0: as many as the model allows.
        model: what to run.
        items: inputs per request, in the order of the model's signature, None for those that did not come, the same
            in all items. rows: their lengths along axis 0.
        group: lengths of the variable axes, the same for all items.
        threads: that work on it, on a CPU.
        plain: whether the network runs as it is, whatever variant of it serves.
        crowded: whether other batches may run on the device meanwhile. If memory runs out then, the batch ends at once,
            to be run again without them; else it is run in smaller parts.
        outcomes: per request, filled by the executor.
        started_ns, finished_ns: of the monotonic clock (`time.perf_counter_ns`), in nanoseconds. Where a lane takes
            batches ahead of time, `started_ns` is later than the true start by what this one waited on the device for
            those before it; it is 0 while others go first.
        gather_us, h2d_us, compute_us, d2h_us: stages in microseconds; they sum to finished - started.
        latency_us: the forward on the device, in microseconds.
        memory_free_mb: free memory of a GPU in MiB when the batch was done; 0 on a CPU.
        exhausted: whether a forward ran out of the device's memory. safe_rows: most rows of a forward that worked after
            that; 0 if none did.
        mixes: the sign that rows depend on each other, in words; "" if there was none.
        fatal: the error that ended the device for good, in words; "" while it works.
    """

    lane: int
    max_rows: int
    model: Model
    items: Sequence[Item]
    rows: Sequence[int]
    group: tuple[int, ...]
    threads: int = 1
    plain: bool = False
    crowded: bool = False
    outcomes: list[Outcome] = field(default_factory=list)
    started_ns: int = 0
    finished_ns: int = 0
    gather_us: float = 0.0
    h2d_us: float = 0.0
    compute_us: float = 0.0
    d2h_us: float = 0.0
    latency_us: float = 0.0
    memory_free_mb: float = 0.0
    exhausted: bool = False
    safe_rows: int = 0
    mixes: str = ""
    fatal: str = ""

    @property
    def run_us(self) -> float:
        """Microseconds that it ran."""
        return (self.finished_ns - self.started_ns) / 1e3


class LoadReport(NamedTuple):
    """Findings of loading a model on a device.

    Attributes:
        costs: (rows, microseconds) of the warm-up's batches, for the cost model; (tokens, microseconds) where requests
            of different lengths share batches.
        padded: (rows, length, microseconds) of the same batches where they are padded.
        widths: (rows, microseconds on one core, microseconds with a team) of batches that were run both ways.
        threads: that each batch must have, by the model's own wish or since it answers otherwise with more; 0: any.
        nbytes: bytes of the weights and buffers on the device.
        warmed: whether the model could be run at all.
        batches: whether axis 0 was found to count rows. joins: whether requests of different lengths may share a batch.
        serial: whether one request at a time may use the model.
        state: one of STATES.
        random: whether answers are drawn by chance.
        tolerance: largest difference between two computations of an answer that is rounding, relative to the largest
            value of the answer.
        safe_rows: most rows of one forward that memory allowed, where more rows ran out of it; 0: all that were tried.
        most_rows: most rows that were tried, where more rows would have taken too great a share of the free memory; 0:
            all were tried.
        examples: shapes of the inputs that were tried, where these are not those of the model.
        notes: sentences for an operator.
        variant: name of the variant of the network that runs; "": it runs as it is.
    """

    costs: list[tuple[int, float]]
    nbytes: int
    warmed: bool = True
    batches: bool = True
    serial: bool = False
    state: str = PURE
    random: bool = False
    tolerance: float = 0.0
    safe_rows: int = 0
    most_rows: int = 0
    examples: tuple[tuple[int, ...], ...] = ()
    widths: tuple[tuple[int, float, float], ...] = ()
    threads: int = 0
    notes: tuple[str, ...] = ()
    joins: bool = False
    padded: Sequence[tuple[int, int, float]] = ()
    variant: str = ""


class Executor(Protocol):
    """Executor of a device: it runs batches, on its lanes or on the calling thread.

    Attributes:
        name: of the device, as torch has it. kind: key of `tnxd.device_kinds.KINDS`. description: for an operator.
        lanes: how many batches at a time. teams: of threads, for batches that run wide.
        shares_chip: whether all lanes share one processor: two batches at a time take as long as one after the other.
            What an execution then waits for those before it does not count as time that it ran, see `Execution`.
        streams: of the device, where lanes share it: lane `i` issues its batches to stream `i % streams`.
        runs_inline: whether `run_inline` may be called.
    """

    name: str
    kind: str
    description: str
    lanes: int
    shares_chip: bool
    streams: int
    teams: Teams
    runs_inline: bool

    def load(self, model: Model) -> LoadReport:
        """Put a replica of a model on the device and warm it up, while the lanes go on serving. Blocks.

        Raises:
            Exception: whatever the model raised; the device goes on without the model.
        """

    def touch(self, model: Model) -> None:
        """Run a loaded model once on every lane, since a thread's first batch takes longer. Blocks; for the start."""

    def unload(self, key: str) -> None:
        """Free the memory of the model of that key. None of its batches may be waiting or running. Blocks."""

    def give_up_variant(self, key: str) -> None:
        """Have the network of the model of that key run as it is from now on, where a variant of it does."""

    def forget_inline(self, key: str) -> None:
        """Free the buffers that the calling thread keeps for `run_inline` of the model of that key."""

    def submit(self, execution: Execution) -> None:
        """Run an execution on its lane. The lane's thread calls `on_done` with it, once, when it is over."""

    def run_inline(self, execution: Execution) -> None:
        """Run an execution on the calling thread, which called `adopt_thread` before."""

    def adopt_thread(self) -> None:
        """Prepare the calling thread for `run_inline`."""

    def memory_mb(self) -> tuple[float, float]:
        """Free and total memory of the device in MiB. Never blocks."""

    def failure(self) -> str:
        """Why the device is lost for good, also where no batch has shown that; "" as far as is known. Never blocks."""
