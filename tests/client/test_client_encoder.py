"""The encoder of the client: arguments in, request headers and the arrays of the caller out."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
import numpy as np
import pytest

from sessions import (
    ENDPOINT,
    X,
    connected_session,
    header,
    new_session,
    predict,
)
from tnxctl.protocol import errors, wire
from tnxctl.protocol.wire import Limits
from tnxctl.session import Session


@pytest.fixture
def idle() -> Session:
    return new_session()


@pytest.fixture
def connected() -> Session:
    return connected_session()


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


def test_defaults_are_not_sent(idle: Session) -> None:
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
def test_bad_model_titles_are_refused(idle: Session, verb: str, title: Any) -> None:
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
