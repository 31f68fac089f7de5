"""`tnxctl replay`: send the requests of a recording again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tnxctl.cli import output, suggestions
from tnxctl.cli.options import Finite, common

if TYPE_CHECKING:
    from tnxctl.cli.bench.recording import Step
    from tnxctl.cli.bench.replay import Compared, Contents

FASTEST = 1000.0


@click.command("replay", short_help="Send the requests of a recording again.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--speed",
    type=Finite(min=0, max=FASTEST, min_open=True),
    default=1.0,
    show_default=True,
    metavar="FACTOR",
    help="How many times as fast as they were recorded.",
)
@click.option(
    "--model",
    default="",
    metavar="NAME[@VERSION]",
    shell_complete=suggestions.models,
    help="Send all requests to this model, or this version.  [default: as they were sent]",
)
@click.option(
    "--only", default="", metavar="NAME[@VERSION]", help="Only requests that were for this one.  [default: all]"
)
@click.option(
    "--against",
    default="",
    metavar="NAME[@VERSION]",
    shell_complete=suggestions.models,
    help="Send them to this one first, and compare the outputs of the two.",
)
@common
@click.pass_context
def command(
    ctx: click.Context,
    file: Path,
    speed: float,
    model: str,
    only: str,
    against: str,
    endpoint: str,
    timeout: float,
    as_json: bool,
) -> None:
    """Send the requests of FILE, a recording of tnxctl record, to a daemon again, and measure it.

    They are sent as far apart as they were recorded, divided by --speed, whatever the daemon does; latency counts from
    when a request was due. Deadlines, priorities and all else are as recorded, but for the model, if --model says so.
    All go over one connection, so that they are requests of one client. The figures are those of tnxctl bench.

    With --against, all are sent twice, one run after the other, so that each model meets the recorded load alone. Of
    each run, the outputs of the first 256 MiB are compared.

    A file that was cut off, as when the daemon was killed, is sent as far as it goes. Ctrl-C, or SIGTERM, ends it with
    what was measured so far. Errors are a failure, as for tnxctl predict.

    \b
    Examples:
      tnxctl replay monday.mcap
      tnxctl replay monday.mcap --speed 2 --host gpu-box
      tnxctl replay monday.mcap --only digits --model digits@2 --against digits@1
      tnxctl replay monday.mcap --json | jq .steps[0].latency_us.p99
    """
    from tnxctl.cli.bench import lines, replay

    selection = replay.Selection(file, only, speed)
    contents = selection.read(1 << 62)  # before anybody is asked
    most_bytes = replay.most_message_bytes(endpoint, timeout)
    if contents.nbytes > most_bytes:
        contents = selection.read(most_bytes)
    run = replay.Replay(endpoint, timeout, selection, contents, most_bytes)
    table = None if as_json else lines.Table(None)
    if table is not None:
        click.echo(f"{_heading(file, contents, speed)}\n\n{table.head()}")
    steps: list[Step] = []
    kept: list[replay.Outputs] = []
    for target in [against, model] if against else [model]:
        outputs = replay.Outputs() if against else None
        step = run.run(target, target or "as recorded", outputs)
        steps.append(step)
        if table is not None:
            click.echo(table.row(step))
        if step.ended is not None:
            break
        if outputs is not None:
            kept.append(outputs)
    compared = replay.compare(*kept) if len(kept) == 2 else None
    end = steps[-1].ended
    if as_json:
        output.write_json(_document(file, contents, selection, endpoint, timeout, steps, compared))
    else:
        remarks = [*lines.remarks(steps), *_remarks(contents)]
        click.echo("\n".join([*lines.stages(steps), *_differences(compared), *([""] if remarks else []), *remarks]))
    sentence = lines.shortfall(steps, end, False)
    if sentence:
        output.complain(sentence)
    ctx.exit(lines.exit_code(steps, end, False))


def _heading(file: Path, contents: Contents, speed: float) -> str:
    from tnxctl.cli import text
    from tnxctl.durations import spell

    of = ", ".join(f"{count} of {text.clean(title)}" for title, count in list(contents.titles.items())[:5])
    more = f" and {len(contents.titles) - 5} more" if len(contents.titles) > 5 else ""
    pace = "" if speed == 1 else f", sent {speed:g} times as fast"
    within = spell(float(f"{max(contents.seconds, 1e-6):.3g}"))
    return f"{text.clean(str(file))}: {contents.requests} requests within {within}, {of}{more}{pace}"


def _remarks(contents: Contents) -> Iterator[str]:
    """Sentences about what of the file was not sent."""
    from tnxctl.cli import text

    if contents.damage:
        yield f"The file was read as far as it goes: {text.clean(contents.damage)}"
    if contents.skipped:
        yield f"{contents.skipped} messages of the file are no requests: {text.clean(contents.last_skipped)}"
    if contents.too_large:
        yield f"{contents.too_large} requests are larger than the daemon takes, and were not sent"


def _differences(compared: Compared | None) -> Iterator[str]:
    import sys

    from tnxctl.cli import comparison, text

    if compared is None:
        return
    yield ""
    yield f"Outputs of {compared.requests} requests compared" + (
        f", {compared.malformed} cannot be read" if compared.malformed else ""
    )
    if compared.outputs:
        yield from comparison.differences(compared.outputs, text.terminal_width(sys.stdout))


def _document(
    file: Path,
    contents: Contents,
    selection: Any,
    endpoint: str,
    timeout: float,
    steps: list[Step],
    compared: Compared | None,
) -> dict[str, Any]:
    import dataclasses

    from tnxctl.cli.bench import lines

    return {
        "endpoint": endpoint,
        "file": str(file),
        "speed": selection.speed,
        "only": selection.only,
        "timeout_s": timeout,
        "requests": contents.requests,
        "models": contents.titles,
        "seconds": contents.seconds,
        "skipped": contents.skipped,
        "too_large": contents.too_large,
        "damage": contents.damage,
        **lines.steps_document(steps, steps[-1].ended),
        "compared": None
        if compared is None
        else {**dataclasses.asdict(compared), "outputs": [output.plain(each) for each in compared.outputs]},
    }
