"""Corpus of messages that were a bug once, sent again: corpus/*.bin is what a peer wrote after it had connected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import Daemon
from invariants import needs_proc, unharmed
from test_fault_old_peers import open_with

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.bin"))


@needs_proc
def test_corpus_is_survived(run_daemon: Callable[..., Daemon]) -> None:
    daemon = run_daemon("--model", "mlp")
    address = "127.0.0.1", int(daemon.endpoint.rpartition(":")[2])
    assert CORPUS
    with unharmed(daemon):
        open_with((path.read_bytes() for path in CORPUS), address)
