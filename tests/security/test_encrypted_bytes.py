"""Encryption against the accounts of bytes: what it adds to each frame is no message that does not end."""

from __future__ import annotations

from pathlib import Path

import pytest

from keyed import dealer, listed
from tnxctl.keys import pairs
from tnxctl.protocol.wire import Limits
from tnxd.config import Clients
from tnxd.transport.access import Access
from tnxd.transport.client_limits import Admission
from tnxd.transport.key_ring import KeyRing
from tnxd.transport.router import Router
from tnxd.transport.wakeup import Wakeup

MESSAGES = 20_000
"""So many that what is added to them, in three frames each, would look like more than a MiB that was not read."""


@pytest.mark.parametrize("size", [1, 300])
def test_what_encryption_adds_does_not_count_as_unread(tmp_path: Path, size: int) -> None:
    server, alice = pairs.new("daemon"), pairs.new("alice")
    (tmp_path / "keys.toml").write_text(listed({"alice": alice}, {"alice": "predict"}))
    admission = Admission(Clients(), max_requests=1000, max_bytes=1 << 30)
    router = Router(Limits(), admission, Access(KeyRing(tmp_path / "keys.toml")), server.secret)
    router.bind("tcp://127.0.0.1:*")
    wakeup = Wakeup()
    router.watch(wakeup)
    with dealer(router.endpoints[0], server.public, alice) as peer:
        for _ in range(MESSAGES):
            peer.socket.send_multipart([b"h" * size] * 3)
        received = 0
        while received < MESSAGES:
            message = router.receive()
            if message is None:
                router.wait(1000)
            else:
                received += 1
        assert message is not None
        assert message.connection.client.name == "alice"
        router.measure_unread(everywhere=True)
        assert admission.unread == 0
    router.close(0)
    wakeup.close()
