"""`tnxctl`: asks a TensorNext daemon, from a shell.

health.py, top/, stats.py, explain.py, models.py, metadata.py, predict.py, bench/, record.py, replay.py, reload.py,
whoami.py, clients.py, keys.py, bridge.py, completion.py   one sub-command each, imported when it is called
options.py      options that they share         exits.py        exit codes
sources.py      what --input may be             inputs.py       random inputs
tensorfiles.py  .npy and .npz                   textfiles.py    JSON and CSV
images.py       image files, by Pillow
workload.py     many requests, some at a time   tally.py        what came of them, in numbers
example.py      an example call of a model      modeltoml.py    a commented model.toml
report.py       how answers are shown           comparison.py   how two versions differ
intervals.py    rates and percentiles, and why requests became slower
text.py         tables, units, colours          output.py       JSON documents and error sentences
groups.py       commands, and misspelt ones     interrupts.py   what SIGTERM does
suggestions.py  models, versions and devices    progress.py     what a daemon is doing
                that complete a word
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import click

import tnxctl
from tnxctl.cli import exits, options, output
from tnxctl.cli.groups import Group
from tnxctl.cli.interrupts import heed_sigterm
from tnxctl.protocol.errors import TensorNextError

_COMMANDS = (
    "health",
    "top",
    "stats",
    "explain",
    "models",
    "metadata",
    "predict",
    "bench",
    "record",
    "replay",
    "reload",
    "whoami",
    "clients",
    "keys",
    "bridge",
    "completion",
)


class _Tool(Group):
    """A group that imports a sub-command when it is needed and turns TensorNext's errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"tnxctl.cli.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (TensorNextError, exits.FileProblem) as error:
            output.fail(ctx, error)
        except KeyboardInterrupt as interrupt:
            click.echo(err=True)  # below the terminal's "^C"
            ctx.exit(exits.of_interrupt(interrupt))

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if "_TNXCTL_COMPLETE" in os.environ:
            import_module("tnxctl.cli.completion").register()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            code = output.lose(error)
            if code is None:
                raise
            sys.exit(code)


def _exit_codes() -> str:
    rows = (f"  {code.value:>3}  {meaning}" for code, meaning in exits.MEANINGS.items())
    return "\n".join(("\b", "Exit codes:", *rows))


_EPILOG = f"""\b
Examples:
  tnxctl health
  tnxctl predict --host 192.168.1.100 --count 5
  tnxctl --host 192.168.1.100 models
  tnxctl predict --model digits --input scans.npy --output scores.npy
  tnxctl bench --concurrency 1,8,64
  tnxctl top
  tnxctl models load resnet@2
  tnxctl COMMAND --help

{_exit_codes()}

With --count above 1: the code of the failures if every request failed in
the same way, 1 if only some failed.

Shell completion: tnxctl completion --help
"""


@click.group(
    cls=_Tool, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@options.host(several=True, expose_value=False)
@click.version_option(tnxctl.__version__, prog_name="tnxctl", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Ask a TensorNext daemon for predictions, its health and its models, measure it, and change what it serves."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without "µ" shows "?" instead of failing
    heed_sigterm(ctx)
    output.check_writable()
