"""`tnxctl metadata`: what a model takes and gives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from tnxctl.cli import output, text
from tnxctl.cli.options import common

if TYPE_CHECKING:
    from tnxctl.wire import ModelInfo


@click.command("metadata", short_help="Show what a model takes and gives.")
@click.argument("model", default="")
@common
def command(model: str, endpoint: str, timeout: float, as_json: bool) -> None:
    """Show what MODEL takes and gives: names, datatypes and shapes. Without MODEL: the default model.

    An axis of -1 takes any length.

    \b
    Examples:
      tnxctl metadata
      tnxctl metadata digits --json
    """
    from tnxctl.client import Client

    with Client(endpoint, timeout=timeout) as client:
        info = client.metadata(model)
    if as_json:
        output.write_json({"endpoint": endpoint, **output.model_document(info)})
    else:
        click.echo("\n".join(_lines(info)))


def _lines(info: ModelInfo) -> Iterator[str]:
    yield (
        f"{text.clean(info.name)} version {text.clean(info.version)}{' (default)' if info.default else ''}: "
        f"{text.status(text.clean(info.status))} on {text.clean(', '.join(info.devices)) or 'no device'}"
    )
    if info.error:
        yield text.clean(info.error)
    yield ""
    rows = [
        (side, spec.name, spec.datatype, text.shape(spec.shape))
        for side, specs in (("input", info.inputs), ("output", info.outputs))
        for spec in specs
    ]
    yield from text.table(("", "NAME", "DATATYPE", "SHAPE"), rows, "<<<<", text.terminal_width(sys.stdout))
    yield ""
    if info.max_batch_size:
        yield f"-1: any length. Axis 0 counts rows; small requests share batches of up to {info.max_batch_size}."
    else:
        yield "-1: any length. There is no batch axis: each request runs alone."
