"""JSON log of a real daemon: each line of both streams is one event, through a life of loads, failures and prints."""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from daemons import PATIENT, Running, running
from dealer import Dealer
from python_models import SIGNATURE, put, rows
from test_events import OF_ALL, documented
from tnxctl import Client
from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxd.process.json_format import JsonFormatter

CHATTY = """
import logging, sys, warnings
print("chatty is imported")
class Model:
    def predict(self, x):
        if (x == 1).any(): print('two\\nlines, "quoted", a tab\\t, a bell\\a, \\u2028 and \\x85: \\udcff')
        if (x == 2).any(): print("x" * 1_000_000)
        if (x == 3).any(): print("\\x00" * 20_000, file=sys.stderr)
        if (x == 4).any(): warnings.warn("dear me", stacklevel=1)
        if (x == 5).any(): logging.getLogger("some.library").warning("from a library: %s", "\\ud800")
        if (x == 7).any(): raise ValueError("seven\\nand a second line")
        return x * 2
"""

ISOLATED = """
import os
class Model:
    def predict(self, x):
        if (x == 1).any(): os.write(1, b"bytes that are no text: \\xff\\xfe\\n")
        if (x == 7).any(): os._exit(3)
        return x * 2
"""

SETTINGS = "max_batch_size = 8\nwarm_up = [1]\naudit = 0\n"

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")

POISONED = 200


def events_of(text: str) -> list[dict[str, Any]]:
    """Events of a stream. Lines end with a newline and nothing else, whatever Python takes for the end of one."""
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    assert lines == text.splitlines()
    found = [json.loads(line) for line in lines]
    for line, fields in zip(lines, found, strict=True):
        assert isinstance(fields, dict)
        assert len(line.encode()) < 48 * 1024, "journald cuts longer lines"
    return found


def lead_a_life(daemon: Running) -> None:
    """Have a daemon load, fail, print, unload and refuse."""
    with Client(daemon.endpoint, timeout=60) as client, Dealer(daemon.endpoint) as other:
        other.await_health(status="ready")
        for value in (1, 2, 3, 4, 5):
            assert client.predict(rows(value), model="chatty").output.tolist() == rows(2 * value).tolist()
        for _ in range(POISONED):
            other.predict(rows(7), names=["x"], model="chatty")
        assert {other.error().code for _ in range(POISONED)} == {"INTERNAL"}
        client.predict(rows(1), model="isolated")
        with pytest.raises(TensorNextError):
            client.predict(rows(7), model="isolated")
        with pytest.raises(FailedPrecondition):
            client.load("broken")
        client.route("chatty", {"1": 1})
        client.unload("chatty")
        client.load("chatty")
        assert client.kick("uid:0") == 1
        daemon.process.send_signal(10)  # SIGUSR1


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Events of a daemon's life, by stream."""
    folder = tmp_path_factory.mktemp("json")
    put(folder / "models", CHATTY, name="chatty", settings=SETTINGS)
    put(folder / "models", ISOLATED, name="isolated", settings=SETTINGS + 'isolation = "process"\n')
    put(folder / "models", "this is no Python", name="broken", settings=SETTINGS)
    arguments = ("--model-repository", str(folder / "models"), "--log-format", "json", "--devices", "cpu")
    with (folder / "out").open("wb") as out, running(folder, *arguments, program=PATIENT, stdout=out) as daemon:
        lead_a_life(daemon)
        assert daemon.stop() == 0
    return {"stderr": events_of(daemon.log), "stdout": events_of((folder / "out").read_text())}


def named(lines: dict[str, list[dict[str, Any]]], name: str) -> list[dict[str, Any]]:
    return [event for stream in lines.values() for event in stream if event["event"] == name]


def test_each_line_is_an_event_of_the_table(lines: dict[str, list[dict[str, Any]]]) -> None:
    table = documented()
    for event in [*lines["stderr"], *lines["stdout"]]:
        assert TIME.fullmatch(event["time"])
        assert event["level"] in ("info", "warning", "error")
        allowed = table[event["event"]] | OF_ALL
        if event["event"] == "repeated":
            allowed |= table[event["repeats"]]
        assert event.keys() <= allowed, event
        assert None not in event.values()


def test_life_is_told_in_its_order(lines: dict[str, list[dict[str, Any]]]) -> None:
    told = [(event["event"], event.get("model")) for event in lines["stderr"]]
    in_order = [
        ("starting", None),
        ("device_ready", None),
        ("model_loaded", "chatty"),
        ("model_raised", "chatty"),
        ("process_restarted", "isolated"),
        ("traffic_routed", "chatty"),
        ("model_unloaded", "chatty"),
        ("model_loaded", "chatty"),
        ("peer_kicked", None),
        ("draining", None),
        ("stopped", None),
    ]
    rest = iter(told)
    assert [step for step in in_order if step not in rest] == []
    [ready] = [event for event in lines["stdout"] if event["event"] == "ready"]
    assert set(ready["models"]) == {"chatty", "isolated", "broken"}
    assert ready["devices"]["cpu"] >= 1


def test_fields_are_typed(lines: dict[str, list[dict[str, Any]]]) -> None:
    loaded = named(lines, "model_loaded")[0]
    assert (loaded["version"], loaded["devices"]) == ("1", ["cpu"])
    assert isinstance(loaded["seconds"], float)
    assert {event["model"] for event in named(lines, "model_failed")} == {"broken"}
    raised = named(lines, "model_raised")[0]
    assert raised["message"] == "chatty on cpu raised"
    assert raised["traceback"].startswith("Traceback (most recent call last)")
    assert raised["traceback"].endswith("ValueError: seven\nand a second line")
    assert (raised["model"], raised["version"], raised["device"]) == ("chatty", "1", "cpu")
    restarted = named(lines, "process_restarted")[0]
    assert (restarted["count"], restarted["seconds"]) == (1, 0)
    assert [event["signal"] for event in named(lines, "signal_ignored")] == ["SIGUSR1"]


def test_failures_that_repeat_are_one_event_and_their_number(lines: dict[str, list[dict[str, Any]]]) -> None:
    """Failed requests are a record each, of which the log has one, or one for each ten seconds that they come."""
    raised = named(lines, "model_raised")
    repeated = [event for event in named(lines, "repeated") if event["repeats"] == "model_raised"]
    assert len(raised) + sum(event["count"] for event in repeated) == POISONED
    times = [datetime.fromisoformat(event["time"]) for event in raised]
    assert all((later - earlier).total_seconds() > 9 for earlier, later in pairwise(times))
    assert {(event["model"], event["device"], event["seconds"]) for event in repeated} == {("chatty", "cpu", 10)}
    codes = Counter[str]()
    for event in named(lines, "errors_sent"):
        codes.update(event["codes"])
    assert codes["INTERNAL"] == POISONED + 1


def test_prints_are_events_with_their_model(lines: dict[str, list[dict[str, Any]]]) -> None:
    printed = named(lines, "output")
    by_stream = {stream: [event for event in printed if event["stream"] == stream] for stream in ("stdout", "stderr")}
    assert {(event["model"], event["version"]) for event in printed if event["message"][0] != "b"} == {("chatty", "1")}
    texts = [event["message"] for event in by_stream["stdout"]]
    assert texts[:3] == [
        "chatty is imported",
        "two",
        'lines, "quoted", a tab\t, a bell\a, \u2028 and \x85: \\udcff',
    ]
    [long] = [text for text in texts if text.startswith("xxx")]
    assert "characters are left out" in long
    [nulls] = [event["message"] for event in by_stream["stderr"] if event["message"].startswith("\0")][:1]
    assert len(nulls) > 1000
    [odd] = [event for event in printed if event["stream"] == "process"]
    assert (odd["model"], odd["message"]) == ("isolated", "bytes that are no text: \ufffd\ufffd")
    [warning] = named(lines, "python_warning")
    assert (warning["category"], warning["model"]) == ("UserWarning", "chatty")
    [foreign] = named(lines, "log")
    assert (foreign["logger"], foreign["message"]) == ("some.library", "from a library: \\ud800")


def test_orders_are_events_of_the_audit(lines: dict[str, list[dict[str, Any]]]) -> None:
    orders = [(event["verb"], event["about"]) for event in named(lines, "order_given")]
    expected = [("load", "broken"), ("route", "chatty"), ("unload", "chatty"), ("load", "chatty"), ("kick", "uid:0")]
    assert orders == expected
    assert {(event["client"], event["role"]) for event in named(lines, "order_given")} == {("uid:0", "admin")}


def test_text_format_has_no_line_for_machines_alone(tmp_path: Path) -> None:
    put(tmp_path / "models", CHATTY, name="chatty", settings=SETTINGS, signature=SIGNATURE)
    with (tmp_path / "out").open("wb") as out:
        arguments = ("--model-repository", str(tmp_path / "models"), "--devices", "cpu")
        with running(tmp_path, *arguments, program=PATIENT, stdout=out) as daemon:
            with Dealer(daemon.endpoint) as dealer:
                dealer.await_health(status="ready")
            assert daemon.stop() == 0
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO"
    expected = [
        rf"{stamp} tnxd.deployment.lifecycle: chatty@1 is loaded on cpu, \d+\.\d s",
        rf"{stamp} tnxd.serving.server: draining: 0 requests waiting, 0 running",
        rf"{stamp} tnxd: stopped",
    ]
    told = daemon.log.splitlines()
    assert len(told) == len(expected), told
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, told, strict=True)), told
    printed, ready = (tmp_path / "out").read_text().splitlines()
    assert printed == "chatty is imported"
    assert re.fullmatch(r"tnxd \S+ ready on ipc://\S+; devices: cpu \(\d+ lanes?\); models: chatty \(default\)", ready)


def test_failed_start_is_an_event(tmp_path: Path) -> None:
    put(tmp_path / "models", "this is no Python", name="broken", settings=SETTINGS)
    arguments = ("--model-repository", str(tmp_path / "models"), "--log-format", "json", "--devices", "cpu")
    with running(tmp_path, *arguments) as daemon:
        assert daemon.process.wait(60) == 1
        told = events_of(daemon.log)
    [end] = [event for event in told if event["event"] == "cannot_start"]
    assert (end["code"], end["level"]) == (1, "error")


@pytest.mark.parametrize("text", ["", "a" * 40_000, "\0" * 40_000, "µ" * 40_000, "\ud800" * 40_000, "\U0001f600" * 9])
def test_line_is_bounded_whatever_a_text_holds(text: str) -> None:
    import logging

    from tnxd.events import event

    record = logging.LogRecord("test", logging.INFO, "", 0, "%s", (text,), None)
    record.__dict__.update(event("output", "a@1#2", stream=text, names=[text] * 100, codes={text: text}, count=1))
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert len(line.encode()) < 48 * 1024
    fields = json.loads(line)
    assert (fields["model"], fields["version"], fields["count"]) == ("a", "1", 1)
    assert fields["message"][:1] == text[:1].encode("utf-8", "backslashreplace").decode()[:1]
