"""1 MiB in and out by way of the bridge, over the same by the daemon's own client."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import httpload
import passing
from contenders import Contender, PeerServer
from goals import Goal
from processes import BenchError
from report import ratio
from targets import daemon_target, start_daemon
from tnxctl import Client

_HERE = Path(__file__).parent
_BOUND = 0.5
_WARM_UP_SECONDS = 0.2


def mebibyte_goal(rounds: int, seconds: float, *, has_wrk: bool) -> Goal:
    """Requests per second through the bridge over those of `tnxctl.Client`, in turns, one outstanding each.

    The bridge is asked by wrk, or by the lean client where that is missing. Each has a daemon of its own.

    Raises:
        BenchError: a server failed, or did not give back what it was sent.
    """
    workload = passing.mebibyte()
    array = workload.input(0)
    tensor = {"name": "x", "datatype": "FP32", "shape": array.shape, "parameters": {"binary_data_size": array.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers, body = {"Inference-Header-Content-Length": str(len(head))}, head + array.tobytes()
    path = f"/v2/models/{passing.MODEL}/infer"
    contender = Contender("TensorNext, bridge", "bridge", passing.MODEL, "triton", path, (), own=True)
    bridged, direct = [], []
    with contextlib.ExitStack() as stack:
        daemon = start_daemon(stack, program=[str(_HERE / "passing.py")], model=passing.MODEL)
        server = stack.enter_context(PeerServer(contender, Path(sys.executable), headers, body))
        client = stack.enter_context(Client(daemon_target(daemon).endpoint))
        request = httpload.request_bytes(server.url, headers, body)
        answers = httpload.closed_loop(server.url, [request], 1, min(_WARM_UP_SECONDS, seconds))
        if answers.errors or any(not answer.endswith(array.tobytes()) for _, _, answer in answers.kept):
            raise BenchError(f"the bridge does not give back 1 MiB as it was: {dict(answers.errors)}")
        for _ in range(rounds):
            if has_wrk:
                said = httpload.wrk(server.url, headers, body, 1, seconds)
                if said.errors:
                    raise BenchError(f"the bridge fails with 1 MiB: {dict(said.errors)}")
                bridged.append(said.requests / said.seconds)
            else:
                answers = httpload.closed_loop(server.url, [request], 1, seconds)
                bridged.append(len(answers.latency_us) / answers.seconds)
            begin, count = time.perf_counter(), 0
            while (passed := time.perf_counter() - begin) < seconds:
                client.predict({"x": array}, model=passing.MODEL)
                count += 1
            direct.append(count / passed)
    over = f"tnxctl.Client, by {'wrk' if has_wrk else 'the lean client'}"
    return Goal("bridge, 1 MiB, requests/s", over, _BOUND, False, ratio(bridged, direct))
