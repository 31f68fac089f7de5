"""`tnxctl reload`: have the daemon scan its model repository again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from tnxctl.cli import exits, output, progress, text
from tnxctl.cli.options import DEFAULT_TIMEOUT_S, slow

if TYPE_CHECKING:
    from tnxctl.protocol.wire import ReloadReport


@click.command("reload", short_help="Have the daemon scan its model repository again.")
@slow
@click.pass_context
def command(ctx: click.Context, endpoint: str, timeout: float, as_json: bool) -> None:
    """Have the daemon scan its model repository again, and wait until it serves what is there now.

    New versions are loaded and warmed up before they get requests; the version before serves until then, and still
    does if that fails. Ctrl-C ends only the waiting.

    The exit code is 0 if all went well and 1 if something could not be loaded.

    \b
    Examples:
      tnxctl reload
      tnxctl reload --timeout 60 && tnxctl models
      tnxctl reload --json | jq .failed
    """
    from tnxctl.client import Client

    with (
        Client(endpoint, timeout=min(timeout, DEFAULT_TIMEOUT_S)) as client,
        output.interruptible(ctx),
        progress.shown(client, "reloading"),
    ):
        report = client.reload(timeout=timeout)
    if as_json:
        output.write_json({"endpoint": endpoint, **output.report_document(report)})
    else:
        click.echo("\n".join(_lines(report)))
    if report.failed:
        output.complain(f"{len(report.failed)} could not be loaded: {', '.join(report.failed)}")
    ctx.exit(exits.Exit.FAILED if report.failed else exits.Exit.OK)


def _lines(report: ReloadReport) -> Iterator[str]:
    for what, titles in (("loaded", report.loaded), ("unloaded", report.unloaded)):
        if titles:
            yield f"{what + ':':10}{text.clean(', '.join(titles))}"
    for title, why in report.failed.items():
        yield f"{click.style('failed:', fg='red')}   {text.clean(title)}: {text.reason(title, why)}"
    if not (report.loaded or report.unloaded or report.failed):
        yield "Nothing has changed."
