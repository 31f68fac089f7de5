"""Prometheus text of a daemon's counts (https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4).

Names begin with `tnx_`, and units are seconds and bytes. Labels are the daemon's own names of models, versions,
devices, stages and error codes: nothing that a request says becomes a series. `METRICS` is the list; docs/metrics.md
has it as a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.histograms import Histogram, bounds, bucket_of
from tnxctl.protocol.statistics import STAGES, DeviceStats, StatsReport, VersionStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

STATUSES = ("starting", "ready", "draining")
"""States of a daemon, see `HealthReport`."""

CODES = tuple(error.code for error in TensorNextError.__subclasses__())
"""Codes of errors, see `tnxctl.protocol.errors`."""

_MIB = 1024.0 * 1024.0


class Buckets(NamedTuple):
    """Buckets of a classic histogram. Each of their bounds is one of the counted histogram too, so no count is a guess.

    Attributes:
        edges: bounds of log-linear buckets, ascending: what is below counts.
        labels: the same bounds as the label `le` has them.
        unit: of the exposed sum, in units of the histogram.
    """

    edges: tuple[float, ...]
    labels: tuple[str, ...]
    unit: float


def _seconds() -> Buckets:
    """Powers of two from 16 µs to 34 s. A time of exactly a bound counts above it, where `le` would have it below."""
    edges = tuple(2.0**exponent for exponent in range(4, 26))
    return Buckets(edges, tuple(f"{edge / 1e6:.6f}".rstrip("0") for edge in edges), 1e6)


def _rows() -> Buckets:
    """Whole numbers, with powers of two, which most batches are, in narrow buckets of their own: 63 < rows <= 71.

    A bucket of whole numbers below `edge` is one up to `edge - 1`.
    """
    powers = [2.0**exponent for exponent in range(1, 11)]
    edges = tuple(sorted({edge for power in powers for edge in (power, max(power + 1.0, bounds(bucket_of(power))[1]))}))
    return Buckets(edges, tuple(f"{edge - 1:.0f}" for edge in edges), 1.0)


SECONDS = _seconds()
ROWS = _rows()

_VERSION = ("model", "version")

Value = float | Histogram
Samples = Iterator[tuple[str, Value]]


class Metric(NamedTuple):
    """One metric.

    Attributes:
        name, kind, help: as `# TYPE` and `# HELP` have them.
        labels: names of the labels, for the reader of a table.
        samples: labels as text, without braces, and value, of every series.
        buckets: of a histogram.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...]
    samples: Callable[[StatsReport], Samples]
    buckets: Buckets = SECONDS


def render(reports: Mapping[str, StatsReport | None], *, triton_names: bool = False) -> bytes:
    """Prometheus text of reports.

    Args:
        reports: by the address of the daemon, which is a label if there are several. None: it does not answer; then
            its `tnx_up` is 0, and all there is of it.
        triton_names: with the `nv_inference_*` counters as well, which boards and autoscalers for Triton read.
    """
    owners = {address: _labels(daemon=address) if len(reports) > 1 else "" for address in reports}
    lines = ["# HELP tnx_up Whether the daemon answers.", "# TYPE tnx_up gauge"]
    lines += (f"tnx_up{_braced(owners[address])} {int(report is not None)}" for address, report in reports.items())
    answered = [(owners[address], report) for address, report in reports.items() if report is not None]
    if answered:
        for metric in (*METRICS, *TRITON_METRICS) if triton_names else METRICS:
            lines += (f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}")
            for owner, report in answered:
                lines += _metric(metric, owner, report)
    lines.append("")
    return "\n".join(lines).encode()


def _metric(metric: Metric, owner: str, report: StatsReport) -> Iterator[str]:
    for own, value in metric.samples(report):
        labels = f"{owner},{own}" if owner and own else owner or own
        if isinstance(value, Histogram):
            yield from _histogram(metric.name, labels, value, metric.buckets)
        else:
            yield f"{metric.name}{_braced(labels)} {_number(value)}"


def _histogram(name: str, labels: str, histogram: Histogram, buckets: Buckets) -> Iterator[str]:
    before = f"{labels}," if labels else ""
    braces = _braced(labels)
    count = histogram.count
    for label, below in zip(buckets.labels, histogram.cumulative(buckets.edges), strict=True):
        yield f'{name}_bucket{{{before}le="{label}"}} {below}'
    yield f'{name}_bucket{{{before}le="+Inf"}} {count}'
    yield f"{name}_sum{braces} {_number(histogram.sum / buckets.unit)}"
    yield f"{name}_count{braces} {count}"


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def _labels(**values: str) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in values.items())


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


# --- how samples are read from a report -----------------------------------------------------------------------


def _of_daemon(
    name: str, kind: str, help: str, value: Callable[[StatsReport], Value], buckets: Buckets = SECONDS
) -> Metric:
    return Metric(name, kind, help, (), lambda report: iter([("", value(report))]), buckets)


def _of_version(
    name: str, kind: str, help: str, value: Callable[[VersionStats], Value], buckets: Buckets = SECONDS
) -> Metric:
    def samples(report: StatsReport) -> Samples:
        return ((_version_labels(version), value(version)) for version in report.models)

    return Metric(name, kind, help, _VERSION, samples, buckets)


def _of_device(name: str, kind: str, help: str, value: Callable[[DeviceStats], Value]) -> Metric:
    def samples(report: StatsReport) -> Samples:
        return ((_labels(device=device.name), value(device)) for device in report.devices)

    return Metric(name, kind, help, ("device",), samples)


def _version_labels(version: VersionStats) -> str:
    return _labels(model=version.name, version=version.version)


def _stage(version: VersionStats, stage: str) -> Histogram:
    return version.stages.get(stage, Histogram())


def _status_samples(report: StatsReport) -> Samples:
    for status in STATUSES:
        yield _labels(status=status), int(report.status == status)


def _build_samples(report: StatsReport) -> Samples:
    yield _labels(version=report.version), 1


def _stage_samples(report: StatsReport) -> Samples:
    for version in report.models:
        before = _version_labels(version)
        for stage in STAGES[:-1]:
            yield f'{before},stage="{stage}"', _stage(version, stage)


def _version_error_samples(report: StatsReport) -> Samples:
    for version in report.models:
        before = _version_labels(version)
        for code in _codes(version.errors):
            yield f"{before},{_labels(code=code)}", version.errors.get(code, 0)


def _error_samples(report: StatsReport) -> Samples:
    for code in _codes(report.errors):
        yield _labels(code=code), report.errors.get(code, 0)


def _codes(errors: Iterable[str]) -> list[str]:
    """Every code, seen or not: a counter that begins with its first error shows no rise, and so no alert sees it."""
    return sorted({*CODES, *errors})


METRICS = (
    Metric("tnx_build_info", "gauge", "Version of the daemon, as a label; 1.", ("version",), _build_samples),
    Metric(
        "tnx_status",
        "gauge",
        "1 for the state that the daemon is in: starting, ready or draining; 0 for the others.",
        ("status",),
        _status_samples,
    ),
    _of_daemon(
        "tnx_start_time_seconds",
        "gauge",
        "When the daemon started, in seconds since 1970. Counters begin anew then.",
        lambda report: report.started_s,
    ),
    # Models.
    _of_version(
        "tnx_requests_total",
        "counter",
        "Predict requests for a model, those included that were refused.",
        lambda version: version.requests,
    ),
    _of_version("tnx_replies_total", "counter", "Results of a model that were sent.", lambda version: version.replies),
    Metric(
        "tnx_errors_total",
        "counter",
        "Errors that were sent instead of results of a model, by code.",
        (*_VERSION, "code"),
        _version_error_samples,
    ),
    _of_version(
        "tnx_abandoned_requests_total",
        "counter",
        "Requests for a model that were never answered: their client was gone, or another step of a pipeline failed.",
        lambda version: version.abandoned,
    ),
    _of_version("tnx_rows_total", "counter", "Rows that a model computed.", lambda version: version.rows),
    _of_version(
        "tnx_batches_total",
        "counter",
        "Batches of a model that gave results.",
        lambda version: version.batches,
    ),
    _of_version("tnx_batch_rows", "histogram", "Rows in a batch.", lambda version: version.batch_rows, ROWS),
    _of_version(
        "tnx_request_duration_seconds",
        "histogram",
        "Time that a request with a result spent in the daemon: the sum of its stages.",
        lambda version: _stage(version, "total"),
    ),
    Metric(
        "tnx_stage_duration_seconds",
        "histogram",
        "Time that a request with a result spent in one stage.",
        (*_VERSION, "stage"),
        _stage_samples,
    ),
    _of_version(
        "tnx_prediction_error_seconds",
        "histogram",
        "Distance between the predicted and the actual time of a request, from its queueing to the end of its batch.",
        lambda version: version.prediction_error,
    ),
    _of_version(
        "tnx_deadlines_met_total",
        "counter",
        "Results that went out before their deadline.",
        lambda version: version.deadlines_met,
    ),
    _of_version(
        "tnx_deadlines_missed_total",
        "counter",
        "Results that went out after their deadline, and errors DEADLINE_EXCEEDED.",
        lambda version: version.deadlines_missed,
    ),
    _of_version(
        "tnx_stolen_batches_total",
        "counter",
        "Batches that another device took than the one they were queued for.",
        lambda version: version.steals,
    ),
    _of_version(
        "tnx_split_batches_total",
        "counter",
        "Batches that ran out of memory, and again in parts.",
        lambda version: version.splits,
    ),
    _of_version(
        "tnx_evictions_total",
        "counter",
        "Times that a model was unloaded to make room for another.",
        lambda version: version.evictions,
    ),
    _of_version(
        "tnx_queue_rows",
        "gauge",
        "Rows that wait for a model, or tokens where requests of different lengths share batches.",
        lambda version: version.queued_rows,
    ),
    _of_version(
        "tnx_predicted_wait_seconds",
        "gauge",
        "Time until one more row would be done, if it came now; 0 if nothing was asked lately.",
        lambda version: version.predicted_wait_us / 1e6,
    ),
    # Devices.
    _of_device(
        "tnx_device_ready",
        "gauge",
        "1 while a device is ready, 0 when it has failed.",
        lambda device: int(device.status == "ready"),
    ),
    _of_device(
        "tnx_device_lanes",
        "gauge",
        "Places of a device where batches run, one at a time each.",
        lambda device: device.lanes,
    ),
    _of_device(
        "tnx_device_busy_seconds_total",
        "counter",
        "Time that the lanes of a device ran batches, summed over its lanes. A batch on several cores counts for each.",
        lambda device: device.busy_us / 1e6,
    ),
    _of_device(
        "tnx_device_inline_seconds_total",
        "counter",
        "Time that batches of a device ran on the serving thread.",
        lambda device: device.inline_us / 1e6,
    ),
    _of_device("tnx_device_queue_rows", "gauge", "Rows that wait for a device.", lambda device: device.queued_rows),
    _of_device(
        "tnx_device_memory_free_bytes",
        "gauge",
        "Free memory of a device; for the CPU, of the host within the limits of the daemon.",
        lambda device: device.memory_free_mb * _MIB,
    ),
    _of_device(
        "tnx_device_memory_size_bytes",
        "gauge",
        "All memory of a device; for the CPU, of the host within the limits of the daemon.",
        lambda device: device.memory_total_mb * _MIB,
    ),
    # The daemon.
    _of_daemon(
        "tnx_daemon_requests_total",
        "counter",
        "Predict requests, and other messages that were refused.",
        lambda report: report.requests,
    ),
    _of_daemon("tnx_daemon_replies_total", "counter", "Results that were sent.", lambda report: report.replies),
    Metric(
        "tnx_daemon_errors_total",
        "counter",
        "Errors that were sent, by code, those included that concern no model.",
        ("code",),
        _error_samples,
    ),
    _of_daemon(
        "tnx_resent_requests_total",
        "counter",
        "Predict requests that had been sent before, as they said.",
        lambda report: report.resent,
    ),
    _of_daemon(
        "tnx_undeliverable_replies_total",
        "counter",
        "Answers whose client was gone.",
        lambda report: report.undeliverable,
    ),
    _of_daemon(
        "tnx_daemon_abandoned_requests_total",
        "counter",
        "Requests taken out of the queue because their client was gone.",
        lambda report: report.abandoned,
    ),
    _of_daemon("tnx_queued_requests", "gauge", "Requests that wait.", lambda report: report.queued),
    _of_daemon("tnx_running_requests", "gauge", "Requests on a lane.", lambda report: report.running),
    _of_daemon("tnx_connections", "gauge", "Connections of clients.", lambda report: report.connections),
    _of_daemon(
        "tnx_connections_refused_total",
        "counter",
        "Connections that were not let in.",
        lambda report: report.connections_refused,
    ),
    _of_daemon(
        "tnx_connections_cut_total",
        "counter",
        "Connections that the daemon ended.",
        lambda report: report.connections_cut,
    ),
    _of_daemon(
        "tnx_traffic_bytes",
        "gauge",
        "Memory of what is received, in flight and owed.",
        lambda report: report.traffic_mb * _MIB,
    ),
    _of_daemon(
        "tnx_traffic_owed_bytes",
        "gauge",
        "Memory of the replies that clients have not taken yet.",
        lambda report: report.traffic_owed_mb * _MIB,
    ),
    _of_daemon(
        "tnx_traffic_limit_bytes",
        "gauge",
        "Most memory that all traffic may take.",
        lambda report: report.traffic_limit_mb * _MIB,
    ),
    _of_daemon(
        "tnx_loop_turn_seconds",
        "histogram",
        "Length of the turns of the serving loop, without what it waited for work.",
        lambda report: report.loop_turns,
    ),
    _of_daemon(
        "tnx_log_lines_dropped_total",
        "counter",
        "Texts that found no room in the queues of the log and of what is printed.",
        lambda report: report.log_lines_dropped,
    ),
    _of_daemon(
        "tnx_spans_dropped_total",
        "counter",
        "Sampled requests whose spans went nowhere.",
        lambda report: report.spans_dropped,
    ),
)
"""All metrics but `tnx_up`, in the order of the text."""


# --- Triton's names ---------------------------------------------------------------------------------------------

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
        before = _version_labels(version)
        for reason, count in counts.items():
            yield f'{before},reason="{reason}"', count


def _microseconds(*stages: str) -> Callable[[VersionStats], int]:
    return lambda version: round(sum(_stage(version, stage).sum for stage in stages))


TRITON_METRICS = (
    _of_version(
        "nv_inference_request_success", "counter", "Requests that got a result.", lambda version: version.replies
    ),
    Metric(
        "nv_inference_request_failure",
        "counter",
        "Requests that got an error, by reason.",
        (*_VERSION, "reason"),
        _failure_samples,
    ),
    _of_version("nv_inference_count", "counter", "Rows computed.", lambda version: version.rows),
    _of_version("nv_inference_exec_count", "counter", "Batches that gave results.", lambda version: version.batches),
    _of_version(
        "nv_inference_request_duration_us",
        "counter",
        "Microseconds of all requests with results, in the daemon.",
        _microseconds("total"),
    ),
    _of_version(
        "nv_inference_queue_duration_us", "counter", "Microseconds that they waited for a lane.", _microseconds("queue")
    ),
    _of_version(
        "nv_inference_compute_input_duration_us",
        "counter",
        "Microseconds of the stages gather and h2d.",
        _microseconds("gather", "h2d"),
    ),
    _of_version(
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Microseconds of the stage compute.",
        _microseconds("compute"),
    ),
    _of_version(
        "nv_inference_compute_output_duration_us", "counter", "Microseconds of the stage d2h.", _microseconds("d2h")
    ),
    _of_version(
        "nv_inference_pending_request_count",
        "gauge",
        "Rows that wait: as many as requests, where each has one row.",
        lambda version: version.queued_rows,
    ),
)
"""Metrics of Triton (https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md)."""
