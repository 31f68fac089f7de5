"""Mixed load on one daemon for a long time, and whether it grows: `make soak MINUTES=60`.

An honest client, whose every answer is checked, beside clients that crash, stall, lie and send what models fail at;
versions are swapped and the repository reloaded all the time. Memory, descriptors and threads are sampled, and their
slopes told with their confidence. Then the same for a few minutes with a leak planted, of each kind, which has to be
found: else the first result means nothing. All of it is on loopback, and at rates that leave the machine room.

    python tests/soak/soak.py --minutes 30 --json soak.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "faults")]

import numpy as np  # noqa: E402

from daemons import ODD, Running, running  # noqa: E402
from dealer import Dealer, rows  # noqa: E402
from model_repositories import ONE_ROW, put  # noqa: E402
from slopes import BLOCKS, Slope, slope  # noqa: E402
from tnxctl import Client  # noqa: E402
from tnxctl.protocol import wire  # noqa: E402
from zmtp import Peer, message  # noqa: E402

LEAKING = (str(Path(__file__).with_name("leaking.py")),)
LEAKS = ("memory", "descriptors", "threads")
LEAK_MINUTES = 3.0

WARM_UP = 0.25
"""Part of the time that is left out: caches fill, and the C library finds out how much memory it needs."""

ALLOWED = {"memory": 16.0, "descriptors": 8.0, "threads": 4.0}
"""Growth over the whole time that is no leak, in MiB and in numbers."""

CONFIG = """
drain_timeout_s = 5.0
stall_timeout_s = 20.0
[cpu]
workers = 2
threads = 1
"""


class Soak:
    """One daemon and those who trouble it, until the time is over."""

    def __init__(self, daemon: Running, tcp: str, repository: Path, seconds: float) -> None:
        self.daemon = daemon
        self.tcp = tcp
        self.repository = repository
        self.ends = time.monotonic() + seconds
        self.over = threading.Event()
        self.counts: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.wrong: list[str] = []

    def run(self) -> None:
        actors = [
            self.honest,
            self.honest_futures,
            self.poison,
            self.crash,
            self.stall,
            self.lie,
            self.swap,
            self.signal,
        ]
        threads = [threading.Thread(target=self._act, args=(actor,), name=actor.__name__) for actor in actors]
        for thread in threads:
            thread.start()
        self.samples = self._sample()
        self.over.set()
        for thread in threads:
            thread.join(60)
            if thread.is_alive():
                self.wrong.append(f"{thread.name} hangs")

    def _act(self, actor: Callable[[random.Random], float]) -> None:
        """Let an actor act again and again; it returns the seconds until the next time."""
        generator = random.Random(actor.__name__)
        while not self.over.is_set():
            try:
                pause = actor(generator)
            except Exception as error:
                if actor in (self.honest, self.honest_futures, self.swap):
                    self.wrong.append(f"{actor.__name__}: {type(error).__name__}: {error}")
                self.counts[f"{actor.__name__} was cut off"] += 1
                pause = 0.1
            self.counts[actor.__name__] += 1
            self.over.wait(pause)

    # --- honest --------------------------------------------------------------------------------------------

    def honest(self, generator: random.Random) -> float:
        """One request after another for half a minute, each answer checked."""
        with Client(self.daemon.endpoint, timeout=30.0) as client:
            ends = time.monotonic() + 30
            while time.monotonic() < ends and not self.over.is_set():
                began = time.perf_counter()
                answer = float(client.predict(ONE_ROW, model="net").output[0, 0])
                self.latencies.append(time.perf_counter() - began)
                if not answer.is_integer() or answer < 1:
                    self.wrong.append(f"the answer was {answer}")
                self.counts["answers"] += 1
                self.over.wait(0.005)
        return 0.0

    def honest_futures(self, generator: random.Random) -> float:
        """32 at once; each has rows of its own, and gets its own back."""
        with Client(self.daemon.endpoint, timeout=30.0) as client:
            sent = [np.full((generator.randint(1, 8), 4), 100.0 + index, np.float32) for index in range(32)]
            futures = [client.submit(array, model="odd") for array in sent]
            for array, future in zip(sent, futures, strict=True):
                if not np.array_equal(future.result().output, array * 2):
                    self.wrong.append("somebody else's answer")
                self.counts["answers"] += 1
        return 0.1

    # --- not so honest -------------------------------------------------------------------------------------

    def poison(self, generator: random.Random) -> float:
        """A quarter of the requests is what the model fails at, each in its own way."""
        with Dealer(self.tcp) as dealer:
            for _ in range(20):
                for _ in range(8):
                    command = float(generator.randint(1, 13)) if generator.random() < 0.25 else 100.0
                    dealer.predict(rows(generator.randint(1, 3), 4, command), model="odd")
                for _ in range(8):
                    dealer.receive()
                    self.counts["answers to poison"] += 1
                self.over.wait(0.05)
        return 0.0

    def crash(self, generator: random.Random) -> float:
        """Go in the middle of a request, a message or a handshake."""
        header = wire.encode(wire.Predict(v=wire.VERSION, id=1, model="mlp", inputs=(SPEC,)))
        whole = message(header, rows(64).tobytes())
        peer = Peer(self.tcp)
        if generator.random() < 0.8:
            peer.greet()
            peer.write(whole[: generator.randint(1, len(whole))] if generator.random() < 0.5 else whole)
        (peer.reset if generator.random() < 0.5 else peer.close)()
        return 0.1

    def stall(self, generator: random.Random) -> float:
        """Ask for much and read nothing, for a while."""
        with Peer(self.tcp, receive_buffer=4096) as peer:
            peer.greet()
            array = rows(64)
            for index in range(100):
                header = wire.encode(wire.Predict(v=wire.VERSION, id=index, model="mlp", inputs=(SPEC,)))
                peer.write(message(header, array.tobytes()))
            self.over.wait(2.0)
        return 1.0

    def lie(self, generator: random.Random) -> float:
        """Bytes that are no message, messages that are no request, requests that are not what they say."""
        kind = generator.randrange(4)
        if kind == 0:
            with Peer(self.tcp) as peer:
                peer.write(generator.randbytes(generator.randint(1, 200)))
            return 0.1
        header = bytearray(wire.encode(wire.Predict(v=wire.VERSION, id=1, model="mlp", inputs=(SPEC,))))
        with Dealer(self.tcp) as dealer:
            for _ in range(10):
                lying = bytearray(header)
                for _ in range(generator.randint(0, 4)):
                    lying[generator.randrange(len(lying))] = generator.randrange(256)
                dealer.socket.send_multipart([bytes(lying), *[generator.randbytes(40)] * generator.randint(0, 3)])
            dealer.socket.poll(200)
        return 0.1

    # --- the operator --------------------------------------------------------------------------------------

    def swap(self, generator: random.Random) -> float:
        """A new version, or the old one with new weights; then the traffic moves, and the oldest goes."""
        version = generator.randint(1, 3)
        put(self.repository, "net", version, answer=float(generator.randint(1, 9)), more='versions = "all"')
        with Client(self.daemon.endpoint, timeout=60.0) as client:
            report = client.reload()
            if report.failed:
                self.wrong.append(f"a reload: {report.failed}")
            client.route("net", {version: 1.0})
            client.health()
        return 3.0

    def signal(self, generator: random.Random) -> float:
        self.daemon.process.send_signal(generator.choice([signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]))
        return 7.0

    # --- what it takes -------------------------------------------------------------------------------------

    def _sample(self) -> list[tuple[float, float, int, int]]:
        """Seconds, MiB, descriptors and threads, until the time is over."""
        began = time.monotonic()
        period = max((self.ends - began) / 2000, 0.25)
        samples = []
        while time.monotonic() < self.ends:
            if self.daemon.process.poll() is not None:
                self.wrong.append(f"the daemon ended with {self.daemon.process.returncode}")
                break
            samples.append((time.monotonic() - began, *usage(self.daemon.process.pid)))
            time.sleep(period)  # the pace of the samples, no wait for something
        return samples


SPEC = wire.TensorSpec("", "FP32", (64, 256))


def usage(pid: int) -> tuple[float, int, int]:
    """MiB that are the process's own, descriptors, threads."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    memory = status.get("RssAnon", status["VmRSS"])  # not every kernel tells the first
    return int(memory.split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])


def soak(minutes: float, leak: str = "") -> dict[str, Any]:
    """Run it once; what came of it."""
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        folder = Path(place)
        repository = folder / "models"
        put(repository, "net", 1, answer=1.0, more='versions = "all"')
        arguments = ("--bind", "tcp://127.0.0.1:*", "--model", "odd", "--model", "mlp")
        with running(
            folder,
            *arguments,
            *("--model-repository", str(repository)),
            program=LEAKING if leak else ODD,
            config=CONFIG,
            stdout=subprocess.PIPE,
            environment={"LEAK": leak},
        ) as daemon:
            assert daemon.process.stdout is not None
            line = daemon.process.stdout.readline().decode()
            tcp = next(word.strip(",;") for word in line.split() if word.startswith("tcp://"))
            run = Soak(daemon, tcp, repository, minutes * 60)
            run.run()
            code = daemon.stop()
            log = daemon.log.splitlines()
    return report(run, code, log)


def report(run: Soak, code: int, log: list[str]) -> dict[str, Any]:
    """The figures, and what is wrong."""
    samples = [sample for sample in run.samples if sample[0] >= WARM_UP * run.samples[-1][0]]
    slopes: dict[str, Slope] = (
        {}
        if len(samples) < BLOCKS
        else {
            name: slope([sample[0] for sample in samples], [sample[index] for sample in samples])
            for index, name in enumerate(ALLOWED, 1)
        }
    )
    if not slopes:
        run.wrong.append(f"only {len(samples)} samples")
    grown = [name for name, found in slopes.items() if found.grows_by(ALLOWED[name])]
    wrong = [*run.wrong[:10], *([] if code == 0 else [f"the daemon ended with {code}"])]
    if any("Traceback" in line for line in log) and not any("odd on cpu raised" in line for line in log):
        wrong.append("a traceback in the log that no model made")
    p50, p99 = np.percentile(run.latencies, (50, 99)) * 1e3 if run.latencies else (0.0, 0.0)
    return {
        "minutes": round(run.samples[-1][0] / 60, 1),
        "counts": dict(run.counts),
        "latency_ms": {"p50": round(float(p50), 2), "p99": round(float(p99), 2)},
        "slopes": {name: str(found) for name, found in slopes.items()},
        "last": dict(zip(ALLOWED, run.samples[-1][1:], strict=True)),
        "grown": grown,
        "wrong": wrong,
        "log_lines": len(log),
        "end_of_log": log[-20:] if wrong else [],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument(
        "--leak-minutes", type=float, default=LEAK_MINUTES, help="of each run with a planted leak; 0: none"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    results = {"soak": soak(options.minutes)}
    print(json.dumps(results["soak"], indent=2), flush=True)
    failed = bool(results["soak"]["grown"] or results["soak"]["wrong"])
    for leak in LEAKS if options.leak_minutes else ():
        results[leak] = found = soak(options.leak_minutes, leak)
        caught = leak in found["grown"]
        print(f"planted leak of {leak}: {'caught' if caught else 'NOT FOUND'}: {found['slopes'][leak]}", flush=True)
        failed = failed or not caught
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    print(
        "failed" if failed else "nothing grows" + (", and every planted leak was found" if options.leak_minutes else "")
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
