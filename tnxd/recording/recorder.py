"""Recorder of the daemon: at most one recording at a time, in the directory that the configuration allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxctl.protocol.wire import VERSION, Record, RecordingReport
from tnxd.recording.recording import Recording
from tnxd.recording.recording_file import check_name

Done = Callable[[RecordingReport | TensorNextError], None]
"""Called on the loop with the answer to an order, whose id is yet to be put in."""


class Recorder:
    """Recorder, which the serving loop owns.

    Args:
        directory: for the files; "": nothing may be recorded.
        most_bytes: of one file. queue_bytes: of what waits to be written.
        call_soon: has the loop run a function.
        describe: what a recording says about a version, by NAME@VERSION.
        about: what it says about the daemon.

    Attributes:
        recording: the one that takes requests now; None: there is none.
    """

    def __init__(
        self,
        directory: str,
        *,
        most_bytes: int,
        queue_bytes: int,
        call_soon: Callable[[Callable[[], None]], None],
        describe: Callable[[str], Mapping[str, str]],
        about: Callable[[], Mapping[str, str]],
    ) -> None:
        self.recording: Recording | None = None
        self._directory = directory
        self._most_bytes = most_bytes
        self._queue_bytes = queue_bytes
        self._call_soon = call_soon
        self._describe = describe
        self._about = about
        self._last: Recording | None = None  # under way or not
        self._opening: Recording | None = None
        self._stopping: list[Done] = []

    @property
    def held_bytes(self) -> int:
        """Bytes of requests that wait to be written."""
        return 0 if self._last is None else self._last.held_bytes

    def start(self, order: Record, done: Done) -> None:
        """Begin a recording; `done` is called when its file is open, or cannot be opened.

        The same order again, while it is carried out, changes nothing.

        Raises:
            FailedPrecondition: nothing may be recorded, or something else is being recorded.
            InvalidArgument: the name of the file is none.
        """
        if not self._directory:
            raise FailedPrecondition(
                "recording is off, since inputs may be private: record_directory in the daemon's tnxd.toml names the "
                "directory for recordings and turns it on"
            )
        check_name(order.file)
        running = self.recording
        if running is not None and msgspec.structs.replace(running.order, id=order.id) == order:
            done(running.report(order.id))
            return
        if running is not None or self._opening is not None or self._stopping:
            busy = running or self._opening
            what = f"{busy.order.file!r} is being recorded" if busy else "a recording is being ended"
            raise FailedPrecondition(f"{what}, and there is one recording at a time: tnxctl record --stop ends it")

        def opened(error: TensorNextError | None) -> None:
            self._call_soon(lambda: self._opened(recording, error, done))

        def ended() -> None:
            self._call_soon(lambda: self._ended(recording))

        self._opening = recording = Recording(
            order,
            self._directory,
            most_bytes=self._most_bytes,
            queue_bytes=self._queue_bytes,
            describe=self._describe,
            about=self._about(),
            on_open=opened,
            on_end=ended,
        )

    def stop(self, done: Done) -> None:
        """End the recording that is under way; `done` is called when its file is closed.

        Raises:
            FailedPrecondition: none is under way.
        """
        if self.recording is None and not self._stopping:
            raise FailedPrecondition("nothing is being recorded")
        self._stopping.append(done)
        self._end("it was stopped")

    def report(self, id_: int) -> RecordingReport:
        """The recording that is under way, or else the last one."""
        return RecordingReport(v=VERSION, id=id_, state="off") if self._last is None else self._last.report(id_)

    def close(self, timeout_s: float) -> None:
        """End the recording, and wait for so long until its file is closed. The loop is over."""
        self._end("the daemon stopped")
        for recording in (self._last, self._opening):
            if recording is not None:
                recording.stop("the daemon stopped")
                recording.join(timeout_s)

    def _end(self, reason: str) -> None:
        recording, self.recording = self.recording, None
        if recording is not None:
            recording.stop(reason)

    def _opened(self, recording: Recording, error: TensorNextError | None, done: Done) -> None:
        self._opening = None
        if error is not None:
            done(error)
            return
        self.recording = self._last = recording
        done(recording.report(0))

    def _ended(self, recording: Recording) -> None:
        if self.recording is recording:
            self.recording = None
        recording.clear()
        waiting, self._stopping = self._stopping, []
        for done in waiting:
            done(recording.report(0))
