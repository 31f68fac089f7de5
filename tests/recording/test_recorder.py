"""The recorder without a daemon: what is taken, what is dropped, and how recordings end."""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tnxctl.protocol import wire
from tnxctl.protocol.errors import AlreadyExists, FailedPrecondition, TensorNextError
from tnxctl.protocol.recordings import RecordedRequest, RecordingReader
from tnxctl.protocol.wire import MIB, Record, RecordingReport
from tnxd.recording.recorder import Recorder
from tnxd.recording.recording_file import RecordingFile

HEADER = wire.encode(wire.Predict(v=1, id=7, inputs=(wire.TensorSpec("x", "UINT8", (1000,)),), model="m"))


@dataclass
class Loop:
    """A recorder with the loop that owns it, which turns when a test says so."""

    folder: Path
    recorder: Recorder = field(init=False)
    answers: list[RecordingReport | TensorNextError] = field(default_factory=list)
    calls: queue.SimpleQueue[Callable[[], None]] = field(default_factory=queue.SimpleQueue)

    def make(self, *, most_bytes: int = MIB, queue_bytes: int = MIB, directory: str | None = None) -> Recorder:
        self.recorder = Recorder(
            str(self.folder) if directory is None else directory,
            most_bytes=most_bytes,
            queue_bytes=queue_bytes,
            call_soon=self.calls.put,
            describe=lambda title: {"title": title},
            about=lambda: {"program": "a test"},
        )
        return self.recorder

    def turn(self) -> None:
        """Run the next function that is to be called soon."""
        self.calls.get(timeout=60)()

    def start(self, **fields: object) -> RecordingReport:
        """Begin a recording. Raises what the answer is."""
        self.recorder.start(Record(v=1, id=1, file="a", **fields), self.answers.append)  # type: ignore[arg-type]
        self.turn()
        answer = self.answers.pop()
        if isinstance(answer, TensorNextError):
            raise answer
        return answer

    def stop(self) -> RecordingReport:
        self.recorder.stop(self.answers.append)
        self.turn()
        answer = self.answers.pop()
        assert isinstance(answer, RecordingReport)
        return answer

    def take(self, title: str = "m@1", frames: Sequence[bytes] = (bytes(1000),), at_ns: int | None = None) -> None:
        """Hand a request over, if anything is recorded."""
        recording = self.recorder.recording
        assert recording is not None
        now_ns = time.perf_counter_ns() if at_ns is None else at_ns
        recording.take(now_ns, title.partition("@")[0], title, "alice", HEADER, frames)

    def read(self) -> tuple[list[RecordedRequest], RecordingReader]:
        with (self.folder / "a").open("rb") as file:
            reader = RecordingReader(file)
            return list(reader), reader


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    loop = Loop(tmp_path)
    yield loop
    loop.recorder.close(10)


def test_what_is_taken_is_in_the_file_as_it_came(loop: Loop) -> None:
    loop.make()
    assert loop.start().state == "recording"
    frames = [bytes(1000), b"", b"abc"]
    for number in range(3):
        loop.take(f"m@{number % 2 + 1}", frames, at_ns=time.perf_counter_ns() + number * 1000)
    report = loop.stop()
    found, reader = loop.read()
    assert (report.state, report.requests, report.dropped, report.reason) == ("ended", 3, 0, "it was stopped")
    assert report.file_bytes == (loop.folder / "a").stat().st_size
    assert [request.title for request in found] == ["m@1", "m@2", "m@1"]
    assert {request.client for request in found} == {"alice"}
    assert [bytes(frame) for frame in found[2].frames] == frames
    assert found[0].request == wire.decode_request(HEADER, wire.Limits())
    assert found[0].offset_ns == 0 < found[1].offset_ns < found[2].offset_ns
    assert reader.about["program"] == "a test"
    assert reader.channels == {"m@1": {"title": "m@1"}, "m@2": {"title": "m@2"}}
    assert reader.ending == {"requests": "3", "dropped": "0", "reason": "it was stopped"}
    assert not reader.damage
    assert loop.recorder.recording is None


@pytest.mark.parametrize(("model", "taken"), [("", 3), ("m", 2), ("m@2", 1), ("other", 1)])
def test_only_the_requests_of_the_model_are_taken(model: str, taken: int, loop: Loop) -> None:
    loop.make()
    loop.start(model=model)
    for title in ("m@1", "m@2", "other@1"):
        loop.take(title)
    assert loop.stop().requests == taken


def test_a_sample_is_a_share(loop: Loop) -> None:
    loop.make(queue_bytes=100 * MIB)
    loop.start(sample=0.25)
    for _ in range(2000):
        loop.take(frames=())
    report = loop.stop()
    assert 350 < report.requests < 650  # 500 are expected, and seven standard deviations off are as good as never
    assert report.dropped == 0


class SlowDisk:
    """Disk that writes requests only once it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.at_it = threading.Event(), threading.Event()
        write = RecordingFile.write

        def slow(file: RecordingFile, records: Sequence[Sequence[bytes]]) -> None:
            if HEADER in records[-1]:
                self.at_it.set()
                assert self.go.wait(60)
            write(file, records)

        monkeypatch.setattr(RecordingFile, "write", slow)


def test_what_finds_no_room_is_dropped_and_counted(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(monkeypatch)
    loop.make(queue_bytes=60_000)
    loop.start()
    loop.take()
    assert disk.at_it.wait(60)
    for _ in range(20):
        loop.take()
    held = loop.recorder.held_bytes
    assert 0 < held <= 60_000
    dropped = loop.recorder.report(1).dropped
    assert 10 <= dropped < 20
    disk.go.set()
    report = loop.stop()
    assert (report.requests, report.dropped) == (21 - dropped, dropped)
    assert loop.recorder.held_bytes == 0
    assert len(loop.read()[0]) == 21 - dropped


def test_a_request_larger_than_the_queue_is_taken_alone(loop: Loop) -> None:
    loop.make(queue_bytes=1)
    loop.start()
    loop.take(frames=(bytes(100_000),))
    assert loop.stop().requests == 1


def test_the_time_ends_it(loop: Loop) -> None:
    loop.make()
    loop.start(seconds=3600)
    recording = loop.recorder.recording
    assert recording is not None
    loop.take()
    recording._until_ns = time.perf_counter_ns()
    loop.turn()
    assert loop.recorder.recording is None
    recording.take(time.perf_counter_ns(), "m", "m@1", "alice", HEADER, ())  # the loop may be as late as that
    assert recording.held_bytes == 0
    report = loop.recorder.report(1)
    assert (report.state, report.requests, report.reason) == ("ended", 1, "")


def test_the_size_ends_it(loop: Loop) -> None:
    loop.make(most_bytes=20_000)
    loop.start()
    recording = loop.recorder.recording
    for _ in range(100):
        loop.take()
    loop.turn()
    report = loop.recorder.report(1)
    assert report.reason.endswith("and the limit is 20000")
    assert report.requests + report.dropped == 100
    assert 5 < report.requests < 20
    assert (loop.folder / "a").stat().st_size <= 20_000
    found, reader = loop.read()
    assert (len(found), reader.damage) == (report.requests, "")
    assert recording is not None
    assert recording.held_bytes == 0


@pytest.mark.parametrize("of", ["file", "directory"])
def test_a_file_that_is_removed_ends_it(loop: Loop, tmp_path: Path, of: str) -> None:
    directory = tmp_path / "recordings"
    directory.mkdir()
    loop.make(directory=str(directory))
    loop.start(seconds=60)
    loop.take()
    if of == "file":
        (directory / "a").unlink()
    else:
        shutil.rmtree(directory)
    loop.turn()  # it tells of its end
    report = loop.recorder.report(1)
    assert (report.state, report.reason) == ("ended", "the file was removed")
    assert not loop.recorder.held_bytes


def test_a_full_disk_ends_it(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    write = RecordingFile.write
    written = []

    def full(file: RecordingFile, records: Sequence[Sequence[bytes]]) -> None:
        if HEADER in records[-1]:
            written.append(records)
            if len(written) > 1:
                raise OSError(28, "No space left on device")
        write(file, records)

    monkeypatch.setattr(RecordingFile, "write", full)
    loop.make()
    loop.start()
    loop.take()
    while not loop.recorder.report(1).requests:
        time.sleep(0.001)
    loop.take()
    loop.turn()
    report = loop.recorder.report(1)
    assert (report.requests, report.dropped, report.reason) == (1, 1, "cannot write: No space left on device")
    assert len(loop.read()[0]) == 1


def test_a_disk_that_is_full_already_refuses_it(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: RecordingFile, records: Sequence[Sequence[bytes]]) -> None:
        raise OSError(28, "No space left on device")

    loop.make()
    with monkeypatch.context() as patch:
        patch.setattr(RecordingFile, "write", full)
        with pytest.raises(FailedPrecondition, match=r"cannot write .*/a: No space left on device"):
            loop.start()
    assert not (loop.folder / "a").exists()
    assert loop.start().state == "recording"  # once there is room


def test_a_disk_that_tells_at_the_end_that_it_is_full(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    close = RecordingFile.close

    def late(file: RecordingFile) -> None:
        close(file)
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(RecordingFile, "close", late)
    loop.make()
    loop.start()
    assert loop.stop().reason == "cannot write: Disk quota exceeded"


def test_it_is_off_without_a_directory(loop: Loop) -> None:
    loop.make(directory="")
    with pytest.raises(FailedPrecondition, match=r"record_directory in the daemon's tnxd\.toml"):
        loop.start()
    assert loop.recorder.report(3) == RecordingReport(v=1, id=3, state="off")


def test_there_is_one_at_a_time_and_the_same_order_changes_nothing(loop: Loop) -> None:
    loop.make()
    loop.start()
    with pytest.raises(FailedPrecondition, match="'a' is being recorded"):
        loop.recorder.start(Record(v=1, id=2, file="b"), loop.answers.append)
    loop.recorder.start(Record(v=1, id=2, file="a"), loop.answers.append)
    (again,) = loop.answers
    assert isinstance(again, RecordingReport)
    assert again.state == "recording"
    loop.answers.clear()
    loop.stop()
    with pytest.raises(FailedPrecondition, match="nothing is being recorded"):
        loop.stop()
    with pytest.raises(AlreadyExists):
        loop.start()
    assert loop.recorder.report(1).requests == 0  # still that of the one before


def test_closing_it_writes_what_waits(loop: Loop) -> None:
    loop.make()
    loop.start()
    for _ in range(5):
        loop.take()
    loop.recorder.close(20)
    found, reader = loop.read()
    assert (len(found), reader.ending["reason"]) == (5, "the daemon stopped")
