"""Requests as scheduling knows them."""

from __future__ import annotations

import msgspec

from tnxctl.protocol.wire import DEFAULT_PRIORITY, LOWEST_PRIORITY

LEVELS = LOWEST_PRIORITY + 1
"""Number of priorities: 0 goes first."""

NEVER = 2**63 - 1
"""No deadline, in nanoseconds."""


BATCH, DEVICE = 1, 2
"""Flags of a request: what it has for itself alone."""


class Request(msgspec.Struct, eq=False, gc=False):
    """Request with what the policy needs to know of it. The server derives its own kind from it.

    Attributes:
        model: key of the model. max_batch_size: its row limit, 0 if it cannot be batched. max_delay_ns: how long a
            smaller batch may wait for company.
        group: requests share a batch only if model and group are equal.
        rows, nbytes: size of the inputs. Where requests of different lengths share batches, rows are tokens.
        client, peer: whose it is, and the connection it came by; clients share a device fairly, and so do the
            connections of one. share: of the client's turns, relative to those of others.
        wanted: "" to go by prefer_gpu and min_gpu_memory_mb, "auto" for the device that is done first, or a device
            that it must run on.
        excluded: devices that had no memory left for it: it goes to others, unless it names one.
        alone: BATCH: it shares no batch, though others of its model and group wait (`tnxd.serving.quarantine`). DEVICE:
            while it runs, nothing else does there, since memory ran out for it beside others.
        priority: 0 to LEVELS - 1, 0 first.
        admitted: whether it is part of something that was taken in before: no limit and no prediction refuses it.
        deadline_ns: when it is worthless; NEVER. came_ns: when it came, from which its deadline
            was counted; 0: when it is added.
        length: of its rows, which are padded to the longest of the batch; 0: they are not. `rows` is a multiple of it.
        most_rows: most rows of such a batch, where `max_batch_size` is in tokens.
        device, reason, predicted_us: filled by `Scheduler.add`: where it will run, why there, and the microseconds
            until it will be done. So are wait_us, of these the wait; cost_us, its share of a full batch; due_ns, its
            place in the order; added_ns, when that was; serial, which grows with every request.
        waiting: whether it is in a queue. done: whether it has been answered; set by the caller.
    """

    model: str
    max_batch_size: int
    rows: int = 1
    nbytes: int = 0
    group: tuple[int, ...] = ()
    client: str = ""
    peer: bytes = b""
    wanted: str = ""
    prefer_gpu: bool = True
    min_gpu_memory_mb: float = 0.0
    priority: int = DEFAULT_PRIORITY
    deadline_ns: int = NEVER
    max_delay_ns: int = 0
    came_ns: int = 0
    length: int = 0
    most_rows: int = 0
    excluded: frozenset[str] = frozenset()
    alone: int = 0
    admitted: bool = False
    share: float = 1.0
    device: str = ""
    reason: str = ""
    predicted_us: float = 0.0
    wait_us: float = 0.0
    cost_us: float = 0.0
    due_ns: int = 0
    added_ns: int = 0
    serial: int = 0
    waiting: bool = False
    done: bool = False
