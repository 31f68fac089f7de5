"""`tnxctl` for tests, called in this process."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from fake_daemon import FakeDaemon
from tnxctl.cli import main
from tnxctl.cli.exits import Exit


def run(*arguments: object, stdin: bytes | None = None, **environment: str) -> Result:
    """The outcome of a command line."""
    return CliRunner(env={"TNX_HOST": None, **environment}).invoke(main, list(map(str, arguments)), input=stdin)


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
