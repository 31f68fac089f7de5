"""`tnxctl whoami`: who the daemon takes this client for, and what it may do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from tnxctl.cli import output, text
from tnxctl.cli.options import common

if TYPE_CHECKING:
    from tnxctl.protocol.wire import Identity

_TOLD_BY = {"key": "its key", "user": "the user of this process", "address": "its address"}

_MAY = {
    "observe": "see health and models",
    "predict": "run models, and see health and models",
    "admin": "run models, change what is served, see who is connected, and end connections",
}


@click.command("whoami", short_help="Show who the daemon takes this client for.")
@common
def command(endpoint: str, timeout: float, as_json: bool) -> None:
    """Show the name that the daemon knows this client by, its role, and its limits.

    \b
    Examples:
      tnxctl whoami
      tnxctl whoami --host 192.168.1.100 --json | jq -r .role
    """
    from tnxctl.client import Client

    with Client(endpoint, timeout=timeout) as client:
        found = client.whoami()
    if as_json:
        output.write_json({"endpoint": endpoint, **output.report_document(found)})
    else:
        click.echo("\n".join(_lines(found)))


def _lines(found: Identity) -> Iterator[str]:
    told_by = _TOLD_BY.get(found.by, text.clean(found.by))
    yield f"{text.heading(text.clean(found.name))}, known by {told_by}, at {text.clean(found.address)}"
    may = f": may {_MAY[found.role]}" if found.role in _MAY else ""
    yield f"{'role':13}{text.clean(found.role)}{may}"
    yield f"{'connections':13}{found.connections}"
    yield f"{'in flight':13}at most {found.max_requests} requests, and {text.memory(found.max_mb)} of inputs"
    yield f"{'rate':13}{f'at most {found.rate:g} requests a second' if found.rate else 'no limit'}"
    if found.share != 1.0:
        yield f"{'share':13}{found.share:g} times the turns of others"
