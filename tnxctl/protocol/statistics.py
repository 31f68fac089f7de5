"""Raw counts of a daemon since its start, of which every reader takes its own differences.

Counters only grow, as long as `StatsReport.started_s` is the same. Times are in microseconds.
"""

from __future__ import annotations

import msgspec

from tnxctl.protocol.fields import Id, Version
from tnxctl.protocol.histograms import Histogram
from tnxctl.protocol.timings import Timing

STAGES = ("receive", "queue", "gather", "h2d", "compute", "d2h", "reply", "total")
"""Stages of a request, by the fields of `Timing` without `_us`."""


class VersionStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one version of a model.

    Attributes:
        name, version: of the model.
        requests: for this version, those included that were refused: replies, errors, abandoned ones, and those in
            flight. replies: results sent. errors: error replies by code. abandoned: never answered, since their client
            was gone or, of a step of a pipeline, since another step had failed.
        rows: computed. batches: that gave results; a pipeline has none of its own.
        batch_rows: rows per batch. stages: by `STAGES`, of the requests with results.
        prediction_error: distance between predicted and actual time, queue to d2h.
        deadlines_met, deadlines_missed: results that went out before their deadline; those that did so later, and
            errors DEADLINE_EXCEEDED.
        steals: batches that another device took than the one they were queued for.
        splits: batches that ran again in parts after they had run out of memory.
        evictions: times that it was unloaded to make room.
        queued_rows: rows that wait now, or tokens where requests of different lengths share batches.
        predicted_wait_us: time until one more row would be done now; 0: it was not asked lately.
    """

    name: str
    version: str
    requests: int = 0
    replies: int = 0
    errors: dict[str, int] = {}
    abandoned: int = 0
    rows: int = 0
    batches: int = 0
    batch_rows: Histogram = Histogram()
    stages: dict[str, Histogram] = {}
    prediction_error: Histogram = Histogram()
    deadlines_met: int = 0
    deadlines_missed: int = 0
    steals: int = 0
    splits: int = 0
    evictions: int = 0
    queued_rows: int = 0
    predicted_wait_us: float = 0.0


class DeviceStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one device.

    Attributes:
        name, status: as in `DeviceInfo`.
        lanes: places where batches run. busy_us: time that they ran batches, summed over lanes; a batch on several
            cores counts for each of them, and lanes of a GPU are all busy while it has work. inline_us: time that
            batches ran on the serving thread.
        queued_rows: rows that wait for it now.
        memory_free_mb, memory_total_mb: as in `DeviceInfo`.
    """

    name: str
    status: str
    lanes: int = 0
    busy_us: float = 0.0
    inline_us: float = 0.0
    queued_rows: int = 0
    memory_free_mb: float = 0.0
    memory_total_mb: float = 0.0


class ClientStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one client that is connected.

    Attributes:
        name: as in `Identity`; "": all that have no entry of their own.
        requests: taken in. refused: messages that were answered with an error at once.
        in_flight: requests that have no answer yet. owed_bytes: of answers that it has not taken yet.
    """

    name: str
    requests: int = 0
    refused: int = 0
    in_flight: int = 0
    owed_bytes: int = 0


class StatsReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="stats"):
    """Answer to `Stats`.

    Attributes:
        status, version: as in `HealthReport`.
        started_s: when the daemon started, in seconds since 1970. uptime_us: since then, by a steady clock.
        models: one entry per version that is loaded, or was asked since the start and is known; of those that are not
            there any more, the last 256. devices: all.
        clients: those with most requests first, 20 at most, and the rest as one; only for admins.
        requests, replies, errors, resent, undeliverable, abandoned: as in `HealthReport`.
        queued, running, connections, connections_refused, connections_cut, traffic_mb, traffic_owed_mb,
            traffic_limit_mb: as there.
        loop_turns: turns of the serving loop, by their length without what it waited for work.
        log_lines_dropped: texts that found no room in the queues of the log and of what is printed.
        spans_dropped: sampled requests whose spans went nowhere: there was no room for them, or no receiver took them.
    """

    v: Version
    id: Id
    status: str
    version: str
    started_s: float
    uptime_us: float
    models: tuple[VersionStats, ...] = ()
    devices: tuple[DeviceStats, ...] = ()
    clients: tuple[ClientStats, ...] = ()
    requests: int = 0
    replies: int = 0
    errors: dict[str, int] = {}
    resent: int = 0
    undeliverable: int = 0
    abandoned: int = 0
    queued: int = 0
    running: int = 0
    connections: int = 0
    connections_refused: int = 0
    connections_cut: int = 0
    traffic_mb: float = 0.0
    traffic_owed_mb: float = 0.0
    traffic_limit_mb: float = 0.0
    loop_turns: Histogram = Histogram()
    log_lines_dropped: int = 0
    spans_dropped: int = 0


class SlowRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One of the slowest requests.

    Attributes:
        id: that its client gave it. client: name of the client; "" unless an admin asks.
        model, version, device, reason, batch_size, predicted_us, timing: as in `Result`.
        rows: of the request. priority: 0 to 3. deadline_us: time that it had; None: no deadline.
        attempt: as in `Predict`.
        age_s: seconds since it was answered.
    """

    id: int
    model: str
    version: str
    device: str
    reason: str
    batch_size: int
    predicted_us: float
    timing: Timing
    rows: int
    priority: int
    deadline_us: float | None = None
    attempt: int = 1
    age_s: float = 0.0
    client: str = ""


class Explanation(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="explain"):
    """Answer to `Explain`. Attributes: requests: the slowest first. kept_s: age at which they are forgotten."""

    v: Version
    id: Id
    requests: tuple[SlowRequest, ...] = ()
    kept_s: float = 60.0
