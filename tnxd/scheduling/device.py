"""Devices as scheduling sees them, and the batches that run there."""

from __future__ import annotations

from dataclasses import dataclass, field

from tnxd.device_kinds import KINDS
from tnxd.lanes import NO_TEAMS, Teams
from tnxd.scheduling.chip import Chip
from tnxd.scheduling.cost_surface import CostSurface
from tnxd.scheduling.costs import BatchCosts
from tnxd.scheduling.placement import Placement
from tnxd.scheduling.request import LEVELS, Request
from tnxd.scheduling.request_queue import RequestQueue
from tnxd.scheduling.round_robin import DeadlineRoundRobin

# Tickets of each level: its share of the device's time while all have work. The last one keeps moving, too.
_TICKETS = (8.0, 4.0, 2.0, 1.0)

# Stride of each level: by how much a microsecond of the device moves its pass on.
_STRIDES = tuple(1.0 / tickets for tickets in _TICKETS)

# What a batch is charged with that nothing is known about, in microseconds: a level whose batches always fail must not
# have the device for nothing.
_UNKNOWN_US = 1000.0


@dataclass(slots=True)
class Batch:
    """Batch of requests that runs on one lane.

    Attributes:
        lane: INLINE, BACKGROUND, or an index below the device's lane count.
        model: key of the model.
        requests: none in a background batch, which counts as one request that runs.
        costs: learn from how long the batch took.
        max_rows: most rows in one forward, since more ran out of memory; 0: as many as the model allows.
        started_ns: when it was formed.
        run_us: predicted microseconds; 0: nobody knows.
        threads: that work on it. had_cores: whether it found cores enough idle to run wide.
        hung: whether it hangs, see `Scheduler.mark_hung`.
        length: of its rows, padded to the longest of them; 0: they are not padded. Then `rows` are tokens.
        surface: learns from how long a batch of that length took.
        preparation_us: what it took until it was on a device whose lanes share a chip. Set by the caller.
        alone: whether nothing else runs on its device meanwhile. stolen: whether it was queued for another device.
        chip_us: microseconds that it took of a chip that lanes share, once it is over (`Chip.end`).
    """

    device: Device
    lane: int
    model: str
    requests: list[Request]
    rows: int
    costs: BatchCosts = field(default_factory=BatchCosts)
    max_rows: int = 0
    started_ns: int = 0
    run_us: float = 0.0
    threads: int = 1
    had_cores: bool = False
    hung: bool = False
    length: int = 0
    surface: CostSurface | None = None
    preparation_us: float = 0.0
    alone: bool = False
    stolen: bool = False
    chip_us: float = 0.0


@dataclass(slots=True, eq=False)
class Device:
    """Device with its lanes, its queues, and their order.

    Attributes:
        kind: key of `tnxd.device_kinds.KINDS`. is_gpu: as there.
        lanes: batches that it runs at a time.
        models: keys of the models that are loaded on it; they come and go.
        memory_free_mb: in MiB, as last reported; used for GPUs.
        inline_limit_us: a batch predicted to take no longer runs on the caller's own thread, since handing it to
            another would cost more than it saves. 0: never.
        teams: of threads, for batches that run wide.
        shares_chip: whether batches on its lanes slow each other down. streams: where they do, those that lanes take by
            turns; batches of one stream run one after the other. 0: each lane has one.
        chip: what lanes share; None: each has a core of its own.
        error: why the device failed; empty while it works.
        free_lanes: indices of lanes that have nothing to do.
        background_free: whether the BACKGROUND lane has nothing to do.
        opens_ns: when a batch may begin on a free lane that is not to begin yet (`running_ahead`).
        reserved: whether nothing begins until all that runs is over, for a batch that is to have the device alone.
        placements: of models that came here, by key.
        queues: by model, group and what their requests have for themselves alone, empty ones too.
        sweep_at: how many queues there may be before the empty ones are dropped.
        queued, queued_rows: requests that wait here, and their rows.
        running_rows: rows of the batches that run.
        counts: requests that wait, per priority.
        turns: order of the queues, per priority.
        held: placements that run on as many lanes as they may, and their queues that take no turns on that priority
            until one of these lanes is free.
        passes: pass of each priority in stride scheduling: the device's time that it used, divided by its tickets.
        global_pass: pass of the priority that was served last.
        busy_until_ns: per running lane, when its batch should be over. wide: lanes that run wide -> threads.
        backlog_us: predicted cost of what waits, per priority.
        backlog_ns: when the last batch was over, if requests waited then; else 0.
        busy_ns, inline_ns: time that batches have run on lanes, a wide one once for each of its threads, and on the
            caller's thread. The caller counts it, but for lanes that share a chip, which does (`Chip.busy_ns`).
    """

    name: str
    kind: str
    lanes: int
    models: set[str]
    memory_free_mb: float = 0.0
    inline_limit_us: float = 0.0
    teams: Teams = NO_TEAMS
    shares_chip: bool = False
    streams: int = 0
    error: str = ""
    is_gpu: bool = field(init=False)
    chip: Chip | None = field(init=False, default=None)
    free_lanes: list[int] = field(init=False)
    background_free: bool = field(init=False, default=True)
    busy_until_ns: dict[int, int] = field(init=False, default_factory=dict)
    wide: dict[int, int] = field(init=False, default_factory=dict)
    opens_ns: int = field(init=False, default=0)
    reserved: bool = field(init=False, default=False)
    placements: dict[str, Placement] = field(init=False, default_factory=dict)
    queues: dict[tuple[str, tuple[int, ...], int], RequestQueue] = field(init=False, default_factory=dict)
    sweep_at: int = field(init=False, default=0)
    held: dict[Placement, set[tuple[RequestQueue, int]]] = field(init=False, default_factory=dict)
    backlog_us: list[float] = field(init=False, default_factory=lambda: [0.0] * LEVELS)
    backlog_ns: int = field(init=False, default=0)
    busy_ns: int = field(init=False, default=0)
    inline_ns: int = field(init=False, default=0)
    queued: int = field(init=False, default=0)
    queued_rows: int = field(init=False, default=0)
    running_rows: int = field(init=False, default=0)
    turns: list[DeadlineRoundRobin[RequestQueue]] = field(
        init=False, default_factory=lambda: [DeadlineRoundRobin() for _ in range(LEVELS)]
    )
    counts: list[int] = field(init=False, default_factory=lambda: [0] * LEVELS)
    passes: list[float] = field(init=False, default_factory=lambda: [0.0] * LEVELS)
    global_pass: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.is_gpu = KINDS[self.kind].is_gpu
        self.free_lanes = list(range(self.lanes))
        if self.shares_chip:
            self.chip = Chip(self.streams or self.lanes)

    @property
    def at_once(self) -> int:
        """Batches that it does in the time of one: as many as lanes, unless these share a chip."""
        return self.lanes if self.chip is None else 1

    @property
    def outstanding_rows(self) -> int:
        """Rows that wait or run here: the measure of load that routing compares."""
        return self.queued_rows + self.running_rows

    def is_eligible(self, request: Request) -> bool:
        """Whether a request that may run anywhere may run here."""
        if self.error or request.model not in self.models or self.name in request.excluded:
            return False
        return not self.is_gpu or self.memory_free_mb >= request.min_gpu_memory_mb

    def may_steal(self, request: Request) -> bool:
        """Whether a request that waits for another device may run here."""
        return request.wanted == "auto" and self.is_eligible(request)

    def clear_in_us(self, now_ns: int) -> float:
        """Predicted microseconds until all that runs and waits here is done."""
        return (sum(self.backlog_us) + self.running_us(now_ns)) / self.at_once

    def running_us(self, now_ns: int) -> float:
        """Predicted microseconds of a lane that are left of what runs here; a wide batch uses those of several."""
        if self.chip is not None:
            return sum(self.chip.left_us(now_ns))
        left_ns = sum([until_ns - now_ns for until_ns in self.busy_until_ns.values() if until_ns > now_ns])
        if self.wide:
            for lane, threads in self.wide.items():
                left_ns += (threads - 1) * max(self.busy_until_ns[lane] - now_ns, 0)
        return left_ns / 1e3

    @property
    def has_cores_for_team(self) -> bool:
        """Whether so many cores have nothing to do that a batch may run wide."""
        used = len(self.busy_until_ns) + sum([threads - 1 for threads in self.wide.values()])
        return self.teams.cores - used >= self.teams.threads

    # --- which level: stride scheduling (Waldspurger and Weihl, 1995) --------------------------------------------

    def next_level(self) -> int | None:
        """Priority whose turn it is: the one with the smallest pass; None if nothing takes turns."""
        best = None
        for level in range(LEVELS):
            if self.turns[level].members and (best is None or self.passes[level] < self.passes[best]):
                best = level
        return best

    def charge(self, level: int, micros: float) -> None:
        """Advance the pass of a level, which has used so many microseconds of the device; 0 if that is not known."""
        used = self.passes[level]
        if used > self.global_pass:
            self.global_pass = used
        self.passes[level] = used + (micros or _UNKNOWN_US) * _STRIDES[level]

    def wake(self, level: int) -> None:
        """Move the pass of a level that had nothing to run up to the global pass: it makes up for nothing.

        That is the pass of the level that was served last (start-time fair queueing; Goyal, Vin and Cheng, 1996).
        """
        if self.passes[level] < self.global_pass:
            self.passes[level] = self.global_pass

    # --- which queue of a level ----------------------------------------------------------------------------------

    def offer(self, queue: RequestQueue, level: int) -> None:
        """Let a queue take turns on a level, if something of that level waits in it."""
        head = queue.head(level)
        if head is not None:
            self.turns[level].offer(queue, head.due_ns, head.serial)

    def end_turn(self, queue: RequestQueue, level: int) -> None:
        """Put a queue that has had its turn behind the others, or out if it is empty."""
        self.turns[level].served(queue)
        self.withdraw_empty_levels(queue)
        if queue.count:
            self.offer(queue, level)

    def withdraw_empty_levels(self, queue: RequestQueue) -> None:
        """Let a queue that requests have left take no turns on levels where nothing of it is left."""
        if not queue.count:
            self.withdraw(queue)
            return
        for level in range(LEVELS):
            if queue.head(level) is None:
                self.turns[level].withdraw(queue)

    def withdraw(self, queue: RequestQueue) -> None:
        """Let a queue that is empty take no turns."""
        for turns in self.turns:
            if turns.members:
                turns.withdraw(queue)

    def release(self, placement: Placement) -> None:
        """Let queues that were held until a lane of their model is free take turns again."""
        for queue, level in self.held.pop(placement, ()):
            if not self.turns[level].members:
                self.wake(level)
            self.offer(queue, level)

    # --- counts --------------------------------------------------------------------------------------------------

    def enqueue(self, level: int, rows: int, micros: float) -> None:
        """Count a request that joins a level."""
        if not self.counts[level]:
            self.wake(level)
        self.counts[level] += 1
        self.queued += 1
        self.queued_rows += rows
        self.backlog_us[level] += micros

    def dequeued(self, count: int, rows: int) -> None:
        """Count off requests that have left; `counts` and `backlog_us` know already."""
        self.queued -= count
        self.queued_rows -= rows
        if not self.queued:
            self.backlog_us = [0.0] * LEVELS  # rounding errors do not add up
