"""Work stealing: a device with nothing to do runs what waits for another."""

from __future__ import annotations

from collections.abc import Iterable

from tnxd.scheduling.accounts import Accounts
from tnxd.scheduling.costs import CostCurve
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.lane_choice import give_lane_back, take_any_lane
from tnxd.scheduling.routing import Routing
from tnxd.scheduling.running_ahead import runs_ahead

# Work stealing: an idle device takes at most this fraction of its own batch limit. It may be slower than the owner, and
# must soon be free for requests routed to it.
_STEAL_FRACTION = 0.5


def steal(
    accounts: Accounts, routing: Routing, thief: Device, victims: Iterable[Device], now_ns: int, batches: list[Batch]
) -> None:
    """Fill the free lanes of an idle device with batches of what waits for others."""
    for victim in victims:
        while thief.free_lanes and victim.queued and victim is not thief:
            batch = _steal_batch(accounts, routing, thief, victim, now_ns)
            if batch is None:
                break
            batches.append(batch)


def _steal_batch(accounts: Accounts, routing: Routing, thief: Device, victim: Device, now_ns: int) -> Batch | None:
    """Batch of requests that may run anywhere, if the thief is done with it before the victim has done all it has.

    Requests too urgent for the thief stay where they are. Of the others the most urgent go first.
    """
    level = victim.next_level()
    queue = victim.turns[level].first() if level is not None else None
    if level is None or queue is None or not queue.stealable:
        return None
    head = queue.head(level)
    if head is None or head.model not in thief.models:
        return None
    own = routing.queue(thief, *queue.key)
    curve, placement = own.costs.lane, own.placement
    if placement.load.max_lanes and placement.has_all_lanes:
        return None
    if thief.chip is not None and runs_ahead(thief):
        return None
    limit = placement.row_limit(head.max_batch_size)
    if head.length:  # of one length, and the limit is in tokens
        limit = min(limit, head.most_rows * head.length)
    most = max(int(_STEAL_FRACTION * limit), min(head.rows, limit), 1)
    begin_ns = now_ns if thief.chip is None else thief.chip.begins_ns(curve.mean(most), now_ns)
    rows, most = 0, curve.rows_within(victim.clear_in_us(now_ns) - (begin_ns - now_ns) / 1e3, most)
    while rows < most:
        middle = (rows + most + 1) // 2
        if queue.rows_due_outside(now_ns, _ends_ns(curve, middle, begin_ns)) >= middle:
            rows = middle
        else:
            most = middle - 1
    if not rows:
        return None
    taken = take_any_lane(thief, placement.width)
    if taken is None:
        return None
    requests = queue.steal(level, rows, now_ns, _ends_ns(curve, rows, begin_ns), thief.may_steal)
    if not requests:
        give_lane_back(thief, taken[0])
        return None
    accounts.dequeue(victim, queue, requests)
    victim.withdraw_empty_levels(queue)
    rows = 0
    for request in requests:
        request.device = thief.name
        request.reason += f"; then {thief.name} was free, and took it over"
        rows += request.rows
    micros = curve.mean(rows)
    thief.wake(level)
    lane, threads = taken
    thief.charge(level, micros * threads)
    batch = accounts.start_batch(thief, lane, own, requests, rows, now_ns, micros, threads, length=head.length)
    batch.stolen = True
    return batch


def _ends_ns(curve: CostCurve, rows: int, begin_ns: int) -> int:
    """Time by which a batch that starts then is over, but for rare ones."""
    return begin_ns + int((curve.mean(rows) + curve.spread(rows)) * 1e3)
