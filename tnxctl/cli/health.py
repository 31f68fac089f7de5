"""`tnxctl health`: the state of the daemon."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING

import click

from tnxctl.cli import exits, output, text
from tnxctl.cli.options import common

if TYPE_CHECKING:
    from tnxctl.protocol.wire import DeviceInfo, HealthReport, ModelInfo


@click.command("health", short_help="Show the state of the daemon.")
@common
@click.pass_context
def command(ctx: click.Context, endpoint: str, timeout: float, as_json: bool) -> None:
    """Show the state of the daemon: its devices, models, queue and counts.

    The exit code is 0 if the daemon is ready, 9 if it is degraded, that is, ready, but with models that have failed, 4
    if it answers but is starting or draining, 3 if nobody answers.

    LANES BUSY says how many of the places where batches run are taken; QUEUED ROWS wait for one. BATCH is the number of
    rows up to which requests share a batch; TRAFFIC, shown where it is split, the part of a name's requests that each
    version gets. UNDELIVERABLE answers had lost their client when they were ready, ABANDONED requests while they still
    waited. Predicted times are those by which the daemon chooses devices and refuses requests that cannot make their
    deadlines.

    \b
    Examples:
      tnxctl health
      tnxctl health --host 192.168.1.100:5555 --timeout 1
      until tnxctl health >/dev/null 2>&1 || [ $? = 9 ]; do sleep 1; done
      tnxctl health --json | jq .gpu_memory_free_mb
    """
    from tnxctl.client import Client

    with Client(endpoint, timeout=timeout) as client:
        started = time.perf_counter()
        report = client.health()
        round_trip_ms = (time.perf_counter() - started) * 1e3
    if as_json:
        _write_json(report, endpoint, round_trip_ms)
    else:
        click.echo("\n".join(_lines(report, endpoint, round_trip_ms)))
    ctx.exit(_EXITS.get(_status(report), exits.Exit.NOT_READY))


_DEGRADED = "degraded"
_EXITS = {"ready": exits.Exit.OK, _DEGRADED: exits.Exit.DEGRADED}


def _status(report: HealthReport) -> str:
    """The status that the daemon reports; "degraded" in place of "ready" where models have failed."""
    return _DEGRADED if report.status == "ready" and _failed(report) else report.status


def _failed(report: HealthReport) -> list[ModelInfo]:
    return [model for model in report.models if model.status == "failed"]


def _write_json(report: HealthReport, endpoint: str, round_trip_ms: float) -> None:
    document = output.report_document(report)
    document["status"] = _status(report)
    document["failed"] = [text.title(model) for model in _failed(report)]
    document["models"] = [output.model_document(model) for model in report.models]
    output.write_json({"endpoint": endpoint, "round_trip_ms": round_trip_ms, **document})


def _lines(report: HealthReport, endpoint: str, round_trip_ms: float) -> Iterator[str]:
    width = text.terminal_width(sys.stdout)
    yield (
        f"{text.status(text.clean(_status(report)))}  {endpoint}  tnxd {text.clean(report.version)}, "
        f"up {text.duration(report.uptime_s)}, answered in {round_trip_ms:.1f} ms"
    )
    failed = _failed(report)
    if failed:
        yield f"Not served: {', '.join(map(text.title, failed))}"
    yield ""
    yield from _devices(report.devices, width)
    memory = f" ({report.gpu_memory_free_mb / 1024:.1f} GiB free)" if report.gpu_memory_free_mb else ""
    if report.current_device:
        yield f"Requests that prefer a GPU run on {text.clean(report.current_device)}{memory} now."
    yield ""
    yield from _models(report.models, width)
    yield ""
    again = f", {report.resent} sent again" if report.resent else ""
    yield (
        f"{report.requests} requests, {report.replies} replies, {sum(report.errors.values())} errors, "
        f"{report.undeliverable} undeliverable, {report.abandoned} abandoned{again}"
    )
    predictions = f"; predicted times are off by {report.prediction_error_us:.0f} µs" if report.replies else ""
    yield f"{report.queued} waiting, {report.running} running{predictions}"
    if report.errors:
        counts = ", ".join(f"{text.clean(code)} {count}" for code, count in sorted(report.errors.items()))
        yield f"errors: {counts}"


def _devices(devices: tuple[DeviceInfo, ...], width: int | None) -> Iterator[str]:
    rows = [
        (
            device.name,
            device.status,
            f"{device.busy_lanes} of {device.lanes}",
            str(device.queued_rows),
            f"{device.memory_free_mb / 1024:.1f} of {device.memory_total_mb / 1024:.1f} GiB",
            device.description,
        )
        for device in devices
    ]
    header = ("DEVICE", "STATUS", "LANES BUSY", "QUEUED ROWS", "MEMORY FREE", "DESCRIPTION")
    yield from text.table(header, rows, "<<>>><", width)
    yield from (f"{text.clean(device.name)} failed: {text.clean(device.error)}" for device in devices if device.error)


def _models(models: tuple[ModelInfo, ...], width: int | None) -> Iterator[str]:
    shown = [model for model in models if model.status != "unloaded"]
    split = any(0 < model.traffic < 1 or model.shadow for model in shown)
    header = ("MODEL", "VERSION", "STATUS", "BATCH", "INPUTS", "OUTPUTS", *(("TRAFFIC",) * split))
    rows = []
    for model in shown:
        first = (
            f"{model.name} (default)" if model.default else model.name,
            model.version,
            model.status,
            str(model.max_batch_size or "none"),
        )
        last = (text.traffic(model),) if split else ()
        signature = list(zip_longest(map(text.tensor, model.inputs), map(text.tensor, model.outputs), fillvalue=""))
        rows.append((*first, *(signature[0] if signature else ("", "")), *last))
        rows.extend(("", "", "", "", *more, *("",) * split) for more in signature[1:])
    yield from text.table(header, rows, "<<<><<" + ">" * split, width, ("INPUTS", "OUTPUTS"))
    yield from text.failures(shown)
    for model in shown:
        if model.restarts:
            times = "once" if model.restarts == 1 else f"{model.restarts} times"
            yield f"{text.title(model)}: its process was started again {times}: tnxctl models says why"
    if len(shown) < len(models):
        yield f"Not loaded: {', '.join(text.title(model) for model in models if model.status == 'unloaded')}"
