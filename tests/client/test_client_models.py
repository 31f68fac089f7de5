"""The calls about models over both clients, against daemons that are slow, refuse, die and come back."""

from __future__ import annotations

import asyncio
import inspect
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from fake_daemon import RESNETS, Change, FakeDaemon, Outputs, comparison
from peers import FakeDaemon as Peer
from peers import Reply, Request, die, echo, error, free_endpoint, in_turn, silence
from tnxctl import AsyncClient, Client
from tnxctl.protocol import errors, wire
from tnxctl.protocol.wire import ModelInfo
from tnxctl.results import Result

PATIENCE_S = 60.0  # for what must happen; never reached when all is well
X = np.zeros((1, 256), np.float32)

VERBS: dict[str, tuple[Any, ...]] = {
    "models": (),
    "load": ("resnet@2",),
    "unload": ("resnet@1",),
    "route": ("resnet", {"1": 95, "2": 5}),
    "reload": (),
    "compare": ("resnet", "1", "2"),
}
CHANGES = ("load", "unload", "route", "reload")

Ask = Callable[..., Any]


class Blocking:
    """`Client` behind one function: verb and arguments -> what it returns."""

    def __init__(self, endpoint: str, timeout: float = PATIENCE_S) -> None:
        self.client = Client(endpoint, timeout=timeout)

    def __call__(self, verb: str, *arguments: Any, **options: Any) -> Any:
        return getattr(self.client, verb)(*arguments, **options)

    def close(self) -> None:
        self.client.close()


class Awaiting:
    """`AsyncClient` likewise, on an event loop of its own."""

    def __init__(self, endpoint: str, timeout: float = PATIENCE_S) -> None:
        self.client = AsyncClient(endpoint, timeout=timeout)
        self.loop = asyncio.new_event_loop()

    def __call__(self, verb: str, *arguments: Any, **options: Any) -> Any:
        return self.loop.run_until_complete(getattr(self.client, verb)(*arguments, **options))

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.close()


@pytest.fixture(params=[Blocking, Awaiting])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Ask]]:
    """Makes clients and closes them at the end."""
    made: list[Any] = []

    def connect(endpoint: str, **options: Any) -> Any:
        made.append(request.param(endpoint, **options))
        return made[-1]

    yield connect
    for client in made:
        client.close()


def statuses(infos: tuple[ModelInfo, ...]) -> list[tuple[str, str, float]]:
    return [(info.version, info.status, info.traffic) for info in infos]


def test_both_clients_take_the_same_arguments() -> None:
    for verb in VERBS:
        assert inspect.signature(getattr(Client, verb)) == inspect.signature(getattr(AsyncClient, verb))


def test_what_they_return(connect: Callable[..., Ask]) -> None:
    with FakeDaemon(models=RESNETS, reloaded={"loaded": ("resnet@3",), "failed": {"m": "no weights"}}) as daemon:
        ask = connect(daemon.endpoint)
        assert ask("models") == RESNETS
        assert statuses(ask("load", "resnet@2")) == [("1", "ready", 1.0), ("2", "ready", 0.0)]
        assert statuses(ask("route", "resnet", {1: 3, 2: 1})) == [("1", "ready", 0.75), ("2", "ready", 0.25)]
        assert ask("route", "resnet", {"1": 1.0}, shadow=2)[1].shadow
        assert statuses(ask("unload", "resnet")) == [("1", "unloaded", 1.0), ("2", "unloaded", 0.0)]
        reloaded = ask("reload")
        assert (reloaded.loaded, reloaded.unloaded, reloaded.failed) == (("resnet@3",), (), {"m": "no weights"})
        assert ask("compare", "resnet", 1, 2).outputs[0].argmax_agreement == 0.995


def test_a_slow_load_may_take_longer_than_other_calls_and_they_go_on_beside_it() -> None:
    with FakeDaemon(load_delay_s=1.0, looks=1) as daemon, Client(daemon.endpoint, timeout=0.9) as tnx:
        loaded = threading.Thread(target=tnx.load, args=("mlp",))
        loaded.start()
        assert daemon.wait_for_requests(1, PATIENCE_S)
        for _ in range(2):
            assert tnx.predict(X, timeout=PATIENCE_S).output.shape == (1, 128)
        assert loaded.is_alive()
        tnx.models(timeout=PATIENCE_S)  # which the answer has waited for
        loaded.join(PATIENCE_S)
        assert not loaded.is_alive()
    with FakeDaemon(looks=1) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        tnx.predict(X)  # now the connection stands
        with pytest.raises(errors.DeadlineExceeded, match=r"load within 100 ms; it may still be at work on it"):
            tnx.load("mlp", timeout=0.1)


def refuse(request: Change, _: tuple[ModelInfo, ...]) -> tuple[ModelInfo, ...]:
    raise errors.FailedPrecondition("resnet@2: models/resnet/2/model.pt2 is truncated")


@pytest.mark.parametrize("verb", CHANGES)
def test_a_refusal_is_an_error_with_the_daemons_sentence(connect: Callable[..., Ask], verb: str) -> None:
    with FakeDaemon(models=RESNETS, change=refuse) as daemon:
        ask = connect(daemon.endpoint)
        with pytest.raises(errors.FailedPrecondition, match=r"^resnet@2: models/resnet/2/model\.pt2 is truncated$"):
            ask(verb, *VERBS[verb])
        assert ask("models") == RESNETS


@pytest.mark.parametrize("verb", CHANGES)
def test_a_daemon_that_dies_of_a_change_is_asked_once(connect: Callable[..., Ask], verb: str) -> None:
    with Peer(die) as daemon:
        ask = connect(daemon.endpoint)
        with pytest.raises(errors.Unavailable, match=f"the connection broke while {verb} was under way"):
            ask(verb, *VERBS[verb])
        assert daemon.gone.wait(PATIENCE_S)
        daemon.start(echo)
        ask("predict", X)
        received = [daemon.received.get_nowait().header for _ in range(2)]
    assert type(received[0]).__name__.lower() == verb
    assert isinstance(received[1], wire.Predict), "nothing else came"


def test_a_change_is_not_sent_again_after_an_error_in_this_process() -> None:
    watched = threading.Event()

    def echo_then(request: Request) -> list[tuple[bytes, Reply]]:
        watched.wait(PATIENCE_S)
        return echo(request)

    def leave(future: Future[Result]) -> None:
        raise SystemExit

    with Peer(in_turn(silence, echo_then)) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        failed: list[errors.TensorNextError] = []

        def load() -> None:
            try:
                tnx.load("resnet@2")
            except errors.TensorNextError as error:
                failed.append(error)

        loading = threading.Thread(target=load)
        loading.start()
        assert isinstance(daemon.received.get(timeout=PATIENCE_S).header, wire.Load)
        tnx.submit(X).add_done_callback(leave)
        watched.set()
        assert tnx.predict(X).model == "mlp"
        loading.join()
        assert {type(request.header) for request in daemon.received.queue} == {wire.Predict}
    sentence = "broke while load was under way: an error in this process ended it; whether it has changed"
    assert isinstance(failed[0], errors.Unavailable)
    assert sentence in failed[0].message


@pytest.mark.parametrize("verb", ["models", "compare"])
def test_a_query_outlives_a_restart(connect: Callable[..., Ask], verb: str) -> None:
    def reply(request: Request) -> list[tuple[bytes, list[bytes]]]:
        if isinstance(request.header, wire.Compare):
            return [(request.identity, [wire.encode(comparison(request.header))])]
        return [(request.identity, [wire.encode(wire.ModelsReport(v=1, id=request.id, models=RESNETS))])]

    with Peer(die) as daemon:
        restart = threading.Thread(target=lambda: daemon.gone.wait(PATIENCE_S) and daemon.start(reply))
        restart.start()
        answer = connect(daemon.endpoint)(verb, *VERBS[verb])
        restart.join()
        assert daemon.received.qsize() == 2
    assert answer == RESNETS if verb == "models" else answer.requests == 200


def test_a_daemon_that_is_starting_is_asked_again(connect: Callable[..., Ask]) -> None:
    def not_yet(request: Request) -> list[tuple[bytes, list[bytes]]]:
        refusal = wire.ErrorReply(
            v=1, id=request.id, code="UNAVAILABLE", message="the daemon is starting", retry_after_us=1000.0
        )
        return [(request.identity, [wire.encode(refusal)])]

    def ready(request: Request) -> list[tuple[bytes, list[bytes]]]:
        return [(request.identity, [wire.encode(wire.ModelsReport(v=1, id=request.id, models=RESNETS))])]

    with Peer(in_turn(not_yet, not_yet, ready)) as daemon:
        assert connect(daemon.endpoint)("load", "resnet@2") == RESNETS
        assert daemon.received.qsize() == 3


@pytest.mark.parametrize("verb", VERBS)
def test_nobody_there_is_noticed_within_the_timeout_of_the_client(connect: Callable[..., Ask], verb: str) -> None:
    ask = connect(free_endpoint(), timeout=0.2)
    with pytest.raises(errors.Unavailable, match=r"no connection within 200 ms"):
        ask(verb, *VERBS[verb])


def test_an_older_daemon_does_not_know_the_verbs(connect: Callable[..., Ask]) -> None:
    with Peer(error("UNIMPLEMENTED", "unknown message type 'models'")) as daemon:
        ask = connect(daemon.endpoint)
        with pytest.raises(errors.Unimplemented, match="'models'"):
            ask("models")


@pytest.mark.parametrize("verb", CHANGES)
def test_an_interrupted_change_is_forgotten_and_not_withdrawn(verb: str) -> None:
    with Peer(in_turn(silence, echo)) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:

        def interrupt() -> None:
            daemon.received.get(timeout=PATIENCE_S)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            getattr(tnx, verb)(*VERBS[verb], timeout=PATIENCE_S)
        thread.join()
        assert tnx.predict(X).model == "mlp"
        assert daemon.cancels.empty()


def test_the_key_and_the_version_reach_the_daemon(connect: Callable[..., Ask]) -> None:
    def zeros(request: wire.Predict, _: Outputs) -> Outputs:
        return {"scores": np.zeros((1, 1000), np.float32)}

    with FakeDaemon(models=RESNETS, compute=zeros) as daemon:
        ask = connect(daemon.endpoint)
        image = np.zeros((1, 3, 224, 224), np.float32)
        assert ask("predict", image, model="resnet@2", route_key="ann", priority=3).version == "2"
        assert ask("metadata", "resnet@1").version == "1"
        ask("predict", image, model="resnet")
        with pytest.raises(errors.NotFound):
            ask("predict", image, model="resnet@3")
    first, second = daemon.predicts
    assert (first.model, first.route_key, first.priority) == ("resnet@2", "ann", 3)
    assert (second.model, second.route_key, second.priority) == ("resnet", "", None)
