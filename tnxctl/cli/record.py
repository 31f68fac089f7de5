"""`tnxctl record`: have a daemon write the requests that come to a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from tnxctl.cli import exits, options, output, text
from tnxctl.cli.options import Finite, common

if TYPE_CHECKING:
    from tnxctl.client import Client
    from tnxctl.protocol.wire import RecordingReport

LONGEST_S = 86_400.0  # as in tnxctl.protocol.limits, whose import would make --help slow; a test compares them

_LOOK_S = 0.5
_STOPPED = "it was stopped"


@click.command("record", short_help="Have the daemon write the requests that come to a file.")
@click.argument("file", required=False)
@options.duration("--seconds", default="60s", help="Length of the recording.", most=LONGEST_S)
@options.model("Only the requests of this model, or of this version.  [default: all]")
@click.option(
    "--sample",
    type=Finite(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    metavar="SHARE",
    help="Share of the requests that is written, chosen at random.",
)
@click.option("--no-wait", is_flag=True, help="Do not wait for its end.")
@click.option("--status", is_flag=True, help="Show how far the recording is, and begin none.")
@click.option("--stop", is_flag=True, help="End the recording that is under way, and begin none.")
@common
@click.pass_context
def command(
    ctx: click.Context,
    file: str | None,
    seconds: float,
    model: str,
    sample: float,
    no_wait: bool,
    status: bool,
    stop: bool,
    endpoint: str,
    timeout: float,
    as_json: bool,
) -> None:
    """Have the daemon write the predict requests that come from now on to FILE, inputs included. For the role admin.

    FILE is a name, without a path: the daemon makes the file on its own host, in the directory that its configuration
    names with record_directory. Without that directory it records nothing. The file is in MCAP format; tnxctl replay
    sends its requests again. One recording is under way at a time, and no file is overwritten.

    Ctrl-C, or SIGTERM, ends the recording. If this command is lost otherwise, the daemon goes on until the time is
    over. What finds no room in the queue to the disk is dropped, and counted. The exit code is 1 if it ended early and
    nobody had stopped it.

    \b
    Examples:
      tnxctl record monday.mcap --seconds 10
      tnxctl record digits.mcap --model digits --sample 0.1 --no-wait
      tnxctl record --status
      tnxctl record --stop
    """
    if (file is None) != (status or stop) or (status and stop):
        raise click.UsageError("give one of FILE, --status and --stop")
    from tnxctl.client import Client

    with Client(endpoint, timeout=timeout) as client:
        interrupt: KeyboardInterrupt | None = None
        if status:
            report = client.recording()
        elif stop:
            report = client.stop_recording()
        else:
            assert file is not None
            report = client.record(file, seconds=seconds, model=model, sample=sample)
            if not no_wait:
                report, interrupt = _wait(client, report)
    if as_json:
        output.write_json({"endpoint": endpoint, **output.report_document(report)})
    else:
        click.echo("\n".join(_lines(report)))
    if report.state == "ended" and report.reason not in ("", _STOPPED):
        output.complain(f"it ended early: {report.reason}")
    if interrupt is not None:
        ctx.exit(exits.of_interrupt(interrupt))
    ctx.exit(exits.Exit.FAILED if report.reason not in ("", _STOPPED) else exits.Exit.OK)


def _wait(client: Client, begun: RecordingReport) -> tuple[RecordingReport, KeyboardInterrupt | None]:
    """Wait for the end of a recording; an interrupt ends it."""
    from tnxctl.protocol.errors import FailedPrecondition, Unavailable

    report = begun
    interrupt: KeyboardInterrupt | None = None
    while report.state == "recording" and report.path == begun.path:
        try:
            time.sleep(min(max(report.seconds - report.elapsed_s, 0.05), _LOOK_S))
            report = client.recording()
        except KeyboardInterrupt as pressed:
            click.echo(err=True)  # below the terminal's "^C"
            interrupt = pressed
            try:
                report = client.stop_recording()
            except FailedPrecondition:  # it has just ended
                report = client.recording()
    if report.path != begun.path:
        raise Unavailable(f"the daemon was started anew meanwhile; what it had recorded is in {begun.path}")
    return report, interrupt


def _lines(report: RecordingReport) -> Iterator[str]:
    from tnxctl.protocol.wire import MIB

    if report.state == "off":
        yield "Nothing has been recorded since the daemon's start."
        return
    size = text.memory(report.file_bytes / MIB)
    of = f" of {text.clean(report.model)}" if report.model else ""
    share = f" (a share of {report.sample:g})" if report.sample < 1 else ""
    dropped = f"; {report.dropped} dropped, since there was no room in the queue to the disk" if report.dropped else ""
    took = f"{text.duration(report.elapsed_s)} of {text.duration(report.seconds)}"
    what = "recording" if report.state == "recording" else "recorded"
    yield f"{what} {report.requests} requests{of}{share} in {took}, {size}{dropped}"
    yield text.clean(report.path)
