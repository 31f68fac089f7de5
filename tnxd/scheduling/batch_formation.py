"""Batch formation: which requests of a device run next, on which of its free lanes."""

from __future__ import annotations

from tnxd.lanes import INLINE
from tnxd.scheduling.accounts import Accounts
from tnxd.scheduling.costs import CostCurve
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.lane_choice import give_lane_back, take_lane
from tnxd.scheduling.ragged import RaggedQueue, padded
from tnxd.scheduling.request import NEVER, Request
from tnxd.scheduling.request_queue import RequestQueue
from tnxd.scheduling.running_ahead import opens_ns

# Queues that are looked at, while all lanes are busy, for a batch that is cheap enough to run inline.
_MAX_PASSED_OVER = 8

# Where many more wait than fit, the next batch leaves out requests that it would finish just in time: it may take a
# little longer than expected, and their places would be lost. This fraction of the spread of its cost is a little.
_CLOSE = 0.5


def fill_lanes(accounts: Accounts, device: Device, now_ns: int, batches: list[Batch], late: list[Request]) -> None:
    """Form batches for the free lanes of a device from its own queues, at most one of them INLINE.

    Requests that would be late in the batch whose turn it is leave their queue and are appended to `late`.
    """
    inline_free = device.inline_limit_us > 0
    passed_over: list[tuple[RequestQueue, int]] = []
    while (inline_free or device.free_lanes) and (level := device.next_level()) is not None:
        queue = device.turns[level].first()
        assert queue is not None  # the level has members
        head = queue.head(level)
        if head is None:
            device.turns[level].withdraw(queue)  # all its requests of this level are cancelled or late
            continue
        if queue.exclusive and device.chip is not None and not device.chip.is_idle:
            device.reserved = True
            break
        costs, placement = queue.costs, queue.placement
        if placement.load.max_lanes and placement.has_all_lanes:
            held = device.held.setdefault(placement, set())
            if device.queued == sum([other.queued for other in device.held]):
                break  # nothing else waits
            device.turns[level].withdraw(queue)
            held.add((queue, level))
            continue
        limit = head.max_batch_size
        if placement.max_rows:
            limit = placement.row_limit(limit)
        ragged = queue if head.length and isinstance(queue, RaggedQueue) else None
        part = ragged.part(head, limit) if ragged is not None else None
        rows = max(head.rows, min(limit, queue.rows)) if part is None else part.units
        if device.chip is not None and device.free_lanes and queue.rows < limit > head.rows:
            device.opens_ns = opens_ns(device, queue, rows, now_ns)
            if device.opens_ns > now_ns:
                break
        fits = inline_free and costs.fits_inline(rows)
        if inline_free and not fits and part is None and queue.has_light_connection(level):
            # A light connection does not wait until a lane is done with what others have sent.
            within = costs.rows_inline(rows)
            if within >= head.rows > 0:
                limit, rows, fits = within, within, True
        if fits:
            lane, threads, curve, inline_free = INLINE, 1, costs.inline, False
        elif device.free_lanes and (way := take_lane(device, queue, rows, limit)) is not None:
            lane, threads, curve, limit = way
            if part is None and 0 < limit < rows:
                rows = max(limit, head.rows)
        elif len(passed_over) == _MAX_PASSED_OVER:
            break
        else:  # no lane for this one; perhaps there is a cheap one behind it
            device.turns[level].withdraw(queue)
            passed_over.append((queue, level))
            continue
        narrow_us = part.micros if part is not None and threads == 1 else 0.0
        planned, run_us = rows, narrow_us or curve.mean(rows)
        begin_ns = now_ns if device.chip is None else device.chip.begins_ns(run_us, now_ns, lane)
        if begin_ns + run_us * 1e3 > head.deadline_ns:
            if ragged is not None and part is not None:
                part, run_us = ragged.shrink(head, part, curve, begin_ns)
            else:
                limit, run_us = shrink_for_deadline(queue, curve, level, head, limit, run_us, begin_ns)
        ends_ns = begin_ns + int(run_us * 1e3)
        if head.deadline_ns != NEVER:
            close_ns = ends_ns + int(_CLOSE * curve.spread(rows) * 1e3)
            if head.deadline_ns < close_ns and queue.rows - queue.rows_due(level, close_ns) >= (limit or 1):
                ends_ns = close_ns
        first_late = len(late)
        if ragged is not None and part is not None:
            in_time = ragged.take_part(level, head, part, ends_ns, late)
        else:
            in_time = queue.take(level, limit, ends_ns, late)
        accounts.dequeue(device, queue, in_time)
        if len(late) > first_late:
            accounts.dequeue(device, queue, late[first_late:])
            placement.forecast.fared(len(late) - first_late, 0)
        device.end_turn(queue, level)
        rows = sum([request.rows for request in in_time])
        if not in_time:
            inline_free = inline_free or lane == INLINE
            if lane != INLINE:
                give_lane_back(device, lane)
            continue
        length = 0
        if ragged is not None:
            rows, length = padded(in_time)
            if rows != planned and threads == 1:
                run_us, planned = ragged.surface.mean(rows // length, length) or curve.mean(rows), rows
        micros = run_us if rows == planned else curve.mean(rows)
        device.charge(level, micros * threads)
        batch = accounts.start_batch(device, lane, queue, in_time, rows, now_ns, micros, threads, length=length)
        batches.append(batch)
        if queue.exclusive:
            batch.alone = device.reserved = True
            break
    for queue, level in passed_over:
        device.offer(queue, level)


def shrink_for_deadline(
    queue: RequestQueue, curve: CostCurve, level: int, head: Request, limit: int, run_us: float, now_ns: int
) -> tuple[int, float]:
    """Shrink a batch of all that wait, which would make its head late, where that loses fewer rows.

    Sizes are tried from that of the full batch down to the largest one in time for the head. The rows that a size loses
    are those late in this batch, those late in the next one, and, where many wait, those that could be done in the time
    by which two batches take longer than one.

    Returns:
        Most rows of the batch, and its predicted microseconds.
    """
    rows = max(head.rows, min(limit, queue.rows))
    smallest = curve.rows_within((head.deadline_ns - now_ns) / 1e3, rows)
    best = limit, run_us
    if smallest < max(head.rows, 1):
        return best
    full_us, fewest = curve.mean(limit), float(queue.rows)
    size = rows
    while True:
        micros = curve.mean(size)
        late = 0 if size == smallest else min(queue.rows_due(level, now_ns + int(micros * 1e3)), queue.rows)
        lost = float(late)
        gone = late + min(size, queue.rows - late)
        if gone < queue.rows:
            next_ns = now_ns + int((micros + curve.mean(min(limit, queue.rows - gone))) * 1e3)
            lost += max(min(queue.rows_due(level, next_ns), queue.rows) - gone, 0)
        if size < rows and 2 * queue.rows > limit:
            lost += max(micros + curve.mean(rows - size) - run_us, 0.0) * limit / full_us
        if lost < fewest:
            best, fewest = (size, micros), lost
        if size == smallest:
            return best
        size = max(size // 2, smallest)
