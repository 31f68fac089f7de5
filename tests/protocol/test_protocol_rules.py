"""Rules of docs/protocol.md beside its tables, held against a daemon: names, types, keys, cancels, retries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from test_protocol_page import bare, section, tables

from conftest import Daemon, serving_daemon
from dealer import Dealer, rows
from tnxctl.protocol import wire

ODD = (str(Path(__file__).parents[1] / "odd_models.py"),)

pack = msgspec.msgpack.encode


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a model of two inputs."""
    log = tmp_path_factory.mktemp("odd") / "log"
    with serving_daemon(log, "--model", "twice", "--model", "odd", program=ODD) as running:
        yield running


@pytest.fixture
def dealer(odd: Daemon) -> Iterator[Dealer]:
    with Dealer(odd.endpoint) as made:
        yield made


def asked(dealer: Dealer, entries: dict[str, Any] | list[tuple[str, Any]], *frames: bytes) -> wire.Reply:
    """The answer to a header of these entries, of which keys may be the same."""
    entries = list(entries.items()) if isinstance(entries, dict) else entries
    header = bytes([0x80 | len(entries)]) + b"".join(pack(key) + pack(value) for key, value in entries)
    dealer.socket.send_multipart([header, *frames])
    return dealer.receive()[0]


def error(reply: wire.Reply) -> wire.ErrorReply:
    assert isinstance(reply, wire.ErrorReply), reply
    return reply


def predict(**fields: Any) -> dict[str, Any]:
    return {"v": 1, "type": "predict", "id": 1, "inputs": [["x", "FP32", [1, 4]]], "model": "odd", **fields}


X = bytes(16)


# --- names of models ---------------------------------------------------------------------------------------------


def test_the_grammar_on_the_page() -> None:
    (grammar,) = tables(section("Names of models"))
    expressions = {bare(what): bare(expression) for what, expression in grammar}
    assert expressions["NAME"] == wire.MODEL_NAME.pattern
    assert expressions["VERSION"] == wire.MODEL_VERSION.pattern


@pytest.mark.parametrize(
    ("model", "code"),
    [
        *(
            (name, "INVALID_ARGUMENT")
            for name in ("lin@", "a b@x", "../etc", "@1", "a@b@1", "a@01", "a@x", "é", "x" * 65)
        ),
        *((name, "NOT_FOUND") for name in ("lin", "odd@2", "x" * 64, "a.b_c-d@999999999999999999")),
    ],
)
def test_a_name_that_can_be_none_and_one_that_is_none(dealer: Dealer, model: str, code: str) -> None:
    """Whatever asks for it."""
    assert error(asked(dealer, predict(model=model), X)).code == code
    for type_, fields in (("metadata", {}), ("load", {}), ("unload", {})):
        assert error(asked(dealer, {"v": 1, "type": type_, "id": 1, "model": model, **fields})).code == code
    if "@" not in model:
        for fields in ({"type": "route"}, {"type": "compare", "baseline": "1", "candidate": "2"}):
            assert error(asked(dealer, {"v": 1, "id": 1, "model": model, **fields})).code == code


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"type": "route", "model": "odd@1"}, "INVALID_ARGUMENT"),
        ({"type": "route", "model": "odd", "weights": {"x": 1.0}}, "INVALID_ARGUMENT"),
        ({"type": "route", "model": "odd", "weights": {"7": 1.0}}, "NOT_FOUND"),
        ({"type": "route", "model": "odd", "shadow": "01"}, "INVALID_ARGUMENT"),
        ({"type": "compare", "model": "odd@1", "baseline": "1", "candidate": "2"}, "INVALID_ARGUMENT"),
        ({"type": "compare", "model": "odd", "baseline": "1", "candidate": "2.0"}, "INVALID_ARGUMENT"),
        ({"type": "compare", "model": "odd", "baseline": "1", "candidate": "2"}, "NOT_FOUND"),
    ],
)
def test_a_version_by_itself_follows_the_same_rule(dealer: Dealer, fields: dict[str, Any], code: str) -> None:
    assert error(asked(dealer, {"v": 1, "id": 1, **fields})).code == code


# --- types and keys ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "taken"),
    [
        ("model", None, False),
        ("prefer_gpu", None, False),
        ("prefer_gpu", 1, False),
        ("min_gpu_memory_mb", None, False),
        ("min_gpu_memory_mb", 0, True),
        ("max_reply_bytes", 1e6, False),
        ("priority", 1.0, False),
        ("priority", None, True),
        ("deadline_us", None, True),
        ("deadline_us", 60_000_000, True),
        ("id", 1.0, False),
        ("inputs", [["x", "FP32", [1.0, 4]]], False),
    ],
)
def test_nothing_stands_in_for_another_type(dealer: Dealer, field: str, value: Any, taken: bool) -> None:
    reply = asked(dealer, predict(**{field: value}), X)
    if taken:
        assert isinstance(reply, wire.Result), reply
    else:
        assert error(reply).code == "INVALID_ARGUMENT"


def test_of_a_key_that_comes_twice_the_last_one_counts(dealer: Dealer) -> None:
    reply = asked(dealer, [*predict(id=7, model="nosuch").items(), ("model", "odd"), ("id", 8)], X)
    assert isinstance(reply, wire.Result), reply
    assert (reply.id, reply.model) == (8, "odd")
    assert isinstance(asked(dealer, [*predict().items(), ("type", "predict")], X), wire.Result)
    assert error(asked(dealer, [*predict().items(), ("type", "health")], X)).code == "UNIMPLEMENTED"
    assert error(asked(dealer, [("type", "health"), *predict().items()], X)).code == "UNIMPLEMENTED"


def test_inputs_are_found_by_name_and_outputs_come_in_the_models_order(dealer: Dealer) -> None:
    ids, mask = np.array([[3, 4]], np.int64), np.array([[1, 0]], np.int64)
    answers = []
    for names in (("ids", "mask"), ("mask", "ids")):
        dealer.predict(*[{"ids": ids, "mask": mask}[name] for name in names], names=names, model="twice")
        result, outputs = dealer.result()
        assert [spec.name for spec in result.outputs] == ["total", "any", "half"]
        answers.append([output.tolist() for output in outputs])
    assert answers[0] == answers[1]
    assert answers[0][0] == [3]
    for names in (("ids", "ids"), ("ids", "other"), ("ids",), ("ids", "")):
        dealer.predict(*[ids] * len(names), names=names, model="twice")
        assert dealer.error().code == "INVALID_ARGUMENT"


# --- cancels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "frames", "code"),
    [
        ({"v": 2}, (), "UNIMPLEMENTED"),
        ({"v": "1"}, (), "INVALID_ARGUMENT"),
        ({"v": 2, "more": "x" * 2000}, (), "UNIMPLEMENTED"),
        ({}, (b"x",), "INVALID_ARGUMENT"),
        ({}, (b"x",) * 100, "INVALID_ARGUMENT"),
        ({"id": "5"}, (), "INVALID_ARGUMENT"),
        ({"id": None}, (), "INVALID_ARGUMENT"),
    ],
)
def test_a_malformed_cancel_is_not_taken_for_the_answer(
    dealer: Dealer, changes: dict[str, Any], frames: tuple[bytes, ...], code: str
) -> None:
    """The request that it names gets exactly one answer, its own."""
    dealer.predict(rows(1, 4), model="odd", id=5)
    dealer.socket.send_multipart([pack({"type": "cancel", "id": 5, "v": 1, **changes}), *frames])
    replies = [dealer.receive()[0] for _ in range(2)]
    (refused,) = [reply for reply in replies if isinstance(reply, wire.ErrorReply)]
    (answered,) = [reply for reply in replies if isinstance(reply, wire.Result)]
    assert (refused.id, refused.code) == (None, code)
    assert answered.id == 5
    assert dealer.health().id == wire.MAX_ID  # and nothing more comes


# --- times to come back ------------------------------------------------------------------------------------------


def test_errors_that_never_say_when_to_come_back(dealer: Dealer) -> None:
    """Those that the page says so of, as far as a client brings them about; others have tests where they arise."""
    (codes,) = tables(section("Errors"))
    never = {bare(code) for code, *_, retry in codes if retry == "never"}
    assert {bare(code) for code, *_ in codes} - never == {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
    replies = [
        asked(dealer, predict(model="nosuch"), X),
        asked(dealer, predict(inputs=[])),
        asked(dealer, predict(v=2), X),
        asked(dealer, predict(inputs=[["x", "FP32", [1, 4]]]), np.array([1, 0, 0, 0], np.float32).tobytes()),
        asked(dealer, {"v": 1, "type": "compare", "id": 1, "model": "odd", "baseline": "1", "candidate": "1"}),
    ]
    assert {error(reply).code for reply in replies} == {
        *("NOT_FOUND", "INVALID_ARGUMENT", "UNIMPLEMENTED", "INTERNAL", "FAILED_PRECONDITION")
    }
    assert {error(reply).code for reply in replies} <= never
    assert {error(reply).retry_after_us for reply in replies} == {None}


def test_a_deadline_that_nothing_could_meet_has_no_time_to_come_back(dealer: Dealer) -> None:
    late = error(asked(dealer, predict(deadline_us=0.001), X))
    assert (late.code, late.retry_after_us) == ("DEADLINE_EXCEEDED", None)
