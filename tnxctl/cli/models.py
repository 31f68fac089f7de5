"""`tnxctl models`: the models that a daemon serves and their versions, and commands that change them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from tnxctl.cli import modellist, modeltoml, output, progress, suggestions, text
from tnxctl.cli.groups import Group
from tnxctl.cli.options import DEFAULT_TIMEOUT_S, as_json, common, slow

if TYPE_CHECKING:
    from tnxctl.protocol.wire import ModelInfo

_LATEST = "latest"


@click.group("models", cls=Group, short_help="Show the models served, and change them.", invoke_without_command=True)
@common
@click.pass_context
def command(ctx: click.Context, endpoint: str, timeout: float, as_json: bool) -> None:
    """Show the models that the daemon serves and their versions; with a COMMAND, change them.

    STATE is ready; starting: it is being loaded; draining: it finishes what it has and goes; unloaded; evicted: it made
    room for another model and comes back when it is asked for; failed: the line below says why. MEMORY is what its
    weights take on each device. TRAFFIC is its part of the requests that name no version; a shadow gets copies of
    them, and nobody its answers.

    What is changed here is written to no file. A restart brings back what each model.toml says. tnxctl reload brings
    back versions that model.toml wants; it leaves versions loaded by number, and routes unless [traffic] has changed.

    \b
    Examples:
      tnxctl models
      tnxctl models show resnet
      tnxctl models load resnet@2
      tnxctl models route resnet 1=95 2=5
      tnxctl models --json | jq '.models[] | select(.status == "failed")'
    """
    if ctx.invoked_subcommand is not None:
        return

    _list(endpoint, timeout, as_json)


@command.command("ls", short_help="Show the list, as tnxctl models alone does.")
@common
def ls(endpoint: str, timeout: float, as_json: bool) -> None:
    """Show the models that the daemon serves and their versions, as tnxctl models alone does: see its --help.

    \b
    Example:
      tnxctl models ls --json
    """
    _list(endpoint, timeout, as_json)


def _list(endpoint: str, timeout: float, as_json: bool) -> None:
    from tnxctl.client import Client

    with Client(endpoint, timeout=timeout) as client:
        infos = client.models()
    _show(endpoint, infos, as_json)


@command.command("show", short_help="Show all about a model, and an example call.")
@click.argument("model", metavar="NAME[@VERSION]", shell_complete=suggestions.models)
@common
def show(model: str, endpoint: str, timeout: float, as_json: bool) -> None:
    """Show a model: its inputs and outputs, its settings, and a call of it to copy, for a shell and for Python.

    Without VERSION: the version that gets most of the requests.

    \b
    Examples:
      tnxctl models show resnet
      tnxctl models show resnet@2 --json | jq -r .example.python > call.py
    """
    from tnxctl.cli import example
    from tnxctl.client import Client

    with Client(endpoint, timeout=timeout) as client:
        info = client.metadata(model)
        others = [other for other in client.models() if other.name == info.name and other.version != info.version]
    calls = example.calls(info, model, endpoint)
    if as_json:
        document = output.model_document(info)
        output.write_json({"endpoint": endpoint, **document, "example": calls and calls._asdict()})
        return
    click.echo("\n".join(modellist.details(info, others)))
    if calls is not None:
        click.echo(f"\n{text.heading('In a shell')}\n{calls.shell}\n\n{text.heading('In Python')}\n{calls.python}")


@command.command("load", short_help="Load a model, or one version of it.")
@click.argument("model", metavar="NAME[@VERSION]", shell_complete=suggestions.models)
@slow
@click.pass_context
def load(ctx: click.Context, model: str, endpoint: str, timeout: float, as_json: bool) -> None:
    """Load a version and wait until it is warm. While another version serves, it gets only the requests that name it,
    until tnxctl models route gives it more. With NAME alone: load what its model.toml wants, traffic included.

    Ctrl-C ends only the waiting: the daemon goes on. A version that cannot be loaded leaves what served before as it
    is; the exit code is 4 then, 8 if there is no room for it, 6 if it took too long.

    \b
    Examples:
      tnxctl models load resnet@2
      tnxctl models load resnet --timeout 60
    """
    from tnxctl.client import Client

    with (
        Client(endpoint, timeout=min(timeout, DEFAULT_TIMEOUT_S)) as client,
        output.interruptible(ctx),
        progress.shown(client, f"loading {model}", model),
    ):
        infos = client.load(model, timeout=timeout)
    _show(endpoint, infos, as_json)
    if not as_json:
        for info in infos:
            if info.status == "ready" and model in (info.name, f"{info.name}@{info.version}"):
                click.echo(f"{text.title(info)}: its loading and warm-up took {text.duration(info.load_s)}")


@command.command("unload", short_help="Stop serving a model, or one version of it.")
@click.argument("model", metavar="NAME[@VERSION]", shell_complete=suggestions.models)
@slow
@click.pass_context
def unload(ctx: click.Context, model: str, endpoint: str, timeout: float, as_json: bool) -> None:
    """Stop serving a version, or with NAME alone all versions, and wait until its memory is free.

    Requests taken in before are answered. Ctrl-C ends only the waiting.

    \b
    Examples:
      tnxctl models unload resnet@1
      tnxctl models unload resnet
    """
    from tnxctl.client import Client

    with (
        Client(endpoint, timeout=min(timeout, DEFAULT_TIMEOUT_S)) as client,
        output.interruptible(ctx),
        progress.shown(client, f"unloading {model}", model),
    ):
        infos = client.unload(model, timeout=timeout)
    _show(endpoint, infos, as_json)


@command.command("route", short_help="Split the requests for a model between its versions.")
@click.argument("name", shell_complete=suggestions.names)
@click.argument(
    "weights", nargs=-1, required=True, metavar="(VERSION=WEIGHT... | latest)", shell_complete=suggestions.weights
)
@click.option(
    "--shadow",
    default="",
    metavar="VERSION",
    shell_complete=suggestions.versions,
    help="Send copies of the requests to this version, as far as there is free capacity, and answer none of them.",
)
@common
def route(name: str, weights: tuple[str, ...], shadow: str, endpoint: str, timeout: float, as_json: bool) -> None:
    """Split the requests for NAME that name no version. Weights are relative to their sum; versions without one get
    nothing. latest: the newest version takes all. All versions named must be loaded.

    Requests of one connection, or with the same --route-key, stay with one version. tnxctl models compare shows how the
    answers of a shadow differ.

    \b
    Examples:
      tnxctl models route resnet 1=95 2=5
      tnxctl models route resnet 1=1 --shadow 2
      tnxctl models route resnet latest
    """
    shares = _weights(weights)

    from tnxctl.client import Client

    with Client(endpoint, timeout=timeout) as client:
        infos = client.route(name, shares, shadow=shadow)
    _show(endpoint, infos, as_json)


@command.command("compare", short_help="Compare the answers of a shadow version.")
@click.argument("name", shell_complete=suggestions.names)
@click.argument("baseline", shell_complete=suggestions.versions)
@click.argument("candidate", shell_complete=suggestions.versions)
@common
def compare(name: str, baseline: str, candidate: str, endpoint: str, timeout: float, as_json: bool) -> None:
    """Compare the answers of version CANDIDATE, a shadow, with those of BASELINE, the version that answers, and the
    time that both take for the same batches.

    Strings are 0 apart if they are equal, else 1: the mean is the part of them that differ. ARG-MAX AGREES is the
    part of the rows whose largest element is at the same place in both. MISFITS are outputs of another shape or
    datatype, or with NaN or infinity in one of the two alone.

    \b
    Examples:
      tnxctl models route resnet 1=1 --shadow 2
      tnxctl models compare resnet 1 2
      tnxctl models compare resnet 1 2 --json | jq '.outputs[].max_abs'
    """
    from tnxctl.cli import comparison
    from tnxctl.client import Client

    with Client(endpoint, timeout=timeout) as client:
        found = client.compare(name, baseline, candidate)
    if as_json:
        output.write_json({"endpoint": endpoint, **output.report_document(found)})
    else:
        click.echo("\n".join(comparison.lines(found, text.terminal_width(sys.stdout))))


@command.command("init", short_help="Write a commented model.toml.")
@click.argument("directory", type=click.Path(file_okay=False))
@click.option(
    "--format",
    "kind",
    type=click.Choice(list(modeltoml.FILES)),
    default="pt2",
    show_default=True,
    help="Format of the weights. pt2 is torch.export; safetensors needs a factory in Python; torchscript is "
    "deprecated; python is a class in model.py.",
)
@click.option("--force", is_flag=True, help="Replace a model.toml that is there.")
@as_json
def init(directory: str, kind: str, force: bool, as_json: bool) -> None:
    """Write DIRECTORY/model.toml, which says how a model is served, with all keys and their defaults as comments.

    DIRECTORY is called like the model, and the folder around it is the repository. No daemon is asked.

    \b
    Examples:
      tnxctl models init models/resnet
      tnxctl models init models/minilm --format safetensors
      tnxd --model-repository models/
    """
    path, weights = modeltoml.write(directory, kind, force)
    if as_json:
        output.write_json({"path": str(path), "weights": str(weights), "format": kind})
    else:
        click.echo(f"wrote {path}\nThe weights go to {weights}, those of a later version beside it, to 2, 3, ...")


def _weights(arguments: Sequence[str]) -> dict[str, float]:
    """VERSION=WEIGHT... as a mapping; empty for "latest".

    Raises:
        click.UsageError: something else; the sentence names it.
    """
    if list(arguments) == [_LATEST]:
        return {}
    from tnxctl.arguments import check_weights
    from tnxctl.protocol.errors import InvalidArgument

    weights: dict[str, float] = {}
    for argument in arguments:
        version, equals, number = argument.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not version or not equals or math.isnan(weight):
            raise click.UsageError(f"{argument!r} is not VERSION=WEIGHT, as in 2=5; or {_LATEST} alone.")
        if version in weights:
            raise click.UsageError(f"version {version} has two weights.")
        weights[version] = weight
    try:
        return check_weights(weights)
    except InvalidArgument as error:
        raise click.UsageError(f"{error.message}.") from None


def _show(endpoint: str, infos: Sequence[ModelInfo], as_json: bool) -> None:
    if as_json:
        output.write_json({"endpoint": endpoint, "models": [output.model_document(info) for info in infos]})
    elif infos:
        click.echo("\n".join((*modellist.table(infos, text.terminal_width(sys.stdout)), *text.remarks(infos))))
    else:
        click.echo("There are no models.")
