"""Replies to a session, cancelling, and its bounds: no socket, and a clock that the test holds in its hand."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessions import (
    ENDPOINT,
    TIMING,
    X,
    ask,
    connected_session,
    new_session,
    predict,
    result,
    started,
)
from tnxctl import session
from tnxctl.call import Call
from tnxctl.protocol import errors, wire
from tnxctl.protocol.wire import Limits
from tnxctl.session import Session


@pytest.fixture
def idle() -> Session:
    return new_session()


@pytest.fixture
def connected() -> Session:
    return connected_session()


# --- replies -------------------------------------------------------------------------------------------------


def test_a_reply_finishes_its_call_and_no_other(connected: Session) -> None:
    first, second = started(connected), started(connected)
    assert connected.receive(result(second), 0.0) is second
    assert (first.done, second.done) == (False, True)
    got = second.take()
    np.testing.assert_array_equal(got.output, X)
    assert list(got.outputs) == ["output"]
    assert (got.model, got.version, got.device, got.reason, got.batch_size) == ("mlp", "1", "cpu", "a test", 2)
    assert (got.latency_ms, got.gpu_memory_mb, got.timing) == (0.5, 0.0, TIMING)
    assert (got.predicted_us, got.actual_us) == (25.0, 20.0)


def test_outputs_are_read_only_views(connected: Session) -> None:
    call = started(connected)
    connected.receive(result(call), 0.0)
    with pytest.raises(ValueError, match="read-only"):
        call.take().output[0] = 1


def test_output_of_several_names_them(connected: Session) -> None:
    call = started(connected)
    specs = (wire.TensorSpec("scores", "FP32", X.shape), wire.TensorSpec("boxes", "FP32", (0, 4)))
    connected.receive([*result(call, outputs=specs), b""], 0.0)
    got = call.take()
    assert got.outputs["boxes"].shape == (0, 4)
    with pytest.raises(errors.InvalidArgument, match="'scores', 'boxes'"):
        _ = got.output


CLASSES = [cls for cls in errors.TensorNextError.__subclasses__() if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", CLASSES)
def test_error_replies_become_their_class(connected: Session, cls: type[errors.TensorNextError]) -> None:
    call = started(connected)
    connected.receive([wire.encode(wire.ErrorReply(v=1, id=call.id, code=cls.code, message="no model 'x'"))], 0.0)
    with pytest.raises(cls, match="no model 'x'"):
        call.take()


@pytest.mark.parametrize(("micros", "seconds"), [(250_000.0, 0.25), (None, None)])
def test_an_error_says_when_to_try_again(connected: Session, micros: float | None, seconds: float | None) -> None:
    call = started(connected)
    reply = wire.ErrorReply(
        v=1, id=call.id, code="RESOURCE_EXHAUSTED", message="the queue is full", retry_after_us=micros
    )
    connected.receive([wire.encode(reply)], 0.0)
    assert call.error is not None
    assert call.error.retry_after_s == seconds


def test_an_unknown_code_is_kept(connected: Session) -> None:
    call = started(connected)
    connected.receive([wire.encode(wire.ErrorReply(v=1, id=call.id, code="TEAPOT", message="short and stout"))], 0.0)
    with pytest.raises(errors.Unknown, match="TEAPOT: short and stout"):
        call.take()


def test_a_second_reply_is_dropped(connected: Session) -> None:
    call = started(connected)
    assert connected.receive(result(call), 0.0) is call
    assert connected.receive(result(call, batch_size=99), 0.0) is None
    assert call.take().batch_size == 2


def test_a_reply_to_a_forgotten_call_is_dropped(connected: Session) -> None:
    call = started(connected)
    assert connected.forget(call)
    assert not connected.forget(call)
    assert connected.receive(result(call), 0.0) is None
    assert not call.done


def raw(call: Call[Any], **fields: Any) -> bytes:
    return msgspec.msgpack.encode({"v": 1, "id": call.id, "type": "result", **fields})


@pytest.mark.parametrize(
    ("reply", "named"),
    [
        pytest.param(lambda c: result(c)[:1], "announces 1 tensors, 0 tensor frames", id="no frame"),
        pytest.param(lambda c: [*result(c), b""], "announces 1 tensors, 2 tensor frames", id="one frame more"),
        pytest.param(lambda c: [*result(c), *1000 * [b""]], "1001 tensor frames", id="1000 frames more"),
        pytest.param(lambda c: [result(c)[0], b"short"], "its frame has 5", id="truncated"),
        pytest.param(lambda c: [result(c)[0], X.tobytes() + b"x"], "its frame has 25", id="too long"),
        pytest.param(lambda c: result(c, outputs=(wire.TensorSpec("output", "FP31", (2, 3)),)), "FP31", id="datatype"),
        pytest.param(lambda c: result(c, outputs=(wire.TensorSpec("output", "FP32", (-2, -3)),)), "-2", id="dims"),
        pytest.param(
            lambda c: [*result(c, outputs=2 * (wire.TensorSpec("a", "FP32", (2, 3)),)), X.tobytes()],
            "same name.*'a'",
            id="names",
        ),
        pytest.param(lambda c: [raw(c)], "missing required field", id="no fields"),
        pytest.param(lambda c: [raw(c, v=2)], "protocol version 2", id="version"),
        pytest.param(lambda c: [raw(c, type="riddle")], "riddle", id="type"),
        pytest.param(
            lambda c: [wire.encode(wire.MetadataReport(v=1, id=c.id, model=MODEL))], "MetadataReport", id="other verb"
        ),
        pytest.param(
            lambda c: [wire.encode(wire.ModelsReport(v=1, id=c.id, models=()))],
            "a Result, got a ModelsReport",
            id="list",
        ),
    ],
)
def test_a_malformed_reply_fails_its_call(connected: Session, reply: Any, named: str) -> None:
    call, other = started(connected), started(connected)
    assert connected.receive(reply(call), 0.0) is call
    with pytest.raises(errors.Internal, match=named) as caught:
        call.take()
    assert ENDPOINT in caught.value.message
    assert not other.done


MODEL = wire.ModelInfo(name="mlp", version="1", status="ready")


def test_metadata_is_the_model_and_takes_no_frames(connected: Session) -> None:
    calls = [connected.encoder.metadata("", timeout=None, now=0.0) for _ in range(2)]
    for call, frames in zip(calls, ([], [b""]), strict=True):
        connected.start(call)
        connected.receive([wire.encode(wire.MetadataReport(v=1, id=call.id, model=MODEL)), *frames], 0.0)
    assert calls[0].take() == MODEL
    with pytest.raises(errors.Internal, match="1 tensor frames"):
        calls[1].take()


REPLIES: dict[str, wire.Reply] = {
    "models": wire.ModelsReport(v=1, id=0, models=(MODEL,)),
    "load": wire.ModelsReport(v=1, id=0, models=(MODEL,)),
    "unload": wire.ModelsReport(v=1, id=0, models=(MODEL,)),
    "route": wire.ModelsReport(v=1, id=0, models=(MODEL,)),
    "reload": wire.ReloadReport(v=1, id=0, loaded=("m@2",), unloaded=("m@1",), failed={"n": "no weights"}),
    "compare": wire.Comparison(
        v=1,
        id=0,
        model="m",
        baseline="1",
        candidate="2",
        requests=1,
        errors=0,
        skipped=0,
        outputs=(),
        baseline_us=wire.Percentiles(count=1, p50_us=2.0, p90_us=3.0, p99_us=4.0),
        candidate_us=wire.Percentiles(count=1, p50_us=2.0, p90_us=3.0, p99_us=4.0),
    ),
}


@pytest.mark.parametrize("verb", REPLIES)
def test_the_verbs_about_models_return_their_reports(connected: Session, verb: str) -> None:
    call = ask(connected, verb)
    reply = msgspec.structs.replace(REPLIES[verb], id=call.id)
    connected.receive([wire.encode(reply)], 0.0)
    assert call.take() == (reply.models if isinstance(reply, wire.ModelsReport) else reply)


@pytest.mark.parametrize("verb", REPLIES)
def test_the_verbs_about_models_take_no_other_reply_and_no_tensors(connected: Session, verb: str) -> None:
    other = ask(connected, verb)
    connected.receive([wire.encode(wire.MetadataReport(v=1, id=other.id, model=MODEL))], 0.0)
    with pytest.raises(errors.Internal, match="got a MetadataReport"):
        other.take()
    call = ask(connected, verb)
    connected.receive([wire.encode(msgspec.structs.replace(REPLIES[verb], id=call.id)), b""], 0.0)
    with pytest.raises(errors.Internal, match="1 tensor frames"):
        call.take()


def test_a_reply_may_have_a_larger_header_than_a_request(connected: Session) -> None:
    call = started(connected)
    assert connected.receive(result(call, reason=100_000 * "x"), 0.0) is call
    assert len(call.take().reason) == 100_000


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=4))
def test_noise_is_dropped(frames: list[bytes]) -> None:
    session = Session(ENDPOINT, 5.0, Limits())
    call = started(session)
    assert session.receive(frames, 0.0) is None
    assert not call.done


@given(st.data())
def test_a_damaged_reply_never_does_worse_than_fail_its_call(data: st.DataObject) -> None:
    session = Session(ENDPOINT, 5.0, Limits())
    call, other = started(session), started(session)
    header, tensor = result(call)
    damaged = bytearray(header)
    damaged[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    finished = session.receive([bytes(damaged[: data.draw(st.integers(0, len(header)))]), tensor], 0.0)
    assert finished in (None, call, other)
    assert [c.done for c in (call, other)] == [finished is call, finished is other]
    if finished is not None and finished.error is not None:
        assert isinstance(finished.error, errors.TensorNextError)


# --- withdrawing ---------------------------------------------------------------------------------------------


def test_a_call_given_up_is_cancelled(connected: Session) -> None:
    forgotten, expired = started(connected), started(connected, timeout=1.0)
    connected.forget(forgotten)
    connected.expire(1.0)
    for call in (forgotten, expired):
        message = connected.cancel_message(call)
        assert message is not None
        assert wire.decode_request(message, Limits()) == wire.Cancel(v=1, id=call.id)


def test_only_queued_requests_are_cancelled(connected: Session) -> None:
    health, metadata = (
        connected.encoder.health(timeout=None, now=0.0),
        connected.encoder.metadata("", timeout=None, now=0.0),
    )
    sent = started(connected)
    assert [connected.cancel_message(call) for call in (health, metadata)] == [None, None]
    connected.lost()
    assert connected.cancel_message(sent) is None


def test_a_reply_to_a_cancelled_call_is_dropped(connected: Session) -> None:
    first, second = started(connected), started(connected)
    for call in (first, second):
        connected.forget(call)
    withdrawn = wire.ErrorReply(v=1, id=first.id, code="CANCELLED", message="withdrawn")
    assert connected.receive([wire.encode(withdrawn)], 0.0) is None
    assert connected.receive(result(second), 0.0) is None
    assert (first.done, second.done) == (False, False)


# --- bounds and the end --------------------------------------------------------------------------------------


def test_too_many_calls_fail_at_once(connected: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_PENDING_CALLS", 2)
    calls = [predict(connected) for _ in range(3)]
    assert [connected.start(call) for call in calls] == [True, True, False]
    with pytest.raises(errors.ResourceExhausted, match="2 calls"):
        calls[2].take()
    connected.receive(result(calls[0]), 0.0)
    assert connected.start(predict(connected))


def test_too_many_bytes_under_way_fail_at_once(connected: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_PENDING_BYTES", 2 * X.nbytes)
    calls = [predict(connected) for _ in range(3)]
    assert [connected.start(call) for call in calls] == [True, True, False]
    with pytest.raises(errors.ResourceExhausted, match="48 bytes"):
        calls[2].take()
    connected.forget(calls[1])
    assert connected.start(predict(connected))


def test_close_fails_what_is_under_way_and_what_comes(connected: Session) -> None:
    call = started(connected)
    assert connected.close() == [call]
    assert connected.close() == []
    with pytest.raises(errors.Cancelled, match="closed before predict was answered"):
        call.take()
    late = predict(connected)
    assert not connected.start(late)
    with pytest.raises(errors.FailedPrecondition, match="closed"):
        late.take()


def test_a_finished_call_holds_no_inputs(connected: Session) -> None:
    call = started(connected)
    connected.receive(result(call), 0.0)
    assert call.frames == []
