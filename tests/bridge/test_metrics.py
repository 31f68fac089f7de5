"""Prometheus text: what a reader of it gets back."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prometheus_text import buckets, read
from tnxctl.bridge.exposition import ROWS, SECONDS
from tnxctl.bridge.metrics import CODES, METRICS, render
from tnxctl.bridge.triton_metrics import TRITON_METRICS
from tnxctl.protocol.histograms import BUCKETS, Histogram, bucket_of, trimmed
from tnxctl.protocol.statistics import STAGES, DeviceStats, StatsReport, VersionStats

ADDRESS = "tcp://127.0.0.1:5555"
MLP = {"model": "mlp", "version": "1"}


def histogram(values: Iterable[float]) -> Histogram:
    dense = [0] * BUCKETS
    for value in values:
        dense[bucket_of(value)] += 1
    return trimmed(dense, math.fsum(values))


def report(*models: VersionStats, **counts: object) -> StatsReport:
    return StatsReport(
        **{  # type: ignore[arg-type]
            "v": 1,
            "id": 1,
            "status": "ready",
            "version": "0.1.0",
            "started_s": 1.5e9,
            "uptime_us": 1e6,
            "models": models,
            "devices": (DeviceStats(name="cpu", status="ready"),),
        }
        | counts
    )


def rendered(only: StatsReport, *, triton_names: bool = False) -> bytes:
    return render({ADDRESS: only}, triton_names=triton_names)


def mlp(**counts: object) -> VersionStats:
    return VersionStats(name="mlp", version="1", **counts)  # type: ignore[arg-type]


def filled(number: int) -> StatsReport:
    """A report where every count is `number`, and every histogram has as many values."""

    def fill(cls: type[msgspec.Struct], **given: object) -> msgspec.Struct:
        values: dict[str, object] = {}
        for each in msgspec.structs.fields(cls):
            if each.type in (int, float):
                values[each.name] = number
            elif each.type is Histogram:
                values[each.name] = histogram([5.0] * number)
        values |= {"errors": {"INTERNAL": number}} if "errors" in cls.__struct_fields__ else {}
        return cls(**values | given)

    stages = {stage: histogram([100.0] * number) for stage in STAGES}
    models = (fill(VersionStats, name="mlp", version="1", stages=stages),)
    devices = (fill(DeviceStats, name="cpu", status="ready"),)
    given = {
        "v": 1,
        "id": 1,
        "status": "ready",
        "version": "0.1.0",
        "models": models,
        "devices": devices,
        "clients": (),
    }
    full = fill(StatsReport, **given)
    assert isinstance(full, StatsReport)
    return full


def test_a_daemon_that_does_not_answer_is_told_and_nothing_else() -> None:
    families = read(render({ADDRESS: None}))
    assert families.keys() == {"tnx_up"}
    assert families["tnx_up"][{}] == 0


def test_several_daemons_are_told_apart() -> None:
    first, third = report(mlp(requests=3)), report(mlp(stages={"total": histogram([100.0])}))
    families = read(render({"tcp://a:5555": first, "tcp://b:5555": None, "tcp://c:5555": third}))
    ups = {name: families["tnx_up"][{"daemon": f"tcp://{name}:5555"}] for name in "abc"}
    assert ups == {"a": 1, "b": 0, "c": 1}
    assert families["tnx_requests_total"][MLP | {"daemon": "tcp://a:5555"}] == 3
    assert families["tnx_queued_requests"][{"daemon": "tcp://c:5555"}] == 0
    assert buckets(families["tnx_request_duration_seconds"], MLP | {"daemon": "tcp://c:5555"})["+Inf"] == 1
    assert len(families["tnx_connections"].samples) == 2


def test_labels_are_what_the_daemon_says() -> None:
    families = read(rendered(report(mlp(requests=3, errors={"INTERNAL": 2, "OF_THE_FUTURE": 1}), traffic_mb=0.5)))
    assert families["tnx_up"][{}] == 1
    assert families["tnx_build_info"][{"version": "0.1.0"}] == 1
    assert families["tnx_status"][{"status": "ready"}] == 1
    assert families["tnx_status"][{"status": "draining"}] == 0
    assert families["tnx_requests_total"][MLP] == 3
    assert families["tnx_errors_total"][MLP | {"code": "INTERNAL"}] == 2
    assert families["tnx_errors_total"][MLP | {"code": "OF_THE_FUTURE"}] == 1
    assert families["tnx_traffic_bytes"][{}] == 512 * 1024
    assert families["tnx_device_ready"][{"device": "cpu"}] == 1


def test_a_counter_of_errors_is_there_before_the_first_error() -> None:
    families = read(rendered(report(mlp())))
    for code in CODES:
        assert families["tnx_errors_total"][MLP | {"code": code}] == 0
        assert families["tnx_daemon_errors_total"][{"code": code}] == 0


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_any_name_comes_back(name: str, device: str) -> None:
    stages = dict.fromkeys(STAGES, Histogram())
    text = rendered(
        report(
            VersionStats(name=name, version="1", requests=7, stages=stages),
            devices=(DeviceStats(name=device, status="ready", lanes=2),),
        ),
        triton_names=True,
    )
    families = read(text)
    assert families["tnx_requests_total"][{"model": name, "version": "1"}] == 7
    assert families["tnx_device_lanes"][{"device": device}] == 2


@given(st.lists(st.floats(0, 1e9).filter(lambda value: value not in SECONDS.edges)))
def test_a_bucket_holds_the_times_up_to_its_bound(values: list[float]) -> None:
    family = read(rendered(report(mlp(stages={"total": histogram(values)}))))["tnx_request_duration_seconds"]
    counts = buckets(family, MLP)
    for le, count in counts.items():
        assert count == sum(value <= float(le) * 1e6 for value in values)
    assert [*counts.values()] == sorted(counts.values())
    assert [*counts][-1] == "+Inf"
    assert family.samples["tnx_request_duration_seconds_count", frozenset(MLP.items())] == len(values)
    total = family.samples["tnx_request_duration_seconds_sum", frozenset(MLP.items())]
    assert total == pytest.approx(math.fsum(values) / 1e6)


@given(st.lists(st.integers(1, 5000)))
def test_a_bucket_holds_the_batches_of_up_to_its_rows(rows: list[int]) -> None:
    family = read(rendered(report(mlp(batch_rows=histogram(rows)))))["tnx_batch_rows"]
    for le, count in buckets(family, MLP).items():
        assert count == sum(value <= float(le) for value in rows)


def test_batches_of_a_power_of_two_are_told_from_larger_and_smaller_ones() -> None:
    ends = [int(label) for label in ROWS.labels]
    for exponent in range(11):
        power = 2**exponent
        [bucket] = [(below, end) for below, end in zip([0, *ends], ends, strict=False) if below < power <= end]
        assert bucket[0] == power - 1
        assert bucket[1] - power <= power // 8


def test_every_count_is_there_and_grows_with_its_count() -> None:
    """All but the gauges, of which none must be taken for a counter."""
    before, after = read(rendered(filled(10), triton_names=True)), read(rendered(filled(11), triton_names=True))
    assert before.keys() == after.keys()
    for name, family in after.items():
        for key, value in family.samples.items():
            if family.kind == "gauge":
                continue
            assert value >= before[name].samples[key]
        if family.kind != "gauge":
            assert sum(family.samples.values()) > sum(before[name].samples.values()), name


def test_every_field_of_a_report_is_told_but_for_clients() -> None:
    """A count that a daemon gains has to be named here, too."""
    base = rendered(filled(10))
    told = {"v", "id", "uptime_us", "clients"}
    for cls, owner in ((StatsReport, None), (VersionStats, "models"), (DeviceStats, "devices")):
        for each in msgspec.structs.fields(cls):
            full = filled(10)
            changed: object = {int: 99, float: 99.0, str: "other", Histogram: histogram([1.0])}.get(each.type)
            if each.name == "errors":
                changed = {"INTERNAL": 99}
            elif each.name == "stages":
                changed = {"total": histogram([1.0])}
            elif changed is None:
                changed = ()
            if owner is None:
                full = msgspec.structs.replace(full, **{each.name: changed})
            else:
                [part] = getattr(full, owner)
                full = msgspec.structs.replace(
                    full, **{owner: (msgspec.structs.replace(part, **{each.name: changed}),)}
                )
            assert (rendered(full) != base) != (owner is None and each.name in told), f"{cls.__name__}.{each.name}"


def test_names_follow_the_conventions() -> None:
    """https://prometheus.io/docs/practices/naming/: a prefix, base units in the plural, `_total` for counters alone."""
    for metric in METRICS:
        assert metric.name.startswith("tnx_")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert not any(unit in metric.name.split("_") for unit in ("us", "ms", "mb", "second", "byte")), metric.name
        assert metric.help.endswith(".")
        if metric.buckets is SECONDS and metric.kind == "histogram":
            assert metric.name.endswith("_seconds")


def test_triton_names_are_an_option() -> None:
    stages = {
        "total": histogram([900.0, 600.0]),
        "queue": histogram([200.0, 100.0]),
        "gather": histogram([10.0, 20.0]),
        "h2d": histogram([1.0, 2.0]),
        "compute": histogram([500.0, 300.0]),
        "d2h": histogram([3.0, 4.0]),
    }
    errors = {"INTERNAL": 1, "RESOURCE_EXHAUSTED": 2, "DEADLINE_EXCEEDED": 3, "CANCELLED": 4, "INVALID_ARGUMENT": 5}
    full = report(mlp(replies=2, rows=6, batches=1, stages=stages, errors=errors, queued_rows=9))
    assert not any(name.startswith("nv_") for name in read(rendered(full)))
    families = read(rendered(full, triton_names=True))
    assert {name for name in families if name.startswith("nv_")} == {metric.name for metric in TRITON_METRICS}
    values = {name.removeprefix("nv_inference_"): family for name, family in families.items() if name.startswith("nv_")}
    assert values["request_success"][MLP] == 2
    reasons = {"BACKEND": 1, "REJECTED": 5, "CANCELED": 4, "OTHER": 5}
    for reason, count in reasons.items():
        assert values["request_failure"][MLP | {"reason": reason}] == count
    assert values["count"][MLP] == 6
    assert values["exec_count"][MLP] == 1
    assert values["pending_request_count"][MLP] == 9
    assert values["request_duration_us"][MLP] == 1500
    assert values["queue_duration_us"][MLP] == 300
    assert values["compute_input_duration_us"][MLP] == 33
    assert values["compute_infer_duration_us"][MLP] == 800
    assert values["compute_output_duration_us"][MLP] == 7
