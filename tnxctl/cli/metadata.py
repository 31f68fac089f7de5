"""`tnxctl metadata`: the inputs and outputs of a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from tnxctl.cli import output, suggestions, text
from tnxctl.cli.options import common_of_several

if TYPE_CHECKING:
    from tnxctl.protocol.wire import ModelInfo


@click.command("metadata", short_help="Show the inputs and outputs of a model.")
@click.argument("model", default="", metavar="[NAME[@VERSION]]", shell_complete=suggestions.models)
@common_of_several
def command(model: str, endpoints: list[str], timeout: float, as_json: bool) -> None:
    """Show the inputs and outputs of a model: names, datatypes and shapes. Without NAME: the default model. Without
    VERSION: the version that gets most of the requests.

    An axis of -1 takes any length.

    \b
    Examples:
      tnxctl metadata
      tnxctl metadata digits --json
      tnxctl metadata resnet@2
    """
    from tnxctl.client import Client

    with Client(endpoints, timeout=timeout) as client:
        info = client.metadata(model)
    if as_json:
        output.write_json({"endpoint": client.endpoint, **output.model_document(info)})
    else:
        click.echo("\n".join((state(info), *text.remarks([info]), "", *signature(info))))


def state(info: ModelInfo) -> str:
    """The state of a version, and where it is."""
    version = f" version {text.clean(info.version)}" if info.version else ""
    place = f" on {text.clean(', '.join(info.devices))}" if info.devices else ""
    return (
        f"{text.clean(info.name)}{version}{' (default)' if info.default else ''}: "
        f"{text.status(text.clean(info.status))}{place}"
    )


def signature(info: ModelInfo) -> Iterator[str]:
    """The inputs and outputs of a version, and what its axes mean."""
    if not info.inputs and not info.outputs:
        yield "Its inputs and outputs are not known before it is loaded."
        return
    rows = [
        (side, text.tensor_name(spec.name), spec.datatype, text.shape(spec.shape))
        for side, specs in (("input", info.inputs), ("output", info.outputs))
        for spec in specs
    ]
    yield from text.table(("", "NAME", "DATATYPE", "SHAPE"), rows, "<<<<", text.terminal_width(sys.stdout))
    yield ""
    if info.pipeline and not info.max_batch_size:
        yield "-1: any length. Not all steps count rows; those that do share batches with others that use their models."
    elif info.max_batch_size:
        yield f"-1: any length. Axis 0 counts rows; small requests share batches of up to {info.max_batch_size}."
    else:
        yield "-1: any length. There is no batch axis: each request runs alone."
