"""Metrics of a daemon for Prometheus.

Names begin with `tnx_`, and units are seconds and bytes. Labels are the daemon's own names of models, versions,
devices, stages and error codes: nothing that a request says becomes a series. `METRICS` is the list; docs/metrics.md
has it as a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tnxctl.bridge.exposition import (
    ROWS,
    VERSION_LABELS,
    Metric,
    Samples,
    braced,
    labels,
    of_daemon,
    of_device,
    of_version,
    stage_of,
    text_of,
    version_labels,
)
from tnxctl.bridge.triton_metrics import TRITON_METRICS
from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.statistics import STAGES, StatsReport

STATUSES = ("starting", "ready", "draining")
"""States of a daemon, see `HealthReport`."""

CODES = tuple(error.code for error in TensorNextError.__subclasses__())
"""Codes of errors, see `tnxctl.protocol.errors`."""

_MIB = 1024.0 * 1024.0


def render(reports: Mapping[str, StatsReport | None], *, triton_names: bool = False) -> bytes:
    """Prometheus text of reports.

    Args:
        reports: by the address of the daemon, which is a label if there are several. None: it does not answer; then
            its `tnx_up` is 0, and all there is of it.
        triton_names: with the `nv_inference_*` counters as well, which boards and autoscalers for Triton read.
    """
    owners = {address: labels(daemon=address) if len(reports) > 1 else "" for address in reports}
    lines = ["# HELP tnx_up Whether the daemon answers.", "# TYPE tnx_up gauge"]
    lines += (f"tnx_up{braced(owners[address])} {int(report is not None)}" for address, report in reports.items())
    answered = [(owners[address], report) for address, report in reports.items() if report is not None]
    if answered:
        for metric in (*METRICS, *TRITON_METRICS) if triton_names else METRICS:
            lines += (f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}")
            for owner, report in answered:
                lines += text_of(metric, owner, report)
    lines.append("")
    return "\n".join(lines).encode()


def _status_samples(report: StatsReport) -> Samples:
    for status in STATUSES:
        yield labels(status=status), int(report.status == status)


def _build_samples(report: StatsReport) -> Samples:
    yield labels(version=report.version), 1


def _stage_samples(report: StatsReport) -> Samples:
    for version in report.models:
        before = version_labels(version)
        for stage in STAGES[:-1]:
            yield f'{before},stage="{stage}"', stage_of(version, stage)


def _version_error_samples(report: StatsReport) -> Samples:
    for version in report.models:
        before = version_labels(version)
        for code in _codes(version.errors):
            yield f"{before},{labels(code=code)}", version.errors.get(code, 0)


def _error_samples(report: StatsReport) -> Samples:
    for code in _codes(report.errors):
        yield labels(code=code), report.errors.get(code, 0)


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
    of_daemon(
        "tnx_start_time_seconds",
        "gauge",
        "When the daemon started, in seconds since 1970. Counters begin anew then.",
        lambda report: report.started_s,
    ),
    # Models.
    of_version(
        "tnx_requests_total",
        "counter",
        "Predict requests for a model, those included that were refused.",
        lambda version: version.requests,
    ),
    of_version("tnx_replies_total", "counter", "Results of a model that were sent.", lambda version: version.replies),
    Metric(
        "tnx_errors_total",
        "counter",
        "Errors that were sent instead of results of a model, by code.",
        (*VERSION_LABELS, "code"),
        _version_error_samples,
    ),
    of_version(
        "tnx_abandoned_requests_total",
        "counter",
        "Requests for a model that were never answered: their client was gone, or another step of a pipeline failed.",
        lambda version: version.abandoned,
    ),
    of_version("tnx_rows_total", "counter", "Rows that a model computed.", lambda version: version.rows),
    of_version(
        "tnx_batches_total",
        "counter",
        "Batches of a model that gave results.",
        lambda version: version.batches,
    ),
    of_version("tnx_batch_rows", "histogram", "Rows in a batch.", lambda version: version.batch_rows, ROWS),
    of_version(
        "tnx_request_duration_seconds",
        "histogram",
        "Time that a request with a result spent in the daemon: the sum of its stages.",
        lambda version: stage_of(version, "total"),
    ),
    Metric(
        "tnx_stage_duration_seconds",
        "histogram",
        "Time that a request with a result spent in one stage.",
        (*VERSION_LABELS, "stage"),
        _stage_samples,
    ),
    of_version(
        "tnx_prediction_error_seconds",
        "histogram",
        "Distance between the predicted and the actual time of a request, from its queueing to the end of its batch.",
        lambda version: version.prediction_error,
    ),
    of_version(
        "tnx_deadlines_met_total",
        "counter",
        "Results that went out before their deadline.",
        lambda version: version.deadlines_met,
    ),
    of_version(
        "tnx_deadlines_missed_total",
        "counter",
        "Results that went out after their deadline, and errors DEADLINE_EXCEEDED.",
        lambda version: version.deadlines_missed,
    ),
    of_version(
        "tnx_stolen_batches_total",
        "counter",
        "Batches that another device took than the one they were queued for.",
        lambda version: version.steals,
    ),
    of_version(
        "tnx_split_batches_total",
        "counter",
        "Batches that ran out of memory, and again in parts.",
        lambda version: version.splits,
    ),
    of_version(
        "tnx_evictions_total",
        "counter",
        "Times that a model was unloaded to make room for another.",
        lambda version: version.evictions,
    ),
    of_version(
        "tnx_queue_rows",
        "gauge",
        "Rows that wait for a model, or tokens where requests of different lengths share batches.",
        lambda version: version.queued_rows,
    ),
    of_version(
        "tnx_predicted_wait_seconds",
        "gauge",
        "Time until one more row would be done, if it came now; 0 if nothing was asked lately.",
        lambda version: version.predicted_wait_us / 1e6,
    ),
    # Devices.
    of_device(
        "tnx_device_ready",
        "gauge",
        "1 while a device is ready, 0 when it has failed.",
        lambda device: int(device.status == "ready"),
    ),
    of_device(
        "tnx_device_lanes",
        "gauge",
        "Places of a device where batches run, one at a time each.",
        lambda device: device.lanes,
    ),
    of_device(
        "tnx_device_busy_seconds_total",
        "counter",
        "Time that the lanes of a device ran batches, summed over its lanes. A batch on several cores counts for each.",
        lambda device: device.busy_us / 1e6,
    ),
    of_device(
        "tnx_device_inline_seconds_total",
        "counter",
        "Time that batches of a device ran on the serving thread.",
        lambda device: device.inline_us / 1e6,
    ),
    of_device("tnx_device_queue_rows", "gauge", "Rows that wait for a device.", lambda device: device.queued_rows),
    of_device(
        "tnx_device_memory_free_bytes",
        "gauge",
        "Free memory of a device; for the CPU, of the host within the limits of the daemon.",
        lambda device: device.memory_free_mb * _MIB,
    ),
    of_device(
        "tnx_device_memory_size_bytes",
        "gauge",
        "All memory of a device; for the CPU, of the host within the limits of the daemon.",
        lambda device: device.memory_total_mb * _MIB,
    ),
    # The daemon.
    of_daemon(
        "tnx_daemon_requests_total",
        "counter",
        "Predict requests, and other messages that were refused.",
        lambda report: report.requests,
    ),
    of_daemon("tnx_daemon_replies_total", "counter", "Results that were sent.", lambda report: report.replies),
    Metric(
        "tnx_daemon_errors_total",
        "counter",
        "Errors that were sent, by code, those included that concern no model.",
        ("code",),
        _error_samples,
    ),
    of_daemon(
        "tnx_resent_requests_total",
        "counter",
        "Predict requests that had been sent before, as they said.",
        lambda report: report.resent,
    ),
    of_daemon(
        "tnx_undeliverable_replies_total",
        "counter",
        "Answers whose client was gone.",
        lambda report: report.undeliverable,
    ),
    of_daemon(
        "tnx_daemon_abandoned_requests_total",
        "counter",
        "Requests taken out of the queue because their client was gone.",
        lambda report: report.abandoned,
    ),
    of_daemon("tnx_queued_requests", "gauge", "Requests that wait.", lambda report: report.queued),
    of_daemon("tnx_running_requests", "gauge", "Requests on a lane.", lambda report: report.running),
    of_daemon("tnx_connections", "gauge", "Connections of clients.", lambda report: report.connections),
    of_daemon(
        "tnx_connections_refused_total",
        "counter",
        "Connections that were not let in.",
        lambda report: report.connections_refused,
    ),
    of_daemon(
        "tnx_connections_cut_total",
        "counter",
        "Connections that the daemon ended.",
        lambda report: report.connections_cut,
    ),
    of_daemon(
        "tnx_traffic_bytes",
        "gauge",
        "Memory of what is received, in flight and owed.",
        lambda report: report.traffic_mb * _MIB,
    ),
    of_daemon(
        "tnx_traffic_owed_bytes",
        "gauge",
        "Memory of the replies that clients have not taken yet.",
        lambda report: report.traffic_owed_mb * _MIB,
    ),
    of_daemon(
        "tnx_traffic_limit_bytes",
        "gauge",
        "Most memory that all traffic may take.",
        lambda report: report.traffic_limit_mb * _MIB,
    ),
    of_daemon(
        "tnx_loop_turn_seconds",
        "histogram",
        "Length of the turns of the serving loop, without what it waited for work.",
        lambda report: report.loop_turns,
    ),
    of_daemon(
        "tnx_log_lines_dropped_total",
        "counter",
        "Texts that found no room in the queues of the log and of what is printed.",
        lambda report: report.log_lines_dropped,
    ),
    of_daemon(
        "tnx_spans_dropped_total",
        "counter",
        "Sampled requests whose spans went nowhere.",
        lambda report: report.spans_dropped,
    ),
)
"""All metrics but `tnx_up`, in the order of the text."""
