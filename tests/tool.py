"""`tnxctl` for tests, called in this process."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from fake_daemon import FakeDaemon
from tnxctl.cli import main


def run(*arguments: object, stdin: bytes | None = None, **environment: str) -> Result:
    """The outcome of a command line."""
    return CliRunner(env={"TNX_HOST": None, **environment}).invoke(main, list(map(str, arguments)), input=stdin)


def ask(fake: FakeDaemon, *arguments: object, stdin: bytes | None = None) -> Result:
    """The same, at that daemon."""
    return run(*arguments, "--host", fake.endpoint, stdin=stdin)


def fields(result: Result) -> dict[str, Any]:
    """The JSON document that must be all of standard output."""
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document
