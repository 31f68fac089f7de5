"""The daemon asked for one model in a closed loop by a lean client, as lean as `httpload` is towards other servers.

As `zmtpload`, it writes ZMTP to a TCP socket itself; unlike there, a request may have several tensors, and a `Steady`
says what counts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from numpy.typing import NDArray

import zmtpsocket
from processes import BenchError
from steady import Steady
from tnxctl.protocol import wire
from workload import FIRST_ID
from zmtpsocket import MORE, Messages, frame

_DATATYPES = {"float32": "FP32", "int64": "INT64", "uint8": "UINT8"}
_LIMITS = wire.Limits()


class LeanLoad(NamedTuple):
    """Answers that count. Attributes: times_ms: of each. seconds: in which they came. replies: their headers."""

    times_ms: list[float]
    seconds: float
    replies: list[wire.Result]


def closed_loop(
    endpoint: str, model: str, inputs: Mapping[str, NDArray[Any]], outstanding: int, seconds: float
) -> LeanLoad:
    """Keep so many requests with these inputs outstanding. The answers must have one tensor each.

    Raises:
        BenchError: an answer is an error, or there is none.
    """
    specs = tuple(wire.TensorSpec(name, _DATATYPES[str(array.dtype)], array.shape) for name, array in inputs.items())
    header = wire.encode(wire.Predict(v=wire.VERSION, id=FIRST_ID, model=model, inputs=specs))
    first, last = header.split(FIRST_ID.to_bytes(8, "big"))
    arrays = [array.tobytes() for array in inputs.values()]
    tensors = b"".join([*(frame(tensor, MORE) for tensor in arrays[:-1]), frame(arrays[-1])])
    steady, clock = Steady(outstanding, seconds), time.perf_counter_ns
    sent_ns: list[int] = []
    answers: list[tuple[int, bytes]] = []
    socket, received = zmtpsocket.connect(endpoint)
    messages = Messages(received)
    gc.disable()
    try:
        wanted = outstanding
        while len(answers) < len(sent_ns) + wanted:
            leaving = []
            for number in range(len(sent_ns), len(sent_ns) + wanted):
                leaving += [frame(first + (FIRST_ID + number).to_bytes(8, "big") + last, MORE), tensors]
            sent_ns += [clock()] * wanted
            socket.sendall(b"".join([*leaving, messages.pongs]))
            messages.pongs = b""
            wanted = 0
            for answer, _ in messages.take(zmtpsocket.read(socket, endpoint)):
                now = clock()
                answers.append((now, answer))
                wanted += steady.answered(now)
    except OSError as error:
        raise BenchError(f"{endpoint}: {error}") from None
    finally:
        gc.enable()
        socket.close()
    times_ms, replies = [], []
    for now, answer in answers:
        reply = wire.decode_reply(answer, _LIMITS)
        if not isinstance(reply, wire.Result) or reply.id is None:
            raise BenchError(f"a request to {model} failed: {reply}")
        times_ms.append((now - sent_ns[reply.id - FIRST_ID]) / 1e6)
        replies.append(reply)
    return LeanLoad(times_ms[steady.counted], steady.seconds, replies[steady.counted])
