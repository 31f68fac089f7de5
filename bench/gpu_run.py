"""One run of `gpu.py`: its time, the processes that it has started, and what it has found so far."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import msgspec

import gpu_networks
import gpu_report
from gpu_inprocess import About, Asked, Found
from gpu_report import NEITHER, NO_GRAPHS, NO_OVERLAP, USUAL, GpuReport
from processes import BenchError, ChildProcess
from tnxctl import Client

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

SETTINGS = {
    USUAL: (),
    NO_GRAPHS: ("cuda.graphs = false",),
    NO_OVERLAP: ("cuda.depth = 1",),
    NEITHER: ("cuda.graphs = false", "cuda.depth = 1"),
}
"""Lines of tnxd.toml, by what they are called."""

CALL_S = 20.0
"""Longest time that a call to a daemon may take."""

_START_S = 120.0
_LEAST_S = 1.0

_SHARED_MB = 2048  # requests and answers of pictures, as many as are outstanding, several times


class Budget:
    """Time of a run. Each part gets its share of what is left, so that what one did not need is for those after it.

    Args:
        seconds: of all. shares: of the parts that are to come, by name, in any unit.
    """

    def __init__(
        self, seconds: float, shares: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._shares = dict(shares)
        self._part_ends = self._end

    def begin(self, part: str) -> None:
        """Give the next part its time."""
        now = self._clock()
        share = self._shares[part] / sum(self._shares.values())
        del self._shares[part]
        self._part_ends = now + max(self._end - now, 0.0) * share

    def left(self) -> float:
        """Seconds that are left of the part, 0 if there are none."""
        return max(self._part_ends - self._clock(), 0.0)


class Lengths(NamedTuple):
    """Time that is measured. Attributes: rounds: in which contenders take turns. seconds: of one turn at full load."""

    rounds: int
    seconds: float


class Daemon:
    """A daemon that is ready. Attributes: tcp: its endpoint for lean clients. client: to its ipc endpoint."""

    def __init__(self, child: ChildProcess, tcp: str, client: Client) -> None:
        self.child = child
        self.tcp = tcp
        self.client = client


class Run:
    """A run. As a context manager it stops all that it has started.

    Args:
        report: that is filled.
        out: directory that it is written to.
        names: networks that are measured.
        program: arguments of the interpreter before those of a program that is to see the GPU.

    Attributes:
        networks: all of the size, by name. notes, left_out: of the part that runs. log: file for what programs say.
    """

    def __init__(
        self,
        report: GpuReport,
        out: Path,
        budget: Budget,
        lengths: Lengths,
        names: Sequence[str],
        program: Sequence[str] = (),
    ) -> None:
        self.report = report
        self.budget = budget
        self.lengths = lengths
        self.networks = gpu_networks.sized(report.size)
        self.notes: list[str] = []
        self.left_out: list[str] = []
        self._out = out
        self._names = names
        self._program = program
        self._stack = contextlib.ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tnx-gpu-")))
        self.log = out / "gpu.log"
        self.log.write_bytes(b"")
        self._daemons: dict[str, Daemon] = {}
        self._broken: dict[str, str] = {}
        self._process: ChildProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # --- time ------------------------------------------------------------------------------------------------

    def fits(self, seconds: float, what: str) -> bool:
        """Whether the part has so much time left; else `what` is left out."""
        if self.budget.left() >= seconds:
            return True
        self.left_out.append(what)
        return False

    def patience(self, most: float) -> float:
        """Seconds to wait for something: as long as there is time in the part, but not longer than `most`."""
        return max(min(self.budget.left(), most), _LEAST_S)

    # --- what is written -------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write all that is known, for the case that nothing follows."""
        document = msgspec.json.format(msgspec.json.encode(self.report), indent=2)
        (self._out / "gpu.json").write_bytes(document + b"\n")
        (self._out / "gpu.md").write_text(gpu_report.markdown(self.report) + "\n", encoding="utf-8")

    def heading(self, text: str) -> None:
        """Begin a new part of the log."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n=== {text}\n")

    def said(self, heading: str) -> str:
        """Text of the log since the last heading that ends with this."""
        return self.log.read_text(encoding="utf-8", errors="replace").rpartition(heading + "\n")[2]

    # --- processes -------------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """Environment of processes: the project is on their path, and this directory, for networks, after all."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]), str(HERE)]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}

    def start(self, name: str, arguments: Sequence[str]) -> ChildProcess:
        """Start a Python program that sees the GPU. Its stderr goes to the log."""
        self.heading(name)
        return ChildProcess(name, [*self._program, *arguments], environment=self.environment, log=self.log)

    @contextlib.contextmanager
    def daemon(
        self, name: str, networks: Sequence[str], settings: Sequence[str], devices: str = "cuda"
    ) -> Iterator[Daemon]:
        """A daemon within the block.

        Raises:
            BenchError: it is not ready in time; the message has the end of what it logged.
        """
        with contextlib.ExitStack() as stack:
            yield self._ready(stack, *self._launch(stack, name, networks, settings, devices))

    def served(self, settings: str = USUAL) -> Daemon:
        """The daemon with those of SETTINGS, which runs on to the end. It is started anew if it has ended, once.

        Raises:
            BenchError: it is not ready in time.
        """
        return self.all_served([settings])[settings]

    def all_served(self, wanted: Sequence[str]) -> dict[str, Daemon]:
        """Several of them; those that do not run yet start at the same time.

        Raises:
            BenchError: one is not ready in time.
        """
        launched = {}
        for settings in wanted:
            if settings in self._daemons and self._daemons[settings].child.runs:
                continue
            if settings in self._broken:
                raise BenchError(self._broken[settings])
            if settings in self._daemons:
                self.notes.append(f"the daemon {settings} had ended, and was started anew")
                self._broken[settings] = f"the daemon {settings} has ended twice"
            launched[settings] = self._launch(self._stack, settings, self._names, SETTINGS[settings], "cuda")
        for settings, (child, endpoint) in launched.items():
            try:
                self._daemons[settings] = self._ready(self._stack, child, endpoint)
            except BenchError as error:
                self._broken[settings] = str(error)
                raise
        return {settings: self._daemons[settings] for settings in wanted}

    def _launch(
        self, stack: contextlib.ExitStack, name: str, networks: Sequence[str], settings: Sequence[str], devices: str
    ) -> tuple[ChildProcess, str]:
        """Start a daemon, which the stack stops. Returns it and its ipc endpoint."""
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tnxd-", dir=self._folder)))
        models = self._published(networks)
        endpoint = f"ipc://{folder}/tnxd"
        lines = [f"clients.shared_memory_mb = {_SHARED_MB}", *settings]
        (folder / "tnxd.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        arguments = ["-m", "tnxd", "--config", str(folder / "tnxd.toml"), "--devices", devices, "--log-level", "info"]
        arguments += ["--model-repository", str(models), "--bind", endpoint, "--bind", "tcp://127.0.0.1:*"]
        return stack.enter_context(self.start(f"tnxd, {name}", arguments)), endpoint

    def _published(self, networks: Sequence[str]) -> Path:
        """A model repository with these networks."""
        repository = self._folder / "-".join(networks)
        if not repository.exists():
            gpu_networks.publish(repository, networks, self.report.size)
        return repository

    def _ready(self, stack: contextlib.ExitStack, child: ChildProcess, endpoint: str) -> Daemon:
        line = child.hear(self.patience(_START_S), "was not ready", "ended before it was ready")
        listening = line.split("ready on ", 1)[1].split(";")[0].split(", ")
        client = stack.enter_context(Client(endpoint, timeout=CALL_S, shared_memory=True))
        failed = [f"{model.name}: {model.error}" for model in client.health().models if model.status != "ready"]
        if failed:
            self.notes.append(f"{child.name}: {'; '.join(failed)}")
        return Daemon(child, next(each for each in listening if each.startswith("tcp://")), client)

    def best(self) -> Daemon:
        """The daemon as configured by default, or one with less if that does not start: better that than no figures.

        Raises:
            BenchError: none does.
        """
        for settings in SETTINGS:
            with contextlib.suppress(BenchError):
                found = self.served(settings)
                if settings != USUAL:
                    self.notes.append(f"measured {settings}: {self._broken[USUAL]}")
                return found
        raise BenchError(self._broken[USUAL])

    def own(self, network: str, rows: int, how: str, seconds: float = 0.0, *, graph: bool = False) -> Found:
        """Have plain torch measure in a process, see `gpu_inprocess`.

        Raises:
            BenchError: it failed, or took too long.
        """
        asked = Asked(network, rows, how, graph, seconds)
        process = self._own_process()
        try:
            answer = process.ask(msgspec.json.encode(asked) + b"\n", self.patience(seconds + CALL_S))
        except BenchError:
            process.stop()  # a late answer would be taken for that to the next question
            raise
        found = msgspec.json.decode(answer, type=Found)
        if found.error:
            raise BenchError(f"{how} of {network} in a process, {rows} rows{', a graph' * graph}: {found.error}")
        return found

    def _own_process(self) -> ChildProcess:
        if self._process is None or not self._process.runs:
            arguments = [str(HERE / "gpu_inprocess.py"), self.report.size]
            self._process = self._stack.enter_context(self.start("plain torch", arguments))
            line = self._process.hear(self.patience(_START_S), "was not ready", "ended before it was ready")
            self.report.device = msgspec.to_builtins(msgspec.json.decode(line, type=About))
        return self._process
