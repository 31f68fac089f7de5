"""Recordings of real daemons under load, and what is sent again."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import Daemon, serving_daemon
from dealer import Dealer, rows
from python_models import put
from tnxctl import Client
from tnxctl.cli.exits import Exit
from tnxctl.protocol import wire
from tnxctl.protocol.errors import AlreadyExists, InvalidArgument, NotFound
from tnxctl.protocol.recordings import RecordedRequest, RecordingReader
from tnxctl.protocol.wire import RecordingReport
from tool import fields, run

WAITS = """
import time, types
from tnxctl.cli import main, record

def sleep(seconds):
    print("waits", flush=True)
    time.sleep(seconds)

record.time = types.SimpleNamespace(sleep=sleep)
main()
"""
"""The tool, which says when it waits for the end of a recording."""

SIGNATURE = """
inputs = [{ name = "x", datatype = "FP32", shape = [-1, 2] }]
outputs = [{ name = "y", datatype = "FP32", shape = [-1, 2] }]
max_batch_size = 8
"""


@dataclass
class Recorded:
    """A daemon that may record. Attributes: folder: where its recordings are."""

    daemon: Daemon
    folder: Path

    @property
    def endpoint(self) -> str:
        return self.daemon.endpoint

    def requests(self) -> int:
        """Requests that the daemon has counted."""
        with Client(self.endpoint, timeout=60) as client:
            return client.health().requests

    def replay(self, name: str, *arguments: object) -> dict[str, object]:
        """The document of a replay that goes well."""
        return fields(run("replay", self.folder / name, *arguments, "--host", self.endpoint, "--timeout", 60, "--json"))


@pytest.fixture(scope="module")
def recorded() -> Iterator[Recorded]:
    with tempfile.TemporaryDirectory(prefix="recorded-") as given:
        folder = Path(given)
        for name, change in (("double", "x * 2"), ("twice", "x * 2 + (x > 2)")):
            put(
                folder / "models",
                f"class Model:\n    def predict(self, x):\n        return {{'y': {change}}}\n",
                name=name,
                signature=SIGNATURE,
            )
        (folder / "recordings").mkdir()
        arguments = (
            *("--model-repository", str(folder / "models"), "--model", "digits"),
            *("--record-directory", str(folder / "recordings")),
        )
        with serving_daemon(folder / "log", *arguments) as daemon:
            yield Recorded(daemon, folder / "recordings")


def read(path: Path) -> tuple[list[RecordedRequest], RecordingReader]:
    with path.open("rb") as file:
        reader = RecordingReader(file)
        return list(reader), reader


def load(endpoint: str, clients: int, each: int) -> None:
    """Requests of several clients at a time, which differ in model, rows and priority; all are answered."""
    failures: list[BaseException] = []

    def ask(number: int) -> None:
        try:
            with Client(endpoint, timeout=60) as client:
                for count in range(each):
                    model, width = ("double", 2) if (number + count) % 2 else ("digits", 64)
                    client.predict(rows(1 + count % 3, width), model=model, priority=number % 4, deadline=60)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_what_several_clients_send_is_recorded_and_sent_again_twice(recorded: Recorded) -> None:
    with Client(recorded.endpoint, timeout=60) as client:
        begun = client.record("load.mcap", seconds=3600)
        assert (begun.state, begun.path) == ("recording", str(recorded.folder / "load.mcap"))
        load(recorded.endpoint, clients=4, each=50)
        report = client.stop_recording()
    assert (report.requests, report.dropped) == (200, 0)
    recorded.daemon.logged("tnxd.audit: 127.0.0.1: record 'load.mcap'", "tnxd.audit: 127.0.0.1: stop_recording")
    found, reader = read(recorded.folder / "load.mcap")
    assert {request.request.priority for request in found} == {0, 1, 2, 3}
    assert sorted(reader.channels) == ["digits@1", "double@1"]
    assert [request.title for request in found].count("digits@1") == 100
    assert {request.nbytes for request in found if request.title == "double@1"} == {8, 16, 24}
    assert found[-1].offset_ns <= report.elapsed_s * 1e9
    for speed in (20, 100):
        before = recorded.requests()
        told = recorded.replay("load.mcap", "--speed", speed)
        (step,) = told["steps"]  # type: ignore[misc]
        assert (step["requests"], step["answered"], step["errors"]) == (200, 200, [])
        assert recorded.requests() - before == 200
        assert told["models"] == {"digits@1": 100, "double@1": 100}


def test_a_replay_compares_two_models(recorded: Recorded) -> None:
    with Client(recorded.endpoint, timeout=60) as client:
        client.record("compare.mcap", model="double")
        client.predict(rows(1, 64), model="digits")
        for value in (1, 2, 3, 4):
            client.predict(rows(2, 2, value), model="double")
        assert client.stop_recording().requests == 4
    told = recorded.replay("compare.mcap", "--speed", 100, "--model", "twice", "--against", "double@1")
    assert [step["name"] for step in told["steps"]] == ["double@1", "twice"]  # type: ignore[attr-defined]
    assert told["compared"] == {
        "requests": 4,
        "malformed": 0,
        "outputs": [
            {
                "name": "y", "elements": 16, "max_abs": 1.0, "mean_abs": 0.5, "argmax_agreement": 1.0, "misfits": 0,
            }
        ],
    }  # fmt: skip
    shown = run(
        "replay",
        recorded.folder / "compare.mcap",
        "--speed",
        100,
        "--against",
        "double",
        "--host",
        recorded.endpoint,
        "--timeout",
        60,
    )
    assert shown.exit_code == Exit.OK
    assert "4 requests within" in shown.stdout
    assert "Outputs of 4 requests compared" in shown.stdout


def test_errors_of_a_replay_are_told_and_its_other_requests_sent(recorded: Recorded) -> None:
    with Client(recorded.endpoint, timeout=60) as client:
        client.record("errors.mcap")
        client.predict(rows(1, 64), model="digits")
        client.predict(rows(1, 2), model="double")
        client.stop_recording()
    arguments = ("--model", "double", "--host", recorded.endpoint, "--timeout", 60)
    told = run("replay", recorded.folder / "errors.mcap", *arguments)
    assert told.exit_code == Exit.FAILED
    assert "INVALID_ARGUMENT: model 'double'" in told.stdout
    assert "1 of 2 requests failed: INVALID_ARGUMENT 1" in told.stderr
    only = run("replay", recorded.folder / "errors.mcap", "--only", "double@1", *arguments, "--json")
    assert fields(only)["requests"] == 1


def test_requests_without_tensors_and_with_wrong_ones_are_sent_as_they_are(recorded: Recorded) -> None:
    with Client(recorded.endpoint, timeout=60) as client, Dealer(recorded.endpoint) as dealer:
        client.record("wrong.mcap")
        dealer.predict(model="double", names=())
        dealer.predict(rows(1, 2), rows(1, 2), model="double", names=("x", "y"))
        header = wire.encode(wire.Predict(v=1, id=9, inputs=(wire.TensorSpec("x", "FP32", (1, 2)),), model="double"))
        dealer.socket.send_multipart([header, b"short"])
        dealer.socket.send(header)
        codes = [dealer.error().code for _ in range(4)]
        assert client.stop_recording().requests == 4
    told = run("replay", recorded.folder / "wrong.mcap", "--host", recorded.endpoint, "--timeout", 60, "--json")
    (step,) = fields(told)["steps"]
    assert codes == ["INVALID_ARGUMENT"] * 4
    assert [(error["code"], error["count"]) for error in step["errors"]] == [("INVALID_ARGUMENT", 4)]


def test_what_is_no_request_of_a_model_that_is_there_is_not_recorded(recorded: Recorded) -> None:
    with Client(recorded.endpoint, timeout=60) as client, Dealer(recorded.endpoint) as dealer:
        client.record("odd.mcap")
        dealer.predict(rows(1), model="nope")
        assert dealer.error().code == "NOT_FOUND"
        dealer.socket.send(b"\xc1")
        assert dealer.error().code == "INVALID_ARGUMENT"
        dealer.predict(rows(1, 3), model="double")  # refused, and yet traffic of this model
        assert dealer.error().code == "INVALID_ARGUMENT"
        assert client.stop_recording().requests == 1


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", ".", "", "x\0y", "x" * 300, "x\ny"])
def test_the_name_of_a_file_leads_nowhere_else(recorded: Recorded, name: str) -> None:
    before = sorted(recorded.folder.parent.rglob("*"))
    with (
        Client(recorded.endpoint, timeout=60) as client,
        pytest.raises(InvalidArgument, match="no name for a recording"),
    ):
        client.record(name)
    assert sorted(recorded.folder.parent.rglob("*")) == before


def test_a_link_is_neither_followed_nor_overwritten(recorded: Recorded, tmp_path: Path) -> None:
    (recorded.folder / "link").symlink_to(tmp_path / "elsewhere")
    with Client(recorded.endpoint, timeout=60) as client, pytest.raises(AlreadyExists):
        client.record("link")
    assert not (tmp_path / "elsewhere").exists()


def test_a_model_that_is_not_there_is_told_at_once(recorded: Recorded) -> None:
    with Client(recorded.endpoint, timeout=60) as client, pytest.raises(NotFound, match="nope"):
        client.record("nope.mcap", model="nope")
    assert not (recorded.folder / "nope.mcap").exists()


def test_it_goes_on_when_its_client_has_gone(recorded: Recorded) -> None:
    with Client(recorded.endpoint, timeout=60) as client:
        client.record("gone.mcap")
    with Client(recorded.endpoint, timeout=60) as client:
        client.predict(rows(1, 2), model="double")
        report = client.stop_recording()
    assert (report.requests, report.reason) == (1, "it was stopped")
    assert read(recorded.folder / "gone.mcap")[1].ending["requests"] == "1"


def await_end(client: Client) -> RecordingReport:
    """The report of a recording that has ended; the test's own time limit ends the asking."""
    while (report := client.recording()).state == "recording":
        time.sleep(0.01)
    return report


def test_the_tool_waits_and_tells(recorded: Recorded) -> None:
    told = run("record", "tool.mcap", "--seconds", "50ms", "--host", recorded.endpoint, "--timeout", 60)
    assert told.exit_code == Exit.OK
    assert told.stdout.startswith("recorded 0 requests in ")
    assert told.stdout.splitlines()[1] == str(recorded.folder / "tool.mcap")
    again = run("record", "tool.mcap", "--host", recorded.endpoint, "--timeout", 60)
    assert (again.exit_code, "nothing is overwritten" in again.stderr) == (Exit.REFUSED, True)
    assert fields(run("record", "--status", "--host", recorded.endpoint, "--timeout", 60, "--json"))["state"] == "ended"
    assert run("record", "--stop", "--host", recorded.endpoint, "--timeout", 60).exit_code == Exit.NOT_READY


def test_ctrl_c_ends_the_recording(recorded: Recorded) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, "record", "interrupted.mcap", "--host", recorded.endpoint, "--timeout", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waits\n"
        with Client(recorded.endpoint, timeout=60) as client:
            client.predict(rows(1, 2), model="double")
            process.send_signal(signal.SIGINT)
            stdout, _ = process.communicate(timeout=60)
            assert client.recording().reason == "it was stopped"
    finally:
        process.kill()
        process.wait()
    assert process.returncode == Exit.INTERRUPTED
    assert b"recorded 1 requests in " in stdout


def test_it_is_off_unless_the_configuration_allows_it(daemon: Daemon) -> None:
    told = run("record", "x.mcap", "--host", daemon.endpoint, "--timeout", 60)
    assert told.exit_code == Exit.NOT_READY
    assert (
        "record_directory in the daemon's tnxd.toml names the directory for recordings and turns it on" in told.stderr
    )
    assert run("record", "--status", "--host", daemon.endpoint, "--timeout", 60).stdout.startswith(
        "Nothing has been recorded"
    )


def test_a_daemon_that_is_killed_leaves_what_it_had_written(
    run_daemon: Callable[..., Daemon], recorded: Recorded, tmp_path: Path
) -> None:
    killed = run_daemon("--model", "digits", "--record-directory", str(tmp_path))
    with Client(killed.endpoint, timeout=60) as client:
        client.record("killed.mcap")
        for _ in range(100):
            client.predict(rows(1, 64), model="digits")
        while (written := client.recording().requests) < 50:
            time.sleep(0.001)
        killed.process.kill()
        killed.process.wait()
    found, reader = read(tmp_path / "killed.mcap")
    assert written <= len(found) <= 100
    assert "cut off" in reader.damage
    told = run("replay", tmp_path / "killed.mcap", "--speed", 100, "--host", recorded.endpoint, "--timeout", 60)
    assert told.exit_code == Exit.OK
    assert f"{len(found)} requests within" in told.stdout
    assert "The file was read as far as it goes: it was cut off" in told.stdout


def test_a_daemon_that_stops_closes_the_file(run_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    stopped = run_daemon("--model", "digits", "--record-directory", str(tmp_path))
    with Client(stopped.endpoint, timeout=60) as client:
        client.record("stopped.mcap")
        client.predict(rows(1, 64), model="digits")
    assert stopped.stop() == 0
    found, reader = read(tmp_path / "stopped.mcap")
    assert (len(found), reader.damage, reader.ending["reason"]) == (1, "", "the daemon stopped")


def test_a_disk_that_is_too_slow_costs_requests_of_the_recording_and_no_others(
    run_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    (tmp_path / "tnxd.toml").write_text(f'record_directory = "{tmp_path}"\nrecord_queue_mb = 4\n')
    arguments = ("--model", "mlp", "--config", str(tmp_path / "tnxd.toml"))
    slow = run_daemon(*arguments, program=(str(Path(__file__).with_name("slow_disk.py")),))
    with Client(slow.endpoint, timeout=60) as client:
        client.record("slow.mcap")
        for _ in range(20):
            client.predict(rows(1000), model="mlp")
        report = client.recording()
        assert (report.state, report.requests) == ("recording", 0)
        assert 15 <= report.dropped < 20
        while client.health().traffic_mb < 2:  # what waits for the disk counts; the test's own limit ends this
            time.sleep(0.01)
        (tmp_path / "go").touch()
        ended = client.stop_recording()
    assert (ended.requests, ended.dropped) == (20 - report.dropped, report.dropped)
    assert len(read(tmp_path / "slow.mcap")[0]) == ended.requests


def test_a_disk_that_is_full_ends_the_recording_and_nothing_else(
    run_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """A limit for the size of files stands for the disk: the write that reaches it is cut short, the next one fails."""
    full = run_daemon("--model", "mlp", "--record-directory", str(tmp_path))
    resource.prlimit(full.process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    with Client(full.endpoint, timeout=60) as client:
        client.record("full.mcap")
        for _ in range(300):
            client.predict(rows(1), model="mlp")
        report = await_end(client)
        client.predict(rows(1), model="mlp")
    assert report.reason == "cannot write: File too large"
    assert 50 < report.requests < report.requests + report.dropped <= 300
    found, _ = read(tmp_path / "full.mcap")
    assert len(found) == report.requests
    assert (tmp_path / "full.mcap").stat().st_size <= 200_000
