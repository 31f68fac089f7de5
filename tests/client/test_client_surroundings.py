"""The client in its surroundings: forks, the end of the interpreter, and tools that look at it."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import pydoc
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tnxctl
from peers import FakeDaemon, echo, free_endpoint

PATIENCE_S = 60.0  # far more than any of these takes: only so that nothing waits for ever

_TESTS = Path(__file__).parents[1]

_BEGINNING = """
import logging, os, sys
import numpy as np
X = np.ones((2, 3), np.float32)
# The development mode has asyncio say which callback took 0.1 s, as any may on a busy machine.
logging.getLogger("asyncio").addFilter(lambda record: not record.msg.startswith("Executing "))
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def python(code: str, *arguments: str) -> str:
    """Everything that a program prints, which must end well."""
    done = subprocess.run(
        [
            *(sys.executable, "-X", "dev", "-W", "ignore:This process:DeprecationWarning"),
            *("-c", _BEGINNING + textwrap.dedent(code), *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_TESTS), str(_TESTS.parent)])},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def same_channel(code: str, has_streams: bool) -> str:
    """A program whose clients have the channel that is asked for."""
    return f"from tnxctl.channels import opening\nopening.HAS_STREAMS = {has_streams}\n{textwrap.dedent(code)}"


# --- forks ---------------------------------------------------------------------------------------------------

USED = {
    "alone": "tnx.predict(X)",
    "by futures": "[future.result() for future in [tnx.submit(X) for _ in range(20)]]",
    "of several": "tnx.close(); tnx = Client([sys.argv[1], '127.0.0.1:1'], timeout=60); tnx.predict(X)",
    "still": "threading.Thread(target=ask_in_vain, args=(silent,)).start(); sent.wait(); tnx = silent",
}

FORK = """
import threading
from tnxctl import Cancelled, Client, FailedPrecondition
from peers import FakeDaemon, silence

sent = threading.Event()

def ask_in_vain(tnx):
    try:
        tnx.predict(X)
    except Cancelled:
        pass

with FakeDaemon(lambda request: sent.set() or silence(request)) as mute:
    tnx, silent = Client(sys.argv[1], timeout={patience}), Client(mute.endpoint, timeout={patience})
    {use}
    child = os.fork()
    if not child:
        for call in (tnx.predict, tnx.submit):
            try:
                call(X)
            except FailedPrecondition as error:
                print(error)
        print(repr(tnx.close()), flush=True)
        del tnx, silent
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    {after}
    tnx.close()
    silent.close()
"""


@needs_fork
@pytest.mark.parametrize("use", USED)
def test_a_client_that_a_fork_has_copied_says_so_at_once(use: str, each_channel: bool) -> None:
    after = "" if use == "still" else "assert (tnx.predict(X).output == X).all()"
    with FakeDaemon(echo) as daemon:
        code = same_channel(FORK.format(patience=60.0, use=USED[use], after=after), each_channel)
        said = python(code, daemon.endpoint).splitlines()
    assert said[0] == said[1]
    assert "is another process's, and came here by a fork: make a new one after the fork" in said[0]
    assert said[2:] == ["None"]


@needs_fork
def test_a_client_that_nobody_has_used_yet_may_be_used_on_both_sides_of_a_fork() -> None:
    code = """
        from tnxctl import Client

        with Client(sys.argv[1], timeout=60) as tnx:
            child = os.fork()
            right = [bool((tnx.submit(X + i).result().output == X + i).all()) for i in range(20)]
            os.write(1, b"right " if all(right) else b"wrong ")  # at once, since both write
            if child:
                assert os.waitpid(child, 0)[1] == 0
    """
    with FakeDaemon(echo) as daemon:
        assert python(code, daemon.endpoint).split() == ["right", "right"]


@needs_fork
def test_an_asyncio_client_that_a_fork_has_copied_says_so_and_leaves_its_parents_loop_alone(
    each_channel: bool,
) -> None:
    code = """
        import asyncio
        from tnxctl import AsyncClient, FailedPrecondition

        async def again(tnx):
            try:
                await tnx.predict(X)
            except FailedPrecondition as error:
                print(error, flush=True)

        loop = asyncio.new_event_loop()
        tnx = AsyncClient(sys.argv[1], timeout=60)
        loop.run_until_complete(tnx.predict(X))
        child = os.fork()
        if not child:
            asyncio.new_event_loop().run_until_complete(again(tnx))
            del tnx
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert (loop.run_until_complete(tnx.predict(X)).output == X).all()
        loop.run_until_complete(tnx.close())
        loop.close()
    """
    with FakeDaemon(echo) as daemon:
        assert "came here by a fork" in python(same_channel(code, each_channel), daemon.endpoint)


EVERY_CALL = {
    "predict": "X", "submit": "X", "health": "", "metadata": "", "cast": "X", "models": "", "load": "'m'",
    "unload": "'m'", "route": "'m', {}", "reload": "", "compare": "'m', 1, 2", "whoami": "", "clients": "",
    "kick": "'name'", "keys": "", "stats": "", "explain": "", "record": "'file'", "stop_recording": "", "recording": "",
}  # fmt: skip


@needs_fork
@pytest.mark.parametrize("kind", ["Client", "AsyncClient"])
def test_every_call_of_a_client_that_a_fork_has_copied_fails_at_once_and_the_parent_goes_on(kind: str) -> None:
    client = getattr(tnxctl, kind)
    calls = [name for name in vars(client) if not name.startswith("_") and inspect.isfunction(vars(client)[name])]
    arguments = {name: EVERY_CALL[name] for name in calls if name != "close"}
    asks = "\n".join(f"    lambda: tnx.{name}({each})," for name, each in arguments.items())
    code = f"""
import asyncio
from tnxctl import {kind}, FailedPrecondition

ASKS = (
{asks}
)

async def do(call):
    done = call()
    return await done if asyncio.iscoroutine(done) else done

async def ask(tnx):
    return bool(((await do(lambda: tnx.predict(X))).output == X).all())

async def in_the_child(tnx):
    failed = 0
    for call in ASKS:
        try:
            await do(call)
        except FailedPrecondition as error:
            failed += "came here by a fork" in error.message
    await do(tnx.close)
    if hasattr(tnx, "__exit__"):
        tnx.__exit__(None, None, None)
    else:
        await tnx.__aexit__(None, None, None)
    return failed

loop = asyncio.new_event_loop()
tnx = {kind}(sys.argv[1], timeout=60)
loop.run_until_complete(ask(tnx))
child = os.fork()
if not child:
    print(asyncio.new_event_loop().run_until_complete(in_the_child(tnx)), flush=True)
    del tnx
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(loop.run_until_complete(ask(tnx)))
loop.run_until_complete(do(tnx.close))
loop.close()
"""
    with FakeDaemon(echo) as daemon:
        assert python(code, daemon.endpoint).split() == [str(len(arguments)), "True"]


@needs_fork
def test_a_future_that_a_fork_has_copied_fails_at_once_and_calls_nobody() -> None:
    code = """
        import threading
        from concurrent.futures import wait
        from tnxctl import Client, FailedPrecondition
        from peers import FakeDaemon, silence

        sent = threading.Event()
        with FakeDaemon(lambda request: sent.set() or silence(request)) as mute:
            tnx = Client(mute.endpoint, timeout=60)
            future = tnx.submit(X)
            future.add_done_callback(lambda future: print("called", flush=True))
            sent.wait()
            with future._condition:  # as if another thread were in the middle of it
                child = os.fork()
            if not child:
                wait([future])
                print("came here by a fork" in future.exception().message, future.cancel(), flush=True)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert not future.done()
            tnx.close()
    """
    assert python(code).split() == ["True", "False", "called"]


@needs_fork
def test_a_fork_in_a_callback_ends_what_was_under_way_in_the_child_alone() -> None:
    code = """
        import threading
        from tnxctl import Client
        from peers import FakeDaemon, echo

        ready = threading.Event()
        with (
            FakeDaemon(lambda request: ready.wait() and echo(request)) as daemon,
            Client(daemon.endpoint, timeout=60) as tnx,
        ):
            def split(_):
                global child
                child = os.fork()
                if not child:  # its thread ends, and as it is the only one, so does the process
                    print("the child goes on", threading.current_thread().name, flush=True)

            first, second = tnx.submit(X), tnx.submit(X + 1)
            first.add_done_callback(split)
            ready.set()
            assert (second.result().output == X + 1).all()
            assert (tnx.predict(X).output == X).all()
            print(os.waitpid(child, 0)[1])
    """
    assert python(code).splitlines() == ["the child goes on tnxctl-io", "0"]


PROCESSES = """
import multiprocessing, sys
sys.path[:0] = {path!r}
from tnxctl import Client, FailedPrecondition

def use(client, said):
    try:
        client.health()
    except FailedPrecondition as error:
        said.put(error.message)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    said = context.SimpleQueue()
    with Client(sys.argv[1], timeout=60) as client:
        client.health()
        child = context.Process(target=use, args=(client, said))
        try:
            child.start()
        except TypeError as error:
            print(error)
        else:
            print(said.get())
            child.join()
"""


@pytest.mark.parametrize(
    ("method", "said"),
    [
        pytest.param("fork", "came here by a fork: make a new one after the fork", marks=needs_fork),
        pytest.param("forkserver", "make a client where it is used", marks=needs_fork),
        ("spawn", "make a client where it is used"),
    ],
)
def test_a_client_handed_to_another_process_says_what_to_do_instead(method: str, said: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"  # a file: children that are spawned import it
    program.write_text(PROCESSES.format(path=[str(_TESTS.parent)]))
    with FakeDaemon(echo) as daemon:
        done = subprocess.run(
            [sys.executable, "-W", "ignore::DeprecationWarning", program, daemon.endpoint, method],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert said in done.stdout


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", [tnxctl.Client, tnxctl.AsyncClient])
def test_a_client_is_neither_pickled_nor_copied(kind: type, copied: Callable[[object], object]) -> None:
    with pytest.raises(TypeError) as caught:
        copied(kind("gpu-box", timeout=2.5))
    assert str(caught.value) == (
        f"a tnxctl.{kind.__name__} holds a connection of this process, and cannot be pickled or copied: pass on the "
        f"address, and make a client where it is used, {kind.__name__}('gpu-box', timeout=2.5)"
    )


# --- the first attempt to connect ----------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="libzmq aborts without descriptors")
def test_the_first_attempt_imports_nothing_so_that_no_want_of_descriptors_is_told_by_the_name_of_a_module() -> None:
    """Neither can a signal break the import off, again at each attempt."""
    code = """
import resource
from tnxctl import Client, Unavailable

with Client("127.0.0.1:1", timeout=0.2) as tnx:
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    said = b"still under way"
    while said.endswith(b"still under way"):  # where this process is slow, its time is over before the attempt
        try:
            tnx.health()
        except Unavailable as error:
            said = str(error).encode()
    os.write(1, said)
"""
    assert python(code).endswith("no connection within 200 ms: [Errno 24] Too many open files")


# --- the end of the interpreter ------------------------------------------------------------------------------

LEFT_ALIVE = {
    "idle": "tnx.predict(X); kill()",
    "futures": "[f.result() for f in [tnx.submit(X) for _ in range(9)]]; kill(); left = tnx.submit(X)",
    "never there": "kill(); left = tnx.submit(X)",
    "a thread": (
        "tnx.predict(X); kill(); begun = threading.Event()\n"
        "def ask():\n    begun.set()\n    tnx.predict(X)\n"
        "threading.Thread(target=ask, daemon=True).start(); begun.wait()"
    ),
    "threads": (
        "tnx.predict(X); kill(); left = tnx.submit(X)\n"
        "threads = [threading.Thread(target=tnx.predict, args=(X,), daemon=True) for _ in range(3)]\n"
        "[thread.start() for thread in threads]"
    ),
    "asyncio": (
        "import asyncio\ntnx = AsyncClient(endpoint, timeout=60)\nasync def ask():\n    await tnx.predict(X)\n"
        "asyncio.run(ask()); kill()"
    ),
    "asyncio, under way, its loop closed": (
        "import asyncio\ntnx = AsyncClient(endpoint, timeout=60)\nloop = asyncio.new_event_loop()\n"
        "loop.run_until_complete(tnx.predict(X)); kill()\nleft = loop.create_task(tnx.predict(X))\n"
        "loop.run_until_complete(asyncio.sleep(0)); loop.close()\n"
        "left._log_destroy_pending = False  # asyncio's own word"
    ),
    "asyncio, under way, its loop in a thread": (
        "import asyncio\nbegun = threading.Event()\nasync def ask():\n"
        "    async with AsyncClient(endpoint, timeout=60) as tnx:\n        await tnx.predict(X)\n"
        "        kill(); begun.set()\n        await tnx.predict(X)\n"
        "threading.Thread(target=asyncio.run, args=(ask(),), daemon=True).start(); begun.wait()"
    ),
    "a pool of threads": (
        "from concurrent.futures import ThreadPoolExecutor\ntnx.predict(X); kill()\n"
        "left = [ThreadPoolExecutor(2).submit(tnx.predict, X, timeout=0.2) for _ in range(4)]"
    ),
    "several": "tnx = Client([endpoint, '127.0.0.1:1'], timeout=60); tnx.predict(X); kill(); left = tnx.submit(X)",
    "with": "with Client(endpoint, timeout=60) as other:\n    other.predict(X); kill(); left = other.submit(X)",
}


@pytest.mark.parametrize("how", LEFT_ALIVE)
def test_a_client_that_is_alive_when_the_interpreter_ends_prints_nothing(how: str) -> None:
    code = f"""
import subprocess, threading
from tnxctl import AsyncClient, Client
endpoint = sys.argv[1]
serve = "from peers import *; import sys\\nwith FakeDaemon(echo, sys.argv[1]): print(flush=True); sys.stdin.read()"
daemon = subprocess.Popen([sys.executable, "-c", serve, endpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
daemon.stdout.readline()
def kill():
    daemon.kill()
    daemon.wait()
tnx = Client(endpoint, timeout=60)
{LEFT_ALIVE[how]}
daemon.stdin.close()
daemon.stdout.close()
"""
    assert python(code, free_endpoint()) == ""


# --- what looks at it ----------------------------------------------------------------------------------------


def public() -> Iterator[tuple[str, typing.Any]]:
    """Every public name, and those of the classes' own members."""
    for name in tnxctl.__all__:
        value = getattr(tnxctl, name)
        yield name, value
        for member, found in vars(value).items():
            if not member.startswith("_") and inspect.isfunction(found):
                yield f"{name}.{member}", found


@pytest.mark.parametrize(("name", "value"), [pytest.param(*pair, id=pair[0]) for pair in public()])
def test_typed_names_can_be_inspected(name: str, value: typing.Any) -> None:
    assert inspect.signature(value) is not None
    assert isinstance(typing.get_type_hints(value), dict)


def test_the_package_has_a_page_of_help() -> None:
    page = pydoc.plain(pydoc.render_doc(tnxctl))
    assert "class AsyncClient" in page
    assert "class Result" in page


@pytest.mark.parametrize("kind", [tnxctl.Client, tnxctl.AsyncClient])
def test_a_client_shows_where_it_points(kind: type) -> None:
    assert repr(kind("gpu-box", timeout=0.5)) == f"<{kind.__name__} of tcp://gpu-box:5555, timeout 500 ms>"
