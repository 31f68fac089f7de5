"""Measurements: the recordings of a load generator and the calls of the public client, turned into numbers."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadgen import Recording
from tnxctl import Client
from tnxctl.protocol import wire
from tnxctl.protocol.errors import TensorNextError
from workload import FIRST_ID, MODEL, Workload

_LIMITS = wire.Limits()


@dataclass
class Measurement:
    """One round of load on one server.

    Attributes:
        latency_us: of every request that got its result: from when it was due to when its result was here.
        late_us: how much later than due each request was sent; zeros in a closed loop.
        seconds: how long the round took.
        errors: what came instead of a result, counted: error codes, "LOST" (no answer), "UNEXPECTED" (an answer to
            no request, or a second one); and "WRONG", a result that is not the model's output.
        devices: where the results were computed, counted.
        timings: what the server says about each result. device_us: how long the device had to do with it.
        server_cpu_ns, client_cpu_ns: CPU time used meanwhile; None if not known.
    """

    latency_us: NDArray[np.float64]
    late_us: NDArray[np.float64]
    seconds: float
    errors: Counter[str] = field(default_factory=Counter)
    devices: Counter[str] = field(default_factory=Counter)
    timings: list[wire.Timing] = field(default_factory=list)
    device_us: list[float] = field(default_factory=list)
    server_cpu_ns: int | None = None
    client_cpu_ns: int | None = None


def evaluate(recording: Recording, workload: Workload, *, check: bool) -> Measurement:
    """Match answers with requests and count what went wrong.

    Args:
        check: compare the answers whose tensors were kept with the model's own output. The echo floor has none.
    """
    due_ns = recording.due_ns[: len(recording.sent_ns)]
    late_us = (np.array(recording.sent_ns) - np.array(due_ns)) / 1e3
    result = Measurement(np.empty(0), late_us, recording.seconds)
    latency_us: list[float] = []
    unanswered = set(range(len(due_ns)))
    first_kept = len(recording.answers) - len(recording.tensors)
    for position, (arrived_ns, header) in enumerate(recording.answers):
        reply = wire.decode_reply(header, _LIMITS)
        index = -1 if reply.id is None else reply.id - FIRST_ID - recording.first
        if index not in unanswered:
            result.errors["UNEXPECTED"] += 1
            continue
        unanswered.remove(index)
        if isinstance(reply, wire.ErrorReply):
            result.errors[reply.code] += 1
            continue
        if not isinstance(reply, wire.Result):
            result.errors["UNEXPECTED"] += 1
            continue
        if check and position >= first_kept:
            tensor = recording.tensors[position - first_kept]
            result.errors["WRONG"] += not workload.is_right(recording.first + index, reply.outputs[0].shape, tensor)
        latency_us.append((arrived_ns - due_ns[index]) / 1e3)
        result.timings.append(reply.timing)
        result.device_us.append(reply.timing.h2d_us + 1e3 * reply.latency_ms + reply.timing.d2h_us)
        result.devices[reply.device] += 1
    result.errors["LOST"] += len(unanswered)
    result.errors = +result.errors  # without the zeros
    result.latency_us = np.array(latency_us)
    return result


def call_client(client: Client, workload: Workload, seconds: float) -> Measurement:
    """One `Client.predict` after the other for so long: what users of the Python client see."""
    clock, predict, prefer_gpu = time.perf_counter_ns, client.predict, workload.prefer_gpu
    result = Measurement(np.empty(0), np.zeros(1), 0.0)
    latency_us: list[float] = []
    begin = now = clock()
    end = begin + int(seconds * 1e9)
    number = 0
    output: NDArray[Any] | None = None
    while now < end:
        array = workload.input(number)
        sent = clock()
        try:
            answer = predict(array, model=MODEL, prefer_gpu=prefer_gpu)
        except TensorNextError as error:
            result.errors[error.code] += 1
            now = clock()
            output = None
        else:
            now = clock()
            latency_us.append((now - sent) / 1e3)
            result.timings.append(answer.timing)
            result.devices[answer.device] += 1
            output = answer.output
        number += 1
    if output is not None and not workload.is_right(number - 1, output.shape, output.tobytes()):
        result.errors["WRONG"] += 1
    result.seconds = (now - begin) / 1e9
    result.latency_us = np.array(latency_us)
    return result
