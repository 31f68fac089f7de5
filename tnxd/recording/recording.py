"""One recording: requests that the serving loop hands over, and the thread that writes them."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tnxctl.protocol import mcap, recordings
from tnxctl.protocol.errors import Internal, TensorNextError
from tnxctl.protocol.wire import VERSION, Record, RecordingReport
from tnxd.events import event
from tnxd.recording.recording_file import RecordingFile

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

# So often the thread looks for requests: to wake it for each would cost the loop more than all else.
_EVERY_S = 0.01

# Memory of a request in the queue beside its frames: these objects, and the 8 KiB that libzmq has received at a time,
# which a small frame of them keeps.
_OVERHEAD_BYTES = 9 << 10

# What the record of a request has beside its header and its tensors, about.
_FRAMING_BYTES = 128

# Written in one go, at most. To lay out so many takes this thread 0.2 ms; then the write lets the loop have the GIL.
_TOGETHER = 64
_TOGETHER_BYTES = 8 << 20

# The loop may be about to hand over what it took up before the end.
_GRACE_NS = 50_000_000


class _Taken(NamedTuple):
    """One request in the queue. Attributes: time_ns: of `time.perf_counter_ns`. nbytes: of its header and tensors."""

    time_ns: int
    title: str
    client: str
    header: Buffer
    frames: Sequence[Buffer]
    nbytes: int


class Recording:
    """One recording, from the opening of its file to its end.

    The loop calls `take`, which copies nothing: the frames stay alive until they are written. What finds no room in the
    queue is dropped and counted.

    Args:
        order: what is to be recorded.
        directory: of the file. most_bytes: of the file. queue_bytes: of what waits to be written.
        describe: what is to be said about a version, by NAME@VERSION; called by `take`.
        about: what is to be said about the daemon.
        on_open: called on the thread when the file is open, or with the reason why it is not.
        on_end: called on the thread when the file is closed.

    Attributes:
        path: of the file.
    """

    def __init__(
        self,
        order: Record,
        directory: str,
        *,
        most_bytes: int,
        queue_bytes: int,
        describe: Callable[[str], Mapping[str, str]],
        about: Mapping[str, str],
        on_open: Callable[[TensorNextError | None], None],
        on_end: Callable[[], None],
    ) -> None:
        self.order = order
        self.path = ""
        self._directory = directory
        self._most_bytes = most_bytes
        self._queue_bytes = queue_bytes
        self._describe = describe
        self._about = about
        self._on_open = on_open
        self._on_end = on_end
        self._random = random.Random()  # of its own: the daemon watches what models do to that of all
        self._queue: deque[_Taken] = deque()
        self._channels: dict[str, Mapping[str, str]] = {}
        self._queued_bytes = 0  # ever; the loop's
        self._done_bytes = 0  # ever; the thread's
        self._refused = 0  # for want of room; the loop's
        self._lost = 0  # the thread's
        self._requests = 0
        self._file_bytes = 0
        self._began_ns = time.perf_counter_ns()
        self._until_ns = self._began_ns + int(order.seconds * 1e9)
        self._ended_ns = 0
        self._reason = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recording", daemon=True)
        self._thread.start()

    # --- called by the loop ------------------------------------------------------------------------------------

    @property
    def dropped(self) -> int:
        """Requests that found no room, in the queue or on the disk."""
        return self._refused + self._lost

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that wait to be written."""
        return self._queued_bytes - self._done_bytes

    def take(self, time_ns: int, name: str, title: str, client: str, header: Buffer, frames: Sequence[Buffer]) -> None:
        """Take a request, if it is to be recorded.

        Args:
            time_ns: when it was taken up, of `time.perf_counter_ns`.
            name, title: NAME and NAME@VERSION of what it is for. client: name of its sender.
        """
        order = self.order
        if time_ns >= self._until_ns or (order.model and order.model not in (name, title)):
            return
        if order.sample < 1 and self._random.random() >= order.sample:
            return
        nbytes = memoryview(header).nbytes + sum([memoryview(frame).nbytes for frame in frames])
        held = self._queued_bytes - self._done_bytes
        if held and held + nbytes + _OVERHEAD_BYTES > self._queue_bytes:  # a single one may be larger
            self._refused += 1
            return
        if title not in self._channels:
            self._channels[title] = self._describe(title)
        self._queued_bytes += nbytes + _OVERHEAD_BYTES
        self._queue.append(_Taken(time_ns, title, client, header, frames, nbytes))

    def stop(self, reason: str) -> None:
        """End it: what is in the queue is still written. Any thread."""
        self._reason = self._reason or reason
        self._stop.set()

    def clear(self) -> None:
        """Drop what waits. On the thread, and once it is over on the loop, which may have taken one more."""
        while self._queue:
            self._drop([self._queue.popleft()])

    def join(self, timeout_s: float) -> bool:
        """Wait until the file is closed. False if that takes longer."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def report(self, id_: int) -> RecordingReport:
        """Text that has been written so far."""
        end_ns = self._ended_ns or time.perf_counter_ns()
        return RecordingReport(
            v=VERSION,
            id=id_,
            state="ended" if self._ended_ns else "recording",
            path=self.path,
            file_bytes=self._file_bytes,
            seconds=self.order.seconds,
            model=self.order.model,
            sample=self.order.sample,
            elapsed_s=(end_ns - self._began_ns) / 1e9,
            requests=self._requests,
            dropped=self.dropped,
            reason=self._reason,
        )

    # --- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            file = RecordingFile(self._directory, self.order.file, self._beginning())
        except TensorNextError as error:
            self._on_open(error)
            return
        except Exception as error:  # a defect of ours
            log.exception("a recording could not begin", extra=event("defect"))
            self._on_open(Internal(f"the recording could not begin: {error!r}"))
            return
        self.path = file.path
        self._file_bytes = file.size
        self._on_open(None)
        try:
            self._record(file)
        except OSError as error:
            self._reason = f"cannot write: {error.strerror or error}"
        except Exception as error:
            log.exception("the recording %s", file.path, extra=event("defect"))
            self._reason = f"the daemon failed at it: {error!r}"
        self._close(file)

    def _beginning(self) -> list[list[Buffer]]:
        about = {**self._about, "model": self.order.model, "sample": f"{self.order.sample:g}"}
        beginning = mcap.beginning(recordings.PROFILE, about.get("program", ""))
        return [[beginning], [mcap.metadata(recordings.ABOUT, about)]]

    def _record(self, file: RecordingFile) -> None:
        """Write until the time is over, the recording is stopped, or the file is gone or as large as it may be."""
        writer = _Writer(file, self._channels)
        over = False
        while not over:
            over = self._stop.wait(_EVERY_S) or time.perf_counter_ns() >= self._until_ns + _GRACE_NS
            if file.is_gone:
                self._reason = "the file was removed"
                return
            while self._queue:
                taken = self._next(self._most_bytes - file.size)
                if not taken:
                    self._reason = f"the file has {file.size} bytes, and the limit is {self._most_bytes}"
                    return
                try:
                    writer.write(taken)
                except BaseException:
                    self._drop(taken)
                    raise
                self._file_bytes = file.size
                self._done_bytes += _held(taken)
                self._requests += len(taken)

    def _next(self, room: int) -> list[_Taken]:
        """The requests that are written next, as far as there is room for them in the file."""
        taken: list[_Taken] = []
        nbytes = 0
        while self._queue and len(taken) < _TOGETHER and nbytes < _TOGETHER_BYTES:
            nbytes += self._queue[0].nbytes + _FRAMING_BYTES
            if nbytes > room:
                break
            taken.append(self._queue.popleft())
        return taken

    def _drop(self, taken: list[_Taken]) -> None:
        self._lost += len(taken)
        self._done_bytes += _held(taken)

    def _close(self, file: RecordingFile) -> None:
        self._until_ns = 0  # no more is taken
        self.clear()
        counts = {"requests": str(self._requests), "dropped": str(self.dropped), "reason": self._reason}
        with contextlib.suppress(OSError):  # it can be read without
            file.write([[mcap.metadata(recordings.END, counts), mcap.end()]])
        try:
            file.close()
        except OSError as error:  # a disk behind a network says only now that it is full
            self._reason = f"cannot write: {error.strerror or error}"
        self._file_bytes = file.size
        self._ended_ns = time.perf_counter_ns()
        about = event("recorded", file=str(file.path), count=self._requests, dropped=self.dropped, reason=self._reason)
        log.info(
            "recorded %d requests in %s, %d dropped%s",
            *(self._requests, file.path, self.dropped, f": {self._reason}" if self._reason else ""),
            extra=about,
        )
        self._on_end()


def _held(taken: Sequence[_Taken]) -> int:
    """Bytes of memory that requests in the queue hold."""
    return sum([one.nbytes for one in taken]) + len(taken) * _OVERHEAD_BYTES


class _Writer:
    """Writer of requests, with what has to stand before them in the file."""

    def __init__(self, file: RecordingFile, channels: Mapping[str, Mapping[str, str]]) -> None:
        self._file = file
        self._described = channels
        self._channels: dict[str, int] = {}
        self._clients: dict[str, int] = {}
        self._sequence = 0
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()

    def write(self, taken: Sequence[_Taken]) -> None:
        """Write requests. Raises OSError."""
        records: list[list[Buffer]] = []
        for one in taken:
            channel = self._channels.get(one.title)
            if channel is None:
                channel = self._channels[one.title] = len(self._channels) + 1
                described = self._described[one.title]
                records.append([mcap.channel(channel, one.title, recordings.ENCODING, described)])
            client = self._clients.get(one.client)
            if client is None:
                client = self._clients[one.client] = len(self._clients) + 1
                records.append([mcap.metadata(recordings.CLIENT, {"number": str(client), "name": one.client})])
            self._sequence += 1
            time_ns = self._epoch_ns + one.time_ns
            records.append(recordings.message(channel, self._sequence, time_ns, client, one.header, one.frames))
        self._file.write(records)
