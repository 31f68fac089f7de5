"""Requests for pipelines in the serving loop, over devices that delay, fail, hang and are lost on command."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from dealer import Dealer
from faults.daemons import Running, running
from model_repositories import SAYS_TOML, Repository, put
from obedient_devices import ANSWER, FAIL, HOLD, RELEASE, VANISH
from tnxctl.protocol import wire
from tnxctl.protocol.frames import Array

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
inputs = ["a", "b"]
steps = [
    { name = "left", model = "net", inputs = { x = "a" } },
    { name = "right", model = "other", inputs = { x = "b" } },
    { name = "join", model = "pair", inputs = { x = "left.y", after = "right.y" } },
]
outputs = { y = "join.y", right = "right.y" }
"""

PAIR = SAYS_TOML.replace("inputs = [", 'inputs = [{ name = "x", datatype = "FP32", shape = [-1, 2] }, ').replace(
    '{ name = "x", datatype = "FP32", shape = [-1, 2] }]', '{ name = "after", datatype = "FP32", shape = [-1, 2] }]'
)

Start = Callable[..., tuple[Running, Dealer]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a daemon with so many lanes for each of its two devices, ready and with one connection."""
    models = tmp_path / "models"
    for name in ("net", "other", "pair"):
        put(models, name, 1)
    repository = Repository(models)
    repository.settings("pair", PAIR)
    repository.publish("line", 1, {"pipeline.toml": LINE.encode()})
    repository.publish("fork", 1, {"pipeline.toml": FORK.encode()})
    with ExitStack() as stack:

        def started(lanes: int = 1, config: str = "") -> tuple[Running, Dealer]:
            program = (PROGRAM, str(lanes))
            arguments = ("--model-repository", str(models))
            daemon = stack.enter_context(running(tmp_path, *arguments, program=program, config=config))
            dealer = stack.enter_context(Dealer(daemon.endpoint))
            dealer.await_health(status="ready")
            return daemon, dealer

        yield started


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
    return dealer.predict(rows(left), rows(right), names=("a", "b"), model="fork", **options)


def traffic(dealer: Dealer) -> dict[str, int]:
    """Requests that were taken in, by model."""
    return {info.name: info.requests for info in dealer.health().models}


def test_steps_run_one_after_the_other_and_are_told_apart_in_the_reply(start: Start) -> None:
    _, dealer = start()
    number = line(dealer, HOLD, RELEASE)
    dealer.await_health(running=1)
    ask(dealer, RELEASE, device="cpu")
    dealer.result()
    reply, (y,) = dealer.result()
    assert (reply.id, reply.model, reply.version, reply.device) == (number, "line", "1", "cuda:0")
    np.testing.assert_array_equal(y, rows(ANSWER))
    steps = reply.steps or ()
    assert [(step.name, f"{step.model}@{step.version}", step.batch_size) for step in steps] == [
        ("first", "net@1", 1),
        ("second", "pair@1", 1),
        ("third", "pair@1", 1),
    ]
    starts = [step.start_us for step in steps]
    assert starts == sorted(starts)
    for before, after in zip(steps, steps[1:], strict=False):  # each begins when the one before it is done
        done_us = before.start_us + before.queue_us + before.gather_us + before.compute_us
        assert after.start_us >= done_us - 1
    timing = reply.timing
    stages = [getattr(timing, name) for name in timing.__struct_fields__ if name != "total_us"]
    assert sum(stages) == pytest.approx(timing.total_us)
    assert timing.compute_us == pytest.approx(sum(step.compute_us for step in steps))
    assert reply.predicted_us == pytest.approx(30_000)  # three times what warm-up told
    assert traffic(dealer) == {"line": 1, "fork": 0, "net": 2, "other": 0, "pair": 2}


def test_branches_run_at_the_same_time(start: Start) -> None:
    _, dealer = start(lanes=2)
    fork(dealer, HOLD, RELEASE)  # one by one, they would wait for ever
    reply, (y, right) = dealer.result()
    np.testing.assert_array_equal(y, rows(HOLD))
    np.testing.assert_array_equal(right, rows(RELEASE))
    assert [step.name for step in reply.steps or ()] == ["left", "right", "join"]


def test_a_step_shares_its_batch_with_other_pipelines_and_with_requests_to_its_model(start: Start) -> None:
    _, dealer = start()
    held = ask(dealer, HOLD)
    dealer.await_health(running=1)
    sent = [line(dealer), fork(dealer, ANSWER, ANSWER), ask(dealer, ANSWER)]
    dealer.await_health(queued=4)  # the branches of the second wait both
    released = ask(dealer, RELEASE, device="cpu")
    replies = {reply.id: reply for reply, _ in (dealer.result() for _ in range(5))}
    assert replies.keys() == {held, released, *sent}
    first, left = ((replies[number].steps or ())[0] for number in sent[:2])
    assert (first.batch_size, left.batch_size, replies[sent[2]].batch_size) == (3, 3, 3)


def test_a_step_that_fails_fails_its_request_alone(start: Start) -> None:
    _, dealer = start()
    held = ask(dealer, HOLD)
    dealer.await_health(running=1)
    bad, good = line(dealer, FAIL), line(dealer)
    later = line(dealer, ANSWER, ANSWER, FAIL)
    dealer.await_health(queued=3)
    released = ask(dealer, RELEASE, device="cpu")
    replies = {reply.id: reply for reply, _ in (dealer.receive() for _ in range(5))}
    for number, name in ((bad, "first"), (later, "third")):
        error = replies[number]
        assert isinstance(error, wire.ErrorReply)
        assert (error.code, error.message) == ("INTERNAL", f"step '{name}': the model raised, as it was told")
    assert all(isinstance(replies[number], wire.Result) for number in (held, released, good))


def test_nothing_of_a_request_goes_on_once_one_of_its_branches_has_failed(start: Start) -> None:
    _, dealer = start(lanes=2)
    bad = fork(dealer, HOLD, FAIL)
    error = dealer.error()
    assert (error.id, error.message) == (bad, "step 'right': the model raised, as it was told")
    ask(dealer, RELEASE)
    dealer.result()
    dealer.await_health(running=0)
    assert traffic(dealer)["pair"] == 0
    line(dealer)
    dealer.result()


def test_a_request_may_be_withdrawn_at_any_step(start: Start) -> None:
    _, dealer = start()
    held = ask(dealer, HOLD)
    dealer.await_health(running=1)
    waits = fork(dealer, ANSWER, ANSWER)
    dealer.await_health(queued=2)
    dealer.socket.send(wire.encode(wire.Cancel(v=1, id=waits)))
    error = dealer.error()
    assert (error.id, error.code) == (waits, "CANCELLED")
    assert dealer.health().queued == 0
    ask(dealer, RELEASE, device="cpu")
    assert {dealer.result()[0].id for _ in range(2)} >= {held}
    dealer.socket.send(wire.encode(wire.Cancel(v=1, id=waits)))  # which is over
    line(dealer)
    dealer.result()


def test_what_runs_of_a_request_that_is_withdrawn_is_dropped(start: Start) -> None:
    _, dealer = start()
    number = line(dealer, HOLD)
    dealer.await_health(running=1)
    dealer.socket.send(wire.encode(wire.Cancel(v=1, id=number)))
    assert dealer.error().code == "CANCELLED"
    ask(dealer, RELEASE, device="cpu")
    dealer.result()
    dealer.await_health(running=0)
    assert traffic(dealer)["pair"] == 0


def test_what_a_client_leaves_behind_is_taken_out(start: Start) -> None:
    daemon, dealer = start()
    ask(dealer, HOLD)
    dealer.await_health(running=1)
    with Dealer(daemon.endpoint) as other:
        fork(other, ANSWER, ANSWER)
        line(other)
        dealer.await_health(queued=3)
    report = dealer.await_health(queued=0)
    assert report.abandoned == 2
    ask(dealer, RELEASE, device="cpu")
    for _ in range(2):
        dealer.result()


def test_a_deadline_is_one_for_all_steps(start: Start) -> None:
    _, dealer = start()
    # Each step is known to take 10 ms, and within 25 any of them could be done.
    line(dealer, deadline_us=25e3, device="cpu")
    error = dealer.error()
    assert error.code == "DEADLINE_EXCEEDED"
    assert "its 3 steps cannot be done within its deadline" in error.message
    assert "predicted are 30 ms" in error.message
    dealer.predict(rows(ANSWER), model="net", deadline_us=25e3, device="cpu")
    dealer.result()
    assert traffic(dealer)["net"] == 1  # nothing of the other was begun


def test_a_step_that_leaves_too_little_time_for_the_next_ends_the_request(start: Start) -> None:
    _, dealer = start()
    number = line(dealer, HOLD, deadline_us=300e3)
    error = dealer.error()
    assert (error.id, error.code) == (number, "DEADLINE_EXCEEDED")
    assert error.message == "step 'first': too little time is left, 300 ms were allowed for the whole"
    ask(dealer, RELEASE, device="cpu")
    dealer.result()
    dealer.await_health(running=0)
    assert traffic(dealer)["pair"] == 0


def test_the_limits_of_the_queue_are_asked_once(start: Start) -> None:
    _, dealer = start(config="[queue]\nmax_requests = 1\n")
    whole = line(dealer, HOLD)
    dealer.await_health(running=1)
    waits = ask(dealer, ANSWER)
    dealer.await_health(queued=1)
    line(dealer)
    error = dealer.error()
    assert (error.code, "1 requests are queued" in error.message) == ("RESOURCE_EXHAUSTED", True)
    ask(dealer, RELEASE, device="cpu")
    refused = dealer.error()  # the queue is full for all devices
    assert refused.code == "RESOURCE_EXHAUSTED"
    dealer.socket.send(wire.encode(wire.Cancel(v=1, id=waits)))
    assert dealer.error().code == "CANCELLED"
    ask(dealer, RELEASE, device="cpu")
    waits = ask(dealer, ANSWER)
    # Whichever comes first: the second step finds a place behind it.
    assert whole in {dealer.result()[0].id for _ in range(3)}


def test_the_limits_of_a_client_count_the_whole_once(start: Start) -> None:
    _, dealer = start(config="[clients]\nmax_requests = 2\n")
    fork(dealer, HOLD, ANSWER)
    dealer.await_health(queued=1, running=1)
    ask(dealer, RELEASE, device="cpu")
    for _ in range(2):
        dealer.result()


def test_a_step_that_hangs_costs_its_request(start: Start) -> None:
    daemon, dealer = start(lanes=2, config="stall_timeout_s = 0.2")
    number = line(dealer, ANSWER, VANISH)
    error = dealer.error()
    assert (error.id, error.code) == (number, "INTERNAL")
    assert error.message.startswith("step 'second': model 'pair@1' ran for over 0.2 s")
    line(dealer)
    dealer.result()
    assert daemon.stop() == 0


def test_a_drain_that_takes_too_long_answers_each_request_once(start: Start) -> None:
    daemon, dealer = start(lanes=2, config="drain_timeout_s = 0.3")
    sent = {fork(dealer, HOLD, ANSWER), fork(dealer, HOLD, HOLD), line(dealer)}
    assert dealer.health().running + dealer.health().queued > 0
    daemon.process.send_signal(signal.SIGTERM)
    replies = [dealer.receive()[0] for _ in range(3)]
    assert {reply.id for reply in replies} == sent
    errors = [reply for reply in replies if isinstance(reply, wire.ErrorReply)]
    assert len(errors) >= 2
    assert {error.code for error in errors} == {"UNAVAILABLE"}
    assert daemon.process.wait(30) == 0
    assert not dealer.socket.poll(0)


def test_what_is_under_way_keeps_the_versions_of_its_steps(start: Start) -> None:
    _, dealer = start()
    whole = line(dealer, HOLD)
    dealer.await_health(running=1)
    dealer.socket.send(wire.encode(wire.Unload(v=1, id=1000, model="pair")))
    line(dealer)
    error = dealer.error()
    assert error.code == "FAILED_PRECONDITION"
    assert error.message == "step 'second': model 'pair@1' is draining; tnxctl models load pair@1"
    ask(dealer, RELEASE, device="cpu")
    replies = [dealer.receive()[0] for _ in range(3)]
    results = {reply.id for reply in replies if isinstance(reply, wire.Result)}
    assert whole in results
    (report,) = (reply for reply in replies if isinstance(reply, wire.ModelsReport))
    assert [(info.name, info.status) for info in report.models] == [("pair", "unloaded")]
    states = {info.name: (info.status, info.error) for info in dealer.health().models}
    assert states["line"][0] == states["fork"][0] == "failed"
    assert states["line"][1].startswith("line/1/pipeline.toml: steps[1].model: model 'pair@1' is unloaded")
    dealer.socket.send(wire.encode(wire.Load(v=1, id=1001, model="pair")))
    assert isinstance(dealer.receive()[0], wire.ModelsReport)
    line(dealer)
    dealer.result()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"device": "cuda:7"}, "INVALID_ARGUMENT", "step 'first': device 'cuda:7': there are cuda:0, cpu, and auto"),
        ({"max_reply_bytes": 3}, "INVALID_ARGUMENT", "the answer takes 8 bytes, more than the 3"),
        ({"model": "line@2"}, "NOT_FOUND", "model 'line' has no version '2'"),
    ],
)
def test_requests_that_are_refused(start: Start, options: dict[str, object], code: str, said: str) -> None:
    _, dealer = start()
    told = [rows(ANSWER)] * 3
    dealer.predict(*told, names=("a", "b", "c"), **{"model": "line", **options})
    error = dealer.error()
    assert error.code == code
    assert said in error.message
    dealer.predict(*told[:2], names=("a", "b"), model="line")
    assert "needs the input 'c'" in dealer.error().message
    dealer.predict(rows(ANSWER), rows(ANSWER, 2), rows(ANSWER), names=("a", "b", "c"), model="line")
    assert "has 2 rows, the inputs before it have 1" in dealer.error().message
