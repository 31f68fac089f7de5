"""Requests for pipelines in the serving loop, over devices that delay, fail, hang and are lost on command."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from daemons import Running, running
from dealer import Dealer
from model_repositories import SAYS_TOML, Repository, put
from obedient_devices import ANSWER, FAIL, HOLD, RELEASE, VANISH
from tnxctl.protocol import wire
from tnxctl.protocol.datatypes import Array

PROGRAM = str(Path(__file__).parents[1] / "obedient_devices.py")

LINE = """
inputs = ["a", "b", "c"]
steps = [
    { name = "first", model = "net", inputs = { x = "a" } },
    { name = "second", model = "pair", inputs = { x = "b", after = "first.y" } },
    { name = "third", model = "pair", inputs = { x = "c", after = "second.y" } },
]
outputs = { y = "third.y" }
"""
"""Each step is told what to do by an input of the pipeline, and waits for the one before it."""

FORK = """
inputs = ["a", "b", "c"]
steps = [
    { name = "left", model = "net", inputs = { x = "a" } },
    { name = "right", model = "other", inputs = { x = "b" } },
    { name = "join", model = "pair", inputs = { x = "c", after = "left.y" } },
]
outputs = { y = "join.y", right = "right.y" }
"""

PAIR = SAYS_TOML.replace("inputs = [", 'inputs = [{ name = "x", datatype = "FP32", shape = [-1, 2] }, ').replace(
    '{ name = "x", datatype = "FP32", shape = [-1, 2] }]', '{ name = "after", datatype = "FP32", shape = [-1, 2] }]'
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("net", "other", "pair"):
        put(root, name, 1)
    repository = Repository(root)
    repository.settings("pair", PAIR)
    repository.publish("line", 1, {"pipeline.toml": LINE.encode()})
    repository.publish("fork", 1, {"pipeline.toml": FORK.encode()})
    return root


@contextmanager
def started(folder: Path, models: Path, lanes: int, config: str = "") -> Iterator[tuple[Running, Dealer]]:
    """A daemon with so many lanes for each of its two devices, ready and with one connection."""
    arguments = ("--model-repository", str(models))
    with (
        running(folder, *arguments, program=(PROGRAM, str(lanes)), config=config) as daemon,
        Dealer(daemon.endpoint) as dealer,
    ):
        dealer.await_health(status="ready")
        yield daemon, dealer


@pytest.fixture(scope="module")
def one_lane(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Running]:
    """A daemon with one lane for each device, for tests that leave nothing behind."""
    with started(tmp_path_factory.mktemp("one"), models, 1) as (daemon, _):
        yield daemon
        assert daemon.stop() == 0


@pytest.fixture(scope="module")
def two_lanes(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Running]:
    """The same with two lanes."""
    with started(tmp_path_factory.mktemp("two"), models, 2) as (daemon, _):
        yield daemon
        assert daemon.stop() == 0


@pytest.fixture
def one(one_lane: Running) -> Iterator[Dealer]:
    """A connection to the first."""
    with Dealer(one_lane.endpoint) as dealer:
        yield dealer


@pytest.fixture
def two(two_lanes: Running) -> Iterator[Dealer]:
    """A connection to the second."""
    with Dealer(two_lanes.endpoint) as dealer:
        yield dealer


def rows(command: int, count: int = 1) -> Array:
    return np.full((count, 2), command, np.float32)


def ask(dealer: Dealer, command: int, device: str = "cuda:0") -> int:
    """Send a request to `net` itself."""
    return dealer.predict(rows(command), model="net", device=device)


def line(dealer: Dealer, *commands: int, **options: object) -> int:
    """Send a request to `line`: what its steps are to do, ANSWER for those that nothing is said about."""
    told = [rows(command) for command in (*commands, ANSWER, ANSWER, ANSWER)[:3]]
    return dealer.predict(*told, names=("a", "b", "c"), model="line", **options)


def fork(dealer: Dealer, left: int, right: int, **options: object) -> int:
    return dealer.predict(rows(left), rows(right), rows(ANSWER), names=("a", "b", "c"), model="fork", **options)


def taken(dealer: Dealer) -> dict[str, int]:
    """Requests that were taken in, by model."""
    return {info.name: info.requests for info in dealer.health().models}


def taken_since(dealer: Dealer, before: dict[str, int]) -> dict[str, int]:
    """Those that came after that, of models that had some."""
    return {name: count - before[name] for name, count in taken(dealer).items() if count > before[name]}


def released(dealer: Dealer, number: int) -> tuple[wire.Result, tuple[Array, ...]]:
    """Let a request go on, and return its result. The answer to what lets it go on may come before or after that."""
    ask(dealer, RELEASE, device="cpu")
    results = [dealer.result() for _ in range(2)]
    return next(result for result in results if result[0].id == number)


def test_steps_run_one_after_the_other_and_are_told_apart_in_the_reply(one: Dealer) -> None:
    before = taken(one)
    number = line(one, HOLD)
    one.await_health(running=1)
    reply, (y,) = released(one, number)
    assert (reply.id, reply.model, reply.version, reply.device) == (number, "line", "1", "cuda:0")
    np.testing.assert_array_equal(y, rows(ANSWER))
    steps = reply.steps or ()
    assert [(step.name, f"{step.model}@{step.version}", step.batch_size) for step in steps] == [
        ("first", "net@1", 1),
        ("second", "pair@1", 1),
        ("third", "pair@1", 1),
    ]
    for earlier, later in pairwise(steps):  # each begins when the one before it is done
        done_us = earlier.start_us + earlier.queue_us + earlier.gather_us + earlier.compute_us
        assert later.start_us >= done_us - 1
    timing = reply.timing
    stages = [getattr(timing, name) for name in timing.__struct_fields__ if name != "total_us"]
    assert sum(stages) == pytest.approx(timing.total_us)
    assert timing.compute_us == pytest.approx(sum(step.compute_us for step in steps))
    assert taken_since(one, before) == {"line": 1, "net": 2, "pair": 2}


def test_branches_run_at_the_same_time(two: Dealer) -> None:
    number = fork(two, HOLD, HOLD)
    two.await_health(running=2)
    reply, (y, right) = released(two, number)
    np.testing.assert_array_equal(y, rows(ANSWER))
    np.testing.assert_array_equal(right, rows(HOLD))
    assert [step.name for step in reply.steps or ()] == ["left", "right", "join"]


def test_a_step_shares_its_batch_with_other_pipelines_and_with_requests_to_its_model(one: Dealer) -> None:
    held = ask(one, HOLD)
    one.await_health(running=1)
    sent = [line(one), fork(one, ANSWER, ANSWER), ask(one, ANSWER)]
    one.await_health(queued=4)  # the branches of the second wait both
    released = ask(one, RELEASE, device="cpu")
    replies = {reply.id: reply for reply, _ in (one.result() for _ in range(5))}
    assert replies.keys() == {held, released, *sent}
    first, left = ((replies[number].steps or ())[0] for number in sent[:2])
    assert (first.batch_size, left.batch_size, replies[sent[2]].batch_size) == (3, 3, 3)


def test_a_step_that_fails_fails_its_request_alone(one: Dealer) -> None:
    held = ask(one, HOLD)
    one.await_health(running=1)
    bad, good = line(one, FAIL), line(one)
    later = line(one, ANSWER, ANSWER, FAIL)
    one.await_health(queued=3)
    released = ask(one, RELEASE, device="cpu")
    replies = {reply.id: reply for reply, _ in (one.receive() for _ in range(5))}
    for number, name in ((bad, "first"), (later, "third")):
        error = replies[number]
        assert isinstance(error, wire.ErrorReply)
        assert (error.code, error.message) == ("INTERNAL", f"step '{name}': the model raised, as it was told")
    assert all(isinstance(replies[number], wire.Result) for number in (held, released, good))


def test_nothing_of_a_request_goes_on_once_one_of_its_branches_has_failed(two: Dealer) -> None:
    before = taken(two)
    held = ask(two, HOLD)
    two.await_health(running=1)
    bad = fork(two, ANSWER, FAIL)
    error = two.error()
    assert (error.id, error.message) == (bad, "step 'right': the model raised, as it was told")
    ask(two, RELEASE)
    assert held in {two.result()[0].id for _ in range(2)}
    two.await_health(running=0)
    assert taken_since(two, before) == {"fork": 1, "net": 3, "other": 1}
    line(two)
    two.result()


def test_a_request_may_be_withdrawn_while_it_waits(one: Dealer) -> None:
    held = ask(one, HOLD)
    one.await_health(running=1)
    waits = fork(one, ANSWER, ANSWER)
    one.await_health(queued=2)
    withdraw(one, waits)
    assert one.health().queued == 0
    ask(one, RELEASE, device="cpu")
    assert {one.result()[0].id for _ in range(2)} >= {held}
    one.socket.send(wire.encode(wire.Cancel(v=1, id=waits)))  # which is over
    line(one)
    one.result()


def withdraw(dealer: Dealer, number: int) -> None:
    dealer.socket.send(wire.encode(wire.Cancel(v=1, id=number)))
    error = dealer.error()
    assert (error.id, error.code) == (number, "CANCELLED")


def test_what_runs_of_a_request_that_is_withdrawn_is_dropped(one: Dealer) -> None:
    before = taken(one)
    number = line(one, HOLD)
    one.await_health(running=1)
    withdraw(one, number)
    ask(one, RELEASE, device="cpu")
    one.result()
    one.await_health(running=0)
    assert taken_since(one, before) == {"line": 1, "net": 2}


def test_what_a_client_leaves_behind_is_taken_out(one_lane: Running, one: Dealer) -> None:
    abandoned = one.health().abandoned
    ask(one, HOLD)
    one.await_health(running=1)
    with Dealer(one_lane.endpoint) as other:
        fork(other, ANSWER, ANSWER)
        line(other)
        one.await_health(queued=3)
    assert one.await_health(queued=0).abandoned == abandoned + 2
    ask(one, RELEASE, device="cpu")
    for _ in range(2):
        one.result()


def test_a_step_that_leaves_too_little_time_for_the_next_ends_the_request(one: Dealer) -> None:
    before = taken(one)
    number = line(one, HOLD, deadline_us=5e6)  # far more than until it begins
    error = one.error()
    assert (error.id, error.code) == (number, "DEADLINE_EXCEEDED")
    assert error.message == "step 'first': too little time is left, 5000 ms were allowed for the whole"
    ask(one, RELEASE, device="cpu")
    one.result()
    one.await_health(running=0)
    assert taken_since(one, before) == {"line": 1, "net": 2}


def test_what_is_under_way_keeps_the_versions_of_its_steps(one: Dealer) -> None:
    whole = line(one, HOLD)
    one.await_health(running=1)
    one.socket.send(wire.encode(wire.Unload(v=1, id=1000, model="pair")))
    refused = line(one)
    error = one.error()
    assert (error.id, error.code) == (refused, "FAILED_PRECONDITION")
    assert error.message == "step 'second': model 'pair@1' is draining; tnxctl models load pair@1"
    ask(one, RELEASE, device="cpu")
    replies = [one.receive()[0] for _ in range(3)]
    assert whole in {reply.id for reply in replies if isinstance(reply, wire.Result)}
    (report,) = (reply for reply in replies if isinstance(reply, wire.ModelsReport))
    assert [(info.name, info.status) for info in report.models] == [("pair", "unloaded")]
    states = {info.name: (info.status, info.error) for info in one.health().models}
    assert states["line"][0] == states["fork"][0] == "failed"
    assert states["line"][1].startswith("line/1/pipeline.toml: steps[1].model: model 'pair@1' is unloaded")
    one.socket.send(wire.encode(wire.Load(v=1, id=1001, model="pair")))
    assert isinstance(one.receive()[0], wire.ModelsReport)
    line(one)
    one.result()
    assert {info.status for info in one.health().models} == {"ready"}


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"device": "cuda:7"}, "INVALID_ARGUMENT", "step 'first': device 'cuda:7': there are cuda:0, cpu, and auto"),
        ({"max_reply_bytes": 3}, "INVALID_ARGUMENT", "the answer takes 8 bytes, more than the 3"),
        ({"model": "line@2"}, "NOT_FOUND", "model 'line' has no version '2'"),
    ],
)
def test_requests_that_are_refused(one: Dealer, options: dict[str, object], code: str, said: str) -> None:
    one.predict(*[rows(ANSWER)] * 3, names=("a", "b", "c"), **{"model": "line", **options})
    error = one.error()
    assert error.code == code
    assert said in error.message


def test_inputs_that_do_not_fit(one: Dealer) -> None:
    one.predict(*[rows(ANSWER)] * 2, names=("a", "b"), model="line")
    assert "needs the input 'c'" in one.error().message
    one.predict(rows(ANSWER), rows(ANSWER, 2), rows(ANSWER), names=("a", "b", "c"), model="line")
    assert "has 2 rows, the inputs before it have 1" in one.error().message


# --- what is asked on arrival --------------------------------------------------------------------------------


def test_the_deadline_and_the_limits_count_the_whole_once(tmp_path: Path, models: Path) -> None:
    config = "[queue]\nmax_requests = 1\n[clients]\nmax_requests = 2\n"
    with started(tmp_path, models, 1, config) as (_, dealer):
        # Each step is known to take 10 ms from warm-up, give or take 10, and within 46 any of them could be done.
        line(dealer, deadline_us=46e3)
        error = dealer.error()
        assert error.code == "DEADLINE_EXCEEDED"
        assert "its 3 steps cannot be done within its deadline" in error.message
        assert "predicted are 30 ms, with a margin of 17.3 ms" in error.message
        assert taken(dealer)["net"] == 0  # nothing of it was begun
        line(dealer, deadline_us=60e6)
        assert dealer.result()[0].predicted_us == pytest.approx(30_000)

        # Two branches at a time, where one request may wait, of a client that may have two in flight.
        held = fork(dealer, HOLD, ANSWER)
        dealer.await_health(queued=1, running=1)
        refused = line(dealer)
        error = dealer.error()
        assert (error.id, error.code) == (refused, "RESOURCE_EXHAUSTED")
        assert "1 requests are queued, which is the limit" in error.message
        withdraw(dealer, held)


# --- what goes wrong -----------------------------------------------------------------------------------------


def test_hanging_steps_and_the_end_of_a_drain_answer_each_request_once(tmp_path: Path, models: Path) -> None:
    shutil.copytree(models, tmp_path / "models")
    Repository(tmp_path / "models").settings("other", f"{SAYS_TOML}time_limit_s = 60.0\n")
    with started(tmp_path, tmp_path / "models", 2, "drain_timeout_s = 0.1\n") as (daemon, dealer):
        number = fork(dealer, ANSWER, VANISH)
        error = dealer.error()
        assert (error.id, error.code) == (number, "INTERNAL")
        assert error.message.startswith("step 'right': model 'other@1' ran for over 60 s")
        line(dealer)
        dealer.result()

        # On two lanes of the CPU and the one that is left of the other device.
        sent = {line(dealer, HOLD, device="cpu"), line(dealer, HOLD, device="cpu", priority=0), line(dealer, HOLD)}
        sent.add(fork(dealer, ANSWER, ANSWER, device="cpu"))
        daemon.process.send_signal(signal.SIGTERM)
        errors = [reply for reply in (dealer.receive()[0] for _ in sent) if isinstance(reply, wire.ErrorReply)]
        assert {error.id for error in errors} <= sent
        assert len(errors) >= 3
        assert {error.code for error in errors} == {"UNAVAILABLE"}
        assert daemon.process.wait(60) == 0
        assert not dealer.socket.poll(0)
