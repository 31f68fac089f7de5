"""Correction of forecasts by what became of the requests of a batch."""

from __future__ import annotations

from tnxd.scheduling.device import Batch
from tnxd.scheduling.forecast import Forecast
from tnxd.scheduling.queue_admission import BEHIND_NS
from tnxd.scheduling.request import NEVER


def correct_forecast(forecast: Forecast, batch: Batch, now_ns: int) -> None:
    """Correct the forecast by what became of the requests of a batch."""
    device, first, last = batch.device, batch.requests[0], batch.requests[-1]
    if batch.run_us:
        if device.chip is not None:
            forecast.observe(batch.run_us, batch.chip_us)
        else:
            at_once = device.lanes // batch.threads
            elapsed_ns = at_once * (now_ns - device.backlog_ns) if device.backlog_ns else now_ns - batch.started_ns
            forecast.observe(batch.run_us, elapsed_ns / 1e3)
        forecast.answered(first.predicted_us, (now_ns - first.added_ns) / 1e3)
    device.backlog_ns = now_ns if device.queued else 0
    deadlines_ns = [request.deadline_ns for request in batch.requests]
    late = sum([deadline_ns < now_ns for deadline_ns in deadlines_ns]) if min(deadlines_ns) < now_ns else 0
    # To keep a promise is easy where nothing waits.
    waited = last.wait_us or (last.came_ns and last.added_ns - last.came_ns > BEHIND_NS)
    in_time = len(deadlines_ns) - late if waited and last.deadline_ns != NEVER else 0
    if late or in_time:
        forecast.fared(late, in_time)
