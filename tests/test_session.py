"""The session alone: no socket, and a clock that the test holds in its hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peers import health_report
from tnxctl import connection, session
from tnxctl.call import Call
from tnxctl.protocol import errors, wire
from tnxctl.protocol.wire import Limits
from tnxctl.results import Result
from tnxctl.session import Session

ENDPOINT = "tcp://10.0.0.1:5555"
X = np.arange(6, dtype="f4").reshape(2, 3)
TIMING = wire.Timing(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 28.0)


@pytest.fixture
def idle() -> Session:
    return Session(ENDPOINT, 5.0, Limits())


@pytest.fixture
def connected(idle: Session) -> Session:
    call = predict(idle)
    idle.start(call)
    idle.connection.connecting(0.0)
    idle.connected(0.0)
    idle.forget(call)
    return idle


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


# --- requests ------------------------------------------------------------------------------------------------


def test_a_request_is_its_header_and_the_very_arrays(idle: Session) -> None:
    other = np.ones(2, "i8")
    call = predict(idle, {"a": X, "b": other}, model="digits", prefer_gpu=False, min_gpu_memory_mb=100)
    header, *arrays = call.frames
    assert [id(array) for array in arrays] == [id(X), id(other)]
    assert wire.decode_request(header, Limits()) == wire.Predict(
        v=1,
        id=call.id,
        inputs=(wire.TensorSpec("a", "FP32", (2, 3)), wire.TensorSpec("b", "INT64", (2,))),
        model="digits",
        prefer_gpu=False,
        min_gpu_memory_mb=100.0,
    )


def test_one_array_is_the_only_input(idle: Session) -> None:
    assert header(predict(idle)).inputs == (wire.TensorSpec("", "FP32", (2, 3)),)


def test_what_is_not_asked_for_is_not_sent(idle: Session) -> None:
    plain = msgspec.msgpack.decode(predict(idle).frames[0])
    assert plain.keys().isdisjoint({"model", "device", "deadline_us", "priority", "route_key"})


def test_device_deadline_priority_and_route_key_are_sent(idle: Session) -> None:
    asked = header(predict(idle, device="cuda:1", deadline=0.05, priority=np.int64(3), route_key="ann"))
    assert (asked.device, asked.deadline_us, asked.priority, asked.route_key) == ("cuda:1", 50_000.0, 3, "ann")
    explicit = msgspec.msgpack.decode(predict(idle, priority=wire.DEFAULT_PRIORITY).frames[0])
    assert explicit["priority"] == wire.DEFAULT_PRIORITY, "whatever the model's own is"
    assert header(predict(idle, deadline=86_400, timeout=1e6)).deadline_us == wire.MAX_DEADLINE_US


def test_a_deadline_beyond_the_timeout_is_cut_to_it(idle: Session) -> None:
    call = predict(idle, deadline=60, timeout=2.0)
    assert header(call).deadline_us == 2_000_000.0
    assert call.expires == 2.0


def test_a_copy_is_taken_where_asked_for(idle: Session) -> None:
    call = predict(idle, X, copy=True)
    assert not np.shares_memory(call.frames[1], X)
    np.testing.assert_array_equal(call.frames[1], X)


def test_health_and_metadata_have_no_tensors(idle: Session) -> None:
    health, metadata = (
        idle.encoder.health(timeout=None, now=0.0),
        idle.encoder.metadata("digits", timeout=None, now=0.0),
    )
    assert [wire.decode_request(*call.frames, Limits()) for call in (health, metadata)] == [
        wire.Health(v=1, id=health.id),
        wire.Metadata(v=1, id=metadata.id, model="digits"),
    ]


def test_ids_differ(idle: Session) -> None:
    assert len({predict(idle).id for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"inputs": {}}, "0 inputs"),
        ({"inputs": {f"x{i}": X for i in range(9000)}}, r"\d bytes.*65536"),
        ({"inputs": {3: X}}, "3"),
        ({"inputs": {"x": X, "pixels": np.zeros(2, object)}}, "'pixels'.*object"),
        ({"inputs": {"\ud800": X}}, "encode"),
        ({"inputs": {40_000 * "é": X}}, r"800\d\d bytes.*65536"),
        ({"model": None}, "None"),
        ({"model": b"mlp"}, "b'mlp'"),
        ({"prefer_gpu": "no"}, "'no'"),
        ({"prefer_gpu": None}, "None"),
        ({"min_gpu_memory_mb": -1}, "-1"),
        ({"min_gpu_memory_mb": math.nan}, "nan"),
        ({"min_gpu_memory_mb": "much"}, "'much'"),
        ({"timeout": 0}, "timeout 0:"),
        ({"timeout": -1.5}, "timeout -1.5"),
        ({"timeout": math.nan}, "timeout nan"),
        ({"timeout": math.inf}, "timeout inf"),
        ({"timeout": 10**400}, "timeout 10000"),
        ({"timeout": "5"}, "timeout '5'"),
        ({"deadline": 0}, "deadline 0:"),
        ({"deadline": -0.05}, "deadline -0.05"),
        ({"deadline": math.nan}, "deadline nan"),
        ({"deadline": math.inf}, "deadline inf"),
        ({"deadline": 86_401}, "deadline 86401.*at most 86400"),
        ({"deadline": 10**400}, "deadline 10000"),
        ({"deadline": "50ms"}, "deadline '50ms'"),
        ({"deadline": np.ones(2)}, "deadline array"),
        ({"priority": -1}, "priority -1.*0 .* to 3"),
        ({"priority": 4}, "priority 4"),
        ({"priority": 10**400}, "priority 10000"),
        ({"priority": 1.0}, r"priority 1\.0"),
        ({"priority": math.nan}, "priority nan"),
        ({"priority": True}, "priority True"),
        ({"route_key": None}, "route_key None"),
        ({"route_key": b"ann"}, "route_key b'ann'"),
        ({"route_key": 7}, "route_key 7"),
        ({"route_key": "\ud800"}, "encode"),
        ({"priority": "high"}, "priority 'high'"),
        ({"device": None}, "device None"),
        ({"device": 0}, "device 0"),
        ({"device": b"cpu"}, "device b'cpu'"),
    ],
)
def test_arguments_that_cannot_work_are_named(idle: Session, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=named):
        predict(idle, **arguments)


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


def test_the_verbs_about_models(idle: Session) -> None:
    calls = [
        idle.encoder.models(timeout=None, now=0.0),
        idle.encoder.load("resnet@2", timeout=None, now=0.0),
        idle.encoder.unload("resnet", timeout=None, now=0.0),
        idle.encoder.route("resnet", {"1": 95, "2": 5}, shadow="", timeout=None, now=0.0),
        idle.encoder.route("resnet", {1: 0.5}, shadow=2, timeout=None, now=0.0),
        idle.encoder.route("resnet", {}, shadow="", timeout=None, now=0.0),
        idle.encoder.reload(timeout=None, now=0.0),
        idle.encoder.compare("resnet", 1, "2", timeout=None, now=0.0),
    ]
    assert [wire.decode_request(*call.frames, Limits()) for call in calls] == [
        wire.Models(v=1, id=1),
        wire.Load(v=1, id=2, model="resnet@2"),
        wire.Unload(v=1, id=3, model="resnet"),
        wire.Route(v=1, id=4, model="resnet", weights={"1": 95.0, "2": 5.0}),
        wire.Route(v=1, id=5, model="resnet", weights={"1": 0.5}, shadow="2"),
        wire.Route(v=1, id=6, model="resnet"),
        wire.Reload(v=1, id=7),
        wire.Compare(v=1, id=8, model="resnet", baseline="1", candidate="2"),
    ]


@pytest.mark.parametrize("title", ["", "@", "@1", "resnet@", "a@b@c", "resnet@1@", None, 7, b"resnet"])
@pytest.mark.parametrize("verb", ["load", "unload", "route", "compare"])
def test_what_is_no_model_is_refused(idle: Session, verb: str, title: Any) -> None:
    arguments: dict[str, tuple[Any, ...]] = {"route": ({"1": 1.0},), "compare": ("1", "2")}
    options = {"shadow": ""} if verb == "route" else {}
    with pytest.raises(errors.InvalidArgument, match=re.escape(repr(title))):
        getattr(idle.encoder, verb)(title, *arguments.get(verb, ()), timeout=None, now=0.0, **options)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"model": "resnet@1"}, "'resnet@1'.*without a version"),
        ({"weights": {"1": math.nan}}, "weight nan of version 1"),
        ({"weights": {"1": 1, "2": -5}}, "weight -5 of version 2"),
        ({"weights": {"1": math.inf}}, "weight inf of version 1"),
        ({"weights": {"1": 2e9}}, "weight 2000000000.0 of version 1.*0 to 1e.09"),
        ({"weights": {"1": "95"}}, "weight '95'"),
        ({"weights": {"1": None}}, "weight None"),
        ({"weights": {"1": 10**400}}, "weight 1000"),
        ({"weights": {"1": 0, "2": 0.0}}, "none is above 0"),
        ({"weights": {1: 95, "1": 5}}, "version 1 has two"),
        ({"weights": {"": 1}}, "version ''"),
        ({"weights": {1.5: 1}}, "version 1.5"),
        ({"weights": {True: 1}}, "version True"),
        ({"weights": [("1", 95)]}, r"weights \[\('1', 95\)\]"),
        ({"shadow": None}, "shadow None"),
        ({"shadow": 1.5}, "shadow 1.5"),
        ({"shadow": False}, "shadow False"),
    ],
)
def test_routes_that_cannot_work_are_named(idle: Session, arguments: dict[str, Any], named: str) -> None:
    options = {"model": "resnet", "weights": {"1": 1.0}, "shadow": "", **arguments}
    model, weights = options.pop("model"), options.pop("weights")
    with pytest.raises(errors.InvalidArgument, match=named):
        idle.encoder.route(model, weights, timeout=None, now=0.0, **options)


@pytest.mark.parametrize("version", ["", None, 1.5, True])
@pytest.mark.parametrize("which", ["baseline", "candidate"])
def test_versions_that_cannot_be_compared_are_named(idle: Session, which: str, version: Any) -> None:
    versions = {"baseline": "1", "candidate": "2", which: version}
    with pytest.raises(errors.InvalidArgument, match=f"{which} {version!r}"):
        idle.encoder.compare("resnet", **versions, timeout=None, now=0.0)


def test_too_many_bytes_are_refused_before_they_are_sent() -> None:
    small = Session(ENDPOINT, 5.0, Limits(message_bytes=1024))
    predict(small, {"a": np.zeros(512, "u1"), "b": np.zeros(512, "u1")})
    with pytest.raises(errors.InvalidArgument, match=r"1025 bytes.*1024"):
        predict(small, {"a": np.zeros(512, "u1"), "b": np.zeros(513, "u1")})


@pytest.mark.parametrize("timeout", [0, -1, math.nan, None])
def test_the_timeout_of_the_session_is_checked_too(timeout: float) -> None:
    with pytest.raises(errors.InvalidArgument, match=f"timeout {timeout}"):
        Session(ENDPOINT, timeout, Limits())


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


@pytest.mark.parametrize("cls", errors.TensorNextError.__subclasses__())
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


def ask(session: Session, verb: str) -> Call[Any]:
    if verb in CHANGES:
        call = change(session, verb)
    elif verb == "models":
        call = session.encoder.models(timeout=None, now=0.0)
    else:
        call = session.encoder.compare("m", "1", "2", timeout=None, now=0.0)
    session.start(call)
    return call


@pytest.mark.parametrize("verb", REPLIES)
def test_what_the_verbs_about_models_return(connected: Session, verb: str) -> None:
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


# --- time ----------------------------------------------------------------------------------------------------


def test_calls_expire_each_in_its_time(connected: Session) -> None:
    late, early = started(connected, timeout=3.0, now=10.0), started(connected, timeout=1.0, now=10.0)
    assert connected.next_timer <= 11.0
    assert connected.expire(10.9) == []
    assert connected.expire(11.0) == [early]
    connected.receive([b""], 11.0)
    assert connected.next_timer == 13.0
    with pytest.raises(errors.DeadlineExceeded, match=r"did not answer predict within 1 s") as caught:
        early.take()
    assert isinstance(caught.value, TimeoutError)
    assert connected.expire(13.0) == [late]
    connected.receive([b""], 13.0)
    assert connected.next_timer == math.inf
    assert connected.receive(result(late), 0.0) is None


def test_answered_calls_do_not_expire(connected: Session) -> None:
    call, other = started(connected, timeout=1.0), started(connected, timeout=9.0)
    connected.receive(result(call), 0.0)
    assert connected.expire(5.0) == []
    assert connected.next_timer == other.expires


def test_without_a_connection_time_runs_too_and_the_error_says_so(idle: Session) -> None:
    call = started(idle, timeout=2.5)
    nobody_listens(idle)
    assert idle.expire(2.5) == [call]
    with pytest.raises(
        errors.Unavailable, match=r"tcp://10.0.0.1:5555: no connection within 2.5 s: nobody listens"
    ) as e:
        call.take()
    assert isinstance(e.value, ConnectionError)


def test_an_attempt_that_has_only_begun_hides_not_why_the_last_one_failed(idle: Session) -> None:
    call = started(idle, timeout=2.5)
    idle.connection.connecting(0.0)
    idle.connection.note_trouble("nothing answers", begun=True)
    idle.connection.note_trouble("nobody listens there")
    idle.lost()
    idle.connection.connecting(2.4)
    idle.connection.note_trouble("nothing answers", begun=True)
    idle.expire(2.5)
    with pytest.raises(errors.Unavailable, match="nobody listens there"):
        call.take()


def test_after_a_connection_was_lost_the_next_attempt_says_what_it_meets(connected: Session) -> None:
    nobody_listens(connected)
    connected.connection.connecting(0.0)
    connected.connected(0.0)
    connected.connection.note_trouble("it closed the connection")
    call = started(connected, timeout=2.5)
    connected.lost()
    connected.connection.connecting(0.1)
    connected.connection.note_trouble("nothing answers", begun=True)
    connected.expire(2.5)
    with pytest.raises(errors.Unavailable, match="nothing answers"):
        call.take()


@pytest.mark.parametrize(("verb", "patience"), [("load", 600.0), ("unload", 600.0), ("reload", 600.0), ("route", 5.0)])
def test_what_takes_long_may_take_long(connected: Session, verb: str, patience: float) -> None:
    call = change(connected, verb)
    connected.start(call)
    assert connected.next_timer <= patience
    assert connected.expire(patience - 0.1) == []
    assert connected.expire(patience) == [call]
    with pytest.raises(
        errors.DeadlineExceeded, match=rf"did not answer {verb} within {patience:g} s; it may still be at work on it"
    ):
        call.take()


@pytest.mark.parametrize(("timeout", "patience"), [(3.0, 3.0), (None, 3600.0)])
def test_the_timeout_of_what_takes_long(timeout: float | None, patience: float) -> None:
    patient = Session(ENDPOINT, 3600.0, Limits())
    assert change(patient, "load", timeout=timeout).timeout == patience
    with pytest.raises(errors.InvalidArgument, match="timeout nan"):
        change(patient, "load", timeout=math.nan)


@pytest.mark.parametrize(("timeout", "reach"), [(None, 5.0), (60.0, 5.0), (2.0, 2.0)])
def test_what_takes_long_does_not_wait_long_for_a_daemon(idle: Session, timeout: float | None, reach: float) -> None:
    call = change(idle, "load", timeout=timeout)
    idle.start(call)
    nobody_listens(idle)
    assert idle.expire(reach - 0.01) == []
    assert idle.next_timer <= reach
    assert idle.expire(reach) == [call]
    with pytest.raises(errors.Unavailable, match=rf"no connection within {reach:g} s: nobody listens there"):
        call.take()


def test_what_has_been_sent_waits_for_its_answer(idle: Session) -> None:
    call = change(idle, "load")
    idle.start(call)
    idle.connection.connecting(4.9)
    assert idle.connected(4.95) == [call]
    assert idle.expire(599.0) == []
    late = change(idle, "load", now=599.0)
    assert idle.start(late)
    assert idle.expire(610.0) == [call]
    assert idle.next_timer == 1199.0


# --- deadlines -----------------------------------------------------------------------------------------------


def test_a_call_fails_at_its_deadline(connected: Session) -> None:
    call = started(connected, deadline=0.05, now=10.0)
    assert connected.next_timer <= 10.05
    assert connected.expire(10.049) == []
    assert connected.expire(10.05) == [call]
    with pytest.raises(errors.DeadlineExceeded, match=r"did not answer predict within its deadline of 50 ms"):
        call.take()


def test_of_deadline_and_timeout_the_earlier_counts(connected: Session) -> None:
    call = started(connected, deadline=3.0, timeout=1.0, now=10.0)
    assert connected.expire(11.0) == [call]
    with pytest.raises(errors.DeadlineExceeded, match=r"predict within 1 s"):
        call.take()


def test_without_a_connection_a_deadline_passes_all_the_same(idle: Session) -> None:
    call = started(idle, deadline=0.5)
    nobody_listens(idle)
    assert idle.expire(0.5) == [call]
    with pytest.raises(errors.DeadlineExceeded, match=r"no connection within its deadline of 500 ms: nobody listens"):
        call.take()


def test_a_result_after_the_deadline_is_none(connected: Session) -> None:
    in_time, late = started(connected, deadline=0.05), started(connected, deadline=0.05)
    patient = started(connected, timeout=0.05)
    assert connected.receive(result(in_time), 0.049) is in_time
    assert connected.receive(result(late), 0.051) is late
    assert connected.receive(result(patient), 0.051) is patient
    assert in_time.take().batch_size == patient.take().batch_size == 2
    with pytest.raises(errors.DeadlineExceeded, match="its deadline"):
        late.take()


def test_a_late_error_keeps_its_reason(connected: Session) -> None:
    call = started(connected, deadline=0.05)
    connected.receive([wire.encode(wire.ErrorReply(v=1, id=call.id, code="NOT_FOUND", message="no model"))], 0.06)
    with pytest.raises(errors.NotFound, match="no model"):
        call.take()


def test_what_is_left_of_a_deadline_is_sent(connected: Session) -> None:
    call, plain = started(connected, deadline=4.0, device="cpu", now=10.0), started(connected, now=10.0)
    before = plain.frames[0]
    for now, left_us in ((11.0, 3e6), (13.75, 250_000.0)):
        connected.lost()
        connected.connection.connecting(now)
        assert connected.connected(now) == [call, plain]
        assert header(call).deadline_us == left_us
    assert header(call).device == "cpu"
    assert call.frames[1] is X
    assert plain.frames[0] is before


def test_a_connection_that_took_time_took_it_from_the_deadline(idle: Session) -> None:
    call = started(idle, deadline=1.0)
    idle.connection.connecting(0.0)
    assert idle.connected(0.25) == [call]
    assert header(call).deadline_us == 750_000.0


def test_a_deadline_is_never_sent_longer_than_it_may_be(idle: Session) -> None:
    now = 297_980 / 3
    assert now + 86_400 - now > 86_400, "by rounding"
    call = started(idle, deadline=86_400, timeout=1e6, now=now)
    idle.connection.connecting(now)
    idle.connected(now)
    assert header(call).deadline_us == pytest.approx(wire.MAX_DEADLINE_US)


def test_what_is_over_is_not_sent_again(connected: Session) -> None:
    late, patient = started(connected, deadline=0.05), started(connected)
    connected.lost()
    connected.connection.connecting(0.01)
    assert connected.connected(0.05) == [patient]
    assert connected.expire(0.05) == [late]


# --- withdrawing ---------------------------------------------------------------------------------------------


def test_a_call_given_up_is_withdrawn(connected: Session) -> None:
    forgotten, expired = started(connected), started(connected, timeout=1.0)
    connected.forget(forgotten)
    connected.expire(1.0)
    for call in (forgotten, expired):
        message = connected.cancel_message(call)
        assert message is not None
        assert wire.decode_request(message, Limits()) == wire.Cancel(v=1, id=call.id)


def test_only_what_a_daemon_has_in_a_queue_is_withdrawn(connected: Session) -> None:
    health, metadata = (
        connected.encoder.health(timeout=None, now=0.0),
        connected.encoder.metadata("", timeout=None, now=0.0),
    )
    sent = started(connected)
    assert [connected.cancel_message(call) for call in (health, metadata)] == [None, None]
    connected.lost()
    assert connected.cancel_message(sent) is None


def test_what_comes_for_a_withdrawn_call_is_dropped(connected: Session) -> None:
    first, second = started(connected), started(connected)
    for call in (first, second):
        connected.forget(call)
    withdrawn = wire.ErrorReply(v=1, id=first.id, code="CANCELLED", message="withdrawn")
    assert connected.receive([wire.encode(withdrawn)], 0.0) is None
    assert connected.receive(result(second), 0.0) is None
    assert (first.done, second.done) == (False, False)


# --- doubts about the daemon ---------------------------------------------------------------------------------


def asked(session: Session) -> int:
    """The id of the question that the session has for the daemon."""
    message = session.probe_message()
    assert message is not None
    question = wire.decode_request(message, Limits())
    assert isinstance(question, wire.Health)
    assert session.probe_message() is None
    return question.id


def report(id_: int, **changes: Any) -> list[bytes]:
    return [wire.encode(msgspec.structs.replace(health_report(id_), **changes))]


def reconnected(session: Session, now: float) -> list[Call[Any]]:
    session.connection.connecting(now)
    return session.connected(now)


def test_a_connection_on_which_nothing_comes_is_given_up(connected: Session) -> None:
    started(connected, timeout=4.0)
    patient = started(connected, timeout=60.0)
    assert connected.probe_message() is None
    assert len(connected.expire(4.0)) == 1
    asked(connected)
    assert not connected.connection.is_half_open(6.0)  # half as long again as the call waited
    assert connected.connection.is_half_open(connected.next_timer)
    assert connected.next_timer == pytest.approx(6.0, abs=1e-3)
    assert connected.give_up() == []
    assert connected.must_connect(6.1)
    assert reconnected(connected, 6.1) == [patient]
    assert patient.losses == 0  # no call is to blame
    assert not connected.connection.is_half_open(9.0)


@pytest.mark.parametrize("message", [[b""], report(10**9), [b"noise"]])
def test_whatever_comes_ends_the_doubt(connected: Session, message: list[bytes]) -> None:
    started(connected, timeout=4.0)
    connected.expire(4.0)
    asked(connected)
    connected.receive(message, 5.0)
    assert not connected.connection.is_half_open(100.0)


def test_an_answer_to_the_question_is_for_nobody(connected: Session) -> None:
    started(connected, timeout=4.0)
    connected.expire(4.0)
    assert connected.receive(report(asked(connected)), 5.0) is None


def test_a_call_that_times_out_while_others_are_answered_is_no_reason_to_doubt(connected: Session) -> None:
    started(connected, timeout=4.0)
    other = started(connected, timeout=9.0)
    connected.receive(result(other), 3.0)
    connected.expire(4.0)
    assert connected.probe_message() is None
    assert not connected.connection.is_half_open(100.0)


def test_a_call_that_waited_for_the_connection_may_find_it_silent(idle: Session) -> None:
    started(idle, timeout=4.0)
    reconnected(idle, 3.0)
    idle.expire(4.0)
    asked(idle)
    assert idle.connection.is_half_open(6.0)


def test_without_a_connection_nobody_is_asked(idle: Session) -> None:
    started(idle, timeout=4.0)
    idle.expire(4.0)
    assert idle.probe_message() is None
    assert not idle.connection.is_half_open(100.0)


def test_the_time_to_answer_is_bounded_and_doubles_until_something_comes(connected: Session) -> None:
    waits = []
    for timeout in (0.1, 60.0, 60.0, 60.0):
        started(connected, timeout=timeout)
        connected.expire(timeout)
        waits.append(connected.next_timer - timeout)
        connected.give_up()
        reconnected(connected, 0.0)
    assert waits == pytest.approx([1.0, 10.0, 20.0, 40.0])
    connected.receive([b""], -1.0)
    started(connected, timeout=60.0)
    connected.expire(60.0)
    assert connected.next_timer == 65.0
    for _ in range(20):
        connected.give_up()
        reconnected(connected, 0.0)
    started(connected, timeout=60.0)
    connected.expire(60.0)
    assert connected.next_timer == 60.0 + connection.LAST_PROBE_TIMEOUT_S


def test_a_slow_line_gets_time_for_what_it_carries(connected: Session) -> None:
    started(connected, inputs=np.zeros(30_000_000, "u1"), timeout=900.0)
    started(connected, timeout=2.0)
    connected.expire(2.0)
    assert connected.next_timer == pytest.approx(33.0, abs=0.1)


@pytest.mark.parametrize("verb", ["load", "unload", "route", "reload"])
def test_a_change_keeps_its_connection(connected: Session, verb: str) -> None:
    sent = change(connected, verb, timeout=50.0)
    connected.start(sent)
    started(connected, timeout=4.0)
    connected.expire(4.0)
    assert not connected.connection.is_half_open(49.9)


LARGE = np.zeros(session.LARGE_BYTES, "u1")


def broken_under(session: Session, *inputs: Any) -> list[Call[Result]]:
    calls = [started(session, inputs=array) for array in inputs]
    assert session.lost() == []
    return calls


def test_large_inputs_wait_for_what_the_daemon_takes(connected: Session) -> None:
    small, large, larger = broken_under(connected, X, LARGE, np.zeros(2 * LARGE.size, "u1"))
    assert reconnected(connected, 1.0) == [small]
    connected.receive(report(asked(connected), max_message_bytes=LARGE.size), 1.0)
    assert connected.next_timer <= 1.0
    assert connected.expire(1.0) == [larger]
    with pytest.raises(errors.InvalidArgument, match=rf"inputs have {2 * LARGE.size} bytes.*takes {LARGE.size}"):
        larger.take()
    assert connected.take_retries(1.0) == [large]
    assert connected.receive(result(large), 2.0) is large


def refused(id_: int) -> list[bytes]:
    return [wire.encode(wire.ErrorReply(v=1, id=id_, code="UNIMPLEMENTED", message="health?"))]


@pytest.mark.parametrize("answer", [report, refused])
def test_where_it_does_not_say_large_inputs_are_sent_again(
    connected: Session, answer: Callable[[int], list[bytes]]
) -> None:
    (large,) = broken_under(connected, LARGE)
    assert reconnected(connected, 1.0) == []
    connected.receive(answer(asked(connected)), 1.0)
    assert connected.take_retries(1.0) == [large]


def test_large_inputs_that_wait_may_expire_or_be_withdrawn_or_lose_the_connection_again(connected: Session) -> None:
    late, withdrawn, patient = broken_under(connected, LARGE, LARGE, LARGE)
    assert reconnected(connected, 1.0) == []
    late.next_timeout = 1.5
    connected.forget(withdrawn)
    connected._expiry = 1.5
    assert connected.expire(2.0) == [late]
    assert connected.lost() == []
    assert reconnected(connected, 3.0) == []
    connected.receive(report(asked(connected), max_message_bytes=1 << 30), 3.0)
    assert connected.take_retries(3.0) == [patient]


def test_how_often_the_last_connections_broke_names_the_limit_of_an_answer(connected: Session) -> None:
    (call,) = broken_under(connected, X)
    for _ in range(session.MAX_LOSSES - 1):
        reconnected(connected, 1.0)
        connected.lost()
    with pytest.raises(errors.Unavailable, match=r"an answer with a tensor of more than 268435456 bytes would"):
        call.take()


# --- connections ---------------------------------------------------------------------------------------------


def test_no_connection_is_made_before_there_is_a_call(idle: Session) -> None:
    assert not idle.must_connect(100.0)
    assert idle.next_timer == math.inf
    assert not idle.start(predict(idle))
    assert idle.must_connect(0.0)
    assert idle.next_timer == -math.inf


def test_calls_wait_for_the_connection_and_later_ones_do_not(idle: Session) -> None:
    first, second = started(idle), started(idle)
    idle.connection.connecting(0.0)
    assert not idle.must_connect(100.0)
    assert idle.connected(0.0) == [first, second]
    assert idle.start(predict(idle))


def test_unanswered_calls_go_out_again_on_the_next_connection(connected: Session) -> None:
    answered, pending = started(connected), started(connected)
    connected.receive(result(answered), 0.0)
    assert connected.lost() == []
    assert connected.must_connect(1.0)
    connected.connection.connecting(1.0)
    assert connected.connected(1.0) == [pending]
    connected.receive(result(pending), 0.0)
    assert pending.take().batch_size == 2


def test_attempts_come_at_growing_intervals(idle: Session) -> None:
    started(idle, timeout=1e9)
    now, gaps = 0.0, []
    for _ in range(8):
        assert idle.must_connect(now)
        idle.connection.connecting(now)
        idle.lost()
        gaps.append(idle.next_timer - now)
        assert not idle.must_connect(now)
        now = idle.next_timer
    assert gaps == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0])


def test_the_first_caller_after_a_pause_does_not_wait_for_a_retry(idle: Session) -> None:
    call = started(idle)
    idle.connection.connecting(0.0)
    idle.lost()
    idle.forget(call)
    assert not idle.must_connect(0.0)
    started(idle)
    assert idle.must_connect(0.0)


def test_a_call_under_which_connections_keep_breaking_is_given_up(connected: Session) -> None:
    call = started(connected, timeout=1e9)
    connected.connection.trouble = "it closed the connection"
    for attempt in range(session.MAX_LOSSES - 1):
        assert connected.lost() == []
        connected.connection.connecting(float(attempt))
        assert connected.lost() == []  # never stood, so took nothing with it
        connected.connection.connecting(float(attempt))
        connected.connected(1.0)
    assert connected.lost() == [call]
    with pytest.raises(errors.Unavailable, match="broke 3 times while predict was under way: it closed"):
        call.take()
    assert connected.idle


@pytest.mark.parametrize("verb", CHANGES)
def test_what_changes_the_daemon_is_not_sent_again(connected: Session, verb: str) -> None:
    call, harmless = change(connected, verb), started(connected)
    connected.start(call)
    connected.connection.trouble = "it closed the connection"
    assert connected.lost() == [call]
    with pytest.raises(
        errors.Unavailable, match=f"broke while {verb} was under way: it closed.*whether it has changed .* is not known"
    ):
        call.take()
    connected.connection.connecting(0.0)
    assert connected.connected(0.1) == [harmless]


def test_what_only_asks_is_sent_again(connected: Session) -> None:
    calls = [ask(connected, verb) for verb in ("models", "compare")]
    assert connected.lost() == []
    connected.connection.connecting(0.0)
    assert connected.connected(0.1) == calls


def test_a_change_that_was_put_off_has_changed_nothing_and_is_sent_again(connected: Session) -> None:
    call = change(connected, "load")
    connected.start(call)
    assert connected.receive(put_off(call), 0.5) is None
    assert connected.lost() == [], "the daemon drains, and another takes its place"
    connected.connection.connecting(0.6)
    assert connected.connected(0.7) == [call]
    assert connected.lost() == [call]


def test_a_change_that_was_put_off_and_sent_again_is_under_way(connected: Session) -> None:
    call = change(connected, "load")
    connected.start(call)
    connected.receive(put_off(call), 0.5)
    assert connected.take_retries(0.6) == [call]
    assert connected.lost() == [call]


@pytest.mark.parametrize("verb", CHANGES)
def test_a_change_is_not_withdrawn(connected: Session, verb: str) -> None:
    call = change(connected, verb)
    connected.start(call)
    connected.forget(call)
    assert connected.cancel_message(call) is None


def test_closing_the_own_side_blames_no_call(connected: Session) -> None:
    call = started(connected)
    for _ in range(10):
        assert connected.disconnected() == []
        connected.connection.connecting(0.0)
        assert connected.connected(1.0) == [call]


@pytest.mark.parametrize("verb", CHANGES)
def test_after_closing_the_own_side_no_change_is_sent_again(connected: Session, verb: str) -> None:
    call, harmless = change(connected, verb), started(connected)
    connected.start(call)
    connected.connection.trouble = "an error closed it"
    assert connected.disconnected() == [call]
    with pytest.raises(errors.Unavailable, match=f"while {verb} was under way: an error closed it; whether it has"):
        call.take()
    connected.connection.connecting(0.0)
    assert connected.connected(1.0) == [harmless]


def test_closing_the_own_side_keeps_the_changes_that_have_not_been_carried_out(idle: Session) -> None:
    waiting = change(idle, "load")
    idle.start(waiting)
    idle.connection.connecting(0.0)
    assert idle.disconnected() == [], "it was never sent"
    idle.connection.connecting(0.0)
    assert idle.connected(0.1) == [waiting]
    assert idle.receive(put_off(waiting), 0.2) is None
    assert idle.disconnected() == [], "it was refused"
    idle.connection.connecting(0.2)
    assert idle.connected(0.3) == [waiting]


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


# --- a daemon that says when to ask again --------------------------------------------------------------------


def put_off(call: Call[Any], after_us: float | None = 100_000.0, code: str = "UNAVAILABLE") -> list[bytes]:
    reply = wire.ErrorReply(v=1, id=call.id, code=code, message="the daemon is starting", retry_after_us=after_us)
    return [wire.encode(reply)]


def test_a_call_that_is_put_off_is_sent_again_and_answered(connected: Session) -> None:
    call = started(connected)
    assert connected.receive(put_off(call), 1.0) is None
    assert not call.done
    assert connected.next_timer == pytest.approx(1.1)
    assert connected.take_retries(1.05) == []
    assert connected.take_retries(1.1) == [call]
    assert connected.take_retries(1.2) == []
    assert connected.receive(result(call), 1.3) is call
    assert call.take().device == "cpu"


def test_a_call_that_is_put_off_until_its_time_is_over_fails_with_what_the_daemon_said(connected: Session) -> None:
    call = started(connected, timeout=1.0)
    assert connected.receive(put_off(call), 0.5) is None
    connected.take_retries(0.6)
    assert connected.receive(put_off(call), 0.95) is call  # no time is left for another try
    with pytest.raises(errors.Unavailable, match="the daemon is starting"):
        call.take()
    unanswered = started(connected, timeout=1.0)
    assert connected.receive(put_off(unanswered), 0.5) is None
    assert connected.expire(1.0) == [unanswered]
    with pytest.raises(errors.Unavailable, match="the daemon is starting"):
        unanswered.take()


def test_a_call_that_is_put_off_says_how_much_of_its_deadline_is_left(connected: Session) -> None:
    call = started(connected, deadline=2.0)
    connected.receive(put_off(call), 0.5)
    (again,) = connected.take_retries(0.6)
    assert header(again).deadline_us == pytest.approx(1.4e6)


@pytest.mark.parametrize(("after_us", "code"), [(None, "UNAVAILABLE"), (100_000.0, "RESOURCE_EXHAUSTED")])
def test_other_refusals_are_final(connected: Session, after_us: float | None, code: str) -> None:
    call = started(connected)
    assert connected.receive(put_off(call, after_us, code), 0.5) is call
    assert call.error is not None


def test_what_was_put_off_goes_out_on_a_new_connection_at_once(connected: Session) -> None:
    call = started(connected)
    connected.receive(put_off(call), 0.5)
    connected.lost()
    connected.connection.connecting(0.51)
    assert connected.connected(0.52) == [call]
    assert connected.take_retries(9.0) == []


def test_what_was_put_off_is_not_sent_before_there_is_a_new_connection(connected: Session) -> None:
    """Else it would go out twice: again as soon as the connection stands."""
    call = change(connected, "load")
    connected.start(call)
    connected.receive(put_off(call), 0.5)
    connected.lost()
    assert connected.take_retries(9.0) == []
    connected.connection.connecting(9.0)
    assert connected.take_retries(9.1) == []
    assert connected.connected(9.2) == [call]


@pytest.mark.parametrize(("timeout", "reach"), [(None, 5.0), (60.0, 5.0), (2.0, 1.4)])
def test_a_change_that_was_put_off_does_not_wait_long_for_a_daemon_that_has_gone(
    connected: Session, timeout: float | None, reach: float
) -> None:
    call = change(connected, "load", timeout=timeout)
    connected.start(call)
    assert connected.receive(put_off(call), 0.5) is None
    connected.lost()
    connected.connection.trouble = "nobody listens there"
    assert connected.expire(0.59 + reach) == []
    assert connected.expire(0.61 + reach) == [call]
    within = 5 if reach == 5 else 2
    with pytest.raises(errors.Unavailable, match=rf"got none again within {within} s: nobody listens there"):
        call.take()


def test_a_change_that_was_put_off_until_its_time_is_over_fails_with_what_the_daemon_said(connected: Session) -> None:
    call = change(connected, "load", timeout=3.0)
    connected.start(call)
    assert connected.receive(put_off(call, 1e6), 1.9) is None
    assert connected.expire(2.8) == []
    assert connected.expire(3.0) == [call]
    with pytest.raises(errors.Unavailable, match="the daemon is starting"):
        call.take()


def test_a_change_that_was_put_off_and_then_taken_is_not_refused(connected: Session) -> None:
    call = change(connected, "load")
    connected.start(call)
    connected.receive(put_off(call), 0.5)
    assert connected.take_retries(0.6) == [call]
    assert connected.expire(599.0) == []
    assert connected.expire(600.0) == [call]
    with pytest.raises(errors.DeadlineExceeded, match="did not answer load within 600 s; it may still be at work"):
        call.take()


def test_a_forgotten_call_is_not_sent_again(connected: Session) -> None:
    call = started(connected)
    connected.receive(put_off(call), 0.5)
    connected.forget(call)
    assert connected.take_retries(1.0) == []


# --- windows -------------------------------------------------------------------------------------------------


def refused(call: Call[Any], *, retry_after_us: float | None = 2000.0, code: str = "DEADLINE_EXCEEDED") -> list[bytes]:
    reply = wire.ErrorReply(v=1, id=call.id, code=code, message="it cannot be done", retry_after_us=retry_after_us)
    return [wire.encode(reply)]


def test_who_was_refused_for_want_of_time_lets_fewer_wait(connected: Session) -> None:
    calls = [started(connected, deadline=1.0) for _ in range(20)]
    for call in calls[10:]:
        connected.receive(refused(call), 0.0)
    outcomes = []
    for _ in range(20):
        call = predict(connected, deadline=1.0)
        connected.start(call)
        outcomes.append(call.error)
    assert outcomes[-1] is not None
    assert isinstance(outcomes[-1], errors.DeadlineExceeded)
    assert "not sent" in str(outcomes[-1])
    assert "it cannot be done" in str(outcomes[-1])
    assert outcomes[-1].retry_after_s == 0.002
    for call in calls[:10]:
        connected.receive(result(call), 0.0)
    started(connected, deadline=1.0)


def test_one_late_answer_holds_no_handful_of_callers_back(connected: Session) -> None:
    calls = [started(connected, deadline=1.0) for _ in range(8)]
    connected.receive(refused(calls[0]), 0.0)
    started(connected, deadline=1.0)


@pytest.mark.parametrize("arguments", [{}, {"deadline": 0.01}, {"deadline": 1.0, "priority": 0}])
def test_what_is_not_like_those_that_were_refused_is_sent(connected: Session, arguments: dict[str, Any]) -> None:
    calls = [started(connected, deadline=1.0) for _ in range(20)]
    for call in calls[2:]:
        connected.receive(refused(call), 0.0)
    for _ in range(100):
        started(connected, **arguments)


@pytest.mark.parametrize(
    "reply",
    [{"retry_after_us": None}, {"code": "INVALID_ARGUMENT"}, {"code": "UNAVAILABLE", "retry_after_us": None}],
)
def test_a_refusal_that_is_not_for_want_of_time_holds_up_nobody(connected: Session, reply: dict[str, Any]) -> None:
    for _ in range(20):
        connected.receive(refused(started(connected, deadline=1.0), **reply), 0.0)
    for _ in range(100):
        started(connected, deadline=1.0)


def test_calls_that_end_otherwise_leave_the_window(connected: Session) -> None:
    for _ in range(50):
        first, second = started(connected, deadline=1.0), started(connected, deadline=1.0)
        connected.receive(refused(first), 0.0)
        connected.forget(second)
    for at in range(1, 50):
        call = started(connected, deadline=1.0, now=2.0 * at)
        connected.expire(call.expires)
    started(connected, deadline=1.0, now=101.0)
