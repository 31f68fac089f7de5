"""The clients of an overload as one: processes that are started together, load together, and are asked together."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loadgen import PATIENCE_SECONDS
from openload import Load
from outcomes import Outcomes
from processes import START_SECONDS, ChildProcess, cpu_ns, machine_cpu_ns

FLOOD, LIGHT = "flood", "light"

_HERE = Path(__file__).parent
_LEAD_SECONDS = 0.02  # from the call to the start of a load
_DECODING_SECONDS = 60.0


@dataclass
class Aftermath:
    """The remains of a load.

    Attributes:
        outcomes: of the requests, by kind of client, for each of its processes.
        cut: connections that the server ended, likewise.
        server_cpu_ns: CPU time of the server while the load lasted; None if it is not known.
        others_cpu_ns: that of everything on this machine but server and clients, likewise.
    """

    outcomes: dict[str, list[Outcomes]]
    cut: dict[str, int]
    server_cpu_ns: int | None
    others_cpu_ns: int | None


class Crowd:
    """Client processes, which the stack stops.

    Args:
        program: that they run, see `openload`.
        settings: kind of client -> what its loads have in common, and how many processes share them.
    """

    def __init__(
        self, stack: contextlib.ExitStack, program: str, settings: Mapping[str, tuple[msgspec.Struct, int]]
    ) -> None:
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tnx")))
        self._clients: list[tuple[str, int, ChildProcess]] = []
        for kind, (setting, count) in settings.items():
            for _ in range(count):
                client = stack.enter_context(ChildProcess(f"{kind} client", [str(_HERE / program)]))
                client.tell(msgspec.json.encode(setting) + b"\n")
                self._clients.append((kind, count, client))
        for _, _, client in self._clients:
            client.hear(START_SECONDS)

    def load(
        self,
        rates: Mapping[str, float],
        seconds: float,
        seed: int,
        after: Callable[[int], None],
        server_cpu_ns: Callable[[], int | None],
    ) -> Aftermath:
        """Load for so long.

        Args:
            rates: kind of client -> requests per second of all its processes together.
            after: called when the last request was due, with the time of that, before anything is decoded.
            server_cpu_ns: CPU time that the server has used so far.

        Raises:
            BenchError: a client failed.
        """
        for number, (kind, count, client) in enumerate(self._clients):
            load = Load(rates[kind] / count, seconds, seed * len(self._clients) + number)
            client.tell(msgspec.json.encode(load) + b"\n")
        for _, _, client in self._clients:
            client.hear(START_SECONDS)
        before = self._cpu_times(server_cpu_ns)
        start_ns = time.perf_counter_ns() + int(_LEAD_SECONDS * 1e9)
        end_ns = start_ns + int(seconds * 1e9)
        self._tell(str(start_ns))
        time.sleep((end_ns - time.perf_counter_ns()) / 1e9)
        used = [
            None if then is None or now is None else now - then
            for then, now in zip(before, self._cpu_times(server_cpu_ns), strict=True)
        ]
        after(end_ns)
        paths = [self._folder / f"{number}.npz" for number in range(len(self._clients))]
        for path, (_, _, client) in zip(paths, self._clients, strict=True):
            client.tell(str(path).encode() + b"\n")
        cut = dict.fromkeys(rates, 0)
        outcomes: dict[str, list[Outcomes]] = {kind: [] for kind in rates}
        for path, (kind, _, client) in zip(paths, self._clients, strict=True):
            cut[kind] += int(client.hear(PATIENCE_SECONDS + _DECODING_SECONDS))
            outcomes[kind].append(Outcomes.load(path))
        server, clients, machine = used
        others = None
        if server is not None and clients is not None and machine is not None:
            others = max(machine - server - clients, 0)
        return Aftermath(outcomes, cut, server, others)

    def _cpu_times(self, server_cpu_ns: Callable[[], int | None]) -> tuple[int | None, int | None, int | None]:
        """CPU times so far: of the server, of all clients, and of everything on this machine."""
        clients = [cpu_ns(client.pid) for _, _, client in self._clients]
        known = [time for time in clients if time is not None]
        return server_cpu_ns(), sum(known) if len(known) == len(clients) else None, machine_cpu_ns()

    def _tell(self, line: str) -> None:
        for _, _, client in self._clients:
            client.tell(line.encode() + b"\n")
