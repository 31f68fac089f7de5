"""A recording sent again, at its own spacing or faster, and how the answers of two models differ."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tnxctl.cli import exits
from tnxctl.cli.bench.loops import FIRST_ID, Connection, Outgoing, paced_loop
from tnxctl.cli.bench.recording import Load, Recording, Step
from tnxctl.protocol import wire
from tnxctl.protocol.differences import DifferenceTally
from tnxctl.protocol.errors import InvalidArgument, TensorNextError
from tnxctl.protocol.frames import view_tensors
from tnxctl.protocol.recordings import RecordedRequest, RecordingReader

if TYPE_CHECKING:
    from tnxctl.protocol.wire import OutputDifference

KEPT_BYTES = 256 * wire.MIB
"""Most bytes of outputs that are kept to be compared, of each of the two runs."""

_LIMITS = wire.Limits(
    header_bytes=16 * wire.MIB,
    tensors=wire.MAX_TENSORS,
    rank=wire.MAX_RANK,
    message_bytes=1 << 40,
    strings=1 << 40,
)


@dataclass(frozen=True)
class Selection:
    """Requests of a recording that are sent, and where to.

    Attributes:
        path: of the file. only: NAME or NAME@VERSION that they were for; "": all.
        speed: times the pace of the recording.
    """

    path: Path
    only: str
    speed: float

    def __iter__(self) -> Iterator[RecordedRequest]:
        with self.path.open("rb") as file:
            yield from self._of(RecordingReader(file))

    def _of(self, reader: RecordingReader) -> Iterator[RecordedRequest]:
        for request in reader:
            if self.only in ("", request.title, request.title.partition("@")[0]):
                yield request

    def read(self, most_bytes: int) -> Contents:
        """Read the file once, before anything is sent.

        Args:
            most_bytes: that a daemon takes for the tensors of a request.

        Raises:
            FileProblem: it cannot be read, or there is nothing to send in it.
        """
        contents = Contents()
        try:
            with self.path.open("rb") as file:
                reader = RecordingReader(file)
                for request in self._of(reader):
                    contents.note(request, most_bytes)
        except OSError as error:
            raise exits.FileProblem(f"cannot read {self.path}: {error.strerror or error}") from None
        except InvalidArgument as error:
            raise exits.FileProblem(f"{self.path}: {error.message}") from None
        if not contents.requests:
            of = f" of {self.only}" if self.only else ""
            held = ", ".join(reader.channels)
            why = reader.damage or reader.last_skipped or (held and f"it has those of {held}") or "it is empty"
            raise exits.FileProblem(f"{self.path} has no request{of}: {why}")
        contents.about, contents.damage = dict(reader.about), reader.damage
        contents.skipped, contents.last_skipped = reader.skipped, reader.last_skipped
        return contents


@dataclass
class Contents:
    """Contents of a file, of what is selected.

    Attributes:
        titles: requests by NAME@VERSION. seconds: from the first to the last one. nbytes: of the largest one's tensors.
        too_large: those that the daemon does not take.
        skipped, last_skipped, damage, about: see `RecordingReader`.
    """

    requests: int = 0
    titles: dict[str, int] = field(default_factory=dict)
    first_ns: int = 0
    last_ns: int = 0
    nbytes: int = 0
    too_large: int = 0
    skipped: int = 0
    last_skipped: str = ""
    damage: str = ""
    about: dict[str, str] = field(default_factory=dict)

    def note(self, request: RecordedRequest, most_bytes: int) -> None:
        """Count a request."""
        nbytes = request.nbytes
        if nbytes > most_bytes:
            self.too_large += 1
            return
        self.requests += 1
        self.titles[request.title] = self.titles.get(request.title, 0) + 1
        self.first_ns = request.offset_ns if self.requests == 1 else min(self.first_ns, request.offset_ns)
        self.last_ns = max(self.last_ns, request.offset_ns)
        self.nbytes = max(self.nbytes, nbytes)

    @property
    def seconds(self) -> float:
        return (self.last_ns - self.first_ns) / 1e9


class RecordedRequests:
    """Requests of a recording, as the loop sends them.

    Args:
        model: NAME or NAME@VERSION that they go to; "": those that they were sent to.
    """

    def __init__(self, selection: Selection, contents: Contents, most_bytes: int, model: str) -> None:
        self.nbytes = contents.nbytes
        self._selection = selection
        self._first_ns = contents.first_ns
        self._most_bytes = most_bytes
        self._model = model
        self._sent = 0
        self._current: RecordedRequest | None = None

    def offsets_ns(self) -> Iterator[int]:
        """Times of the requests, from the beginning. Each becomes the one that is sent next."""
        for request in self._selection:
            if request.nbytes <= self._most_bytes:
                self._current = request
                yield max(int((request.offset_ns - self._first_ns) / self._selection.speed), 0)

    def next(self, now_ns: int) -> Outgoing:
        """The current request, with what is new in its header."""
        assert self._current is not None
        recorded = self._current.request
        number = FIRST_ID + self._sent
        self._sent += 1
        request = msgspec.structs.replace(
            recorded,
            id=number,
            model=self._model or recorded.model,
            sent_us=None if recorded.deadline_us is None else now_ns / 1e3,
            attempt=1,
            traceparent="",  # its spans are those of then
        )
        return Outgoing(number, wire.encode(request), self._current.frames, self._current.nbytes)


class Outputs:
    """Outputs of a run, as far as there is room for them.

    Attributes:
        results: by the place of the request in the run.
    """

    def __init__(self) -> None:
        self.results: dict[int, tuple[wire.Result, Sequence[bytes]]] = {}
        self._nbytes = 0

    def keep(self, number: int, result: wire.Result, frames: Sequence[bytes]) -> None:
        """Keep a result, if there is room. Args: number: id of the request."""
        nbytes = sum(map(len, frames))
        if self._nbytes + nbytes <= KEPT_BYTES:
            self._nbytes += nbytes
            self.results[number - FIRST_ID] = result, frames


@dataclass(frozen=True)
class Compared:
    """Differences between the outputs of two runs.

    Attributes:
        requests: that were compared. malformed: those whose outputs cannot be read.
        outputs: one entry for each output of the first run.
    """

    requests: int
    malformed: int
    outputs: tuple[OutputDifference, ...]


def compare(first: Outputs, second: Outputs) -> Compared:
    """Compare the outputs of two runs, as far as both were kept."""
    tallies: dict[str, DifferenceTally] = {}
    requests = malformed = 0
    for place, (result, frames) in first.results.items():
        if place not in second.results:
            continue
        other, other_frames = second.results[place]
        try:
            arrays = view_tensors(result.outputs, frames, _LIMITS)
            others = dict(
                zip(
                    (spec.name for spec in other.outputs),
                    view_tensors(other.outputs, other_frames, _LIMITS),
                    strict=True,
                )
            )
        except InvalidArgument:
            malformed += 1
            continue
        requests += 1
        for spec, array in zip(result.outputs, arrays, strict=True):
            tally = tallies.setdefault(spec.name, DifferenceTally(spec))
            if spec.name in others:
                tally.add(array, others[spec.name])
            else:
                tally.misfits += 1
    return Compared(requests, malformed, tuple(tally.report() for tally in tallies.values()))


def most_message_bytes(endpoint: str, timeout: float) -> int:
    """Most bytes that a daemon takes for the tensors of a request. Raises the error of a health request."""
    with Connection(endpoint, timeout) as connection:
        health = connection.ask(connection.session.encoder.health(timeout=None, now=time.monotonic()))
    return health.max_message_bytes or wire.Limits().message_bytes


@dataclass(frozen=True)
class Replay:
    """A recording that is sent to a daemon.

    Attributes:
        timeout: in seconds, of each request.
        most_bytes: that the daemon takes for the tensors of a request.
    """

    endpoint: str
    timeout: float
    selection: Selection
    contents: Contents
    most_bytes: int

    def run(self, model: str, name: str, outputs: Outputs | None = None) -> Step:
        """Send all, and say what came of it. The error that ends it early, if any, is in the step.

        Args:
            model: that the requests go to; "": as they say. name: of the step.
            outputs: gets those of the results.
        """
        source = RecordedRequests(self.selection, self.contents, self.most_bytes, model)
        seconds = self.contents.seconds / self.selection.speed
        load = Load(rate=self.contents.requests / seconds if seconds else 1.0, name=name)
        recording = Recording(patient=True)
        try:
            with Connection(self.endpoint, self.timeout) as connection:
                paced_loop(connection, source, recording, source.offsets_ns(), outputs)
        except (KeyboardInterrupt, TensorNextError) as end:
            return recording.step(load, end)
        return recording.step(load)
