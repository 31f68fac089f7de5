"""Restarts of a daemon under load: whether any client notices. `make restarts COUNT=1000`.

Ten clients of both kinds ask all the time, and check every answer. Meanwhile the daemon is replaced again and again: it
is stopped, killed, or followed by another one that was started beside it. A process that holds the listening sockets
stands for systemd; with --alone nobody holds them, and with --systemd it is `systemctl restart` of the installed
service, which takes root.

    python tests/restart/restarts.py --times 1000 --json restarts.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tnxctl import AsyncClient, Client
from tnxctl.keys import pairs
from tnxctl.results import Result

CLIENTS = 10
OUTSTANDING = 4
"""Calls of each client at a time."""

TIMEOUT_S = 60.0
PAUSE_S = 0.002
"""Between the calls of a client: a machine of two cores has a daemon to start meanwhile."""

LAUNCH = """
import fcntl, os, sys
held = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 100) for number in sys.argv[1].split(",")]
for place, descriptor in enumerate(held, 3):
    os.dup2(descriptor, place)
    os.close(descriptor)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(held)), LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""
"""A program that starts another one as systemd does: with sockets from descriptor 3 on. Their names come second."""


@dataclass
class Report:
    """Report of what the clients met.

    Attributes:
        restarts: of the daemon. asked, answered: calls, and those that got a result.
        answered_again: results beyond the first of a call.
        wrong: results that are not those of the inputs. errors: by their words.
        longest_s: the longest that a call took.
    """

    restarts: int = 0
    asked: int = 0
    answered: int = 0
    answered_again: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether nobody has noticed anything but that it took longer."""
        return 0 < self.asked == self.answered and not (self.answered_again or self.wrong or self.errors)


class Load:
    """Clients that ask from `with` on, by turns at each of the endpoints, or at several of them.

    Args:
        options: of each client, such as its key.
    """

    def __init__(
        self, endpoints: Sequence[str | Sequence[str]], clients: int = CLIENTS, options: Mapping[str, Any] | None = None
    ) -> None:
        self.report = Report()
        self._options = {"timeout": TIMEOUT_S, **(options or {})}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._rounds = [0] * clients
        self._progress = threading.Condition()
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(_ask_by_aio if index % 2 else _ask, index, endpoints[index // 2 % len(endpoints)]),
            )
            for index in range(clients)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def await_round(self, timeout_s: float = TIMEOUT_S) -> None:
        """Return when each client has begun a round and ended it, or has met an error.

        Raises:
            AssertionError: not in time.
        """
        with self._progress:
            before = list(self._rounds)
            passed = self._progress.wait_for(
                lambda: (
                    self.report.errors or all(now > then + 1 for now, then in zip(self._rounds, before, strict=True))
                ),
                timeout_s,
            )
        assert passed, f"rounds of the clients: {before}, then {self._rounds} after {timeout_s:g} s"

    def _run(
        self,
        ask: Callable[[Any, Callable[[], Any], Callable[[Any], bool]], None],
        index: int,
        endpoint: str | Sequence[str],
    ) -> None:
        inputs = np.full((1, 256), (index + 1) / 10, dtype=np.float32)
        expected: list[Any] = []

        def begin() -> tuple[Any, Callable[[Result | BaseException], None]]:
            with self._lock:
                self.report.asked += 1
            return inputs, self._judge(expected)

        def next_round(first: bool) -> bool:
            with self._progress:
                self._rounds[index] += not first
                self._progress.notify_all()
            return not self._stop.wait(PAUSE_S)

        kind = AsyncClient if ask is _ask_by_aio else Client
        ask(kind(endpoint, **self._options), begin, next_round)

    def _judge(self, expected: list[Any]) -> Callable[[Result | BaseException], None]:
        begun, answers = time.monotonic(), 0

        def judge(outcome: Result | BaseException) -> None:
            nonlocal answers
            with self._lock:
                report = self.report
                report.longest_s = max(report.longest_s, time.monotonic() - begun)
                if isinstance(outcome, BaseException):
                    report.errors[f"{type(outcome).__name__}: {outcome}"] += 1
                    return
                answers += 1
                report.answered += answers == 1
                report.answered_again += answers > 1
                if not expected:
                    expected.append(np.array(outcome.output))
                report.wrong += not np.allclose(outcome.output, expected[0], rtol=1e-3, atol=1e-5)

        return judge


def _ask(client: Client, begin: Callable[[], Any], next_round: Callable[[Any], bool]) -> None:
    """Ask by `Client`, from threads."""
    with client as tnx:
        first = True
        while next_round(first):
            first = False
            futures = []
            for _ in range(OUTSTANDING):
                inputs, judge = begin()
                future = tnx.submit(inputs, model="mlp")
                future.add_done_callback(lambda done, judge=judge: judge(done.exception() or done.result()))
                futures.append(future)
            for future in futures:
                future.exception()


def _ask_by_aio(client: AsyncClient, begin: Callable[[], Any], next_round: Callable[[Any], bool]) -> None:
    """Ask by `AsyncClient`, from an event loop."""

    async def call(tnx: AsyncClient) -> None:
        inputs, judge = begin()
        try:
            judge(await tnx.predict(inputs, model="mlp"))
        except Exception as error:
            judge(error)

    async def run() -> None:
        async with client as tnx:
            first = True
            while await asyncio.to_thread(next_round, first):
                first = False
                await asyncio.gather(*(call(tnx) for _ in range(OUTSTANDING)))

    asyncio.run(run())


# --- who starts the daemons -----------------------------------------------------------------------------------------


class Starter:
    """Starts daemons at two endpoints, tcp and ipc, in a folder.

    Args:
        holds: whether it holds their listening sockets, as systemd does.
        keyed: whether the daemons ask for keys on tcp.

    Attributes:
        options: of clients: the key that is let in, and the daemons' own.
    """

    def __init__(self, folder: Path, *, holds: bool, keyed: bool = False) -> None:
        path = folder / "tnx"
        self._port = socket.socket()  # which nobody else gets while no daemon is there
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("127.0.0.1", 0))
        self._listeners: list[socket.socket] = []
        self.endpoints = [f"tcp://127.0.0.1:{self._port.getsockname()[1]}", f"ipc://{path}"]
        self._log = (folder / "log").open("ab")
        self.daemon: subprocess.Popen[bytes] | None = None
        self.options: dict[str, Any] = {}
        self._config: list[str] = []
        if keyed:
            self._ask_for_keys(folder)
        if holds:
            self._port.listen(1024)
            self._listeners = [self._port, socket.socket(socket.AF_UNIX)]
            self._listeners[1].bind(str(path))
            self._listeners[1].listen(1024)

    def _ask_for_keys(self, folder: Path) -> None:
        daemon, client = pairs.new("daemon"), pairs.new("client")
        for pair in (daemon, client):
            pairs.write(folder / f"{pair.name}.key", pair)
        authorized = folder / "authorized_keys.toml"
        authorized.write_text(f'[keys.client]\nkey = "{client.public}"\nrole = "predict"\n')
        config = folder / "tnxd.toml"
        config.write_text(f'[keys]\nauthorized = "{authorized}"\nsecret = "{folder}/daemon.key"\n')
        self._config = ["--config", str(config)]
        self.options = {"key": folder / "client.key", "server_key": pairs.server_line(daemon)}

    def start(self) -> subprocess.Popen[bytes]:
        """Start a daemon, which may still load when this returns."""
        held = [listener.fileno() for listener in self._listeners]
        binds = [part for endpoint in self.endpoints for part in ("--bind", endpoint)]
        command = ["-m", "tnxd", *self._config, *binds, "--model", "mlp", "--devices", "cpu"]
        if held:
            command = ["-c", LAUNCH, ",".join(map(str, held)), ":".join(["tnxd"] * len(held)), *command]
        return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=self._log, pass_fds=held)

    def begin(self) -> None:
        """Start the first daemon, and wait until it is ready."""
        self.daemon = ready(self.start())

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the daemon by a signal, and wait until it has gone."""
        assert self.daemon is not None
        self.daemon.send_signal(number)
        code = self.daemon.wait(TIMEOUT_S)
        assert code == (0 if number == signal.SIGTERM else -number), code
        assert self.daemon.stdout is not None
        self.daemon.stdout.close()
        self.daemon = None

    def terminate(self) -> None:
        """Restart, as systemd does: the new one starts when the old one has gone."""
        self.stop()
        self.begin()

    def kill(self) -> None:
        """Likewise after SIGKILL."""
        self.stop(signal.SIGKILL)
        self.begin()

    def replace(self) -> None:
        """Start the new one beside the old one, which goes when the new one is ready."""
        new = ready(self.start())
        self.stop()
        self.daemon = new

    def close(self) -> None:
        """End what runs."""
        if self.daemon is not None:
            self.stop(signal.SIGKILL)
        for listener in (self._port, *self._listeners):
            listener.close()
        self._log.close()


def ready(daemon: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """The daemon itself, as soon as it says that it is ready."""
    assert daemon.stdout is not None
    line = daemon.stdout.readline()
    assert b" ready on " in line, line
    return daemon


@contextlib.contextmanager
def started(folder: Path, *, holds: bool, keyed: bool = False) -> Iterator[Starter]:
    """A starter whose first daemon is ready."""
    starter = Starter(folder, holds=holds, keyed=keyed)
    try:
        starter.begin()
        yield starter
    finally:
        starter.close()


def restart(
    endpoints: Sequence[str | Sequence[str]],
    ways: Sequence[Callable[[], object]],
    times: int,
    tell: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Restart so many times under load, in each of the ways by turns. Ends with the first error of a client."""
    with Load(endpoints, options=options) as load:
        load.await_round()
        for number in range(times):
            ways[number % len(ways)]()
            load.report.restarts += 1
            load.await_round()
            if tell and (number + 1) % 10 == 0:
                print(f"{number + 1} restarts, {load.report.answered} answers", flush=True)
            if load.report.errors:
                break
    return load.report


def ask_until(endpoints: Sequence[str], path: Path) -> Report:
    """Ask until a file is there, and for a round more. Ends with the first error of a client, too."""
    with Load(endpoints) as load:
        load.await_round()
        while not (path.exists() or load.report.errors):
            time.sleep(0.1)  # between two looks: nothing tells of a file
        load.await_round()
    return load.report


def by_systemd() -> None:
    """Restart the installed service."""
    subprocess.run(["systemctl", "reset-failed", "tensornext"], check=False)  # its limit of starts is not for this
    subprocess.run(["systemctl", "restart", "tensornext"], check=True)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--alone", action="store_true", help="nobody holds the listening sockets")
    parser.add_argument("--keys", action="store_true", help="tcp alone, with keys")
    parser.add_argument("--systemd", action="store_true", help="systemctl restart of the installed service")
    parser.add_argument("--host", action="append", help="with --systemd: an endpoint of the service")
    parser.add_argument("--until", type=Path, help="with --systemd: restart nothing, and ask until this file is there")
    parser.add_argument("--json", type=Path, help="file for the report")
    arguments = parser.parse_args()
    begun = time.monotonic()
    if arguments.systemd:
        hosts = arguments.host or ["tcp://127.0.0.1:5555", "ipc:///run/tensornext.sock"]
        if arguments.until:
            report = ask_until(hosts, arguments.until)
        else:
            report = restart(hosts, [by_systemd], arguments.times, tell=True)
    else:
        holds = not arguments.alone
        with (
            tempfile.TemporaryDirectory() as folder,
            started(Path(folder), holds=holds, keyed=arguments.keys) as starter,
        ):
            ways = [starter.terminate, starter.kill, *([starter.replace] if holds else [])]
            endpoints = starter.endpoints[:1] if arguments.keys else starter.endpoints
            report = restart(endpoints, ways, arguments.times, tell=True, options=starter.options)
    document = {"seconds": round(time.monotonic() - begun, 1), **vars(report)}
    text = json.dumps(document, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
