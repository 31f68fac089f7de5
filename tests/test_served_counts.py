"""Counts of a running daemon: they add up, only grow, and outlive the versions that they are of."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from conftest import Daemon
from dealer import Dealer, rows
from keyed import keyed_daemon
from model_repositories import ONE_ROW, Repository, put, says
from obedient_devices import ANSWER, EXHAUST, FAIL, HOLD, PAUSE, RELEASE
from tnxctl import Client
from tnxctl.protocol import wire
from tnxctl.protocol.errors import NotFound, TensorNextError
from tnxctl.protocol.statistics import STAGES, StatsReport, VersionStats

OBEDIENT = str(Path(__file__).parent / "obedient_devices.py")
RunDaemon = Callable[..., Daemon]


def fresh_stats(client: Client) -> StatsReport:
    """A report that knows of all that was answered before: one that took long to make is told for a while as it is."""
    told = client.stats().uptime_us
    while (report := client.stats()).uptime_us == told:  # the test's own time limit ends this
        pass
    return report


def of(report: StatsReport, title: str) -> VersionStats:
    """The entry of NAME@VERSION."""
    (found,) = [model for model in report.models if f"{model.name}@{model.version}" == title]
    return found


def check(model: VersionStats, in_flight: int = 0) -> None:
    """Check that the counts of a version agree with each other."""
    answered = model.replies + sum(model.errors.values()) + model.abandoned
    assert model.requests == answered + in_flight, model
    if model.replies:
        assert {stage: histogram.count for stage, histogram in model.stages.items()} == dict.fromkeys(
            STAGES, model.replies
        )
        assert model.prediction_error.count == model.replies
        parts = sum(histogram.sum for stage, histogram in model.stages.items() if stage != "total")
        assert parts == pytest.approx(model.stages["total"].sum, rel=1e-6)
    if model.batch_rows.count:
        assert (model.batch_rows.count, model.batch_rows.sum) == (model.batches, model.rows)


def stats(dealer: Dealer) -> StatsReport:
    """The counts, which must be the next reply."""
    dealer.socket.send(wire.encode(wire.Stats(v=wire.VERSION, id=wire.MAX_ID)))
    report, _ = dealer.receive()
    assert isinstance(report, StatsReport)
    return report


def await_stats(dealer: Dealer, arrived: Callable[[StatsReport], bool]) -> StatsReport:
    """Ask until something has arrived; the test's own time limit ends the asking."""
    while not arrived(report := stats(dealer)):
        pass
    return report


@pytest.fixture
def obedient(run_daemon: RunDaemon) -> Iterator[Dealer]:
    """A connection to a daemon with one lane on each of two devices, which do as requests say."""
    daemon = run_daemon("--model", "mlp", "--model", "digits", program=(OBEDIENT, "1"))
    with Dealer(daemon.endpoint) as dealer:
        yield dealer


def test_answers_and_errors_of_every_kind_add_up(obedient: Dealer) -> None:
    dealer = obedient
    seen: Counter[str] = Counter()

    def hear(count: int) -> None:
        for _ in range(count):
            reply, _ = dealer.receive()
            seen[reply.code if isinstance(reply, wire.ErrorReply) else "result"] += 1

    for command, count in ((ANSWER, 3), (FAIL, 1)):
        dealer.predict(rows(count, fill=command), device="cpu", deadline_us=60e6)
        hear(1)
    for count in (1, 2):
        dealer.predict(rows(count, fill=EXHAUST), device="cuda:0")
        hear(1)
    dealer.predict(rows(1, 3))  # of a wrong width
    dealer.predict(rows(1), model="nobody")
    dealer.predict(rows(1), model="mlp@7")
    dealer.predict(rows(1), device="cuda:7")
    dealer.predict(rows(1), deadline_us=1.0)
    header = wire.encode(wire.Predict(v=wire.VERSION, id=wire.MAX_ID, inputs=(), model="mlp"))
    dealer.socket.send_multipart([header, *[b""] * 100])  # more frames than a message may have
    hear(6)
    held = dealer.predict(rows(1, fill=HOLD), device="cpu")
    dealer.await_health(running=1)
    dealer.predict(rows(1, fill=HOLD), id=held, device="cpu")  # the id is in use
    dealer.predict(rows(1), id=held + 1, device="cpu", deadline_us=150_000.0)  # its time passes in the queue
    hear(2)
    withdrawn = dealer.predict(rows(1), device="cpu")
    dealer.socket.send(wire.encode(wire.Cancel(v=wire.VERSION, id=withdrawn)))
    hear(1)
    with Dealer(dealer.socket.last_endpoint.decode()) as leaving:
        leaving.predict(rows(1), device="cpu")
        await_stats(dealer, lambda report: report.queued == 1)
    waiting = await_stats(dealer, lambda report: report.abandoned == 1)
    check(of(waiting, "mlp@1"), in_flight=1)
    assert of(waiting, "mlp@1").abandoned == 1
    dealer.predict(rows(1, fill=RELEASE), device="cuda:0")
    hear(2)
    dealer.socket.send_multipart([b"no header"])
    hear(1)

    report = stats(dealer)
    model = of(report, "mlp@1")
    check(model)
    assert report.replies == model.replies == seen.pop("result") == 3
    assert report.errors == dict(seen)
    assert report.requests == report.replies + sum(seen.values()) + report.abandoned
    # Nobody knows of which model the others would have been.
    others = Counter({"NOT_FOUND": 2, "INVALID_ARGUMENT": 1})
    assert model.errors == dict(seen - others)
    assert seen.keys() == {
        "ALREADY_EXISTS",
        "CANCELLED",
        "DEADLINE_EXCEEDED",
        "INTERNAL",
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "RESOURCE_EXHAUSTED",
    }
    assert sorted(model.name for model in report.models) == ["digits", "mlp"]
    assert (model.batches, model.rows, model.splits) == (3, 5, 1)
    assert (model.deadlines_met, model.deadlines_missed) == (1, 2)
    assert (model.queued_rows, report.queued, report.running) == (0, 0, 0)
    # One whose time will pass in the queue is taken in or refused at once, as the daemon predicts on this machine.
    # What has no header counts in the totals alone.
    assert sum(client.requests + client.refused for client in report.clients) == report.requests - 1


def test_a_device_that_takes_over_what_waits_for_another(obedient: Dealer) -> None:
    dealer = obedient
    dealer.predict(rows(1, fill=HOLD), device="cuda:0")
    dealer.predict(rows(1, fill=PAUSE), device="cpu")
    dealer.await_health(running=2)
    for _ in range(20):
        dealer.predict(rows(64), device="auto", deadline_us=60e6)  # for one device, since the other may help
    earlier, later = [
        await_stats(dealer, lambda report: report.queued == 20 and all(device.busy_us > 0 for device in report.devices))
        for _ in range(2)
    ]
    model = of(earlier, "mlp@1")
    check(model, in_flight=22)
    assert model.queued_rows == 20 * 64 == sum(device.queued_rows for device in earlier.devices)
    assert model.predicted_wait_us > 0
    assert [(device.name, device.lanes) for device in earlier.devices] == [("cuda:0", 1), ("cpu", 1)]
    for before, after in zip(earlier.devices, later.devices, strict=True):
        assert after.busy_us > before.busy_us  # what runs counts before it is over
    dealer.socket.send(wire.encode(wire.Unload(v=wire.VERSION, id=wire.MAX_ID, model="digits")))
    for _ in range(22):  # answers, and that it is unloaded
        dealer.receive()
    dealer.predict(rows(1, fill=RELEASE), device="cpu")
    for _ in range(2):
        dealer.receive()
    model = of(stats(dealer), "mlp@1")
    check(model)
    assert 0 < model.steals == earlier.devices[0].queued_rows / 64
    assert (model.batches, model.rows) == (23, 3 + 20 * 64)
    assert (model.deadlines_met, model.deadlines_missed) == (20, 0)


# --- models that come and go, pipelines and shadows ---------------------------------------------------------------


@contextmanager
def asking(endpoint: str, model: str, clients: int) -> Iterator[Counter[str]]:
    """Clients that ask without a pause, on threads of their own. Yields how often each answer came."""
    stop = threading.Event()
    seen: Counter[str] = Counter()
    lock = threading.Lock()

    def ask() -> None:
        with Client(endpoint, timeout=60) as client:
            while not stop.is_set():
                futures = [client.submit(ONE_ROW, model=model) for _ in range(8)]
                for future in futures:
                    error = future.exception()
                    with lock:
                        seen[getattr(error, "code", "result")] += 1

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def assert_grows(earlier: StatsReport, later: StatsReport) -> None:
    """Check that no count is smaller than it was."""
    assert later.uptime_us > earlier.uptime_us
    for name in ("requests", "replies", "resent", "undeliverable", "abandoned", "log_lines_dropped", "spans_dropped"):
        assert getattr(later, name) >= getattr(earlier, name)
    since = later.loop_turns - earlier.loop_turns
    assert min(since.counts) >= 0
    for old in earlier.models:
        new = of(later, f"{old.name}@{old.version}")
        assert min((new.batch_rows - old.batch_rows).counts, default=0) >= 0
        assert new.requests >= old.requests
        assert Counter(old.errors) <= Counter(new.errors)
        for stage, histogram in old.stages.items():
            difference = new.stages[stage] - histogram
            assert min(difference.counts, default=0) >= 0
            assert difference.count == new.replies - old.replies
    for old_device, new_device in zip(earlier.devices, later.devices, strict=True):
        assert new_device.busy_us >= old_device.busy_us
        assert new_device.inline_us >= old_device.inline_us


def test_several_clients_while_a_version_is_replaced_unloaded_and_removed(
    run_daemon: RunDaemon, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    put(root, "net", 1)
    daemon = run_daemon("--model-repository", str(root))
    reports = []
    with Client(daemon.endpoint, timeout=60) as client:
        with asking(daemon.endpoint, "net", clients=3) as seen:
            for answer in (1.5, 2.5):
                reports.append(client.stats())
                put(root, "net", 1, answer=answer)
                assert client.reload().loaded == ("net@1",)
                assert says(client) == answer
            reports.append(client.stats())
            put(root, "net", 2)
            assert client.reload().unloaded == ("net@1",)
            reports.append(client.stats())
        Repository(root).remove("net", 1)
        client.reload()
        report = fresh_stats(client)
        for earlier, later in zip(reports, [*reports[1:], report], strict=True):
            assert_grows(earlier, later)
        for model in report.models:
            check(model)
        assert seen.keys() == {"result"}
        old, new = of(report, "net@1"), of(report, "net@2")
        assert old.replies + new.replies == report.replies == seen["result"] + 2
        assert old.requests + new.requests == report.requests
        with pytest.raises(NotFound):
            says(client, "net@1")
        assert of(fresh_stats(client), "net@1") == old  # nobody knows this version any more, so nothing counts for it
        assert client.explain(model="net")[0].version == "2"
        assert {request.version for request in client.explain()} == {"1", "2"}


def test_pipelines_count_as_a_whole_and_by_their_steps_and_shadows_not_at_all(
    run_daemon: RunDaemon, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    put(root, "net", 1, before="assert not bool((x == 7).any())", more='versions = "all"\n[traffic]\nshadow = "2"')
    put(root, "net", 2, answer=1, more='versions = "all"\n[traffic]\nshadow = "2"')
    put(root, "last", 1)
    steps = (
        '{ name = "first", model = "net", inputs = { x = "x" } }',
        '{ name = "beside", model = "last", inputs = { x = "x" } }',
        '{ name = "last", model = "last", inputs = { x = "first.y" } }',
    )
    line = f'inputs = ["x"]\nsteps = [{", ".join(steps)}]\noutputs = {{ y = "last.y", z = "beside.y" }}\n'
    Repository(root).publish("line", 1, {"pipeline.toml": line.encode()})
    daemon = run_daemon("--model-repository", str(root))
    with Client(daemon.endpoint, timeout=60) as client:
        for _ in range(20):
            client.predict(ONE_ROW, model="line")
        while not client.compare("net", "1", "2").requests:
            client.predict(ONE_ROW, model="line")
        asked = of(fresh_stats(client), "line@1").replies
        with pytest.raises(TensorNextError, match="step 'first'"):
            client.predict(ONE_ROW + 7, model="line")
        report = fresh_stats(client)
        whole, first, last, shadow = [of(report, title) for title in ("line@1", "net@1", "last@1", "net@2")]
        for model in (whole, first, last, shadow):
            check(model)
        assert (whole.requests, whole.replies, whole.errors) == (asked + 1, asked, {"INTERNAL": 1})
        assert (whole.rows, whole.batches, whole.batch_rows.count) == (asked, 0, 0)
        assert (first.requests, first.replies, first.errors) == (asked + 1, asked, {"INTERNAL": 1})
        assert last.requests == 2 * asked + 1
        assert last.replies + last.abandoned == 2 * asked + 1
        assert (shadow.requests, shadow.replies, shadow.batches) == (0, 0, 0)
        assert (report.requests, report.replies, report.errors) == (asked + 1, asked, {"INTERNAL": 1})

        slow = client.explain(model="line")[0]
        parts = client.explain(slow.id)
        assert parts[0] == msgspec.structs.replace(slow, age_s=parts[0].age_s)
        assert {part.model for part in parts} <= {"line", "net", "last"}


def test_the_difference_of_two_reports_is_what_was_asked_between(daemon: Daemon) -> None:
    with Client(daemon.endpoint, timeout=60) as client:
        for _ in range(3):
            client.predict(rows(2), model="mlp")
        before = fresh_stats(client)
        results = [client.predict(rows(2), model="mlp") for _ in range(300)]
        report = fresh_stats(client)
    earlier, later = of(before, "mlp@1"), of(report, "mlp@1")
    assert later.replies - earlier.replies == later.requests - earlier.requests == 300
    assert later.rows - earlier.rows == 600
    for stage in STAGES:
        since = later.stages[stage] - earlier.stages[stage]
        assert since.count == 300
        took_us = sum(getattr(result.timing, f"{stage}_us") for result in results)
        assert since.sum == pytest.approx(took_us, abs=1.0)
    errors_us = [
        abs(result.predicted_us - (result.timing.total_us - result.timing.receive_us - result.timing.reply_us))
        for result in results
    ]
    since = later.prediction_error - earlier.prediction_error
    assert since.sum == pytest.approx(sum(errors_us), abs=1.0)
    assert since.quantile(0.5) == pytest.approx(float(np.median(errors_us)), rel=0.15, abs=1.0)
    assert report.loop_turns.count - before.loop_turns.count >= 300
    (cpu,) = [device for device in report.devices if device.name == "cpu"]
    assert cpu.inline_us + cpu.busy_us > 0
    assert cpu.memory_total_mb > cpu.memory_free_mb > 0


# --- the slowest ---------------------------------------------------------------------------------------------------


def test_the_slow_request_is_found_and_explained(obedient: Dealer) -> None:
    dealer = obedient

    def explain(**fields: object) -> tuple[wire.SlowRequest, ...]:
        dealer.socket.send(wire.encode(wire.Explain(v=wire.VERSION, id=wire.MAX_ID, **fields)))  # type: ignore[arg-type]
        reply, _ = dealer.receive()
        assert isinstance(reply, wire.Explanation), reply
        return reply.requests

    assert explain() == ()
    answers = {}

    def ask(times: int) -> None:
        for _ in range(times):
            id_ = dealer.predict(rows(1), device="cpu")
            answers[id_] = dealer.result()[0]

    ask(100)
    dealer.predict(rows(3, fill=HOLD), id=777, device="cpu", priority=2, deadline_us=60e6, attempt=2)
    for _ in range(200):
        await_stats(dealer, lambda report: report.running == 1)
    dealer.predict(rows(1, fill=RELEASE), device="cuda:0")
    answers |= {reply.id: reply for reply in (dealer.result()[0], dealer.result()[0])}
    ask(100)
    by_time = sorted(answers.values(), key=lambda result: result.timing.total_us, reverse=True)
    slowest, planted = explain()[0], answers[777]
    assert slowest.id == by_time[0].id
    (slowest,) = explain(request=777)
    assert slowest.timing == planted.timing
    assert (slowest.device, slowest.reason, slowest.batch_size) == ("cpu", planted.reason, 3)
    assert (slowest.predicted_us, slowest.rows, slowest.priority) == (planted.predicted_us, 3, 2)
    assert (slowest.deadline_us, slowest.attempt) == (60e6, 2)
    assert 0 <= slowest.age_s < 60
    assert slowest.client == "127.0.0.1"
    for title in ("mlp", "mlp@1"):
        assert [request.id for request in explain(request=777, model=title)] == [777]
    assert explain(request=777, model="digits") == ()
    assert explain(request=123_456) == ()
    totals = [request.timing.total_us for request in explain()]
    assert totals == sorted(totals, reverse=True)
    for model, code in (("nobody", "NOT_FOUND"), ("mlp@7", "NOT_FOUND"), ("no name", "INVALID_ARGUMENT")):
        dealer.socket.send(wire.encode(wire.Explain(v=wire.VERSION, id=1, model=model)))
        assert dealer.error().code == code


def test_only_admins_are_told_who_the_clients_are(tmp_path: Path) -> None:
    settings = {"watcher": "observe", "user": "predict", "boss": "admin"}
    with keyed_daemon(tmp_path, settings, "--model", "mlp") as keyed, keyed.dealer("user") as user:
        user.predict(rows(1))
        user.result()
        user.predict(rows(1, 3))
        user.error()
        seen = {}
        for name in ("watcher", "boss"):
            with keyed.dealer(name) as dealer:
                report = stats(dealer)
                dealer.socket.send(wire.encode(wire.Explain(v=wire.VERSION, id=1)))
                explained, _ = dealer.receive()
                assert isinstance(explained, wire.Explanation)
                seen[name] = (report.clients, [request.client for request in explained.requests])
    assert seen["watcher"] == ((), [""])
    clients, names = seen["boss"]
    assert names == ["user"]
    assert [(client.requests, client.refused) for client in clients if client.name == "user"] == [(1, 1)]
