"""Sessions without sockets, with a clock that the test holds in its hand, and the messages of a daemon to them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from tnxctl.call import Call
from tnxctl.protocol import wire
from tnxctl.protocol.wire import Limits
from tnxctl.results import Result
from tnxctl.session import Session

ENDPOINT = "tcp://10.0.0.1:5555"
X = np.arange(6, dtype="f4").reshape(2, 3)
TIMING = wire.Timing(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 28.0)


def new_session() -> Session:
    return Session(ENDPOINT, 5.0, Limits())


def connected_session() -> Session:
    session = new_session()
    call = predict(session)
    session.start(call)
    session.connection.connecting(0.0)
    session.connected(0.0)
    session.forget(call)
    return session


def predict(
    session: Session, inputs: object = X, *, timeout: float | None = None, now: float = 0.0, **options: Any
) -> Call[Result]:
    arguments = {
        "model": "",
        "prefer_gpu": True,
        "min_gpu_memory_mb": 0.0,
        "device": "",
        "deadline": None,
        "priority": None,
        "route_key": "",
        **options,
    }
    return session.encoder.predict(inputs, timeout=timeout, now=now, **arguments)


def nobody_listens(session: Session) -> None:
    """An attempt to connect fails."""
    session.connection.connecting(0.0)
    session.connection.trouble = "nobody listens there"
    session.lost()


def started(session: Session, **arguments: Any) -> Call[Result]:
    call = predict(session, **arguments)
    session.start(call)
    assert not call.done
    return call


def header(call: Call[Any]) -> wire.Predict:
    """The header that would be sent now."""
    decoded = wire.decode_request(call.frames[0], Limits())
    assert isinstance(decoded, wire.Predict)
    return decoded


def result(call: Call[Any], **changes: Any) -> list[bytes]:
    reply = wire.Result(
        v=1,
        id=call.id,
        model="mlp",
        version="1",
        outputs=(wire.TensorSpec("output", "FP32", X.shape),),
        device="cpu",
        reason="a test",
        batch_size=2,
        latency_ms=0.5,
        gpu_memory_mb=0.0,
        timing=TIMING,
        predicted_us=25.0,
    )
    return [wire.encode(msgspec.structs.replace(reply, **changes)), X.tobytes()]


def change(session: Session, verb: str, *, timeout: float | None = None, now: float = 0.0) -> Call[Any]:
    """A request that changes what the daemon serves."""
    arguments: dict[str, tuple[Any, ...]] = {
        "load": ("m@2",),
        "unload": ("m@1",),
        "route": ("m", {"1": 1}),
        "reload": (),
    }
    options = {"shadow": ""} if verb == "route" else {}
    call: Call[Any] = getattr(session.encoder, verb)(*arguments[verb], timeout=timeout, now=now, **options)
    return call


CHANGES = ("load", "unload", "route", "reload")


def ask(session: Session, verb: str) -> Call[Any]:
    if verb in CHANGES:
        call = change(session, verb)
    elif verb == "models":
        call = session.encoder.models(timeout=None, now=0.0)
    else:
        call = session.encoder.compare("m", "1", "2", timeout=None, now=0.0)
    session.start(call)
    return call


def put_off(call: Call[Any], after_us: float | None = 100_000.0, code: str = "UNAVAILABLE") -> list[bytes]:
    reply = wire.ErrorReply(v=1, id=call.id, code=code, message="the daemon is starting", retry_after_us=after_us)
    return [wire.encode(reply)]
