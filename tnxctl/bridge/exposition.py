"""Text of Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4): what a metric is,
how it is read from a report of a daemon's counts, and how it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tnxctl.protocol.histograms import Histogram, bounds, bucket_of
from tnxctl.protocol.statistics import DeviceStats, StatsReport, VersionStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


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

VERSION_LABELS = ("model", "version")

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


# --- text -------------------------------------------------------------------------------------------------------


def text_of(metric: Metric, owner: str, report: StatsReport) -> Iterator[str]:
    """The lines of a metric. Args: owner: further labels, the same in each of them."""
    for own, value in metric.samples(report):
        labels = f"{owner},{own}" if owner and own else owner or own
        if isinstance(value, Histogram):
            yield from _histogram(metric.name, labels, value, metric.buckets)
        else:
            yield f"{metric.name}{braced(labels)} {_number(value)}"


def _histogram(name: str, labels: str, histogram: Histogram, buckets: Buckets) -> Iterator[str]:
    before = f"{labels}," if labels else ""
    braces = braced(labels)
    count = histogram.count
    for label, below in zip(buckets.labels, histogram.cumulative(buckets.edges), strict=True):
        yield f'{name}_bucket{{{before}le="{label}"}} {below}'
    yield f'{name}_bucket{{{before}le="+Inf"}} {count}'
    yield f"{name}_sum{braces} {_number(histogram.sum / buckets.unit)}"
    yield f"{name}_count{braces} {count}"


def braced(text: str) -> str:
    """Labels as they follow a name."""
    return f"{{{text}}}" if text else ""


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def labels(**values: str) -> str:
    """Labels as text, without braces."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in values.items())


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


# --- how samples are read from a report -------------------------------------------------------------------------


def of_daemon(
    name: str, kind: str, help: str, value: Callable[[StatsReport], Value], buckets: Buckets = SECONDS
) -> Metric:
    """A metric with one value for a daemon."""
    return Metric(name, kind, help, (), lambda report: iter([("", value(report))]), buckets)


def of_version(
    name: str, kind: str, help: str, value: Callable[[VersionStats], Value], buckets: Buckets = SECONDS
) -> Metric:
    """A metric with a value for each version of each model."""

    def samples(report: StatsReport) -> Samples:
        return ((version_labels(version), value(version)) for version in report.models)

    return Metric(name, kind, help, VERSION_LABELS, samples, buckets)


def of_device(name: str, kind: str, help: str, value: Callable[[DeviceStats], Value]) -> Metric:
    """A metric with a value for each device."""

    def samples(report: StatsReport) -> Samples:
        return ((labels(device=device.name), value(device)) for device in report.devices)

    return Metric(name, kind, help, ("device",), samples)


def version_labels(version: VersionStats) -> str:
    """The labels of a version of a model."""
    return labels(model=version.name, version=version.version)


def stage_of(version: VersionStats, stage: str) -> Histogram:
    """The times of a stage; empty where no request had a result."""
    return version.stages.get(stage, Histogram())
