"""Messages that do not end, and replies that nobody takes."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import Daemon
from dealer import Dealer
from headers import pack, predict_header
from invariants import footprint, needs_proc, unharmed
from tnxd.transport.unread import _KERNEL_BYTES
from zmtp import Peer, frame, message

MIB = 1 << 20

SMALL = """
[limits]
message_bytes = 16777216
[clients]
memory_mb = 128.0
max_mb = 64.0
max_owed_mb = 16.0
"""


@pytest.fixture
def small_daemon(run_daemon: Callable[..., Daemon], tmp_path: Path) -> Daemon:
    """Daemon whose traffic may take 128 MiB."""
    config = tmp_path / "tnxd.toml"
    config.write_text(SMALL)
    return run_daemon("--config", str(config), "--model", "mlp")


@contextlib.contextmanager
def peak_of(pid: int) -> Iterator[list[float]]:
    """Peak of the memory of a process inside the block, in MiB, as the only item."""
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], footprint(pid).rss_mib)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


@needs_proc
@pytest.mark.parametrize(
    "part",
    [
        b"",
        pytest.param(bytes(1000), marks=pytest.mark.slow),
        pytest.param(bytes(1 << 20), marks=pytest.mark.slow),
    ],
    ids=["empty", "1 kB", "1 MiB"],
)
def test_message_that_does_not_end_is_cut_off(small_daemon: Daemon, part: bytes) -> None:
    """Each empty part takes 2 bytes on the wire and 64 in memory."""
    pid = small_daemon.process.pid
    with unharmed(small_daemon), peak_of(pid) as peak:
        before = footprint(pid).rss_mib
        chunk = frame(part, more=True) * max((1 << 18) // (len(part) + 2), 1)
        with Peer(small_daemon.endpoint, timeout=60) as peer:
            peer.greet()
            with contextlib.suppress(ConnectionError):
                for _ in range((4 << 30) // len(chunk)):
                    peer.write(chunk)
                raise AssertionError("it was not cut off")
    print(f"memory rose by {peak[0] - before:.0f} MiB at most")
    with Dealer(small_daemon.endpoint) as dealer:
        assert dealer.health().connections_cut == 1


@needs_proc
def test_slow_upload_within_the_limits_is_not_cut_off(small_daemon: Daemon) -> None:
    with unharmed(small_daemon), Peer(small_daemon.endpoint, timeout=60) as peer:
        rows = 15 * MIB // 1024
        peer.greet().write(frame(pack(predict_header(inputs=[["input", "FP32", [rows, 256]]])), more=True))
        body = frame(bytes(rows * 1024))
        with Dealer(small_daemon.endpoint) as dealer:
            for at in range(0, len(body), MIB):
                peer.write(body[at : at + MIB])
                dealer.health()
        header, output = peer.read_message()
        assert len(output) == rows * 512, header
    with Dealer(small_daemon.endpoint) as dealer:
        assert dealer.health().connections_cut == 0


@needs_proc
def test_replies_that_nobody_takes_are_bounded(small_daemon: Daemon) -> None:
    """Four clients that never read ask for 400 replies of 240 kB each. What they leave behind comes back."""
    # Before each request of the honest client one of each of the four is computed, which takes 20 times as long as one
    # of its own: 80 times its latency is what turns cost. If it waited for all that they have here, it would be
    # thousands.
    fair = 500.0
    pid = small_daemon.process.pid
    rows = 480
    inputs = bytes(rows * 1024)
    with (
        unharmed(small_daemon, latency_bound=fair),
        peak_of(pid) as peak,
        contextlib.ExitStack() as stack,
    ):
        before = footprint(pid).rss_mib
        peers = [stack.enter_context(Peer(small_daemon.endpoint, receive_buffer=4096, timeout=60)) for _ in range(4)]
        for peer in peers:
            peer.greet()
            peer.settimeout(5)  # for each request
        for peer, number in itertools.product(peers, range(400)):
            header = pack(predict_header(id=number, inputs=[["input", "FP32", [rows, 256]]]))
            with contextlib.suppress(OSError):  # it may be cut off by now
                peer.write(message(header, inputs))
        with Dealer(small_daemon.endpoint) as dealer:
            # What is unread is measured at times, and then the worst of them is cut off. Until then it may be more, by
            # what the daemon allows each connection in the kernel's buffer.
            report = dealer.health()
            while report.traffic_mb > report.traffic_limit_mb or report.queued:
                assert report.traffic_mb <= report.traffic_limit_mb + len(peers) * _KERNEL_BYTES / MIB
                report = dealer.health()
            assert report.traffic_mb <= report.traffic_limit_mb
    print(f"memory rose by {peak[0] - before:.0f} MiB at most")
