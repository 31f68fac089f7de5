"""The client in its surroundings: forks, the end of the interpreter, and tools that look at it."""

from __future__ import annotations

import inspect
import os
import pydoc
import subprocess
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import tnxctl
from peers import FakeDaemon, echo, free_endpoint

PATIENCE_S = 30.0  # far more than any of these takes: only so that nothing waits for ever

_TESTS = Path(__file__).parents[1]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def python(code: str, *arguments: str) -> str:
    """Everything that a program prints, which must end well."""
    program = "import os, sys\nimport numpy as np\nX = np.ones((2, 3), np.float32)\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore:This process:DeprecationWarning", "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_TESTS), str(_TESTS.parent)])},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# --- forks ---------------------------------------------------------------------------------------------------

USED = {
    "alone": "tnx.predict(X)",
    "by futures": "[future.result() for future in [tnx.submit(X) for _ in range(20)]]",
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
def test_a_client_that_a_fork_has_copied_says_so_at_once(use: str) -> None:
    after = "" if use == "still" else "assert (tnx.predict(X).output == X).all()"
    with FakeDaemon(echo) as daemon:
        said = python(FORK.format(patience=60.0, use=USED[use], after=after), daemon.endpoint).splitlines()
    assert said[0] == said[1]
    assert "is another process's, and came here by a fork: make a new one after the fork" in said[0]
    assert said[2:] == ["None"]


@needs_fork
def test_a_client_that_nobody_has_used_yet_may_be_used_on_both_sides_of_a_fork() -> None:
    code = """
        from tnxctl import Client

        with Client(sys.argv[1], timeout=20) as tnx:
            child = os.fork()
            right = [bool((tnx.submit(X + i).result().output == X + i).all()) for i in range(20)]
            print(all(right), flush=True)
            if child:
                assert os.waitpid(child, 0)[1] == 0
    """
    with FakeDaemon(echo) as daemon:
        assert python(code, daemon.endpoint).split() == ["True", "True"]


@needs_fork
def test_an_asyncio_client_that_a_fork_has_copied_says_so_and_leaves_its_parents_loop_alone() -> None:
    code = """
        import asyncio
        from tnxctl import AsyncClient, FailedPrecondition

        async def again(tnx):
            try:
                await tnx.predict(X)
            except FailedPrecondition as error:
                print(error, flush=True)

        loop = asyncio.new_event_loop()
        tnx = AsyncClient(sys.argv[1], timeout=20)
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
        assert "came here by a fork" in python(code, daemon.endpoint)


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
