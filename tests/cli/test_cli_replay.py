"""`tnxctl replay` against a daemon that only pretends: what it sends and tells, and files that are none of ours."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fake_daemon import FakeDaemon
from tnxctl.cli.bench.replay import RecordedRequests, Selection
from tnxctl.cli.exits import Exit
from tnxctl.protocol import mcap, recordings, wire
from tool import ask, fields, run

T0 = 1_795_963_669_000_000_000
MS = 1_000_000


def row(width: int, fill: float = 0.5) -> bytes:
    return np.full((1, width), fill, np.float32).tobytes()


def request(
    at_ms: float, model: str = "digits", frames: Sequence[bytes] | None = None, channel: int = 1, **changes: object
) -> bytes:
    """A recorded request, of one row for the model digits unless told otherwise."""
    frames = [row(64)] if frames is None else frames
    specs = tuple(wire.TensorSpec(f"t{n}" if n else "", "FP32", (1, len(one) // 4)) for n, one in enumerate(frames))
    header = wire.encode(wire.Predict(v=1, id=3, inputs=specs, model=model, **changes))  # type: ignore[arg-type]
    return b"".join(map(bytes, recordings.message(channel, 1, T0 + int(at_ms * MS), 1, header, frames)))


def recording(path: Path, *messages: bytes, end: bytes | None = None) -> Path:
    """A file with these messages; channel 1 is of digits@1 and channel 2 of mlp@1."""
    channels = [mcap.channel(n, title, recordings.ENCODING, {}) for n, title in ((1, "digits@1"), (2, "mlp@1"))]
    ending = mcap.end() if end is None else end
    path.write_bytes(b"".join([mcap.beginning(recordings.PROFILE, "tnxd"), *channels, *messages, ending]))
    return path


def test_requests_are_sent_as_they_were_at_their_pace(tmp_path: Path) -> None:
    path = recording(
        tmp_path / "a",
        request(0, priority=3, route_key="k", attempt=2, traceparent=f"00-{'a' * 32}-{'b' * 16}-01"),
        request(40, "mlp", [row(256)], 2, deadline_us=5e6),
    )
    with FakeDaemon() as fake:
        told = fields(ask(fake, "replay", path, "--speed", 2, "--json"))
        sent = fake.predicts
    assert [(one.model, one.priority, one.route_key, one.deadline_us) for one in sent] == [
        ("digits", 3, "k", None),
        ("mlp", None, "", 5e6),
    ]
    assert (sent[0].attempt, sent[0].traceparent) == (1, ""), "it is a request of its own"
    assert sent[0].id != sent[1].id
    assert sent[1].sent_us is not None
    (step,) = told["steps"]
    assert (step["requests"], step["answered"], told["seconds"]) == (2, 2, 0.04)
    assert step["seconds"] >= 0.02
    assert step["name"] == "as recorded"


@pytest.mark.parametrize(("speed", "offsets_ms"), [(1.0, [0, 40, 10]), (2.0, [0, 20, 5]), (0.5, [0, 80, 20])])
def test_times_are_those_of_the_recording_by_its_speed(speed: float, offsets_ms: list[int], tmp_path: Path) -> None:
    path = recording(tmp_path / "a", request(0), request(40), request(10))
    selection = Selection(path, "", speed)
    requests = RecordedRequests(selection, selection.read(1 << 20), 1 << 20, "")
    assert list(requests.offsets_ns()) == [offset * MS for offset in offsets_ms]


def test_what_is_not_sent_is_told(tmp_path: Path) -> None:
    path = recording(
        tmp_path / "a", request(0), request(1, channel=9), mcap.message_head(1, 1, T0, 2) + b"??", end=b"\5"
    )
    with FakeDaemon() as fake:
        told = ask(fake, "replay", path)
    assert told.exit_code == Exit.OK
    assert "2 messages of the file are no requests: a message of 2 bytes is no request" in told.stdout
    assert "The file was read as far as it goes: it was cut off" in told.stdout


def test_what_the_daemon_does_not_take_is_left_out(tmp_path: Path) -> None:
    path = recording(tmp_path / "a", request(0), request(1, frames=[bytes(4000)]))
    with FakeDaemon(max_message_bytes=1024) as fake:
        told = ask(fake, "replay", path)
    assert told.exit_code == Exit.OK
    assert "1 requests within" in told.stdout
    assert "1 requests are larger than the daemon takes, and were not sent" in told.stdout


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is no recording, but empty"),
        (b"\x1f\x8b" + bytes(50), "it is no recording: it begins with"),
        (mcap.beginning("", ""), "has no request: it was cut off"),
        (mcap.beginning("", "") + mcap.end(), "has no request: it is empty"),
        (mcap.beginning("", "") + b"\x05" + b"\xff" * 8, "cut off"),
        (mcap.beginning("", "") + b"\x04\x03" + bytes(7) + b"abc" + mcap.end(), "a record is damaged"),
    ],
)
def test_files_that_are_none_of_ours_are_a_sentence(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    told = run("replay", tmp_path / "a", "--host", "127.0.0.1:1")  # nobody is asked
    assert told.exit_code == Exit.FILE
    assert why in told.stderr
    assert "Traceback" not in told.output


def test_files_that_cannot_be_read_are_a_sentence(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "gone", "No such file"), (tmp_path, "Is a directory")):
        told = run("replay", path)
        assert (told.exit_code, why in told.stderr) == (Exit.FILE, True)


def test_only_some_of_the_requests(tmp_path: Path) -> None:
    path = recording(tmp_path / "a", request(0), request(1, "mlp", [row(256)], 2), request(2))
    with FakeDaemon() as fake:
        for only, count in (("digits", 2), ("digits@1", 2), ("mlp", 1)):
            assert fields(ask(fake, "replay", path, "--only", only, "--json"))["requests"] == count
        told = ask(fake, "replay", path, "--only", "digits@2")
    assert told.exit_code == Exit.FILE
    assert "has no request of digits@2: it has those of digits@1, mlp@1" in told.stderr


def test_outputs_that_have_another_shape_or_name_are_misfits(tmp_path: Path) -> None:
    path = recording(tmp_path / "a", *[request(n) for n in range(3)])
    turns = itertools.count(-3)  # those of the first run are below 0

    def other(request: wire.Predict, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        turn = next(turns)
        if turn == 2:
            return {"else": np.zeros((1, 10), np.float32)}
        return {"scores": np.full((1, 10 + max(turn, 0)), float(turn >= 0), np.float32)}

    with FakeDaemon(compute=other) as fake:
        told = ask(fake, "replay", path, "--against", "digits", "--json")
    (output,) = json.loads(told.stdout)["compared"]["outputs"]
    assert (output["name"], output["elements"], output["max_abs"], output["misfits"]) == ("scores", 10, 1.0, 2)


@pytest.mark.parametrize(
    "arguments", [("--speed", "0"), ("--speed", "1e-300"), ("--speed", "nan"), ("--speed", "-1"), ()]
)
def test_wrong_use(arguments: tuple[str, ...]) -> None:
    assert run("replay", *(("x", *arguments) if arguments else ())).exit_code == Exit.USAGE
