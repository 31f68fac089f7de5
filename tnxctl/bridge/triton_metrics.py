"""Metrics of a daemon by the names that Triton gives them, for boards and autoscalers that read those."""

from __future__ import annotations

from collections.abc import Callable

from tnxctl.bridge.exposition import VERSION_LABELS, Metric, Samples, of_version, stage_of, version_labels
from tnxctl.protocol.statistics import StatsReport, VersionStats

_FAILURES = {
    "CANCELLED": "CANCELED",
    "DEADLINE_EXCEEDED": "REJECTED",
    "INTERNAL": "BACKEND",
    "RESOURCE_EXHAUSTED": "REJECTED",
    "UNAVAILABLE": "REJECTED",
}
"""Triton's reason for a failure, by code; all others are OTHER."""


def _failure_samples(report: StatsReport) -> Samples:
    for version in report.models:
        counts = dict.fromkeys(("BACKEND", "CANCELED", "OTHER", "REJECTED"), 0)
        for code, count in version.errors.items():
            counts[_FAILURES.get(code, "OTHER")] += count
        before = version_labels(version)
        for reason, count in counts.items():
            yield f'{before},reason="{reason}"', count


def _microseconds(*stages: str) -> Callable[[VersionStats], int]:
    return lambda version: round(sum(stage_of(version, stage).sum for stage in stages))


TRITON_METRICS = (
    of_version(
        "nv_inference_request_success", "counter", "Requests that got a result.", lambda version: version.replies
    ),
    Metric(
        "nv_inference_request_failure",
        "counter",
        "Requests that got an error, by reason.",
        (*VERSION_LABELS, "reason"),
        _failure_samples,
    ),
    of_version("nv_inference_count", "counter", "Rows computed.", lambda version: version.rows),
    of_version("nv_inference_exec_count", "counter", "Batches that gave results.", lambda version: version.batches),
    of_version(
        "nv_inference_request_duration_us",
        "counter",
        "Microseconds of all requests with results, in the daemon.",
        _microseconds("total"),
    ),
    of_version(
        "nv_inference_queue_duration_us", "counter", "Microseconds that they waited for a lane.", _microseconds("queue")
    ),
    of_version(
        "nv_inference_compute_input_duration_us",
        "counter",
        "Microseconds of the stages gather and h2d.",
        _microseconds("gather", "h2d"),
    ),
    of_version(
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Microseconds of the stage compute.",
        _microseconds("compute"),
    ),
    of_version(
        "nv_inference_compute_output_duration_us", "counter", "Microseconds of the stage d2h.", _microseconds("d2h")
    ),
    of_version(
        "nv_inference_pending_request_count",
        "gauge",
        "Rows that wait: as many as requests, where each has one row.",
        lambda version: version.queued_rows,
    ),
)
"""Metrics of Triton (https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md)."""
