"""Choice of the lane of a batch, and of how wide it runs there: on one core or on several."""

from __future__ import annotations

from typing import NamedTuple

from tnxd.scheduling.costs import CostCurve
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.request_queue import RequestQueue
from tnxd.scheduling.width import WideCurve, Width

# What lasts longer is shared out among free lanes where it then takes less time by this factor. Less is not worth the
# hand-over to another thread.
_SHARED_FROM_US = 2_000.0
_SHARED_GAIN = 1.2


def next_curve(device: Device, queue: RequestQueue, rows: int) -> CostCurve:
    """Curve of the way that a batch of `rows` would run next: on the caller's thread, narrow or wide."""
    costs, width = queue.costs, queue.placement.width
    if width is None or width.threads or device.queued or device.busy_until_ns or costs.fits_inline(rows):
        return costs.curve(rows)
    return WideCurve(costs.lane, width) if width.goes_wide(costs.lane.mean(rows)) else costs.lane


class Way(NamedTuple):
    """Way of a batch: its lane, its threads, what it is expected to take, and the most rows it should have."""

    lane: int
    threads: int
    curve: CostCurve
    limit: int


def take_lane(device: Device, queue: RequestQueue, rows: int, limit: int) -> Way | None:
    """Take a free lane for a batch, and choose how wide it runs there; None: no lane is free for it.

    Args:
        rows: that it would have. limit: most rows of a batch; 0: no axis counts rows.
    """
    lane_curve, width, free = queue.costs.lane, queue.placement.width, device.free_lanes
    if width is None:
        return Way(_next_free(device), 1, lane_curve, limit) if free else None
    teams = device.teams
    if width.threads > 1:
        taken = take_any_lane(device, width)
        return None if taken is None else Way(*taken, lane_curve, limit)
    if device.queued == queue.count:  # nothing else waits
        shared = _shared_rows(device, queue, rows)
        shared_us = lane_curve.mean(shared)
        if (queue.count == 1 or rows >= queue.rows) and device.has_cores_for_team:
            wide_us = _wide_us(width, lane_curve.mean(rows))
            if wide_us > 0.0 and (shared == rows or wide_us < shared_us):
                lane = _free_team(device)
                if lane is not None:
                    return Way(lane, teams.threads, WideCurve(lane_curve, width), limit)
        if shared < rows:
            limit = shared
    return Way(free.pop(), 1, lane_curve, limit) if free else None


def _wide_us(width: Width, lane_us: float) -> float:
    """Expected microseconds of a wide batch; 0 if it should not be one."""
    return lane_us * width.of_wide(lane_us)[0] if width.goes_wide(lane_us) else 0.0


def _shared_rows(device: Device, queue: RequestQueue, rows: int) -> int:
    """Rows of a narrow batch, where all free lanes take their part of what waits; `rows` if that does not pay."""
    lanes, placement = len(device.free_lanes), queue.placement
    if placement.load.max_lanes:
        lanes = min(lanes, placement.load.max_lanes - len(placement.lanes))
    if lanes < 2 or queue.count < 2:
        return rows
    lane_curve = queue.costs.lane
    part = max(-(-queue.rows // lanes), 1)
    lane_us = lane_curve.mean(rows)
    if part >= rows or lane_us < _SHARED_FROM_US or lane_us < _SHARED_GAIN * lane_curve.mean(part):
        return rows
    return part


def _next_free(device: Device) -> int:
    """A lane that is free, which is taken: where lanes share streams, one of the stream with the fewest batches."""
    free, chip = device.free_lanes, device.chip
    if chip is None or chip.streams == device.lanes:
        return free.pop()
    lane = min(free, key=chip.load)
    free.remove(lane)
    return lane


def _free_team(device: Device) -> int | None:
    """A free lane that may run wide, which is taken; None: there is none."""
    for lane in range(device.teams.lanes):
        if lane in device.free_lanes:
            device.free_lanes.remove(lane)
            return lane
    return None


def take_any_lane(device: Device, width: Width | None) -> tuple[int, int] | None:
    """Take a free lane for a batch that is not to be wide unless its model says so; None: no lane is free for it.

    Returns:
        The lane, and the threads of the batch.
    """
    if width is not None and width.threads > 1:
        lane = _free_team(device)
        return None if lane is None else (lane, min(width.threads, device.teams.threads))
    return (_next_free(device), 1) if device.free_lanes else None


def give_lane_back(device: Device, lane: int) -> None:
    """Note that a lane is free. Those that may run wide come first, to be taken last by narrow batches."""
    if lane < device.teams.lanes:
        device.free_lanes.insert(0, lane)
    else:
        device.free_lanes.append(lane)


def learn(batch: Batch, width: Width | None, micros: float) -> None:
    """Learn from a batch that ran on a lane for so long."""
    costs, rows, wide = batch.costs, batch.rows, batch.threads > 1
    if width is not None and batch.had_cores and not width.threads:
        width.observe(costs.lane.mean(rows), micros, wide=wide)
    if not wide or (width is not None and width.threads):
        costs.observe_lane(rows, micros)
