"""`tnxctl clients`: who is connected to a daemon, and a command that ends connections."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from tnxctl.cli import output, text
from tnxctl.cli.groups import Group
from tnxctl.cli.options import common

if TYPE_CHECKING:
    from tnxctl.protocol.wire import ClientInfo, ClientsReport


@click.group(
    "clients", cls=Group, short_help="Show who is connected, and cut clients off.", invoke_without_command=True
)
@common
@click.pass_context
def command(ctx: click.Context, endpoint: str, timeout: float, as_json: bool) -> None:
    """Show who is connected to the daemon; with a COMMAND, cut clients off. For the role admin.

    NAME is that of a key; without one an address, or uid: and the number of a user on this machine. FOR is the time
    since its oldest connection said something. REQUESTS are predictions since the daemon knows the client, RECEIVED all
    that it sent.

    \b
    Examples:
      tnxctl clients
      tnxctl clients --json | jq '.clients[] | select(.in_flight > 100) | .name'
      tnxctl clients kick alice
    """
    if ctx.invoked_subcommand is not None:
        return
    from tnxctl.client import Client

    with Client(endpoint, timeout=timeout) as client:
        report = client.clients()
    if as_json:
        output.write_json({"endpoint": endpoint, **output.report_document(report)})
    else:
        click.echo("\n".join(_lines(report)))


@command.command("kick", short_help="End all connections of a client.")
@click.argument("name")
@common
def kick(name: str, endpoint: str, timeout: float, as_json: bool) -> None:
    """End all connections of the client NAME but the one that asks. For the role admin.

    It may connect again at once. To keep it out, take its key off the list: tnxctl keys revoke NAME.

    \b
    Examples:
      tnxctl clients kick alice
      tnxctl clients kick 192.168.1.7
    """
    from tnxctl.client import Client

    with Client(endpoint, timeout=timeout) as client:
        count = client.kick(name)
    if as_json:
        output.write_json({"endpoint": endpoint, "client": name, "connections": count})
    else:
        click.echo(f"{text.clean(name)}: {count} connection{'s' * (count != 1)} ended")


def _lines(report: ClientsReport) -> Iterator[str]:
    header = ("NAME", "ROLE", "ADDRESS", "CONNECTIONS", "FOR", "REQUESTS", "IN FLIGHT", "RECEIVED")
    rows = [_row(info) for info in report.clients]
    yield from text.table(header, rows, "<<<>>>>>", text.terminal_width(sys.stdout), ("ADDRESS", "NAME"))
    if report.total > len(report.clients):
        yield f"and {report.total - len(report.clients)} more with fewer requests"


def _row(info: ClientInfo) -> tuple[str, ...]:
    from tnxctl.protocol.wire import MIB

    return (
        info.name,
        info.role or "-",
        ", ".join(info.addresses) or "-",
        str(info.connections),
        text.duration(info.connected_s),
        str(info.requests),
        str(info.in_flight),
        text.memory(info.received_bytes / MIB),
    )
