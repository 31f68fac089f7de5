"""Leak detection of `unharmed`, on which the other tests rely: one leak by one connection is found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Daemon, serving_daemon
from invariants import PATIENCE_S, needs_proc, unharmed
from raw import good, reply
from tnxctl.protocol import wire
from zmtp import Peer


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    program = (str(Path(__file__).with_name("leaky.py")),)
    with serving_daemon(tmp_path_factory.mktemp("leaky") / "log", "--model", "mlp", program=program) as daemon:
        yield daemon


@needs_proc
def test_connection_that_leaves_nothing_behind_is_no_leak(leaky: Daemon) -> None:
    ask(leaky, "nothing")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("leak", ["a thread", "a descriptor", "memory"])
def test_leak_of_one_connection_is_found(leaky: Daemon, leak: str) -> None:
    with pytest.raises(AssertionError, match="does not come back to"):
        ask(leaky, leak, patience_s=3.0)  # it never does


def ask(daemon: Daemon, identity: str, patience_s: float = PATIENCE_S) -> None:
    """Have one request answered, beside an honest client, and look whether everything is as it was."""
    with unharmed(daemon, name=identity, patience_s=patience_s), Peer(daemon.endpoint) as peer:
        peer.greet(identity.encode()).write(good())
        assert isinstance(reply(peer), wire.Result)
