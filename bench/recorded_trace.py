"""A recording of a daemon's requests as a trace: what really arrived, at the costs that the daemon had learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from processes import BenchError
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.limits import DEFAULT_PRIORITY
from tnxctl.protocol.recordings import RecordedRequest, RecordingReader
from traces import CPU, GPU, Job, Machine, Table, Trace

T = TypeVar("T")

NO_DEADLINE_US = 1e6
"""Deadline of a request without one: the scheduler takes it for due a second after it came, too."""


class _Device(msgspec.Struct):
    kind: str
    lanes: int


class _Notes(msgspec.Struct):
    """Notes of a recording about one version, see `tnxd.serving.recording_notes`."""

    max_batch_size: int = 0
    priority: int = DEFAULT_PRIORITY
    deadline_us: float = NO_DEADLINE_US
    costs_us: str = "{}"


def read(path: Path, count: int) -> tuple[Trace, list[str]]:
    """The first requests of a recording as a trace, and remarks about what is not in it.

    The machine has the devices of the daemon, as far as their costs are known, and models are the versions that can be
    simulated there: those that have costs on each of these devices.

    Args:
        count: most requests.

    Raises:
        BenchError: there is nothing to simulate.
    """
    requests: list[RecordedRequest] = []
    try:
        with path.open("rb") as file:
            reader = RecordingReader(file)
            for request in reader:
                requests.append(request)
                if len(requests) == count:
                    break
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror or error}") from None
    except InvalidArgument as error:
        raise BenchError(f"{path}: {error.message}") from None
    notes = {title: _notes(path, fields) for title, fields in reader.channels.items()}
    costs = {title: _decode(path, of.costs_us, dict[str, dict[int, float]]) for title, of in notes.items()}
    devices = _decode(path, reader.about.get("devices", "{}"), dict[str, _Device])
    lanes = {
        name: device.lanes
        for name, device in devices.items()
        if name in (CPU, GPU) and device.lanes > 0 and any(_usable(of.get(name)) for of in costs.values())
    }
    known = [title for title, of in costs.items() if lanes and all(_usable(of.get(name)) for name in lanes)]
    jobs = [_job(request, notes[request.title]) for request in requests if request.title in known]
    if not jobs:
        raise BenchError(f"{path} has no request of a model whose costs are known on every device of its daemon")
    tables: dict[tuple[str, str], Table] = {(name, title): costs[title][name] for title in known for name in lanes}
    machine = Machine(lanes, {title: max(notes[title].max_batch_size, 1) for title in known}, tables)
    remarks = [f"{path.name}: {reader.damage}"] if reader.damage else []
    if len(jobs) < len(requests):
        others = sorted({request.title for request in requests} - {*known})
        remarks.append(
            f"{path.name}: {len(requests) - len(jobs)} requests are left out: no costs of {', '.join(others)}"
        )
    jobs.sort(key=lambda job: job.arrival_us)
    return Trace(path.stem, f"recorded: {len(jobs)} requests", machine, jobs), remarks


def _notes(path: Path, fields: Mapping[str, str]) -> _Notes:
    try:
        return msgspec.convert(dict(fields), _Notes, strict=False)  # all values of MCAP's metadata are strings
    except msgspec.ValidationError as error:
        raise BenchError(f"{path}: {error}") from None


def _decode(path: Path, text: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=kind, strict=False)
    except (msgspec.MsgspecError, ValueError) as error:
        raise BenchError(f"{path}: {error}") from None


def _usable(table: Table | None) -> bool:
    """Whether a table can say what batches cost."""
    return bool(table) and all(rows > 0 and 0 < micros < 1e9 for rows, micros in (table or {}).items())


def _job(recorded: RecordedRequest, notes: _Notes) -> Job:
    request = recorded.request
    rows = 1
    if notes.max_batch_size and request.inputs and request.inputs[0].shape and recorded.frames:
        rows = max(min(request.inputs[0].shape[0], recorded.frames[0].nbytes), 1)  # a file may claim anything
    arrival_us = recorded.offset_ns / 1e3
    deadline_us = notes.deadline_us if request.deadline_us is None else request.deadline_us
    priority = notes.priority if request.priority is None else request.priority
    return Job(arrival_us, arrival_us + deadline_us, recorded.title, rows, recorded.client, priority)
