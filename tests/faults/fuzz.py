"""Damaged requests and raw ZMTP against a live daemon, with an honest client beside it: `make fuzz COUNT=100000`.

Half of the messages go through a whole handshake and are damaged requests; the others are damaged from the first byte
on. Each of the first gets one answer, or its connection ends. What ends the daemon is written to tests/faults/corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import Daemon, start_daemon
from headers import pack, predict_header, route_header
from invariants import unharmed
from raw import ROW
from zmtp import GREETING, Peer, frame, message

CORPUS = Path(__file__).parent / "corpus"
READY = frame(b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER", command=True)
STEP = 10_000

SEEDS = [
    message(pack(predict_header()), ROW),
    message(b"", pack(predict_header()), ROW),
    message(
        pack(predict_header(deadline_us=1e6, priority=0, device="cpu", route_key="key", min_gpu_memory_mb=1.5)), ROW
    ),
    message(pack(predict_header(inputs=[["input", "FP32", [1, 256]], ["more", "INT8", [3]]])), ROW, b"abc"),
    message(pack({"type": "health", "v": 1, "id": 1})),
    message(pack({"type": "metadata", "v": 1, "id": 2, "model": "mlp"})),
    message(pack({"type": "models", "v": 1, "id": 3})),
    message(pack({"type": "cancel", "v": 1, "id": 7})),
    message(pack({"type": "compare", "v": 1, "id": 4, "model": "mlp", "baseline": "1", "candidate": "2"})),
    message(pack(route_header())),
    frame(pack(predict_header()), more=True),
    frame(b"\x04PING\0\0context", command=True),
]


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Message with a few bytes changed, taken out, doubled, or put in."""
    result = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 3, 8])):
        at = chance.randrange(len(result) + 1)
        kind = chance.randrange(5)
        if kind == 0 and at < len(result):
            result[at] = chance.randrange(256)
        elif kind == 1 and at < len(result):
            result[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del result[at : at + chance.choice([1, 1, 2, 9, 100])]
        elif kind == 3:
            result[at:at] = chance.randbytes(chance.choice([1, 2, 8, 50]))
        else:
            piece = result[at : at + chance.randrange(40)]
            result[at:at] = piece * chance.randint(1, 3)
    return bytes(result)


def step(daemon: Daemon, chance: random.Random, count: int) -> None:
    """Send so many messages, over connections that last as long as the daemon lets them."""
    address = "127.0.0.1", int(daemon.endpoint.rpartition(":")[2])
    sent = 0
    with unharmed(daemon, name=f"{count} damaged messages", latency_bound=1000.0):
        while sent < count:
            batch = [damaged(chance, chance.choice(SEEDS)) for _ in range(min(chance.randint(1, 200), count - sent))]
            sent += len(batch)
            try:
                if chance.random() < 0.5:
                    with Peer(daemon.endpoint, timeout=10) as peer:
                        peer.greet()
                        for data in batch:
                            peer.write(data)
                else:
                    with socket.create_connection(address, 10) as raw:
                        raw.sendall(damaged(chance, GREETING + READY) + b"".join(batch))
                        raw.settimeout(0.05)
                        with contextlib.suppress(TimeoutError):
                            raw.recv(4096)
            except OSError:
                pass
            if daemon.process.poll() is not None:
                path = CORPUS / f"{int(time.time())}.bin"
                path.write_bytes(GREETING + READY + b"".join(batch))
                sys.exit(f"the daemon ended with {daemon.process.returncode}; what it had been sent is in {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        daemon = start_daemon(Path(folder) / "log", "--model", "mlp")
        try:
            for begin in range(0, arguments.count, STEP):
                step(daemon, chance, min(STEP, arguments.count - begin))
        finally:
            daemon.process.terminate()
            code = daemon.process.wait(60)
    assert code == 0, code


if __name__ == "__main__":
    main()
