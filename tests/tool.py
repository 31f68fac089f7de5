"""`tnxctl` for tests, called in this process."""

from __future__ import annotations

import json
from typing import Any

import click
from click.testing import CliRunner, Result

from fake_daemon import FakeDaemon
from tnxctl.cli import main
from tnxctl.cli.exits import Exit
from tnxctl.cli.options import DEFAULT_TIMEOUT_S

SHORT = f"{DEFAULT_TIMEOUT_S:g}s"
"""The default timeout, as options spell it."""


def run(*arguments: object, stdin: bytes | None = None, **environment: str) -> Result:
    """The outcome of a command line. Where it says no --timeout, and it would be short, it is a minute."""
    runner = CliRunner(env={"TNX_HOST": None, **environment})
    return runner.invoke(main, list(map(str, arguments)), input=stdin, default_map=_patience(main))


def _patience(group: click.Group) -> dict[str, Any]:
    """Defaults of the commands of a group: tests bear with a daemon that is held up for seconds."""
    found: dict[str, Any] = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        of_command = _patience(command) if isinstance(command, click.Group) else {}
        if any(option.name == "timeout" and option.default == SHORT for option in command.params):
            of_command["timeout"] = "60s"
        found[name] = of_command
    return found


def ask(fake: FakeDaemon, *arguments: object, stdin: bytes | None = None) -> Result:
    """The same, at that daemon."""
    return run(*arguments, "--host", fake.endpoint, stdin=stdin)


def ask_in_vain(fake: FakeDaemon, *arguments: object) -> Result:
    """The same, with a short time for an answer: again where that was over before there was a connection."""
    while "no connection within" in (result := ask(fake, *arguments)).output:
        assert result.exit_code == Exit.UNREACHABLE
    return result


def fields(result: Result) -> dict[str, Any]:
    """The JSON document that must be all of standard output."""
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document
