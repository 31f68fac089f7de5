"""`tnxctl` with several daemons in --host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fake_daemon import FakeDaemon
from tool import fields, run


@pytest.fixture
def pair() -> Iterator[tuple[FakeDaemon, FakeDaemon]]:
    with FakeDaemon() as first, FakeDaemon() as second:
        yield first, second


def hosts(pair: tuple[FakeDaemon, FakeDaemon]) -> str:
    return ",".join(daemon.endpoint for daemon in pair)


def test_predictions_of_several(pair: tuple[FakeDaemon, FakeDaemon]) -> None:
    done = run("predict", "--host", hosts(pair), "--count", 20, "--concurrency", 4, "--json")
    assert done.exit_code == 0, done.output
    document = fields(done)
    assert document["endpoint"] == hosts(pair)
    assert document["answered"] == 20
    assert document["traffic"]["endpoints"].keys() == {daemon.endpoint for daemon in pair}
    assert sum(document["traffic"]["endpoints"].values()) == 21  # one of them for the signature
    assert (document["traffic"]["moved"], document["traffic"]["hedged"]) == (0, 0)


def test_one_of_them_is_not_there() -> None:
    with FakeDaemon() as fake:
        assert run("predict", "--host", f"127.0.0.1:1,{fake.endpoint}", "--count", 5).exit_code == 0
        assert run("metadata", "digits", TNX_HOST=f"127.0.0.1:1,{fake.endpoint}").exit_code == 0
        assert "digits" in run("--host", f"127.0.0.1:1,{fake.endpoint}", "metadata", "digits").stdout


def test_hedging(pair: tuple[FakeDaemon, FakeDaemon]) -> None:
    assert run("predict", "--host", hosts(pair), "--hedge").exit_code == 0
    done = run("predict", "--host", pair[0].endpoint, "--hedge")
    assert done.exit_code == 2
    assert "--hedge sends copies to another daemon: --host names one" in done.output


@pytest.mark.parametrize(
    "command",
    [
        "health",
        "models",
        "models show m",
        "models load m",
        "models route m 1=1",
        "reload",
        "bench",
        "whoami",
        "clients",
    ],
)
def test_what_is_about_one_daemon_takes_one(command: str) -> None:
    for done in (
        run(*command.split(), "--host", "gpu-1,gpu-2"),
        run(*command.split(), TNX_HOST="gpu-1,gpu-2"),
        run("--host", "gpu-1,gpu-2", *command.split()),
    ):
        assert done.exit_code == 2
        assert "is about one daemon, and these are 2: ask each by itself." in " ".join(done.output.split())


@pytest.mark.parametrize(("host", "why"), [("a,,b", "''"), ("a,a:5555", "comes twice"), (",", "''")])
def test_a_list_with_something_wrong(host: str, why: str) -> None:
    done = run("predict", "--host", host)
    assert done.exit_code == 2
    assert why in done.output
