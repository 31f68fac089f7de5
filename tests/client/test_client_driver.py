"""`Client` and its driver: threads, futures and their callbacks, the end of clients and of processes."""

from __future__ import annotations

import concurrent.futures
import gc
import inspect
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest

from peers import (
    PATIENCE_S,
    FakeDaemon,
    X,
    backwards,
    echo,
    equal,
    silence,
)
from tnxctl import AsyncClient, Client, driver
from tnxctl.protocol import errors
from tnxctl.results import Result
from tnxctl.session import MAX_LOSSES


@pytest.fixture
def tnx() -> Iterator[Client]:
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as client:
        yield client


def test_both_clients_take_the_same_arguments() -> None:
    for name in ("__init__", "predict", "health", "metadata", "close"):
        of_threads, of_tasks = (inspect.signature(getattr(kind, name)).parameters for kind in (Client, AsyncClient))
        assert dict(of_threads) == {key: value for key, value in of_tasks.items() if key != "busy_poll"}  # of loops
    ours, theirs = (inspect.signature(function).parameters for function in (Client.predict, Client.submit))
    assert ours == theirs


def test_threads_get_their_own_replies(tnx: Client) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        for i in range(100):
            sent = np.array([number, i])
            result = tnx.predict(sent) if i % 3 else tnx.submit(sent).result()
            if not equal(result, sent):
                wrong.append((sent, result))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert tnx._session.idle


def test_threads_survive_restarts() -> None:
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        right = threading.Semaphore(0)
        stop = threading.Event()

        def work(number: int) -> None:
            while not stop.is_set():
                if equal(tnx.predict(np.array([number])), [number]):
                    right.release()

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            workers = [pool.submit(work, number) for number in range(4)]
            for _ in range(3):
                for _ in range(20):
                    assert right.acquire(timeout=PATIENCE_S)
                daemon.stop()
                daemon.start()
            stop.set()
            for worker in workers:
                worker.result(PATIENCE_S)


def test_close_while_threads_call() -> None:
    with FakeDaemon(echo) as daemon:
        tnx = Client(daemon.endpoint, timeout=PATIENCE_S)
        running = threading.Semaphore(0)

        def work() -> type[BaseException]:
            while True:
                try:
                    tnx.submit(X).result(PATIENCE_S)
                    tnx.predict(X)
                except (errors.Cancelled, errors.FailedPrecondition) as error:
                    return type(error)
                running.release()

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            workers = [pool.submit(work) for _ in range(8)]
            for _ in range(50):
                assert running.acquire(timeout=PATIENCE_S)
            tnx.close()
            for worker in workers:
                assert issubclass(worker.result(PATIENCE_S), errors.TensorNextError)


def test_a_lone_caller_needs_no_thread(tnx: Client) -> None:
    before = {*threading.enumerate()}
    for _ in range(10):
        tnx.predict(X)
    assert {*threading.enumerate()} <= before  # some of tests before may have ended


def test_submit_copies_its_inputs() -> None:
    with FakeDaemon(backwards(2)) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        buffer = np.zeros(100_000)
        first = tnx.submit(buffer)
        buffer[:] = 1
        second = tnx.submit({"x": buffer})
        buffer[:] = 2
        assert (first.result().output.max(), second.result().output.min()) == (0, 1)


def test_futures_are_ordinary_futures(tnx: Client) -> None:
    called: list[Future[Result]] = []
    futures = [tnx.submit(np.array([i])) for i in range(5)]
    futures[0].add_done_callback(called.append)
    done = {future.result().output[0] for future in concurrent.futures.as_completed(futures, PATIENCE_S)}
    assert done == set(range(5))
    assert called == [futures[0]]
    assert not futures[0].cancel()


def test_waiting_for_cancelled_futures_ends() -> None:
    with FakeDaemon(silence) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        futures = [tnx.submit(X) for _ in range(3)]
        for future in futures:
            assert future.cancel()
        done, pending = concurrent.futures.wait(futures, PATIENCE_S)
        assert (done, pending) == (set(futures), set())


def test_callbacks_may_call(tnx: Client) -> None:
    answers: Future[Result] = Future()

    def again(future: Future[Result]) -> None:
        answers.set_result(tnx.predict(future.result().output + 1))

    tnx.submit(X).add_done_callback(again)
    assert equal(answers.result(PATIENCE_S), X + 1)


def test_callbacks_may_close() -> None:
    with FakeDaemon(echo) as daemon:
        tnx = Client(daemon.endpoint, timeout=PATIENCE_S)
        closed = threading.Event()

        def close(future: Future[Result]) -> None:
            tnx.close()
            closed.set()

        tnx.submit(X).add_done_callback(close)
        assert closed.wait(PATIENCE_S)
        with pytest.raises(errors.FailedPrecondition):
            tnx.predict(X)


@pytest.mark.parametrize("thrown", [ValueError, SystemExit])
def test_callbacks_may_fail(tnx: Client, thrown: type[BaseException], caplog: pytest.LogCaptureFixture) -> None:
    def fail(future: Future[Result]) -> None:
        raise thrown

    future = tnx.submit(X)
    future.add_done_callback(fail)
    future.result()
    assert [tnx.submit(X).result().batch_size for _ in range(3)] == [1, 1, 1]


def test_a_callback_that_fails_keeps_no_other_future_from_its_end() -> None:
    def fail(future: Future[Result]) -> None:
        raise SystemExit

    with FakeDaemon(silence) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        futures = [tnx.submit(X) for _ in range(4)]
        for future in futures:
            future.add_done_callback(fail)
        for _ in range(MAX_LOSSES):  # then all are given up at once
            for _ in futures:
                daemon.received.get(timeout=PATIENCE_S)
            daemon.start()
        assert concurrent.futures.wait(futures, PATIENCE_S).not_done == set()


def test_a_callback_that_blocks_delays_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeDaemon(echo) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        entered, leave, left = threading.Event(), threading.Event(), threading.Event()

        def block(future: Future[Result]) -> None:
            entered.set()
            leave.wait(PATIENCE_S)
            left.set()

        try:
            tnx.submit(X).add_done_callback(block)
            assert entered.wait(PATIENCE_S)
            with pytest.raises(errors.DeadlineExceeded, match=r"a callback of a future keeps the reading thread busy"):
                tnx.predict(X, timeout=0.1)
            monkeypatch.setattr(driver, "_GRACE_S", 2 * PATIENCE_S)  # which is not for deadlines
            with pytest.raises(errors.DeadlineExceeded, match=r"its deadline of 100 ms"):
                tnx.predict(X, deadline=0.1)
            assert not left.is_set()
        finally:
            leave.set()
        assert equal(tnx.predict(X), X)


def test_a_client_that_is_dropped_leaves_nothing() -> None:
    with FakeDaemon(echo) as daemon, warnings.catch_warnings():
        warnings.simplefilter("error")
        tnx = Client(daemon.endpoint, timeout=PATIENCE_S)
        tnx.submit(X).result()
        thread, core = tnx._driver._io_thread, weakref.ref(tnx._driver)
        assert thread is not None
        del tnx
        thread.join(PATIENCE_S)
        gc.collect()
        assert not thread.is_alive()
        assert core() is None


def test_futures_outlive_a_client_that_is_dropped() -> None:
    with FakeDaemon(backwards(3)) as daemon:
        tnx = Client(daemon.endpoint, timeout=PATIENCE_S)
        futures = [tnx.submit(np.array([i])) for i in range(3)]
        del tnx
        gc.collect()
        assert [future.result().output[0] for future in futures] == [0, 1, 2]


def test_a_failed_construction_leaves_nothing() -> None:
    with pytest.raises(errors.InvalidArgument):
        Client("localhost", timeout=0)
    gc.collect()  # an error in __del__ would show here


@pytest.mark.skipif(not hasattr(os, "fork"), reason="cannot fork here")
def test_a_forked_child_makes_its_own_client() -> None:
    script = """
import os, sys, numpy as np
from tnxctl import Client
x = np.ones(3)
tnx = Client(sys.argv[1], timeout=60.0)
tnx.submit(x).result()
child = os.fork()
if child == 0:
    with Client(sys.argv[1], timeout=60.0) as own:
        os._exit(7 if own.submit(x).result().output.sum() == 3 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
tnx.predict(x)
tnx.close()
"""
    with FakeDaemon(echo) as daemon:
        subprocess.run([sys.executable, "-c", script, daemon.endpoint], check=True, timeout=PATIENCE_S)


def test_a_program_may_end_with_calls_under_way() -> None:
    script = """
import sys, numpy as np
from tnxctl import Client
tnx = Client(sys.argv[1], timeout=1000.0)
future = tnx.submit(np.ones(3))
"""
    with FakeDaemon(silence) as daemon:
        subprocess.run(
            [sys.executable, "-W", "error", "-c", script, daemon.endpoint],
            check=True,
            timeout=PATIENCE_S,
            stderr=subprocess.DEVNULL,
        )


def test_importing_the_package_alone_imports_nothing_heavy() -> None:
    script = """
import sys, tnxctl
assert not {"numpy", "zmq", "msgspec", "asyncio"} & set(sys.modules), sorted(sys.modules)
tnxctl.Client, tnxctl.Result, tnxctl.NotFound
assert not {"asyncio", "torch", "ml_dtypes"} & set(sys.modules), sorted(sys.modules)
assert set(tnxctl.__all__) <= set(dir(tnxctl))
for name in tnxctl.__all__:
    getattr(tnxctl, name)
try:
    tnxctl.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE_S)
