"""Changes of the process by the code of one model: undone, or the model refused, as the other models see."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from conftest import Daemon
from model_repositories import Repository
from peers import endpoint_of, held_port
from tnxctl import Client, FailedPrecondition, Internal
from tnxctl.protocol.wire import ModelInfo

SETTINGS = """
factory = "net:make"
max_batch_size = 4
audit = 0.0
inputs = [{ name = "x", datatype = "FP32", shape = [-1, 2] }]
outputs = [{ name = "y", datatype = "FP32", shape = [-1, 2] }]
"""
STARTS = 'optimize = "none"\n' + SETTINGS.replace("max_batch_size = 4", "max_batch_size = 0")
"""For a forward that starts processes: no conversion leaves that out, and a load runs few without batches."""

NET = """
import logging.config, os, random, socket, torch
{on_import}

class Net(torch.nn.Module):
    def forward(self, x):
        {forward}
        return x + 1

def make():
    {on_build}
    return Net()
"""
DEPENDS = "x = x + torch.zeros(2)"
"""In a forward: the answer has torch's default dtype."""

DOUBLES = "torch.set_default_dtype(torch.float64)"
X = np.ones((1, 2), np.float32)


def put(
    root: Path,
    name: str,
    *,
    on_import: str = "",
    on_build: str = "pass",
    forward: str = "pass",
    settings: str = SETTINGS,
) -> None:
    repository = Repository(root)
    repository.settings(name, settings)
    code = NET.format(on_import=on_import, on_build=on_build, forward=forward)
    repository.publish(name, 1, {"model.safetensors": safetensors.torch.save({}), "net.py": code.encode()})


def info(tnx: Client, name: str) -> ModelInfo:
    return next(model for model in tnx.models() if model.name == name)


def test_what_loading_changes_is_undone_and_noted(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> None:
    root = tmp_path / "models"
    put(root, "a-depends", forward=DEPENDS)
    put(root, "b-imports", on_import=DOUBLES)
    put(root, "c-builds", on_build="torch.manual_seed(0); socket.setdefaulttimeout(1.0)")
    put(root, "d-silences", on_import="logging.config.dictConfig({'version': 1}); logging.disable()")
    put(root, "e-moves", on_import="os.chdir('/'); os.environ['OMP_NUM_THREADS'] = '1'")
    put(root, "f-depends", forward=DEPENDS)
    running = run_daemon("--model-repository", str(root))
    with Client(running.endpoint, timeout=60.0) as tnx:
        for name in ("a-depends", "b-imports", "c-builds", "d-silences", "e-moves", "f-depends"):
            assert np.array_equal(tnx.predict(X, model=name).output, X + 1), name
        notes = {model.name: model.notes for model in tnx.models()}
    assert notes["a-depends"] == ()
    told = {name: [note.partition(" it ")[2] for note in notes[name]] for name in notes}  # whether read or built
    assert "changed torch's default dtype: put back" in told["b-imports"]
    assert "changed the default timeout of sockets, torch's random seed: put back" in told["c-builds"]
    assert "the level or the handlers of loggers, what logging disables: put back" in notes["d-silences"][0]
    assert "the working directory, the environment variable OMP_NUM_THREADS: put back" in notes["e-moves"][0]
    running.logged("f-depends@1 is loaded")  # after d-silences


@pytest.mark.parametrize(
    ("forward", "named"),
    [
        (DOUBLES, "torch's default dtype"),
        ("torch.manual_seed(0)", "torch's random seed"),
        ("random.seed(0); random.random()", "the seed of Python's random numbers"),
        ("torch.set_num_threads(torch.get_num_threads() + 1)", "torch's number of threads"),
        ("torch.autocast('cpu', torch.bfloat16).__enter__()", "torch's autocast"),
        (f"{DOUBLES}; torch.set_default_dtype(torch.float32)", "torch's default dtype, if only for a while"),
    ],
)
def test_a_forward_that_changes_the_process_is_refused(
    tmp_path: Path, run_daemon: Callable[..., Daemon], forward: str, named: str
) -> None:
    put(tmp_path, "good", forward=DEPENDS)
    put(tmp_path, "bad", forward=forward)
    running = run_daemon("--model-repository", str(tmp_path))
    with Client(running.endpoint, timeout=60.0) as tnx:
        with pytest.raises(FailedPrecondition, match=f"a forward (changes|sets) {named}"):
            tnx.predict(X, model="bad")
        assert np.array_equal(tnx.predict(X, model="good").output, X + 1)


def test_what_a_forward_in_service_changes_is_put_back_soon(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> None:
    put(tmp_path, "depends", forward=DEPENDS)
    put(tmp_path, "sometimes", forward=f"if x.amax() == 700: {DOUBLES}")
    running = run_daemon("--model-repository", str(tmp_path))
    with Client(running.endpoint, timeout=60.0) as tnx:
        for _ in range(2):
            tnx.predict(X * 700, model="sometimes")
            until = time.monotonic() + 60
            while True:
                try:
                    answer = tnx.predict(X, model="depends").output
                    break
                except Internal as error:
                    assert "float64" in error.message  # noqa: PT017 - until the daemon has looked
                    assert time.monotonic() < until
            assert np.array_equal(answer, X + 1)
    said = "a model that serves has changed torch's default dtype: put back"
    assert running.logged(said).count(said) == 1


# --- functions of torch that all models use -------------------------------------------------------------------

RELU = "torch.nn.functional.relu"


@pytest.mark.parametrize(
    ("place", "code", "named"),
    [
        ("on_import", f"{RELU} = lambda *_, **__: 1 / 0", f"importing it replaced {RELU}"),
        ("on_import", f"{RELU} = torch.nn.functional.gelu", f"importing it replaced {RELU}"),
        ("on_build", "torch.nn.Linear.forward = lambda *_: 1 / 0", "make() replaced torch.nn.Linear.forward"),
        ("on_build", "torch.Tensor.add = lambda *_: 1 / 0", "make() replaced torch.Tensor.add"),
        ("forward", "torch.softmax = lambda *_: 1 / 0", "a forward replaced torch.softmax"),
    ],
)
def test_what_replaces_a_function_of_torch_is_refused(
    tmp_path: Path, run_daemon: Callable[..., Daemon], place: str, code: str, named: str
) -> None:
    put(tmp_path, "bad", **{place: code})
    put(tmp_path, "good", forward="x = torch.nn.functional.relu(x); torch.softmax(x, 1); torch.Tensor.add(x, 1)")
    running = run_daemon("--model-repository", str(tmp_path))
    with Client(running.endpoint, timeout=60.0) as tnx:
        with pytest.raises(FailedPrecondition, match=re.escape(f"{named}, which all models use")):
            tnx.predict(X, model="bad")
        assert np.array_equal(tnx.predict(X, model="good").output, X + 1)


# --- processes that a forward starts -------------------------------------------------------------------------


def children(pid: int) -> set[int]:
    """Processes that threads of a process have started and that run."""
    return {int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()}


def test_a_forward_may_have_a_pool_of_processes(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> None:
    forward = "with multiprocessing.get_context('fork').Pool(1) as pool: pool.apply(abs, (1,))"
    put(tmp_path, "pool", on_import="import multiprocessing", forward=forward, settings=STARTS)
    put(tmp_path, "good")
    running = run_daemon("--model-repository", str(tmp_path))
    with Client(running.endpoint, timeout=60.0) as tnx:
        for name in ("pool", "good", "pool", "good"):
            assert np.array_equal(tnx.predict(X, model=name).output, X + 1)
        assert tnx.health().status == "ready"
    assert children(running.process.pid) == set()
    assert running.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_forward_forks_ends_with_the_daemon(
    tmp_path: Path, run_daemon: Callable[..., Daemon], number: signal.Signals
) -> None:
    """It holds copies of the sockets that the daemon listens on."""
    fork = "if x.amax() == 7 and os.fork() == 0: time.sleep(600); os._exit(0)"
    put(tmp_path, "forks", on_import="import time", forward=fork)
    place = held_port()  # where nobody else may be, when the daemon is not there any more
    arguments = ("--model-repository", str(tmp_path), "--bind", endpoint_of(place))
    running = run_daemon(*arguments)
    with Client(running.endpoint, timeout=60.0) as tnx:
        tnx.predict(X * 7, model="forks")
        (child,) = children(running.process.pid)
    try:
        running.stop(number)
        until = time.monotonic() + 60
        while Path(f"/proc/{child}").exists() and time.monotonic() < until:
            time.sleep(0.02)  # between two looks: nobody but init hears of the end of a grandchild
        assert not Path(f"/proc/{child}").exists()
        run_daemon(*arguments)
    finally:
        place.close()
        if Path(f"/proc/{child}").exists():
            os.kill(child, signal.SIGKILL)


def test_a_forward_may_start_programs(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> None:
    forward = "subprocess.run(['true'], check=True); subprocess.run(['true'], check=True, preexec_fn=os.getpid)"
    put(tmp_path, "runs", on_import="import subprocess", forward=forward, settings=STARTS)
    running = run_daemon("--model-repository", str(tmp_path))
    with Client(running.endpoint, timeout=60.0) as tnx:
        assert np.array_equal(tnx.predict(X, model="runs").output, X + 1)
    assert running.stop() == 0
