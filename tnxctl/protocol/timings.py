"""Times that a request spent in the daemon, stage by stage."""

from __future__ import annotations

import msgspec


class Timing(msgspec.Struct, frozen=True, gc=False):
    """Microseconds that a request spent in each stage in the daemon. The seven stages sum to `total_us`.

    Attributes:
        receive_us: taking the frames from the socket, decoding and validating them.
        queue_us: waiting for a lane.
        gather_us: placing the rows of the batch side by side in the staging buffer.
        h2d_us: host to device copy (0 on a CPU).
        compute_us: the forward, with its launch.
        d2h_us: device to host copy (0 on a CPU).
        reply_us: from the end of the batch to the encoding of this reply.
    """

    receive_us: float
    queue_us: float
    gather_us: float
    h2d_us: float
    compute_us: float
    d2h_us: float
    reply_us: float
    total_us: float


class StepTiming(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One step of a pipeline: what ran, where, and the microseconds that it took. Steps may run at the same time.

    Attributes:
        name: of the step. model, version: what ran. device: where.
        batch_size: rows in the batch that it rode in, its own included.
        start_us: from when the request was taken up to when the step was queued.
        queue_us, gather_us, h2d_us, compute_us, d2h_us: as in `Timing`.
    """

    name: str
    model: str
    version: str
    device: str
    batch_size: int
    start_us: float
    queue_us: float
    gather_us: float
    h2d_us: float
    compute_us: float
    d2h_us: float
