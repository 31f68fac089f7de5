"""Pipelines of a real daemon: asked by both clients and the tool, while their models come and go."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from conftest import Daemon, serving_daemon
from model_repositories import SAYS_TOML, Repository
from tnxctl import AsyncClient, Client
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, Internal, ResourceExhausted, TensorNextError, Unavailable
from tool import run

TIMES = """
import torch

class Times(torch.nn.Module):
    def forward(self, x):
        return x * {factor}

def make():
    return Times()
"""
"""A module that multiplies. Args: factor."""

ADDS = """
import torch

class Adds(torch.nn.Module):
    def forward(self, a, b):
        return {"sum": a + b}

make = Adds
"""

ADDS_TOML = """
factory = "says:make"
max_batch_size = 8
inputs = [{ name = "a", datatype = "FP32", shape = [-1, 2] }, { name = "b", datatype = "FP32", shape = [-1, 2] }]
outputs = [{ name = "sum", datatype = "FP32", shape = [-1, 2] }]
"""

FINDS = """
import torch

class Finds(torch.nn.Module):
    def forward(self, x):
        return x[x[:, 0] > 0]

make = Finds
"""
"""A module whose answer has as many rows as it finds."""

FINDS_TOML = SAYS_TOML.replace("max_batch_size = 8", "max_batch_size = 0")

LINE = """
inputs = ["x"]
steps = [
    {{ name = "first", model = "{0}", inputs = {{ x = "x" }} }},
    {{ name = "second", model = "{1}", inputs = {{ x = "first.y" }} }},
    {{ name = "third", model = "{2}", inputs = {{ x = "second.y" }} }},
]
outputs = {{ y = "third.y" }}
"""

DIAMOND = """
inputs = ["x"]
steps = [
    { name = "left", model = "double", inputs = { x = "x" } },
    { name = "right", model = "triple", inputs = { x = "x" } },
    { name = "join", model = "adds", inputs = { a = "left.y", b = "right.y" } },
]
outputs = { sum = "join.sum", right = "right.y" }
"""

DETECT = """
inputs = ["x"]
steps = [
    {{ name = "detect", model = "finds", inputs = {{ x = "x" }}{0} }},
    {{ name = "judge", model = "double", inputs = {{ x = "detect.y" }} }},
]
outputs = {{ y = "judge.y" }}
"""


WRONG = {
    "nowhere": (LINE.format("double", "tripple", "double"), "steps[1].model: no model 'tripple'; there are "),
    "version": (LINE.format("double", "triple@7", "double"), "steps[1].model: model 'triple' has no version '7'"),
    "broken": (LINE.format("double", "bad", "double"), "steps[1].model: model 'bad' cannot be served: bad/1: "),
    "nested": (LINE.format("double", "line", "double"), "steps[1].model: 'line' is a pipeline: name its steps here"),
    "itself": (LINE.format("double", "itself", "double"), "steps[1].model: model 'itself@1' is still being loaded"),
    "inputs": (LINE.format("adds", "double", "double"), "steps[0].inputs.x: step 'first' (adds@1) has no input 'x'"),
    "circle": (
        LINE.format("double", "triple", "double").replace('{ x = "x" }', '{ x = "x", more = "third.y" }'),
        "steps: first -> second -> third -> first: each of them waits for the one before it",
    ),
    "rows": (DETECT.format("").replace("finds", "one"), "steps[0].changes_rows: has to be true: step 'detect' (one@1)"),
}
"""Pipelines that cannot be served, and what is said about them."""


class Models(Repository):
    """A repository of models that multiply, and pipelines of them."""

    def times(self, name: str, factor: float, version: int = 1, more: str = "") -> None:
        self.settings(name, f"{SAYS_TOML}{more}\n")
        self.publish(
            name,
            version,
            {"model.safetensors": safetensors.torch.save({}), "says.py": TIMES.format(factor=factor).encode()},
        )

    def module(self, name: str, source: str, toml: str) -> None:
        self.settings(name, toml)
        self.publish(name, 1, {"model.safetensors": safetensors.torch.save({}), "says.py": source.encode()})

    def pipeline(self, name: str, text: str, version: int = 1) -> None:
        self.publish(name, version, {"pipeline.toml": text.encode()})


def x(*values: float) -> Array:
    return np.repeat(np.array(values or (1.0,), np.float32)[:, None], 2, axis=1)


def standard(root: Path) -> Models:
    models = Models(root)
    models.times("double", 2)
    models.times("triple", 3)
    models.module("adds", ADDS, ADDS_TOML)
    models.module("finds", FINDS, FINDS_TOML)
    models.pipeline("line", LINE.format("double", "triple@1", "double"))
    models.pipeline("diamond", DIAMOND)
    models.pipeline("detect", DETECT.format(", changes_rows = true"))
    models.pipeline("strict", DETECT.format(""))
    return models


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with pipelines, some of which cannot be served, for tests that do it no harm."""
    folder = tmp_path_factory.mktemp("pipelines")
    models = standard(folder / "models")
    (models.root / "bad" / "1").mkdir(parents=True)
    one = FINDS_TOML.replace('"x", datatype = "FP32", shape = [-1, 2]', '"x", datatype = "FP32", shape = [2]')
    models.module("one", FINDS.replace("x[x[:, 0] > 0]", "x.reshape(1, 2)"), one)
    for name, (text, _) in WRONG.items():
        models.pipeline(name, text)
    with serving_daemon(folder / "log", "--model-repository", str(folder / "models")) as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with Client(daemon.endpoint, timeout=60.0) as connected:
        yield connected


# --- what is asked -------------------------------------------------------------------------------------------


def test_three_in_a_row(client: Client) -> None:
    given = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    result = client.predict(given, model="line")
    np.testing.assert_allclose(result.output, given * 12, rtol=1e-6)
    assert (result.model, result.version, result.device) == ("line", "1", "cpu")
    assert [(step.name, step.model, step.version) for step in result.steps] == [
        ("first", "double", "1"),
        ("second", "triple", "1"),
        ("third", "double", "1"),
    ]
    assert client.predict(given, model="double").steps == ()


def test_a_diamond(client: Client) -> None:
    result = client.predict({"x": x(1, 2)}, model="diamond@1")
    assert list(result.outputs) == ["sum", "right"]
    np.testing.assert_array_equal(result.outputs["sum"], x(5, 10))
    np.testing.assert_array_equal(result.outputs["right"], x(3, 6))


def test_many_at_a_time(daemon: Daemon, client: Client) -> None:
    futures = [client.submit(x(k), model=name) for k in range(50) for name in ("line", "diamond", "double")]
    for k, (line, diamond, double) in enumerate(zip(*[iter(futures)] * 3, strict=True)):
        np.testing.assert_array_equal(line.result().output, x(12 * k))
        np.testing.assert_array_equal(diamond.result().outputs["sum"], x(5 * k))
        np.testing.assert_array_equal(double.result().output, x(2 * k))

    async def ask() -> list[Array]:
        async with AsyncClient(daemon.endpoint, timeout=60.0) as tnx:
            return [
                result.output for result in await asyncio.gather(*[tnx.predict(x(k), model="line") for k in (1, 2)])
            ]

    one, two = asyncio.run(ask())
    np.testing.assert_array_equal(one, x(12))
    np.testing.assert_array_equal(two, x(24))


def test_no_rows_more_rows_than_a_batch_and_other_widths(client: Client) -> None:
    assert client.predict(x()[:0], model="line").output.shape == (0, 2)
    np.testing.assert_array_equal(client.predict(x(*range(100)), model="line").output, x(*range(0, 1200, 12)))
    with pytest.raises(TensorNextError, match="takes \\[-1, 2\\], got \\[1, 3\\]: axis 1 differs"):
        client.predict(np.zeros((1, 3), np.float32), model="line")


def test_a_step_that_finds_other_rows(client: Client) -> None:
    np.testing.assert_array_equal(client.predict(x(1, -1, 2, -2, 3), model="detect").output, x(2, 4, 6))
    assert client.predict(x(-1), model="detect").output.shape == (0, 2)
    np.testing.assert_array_equal(client.predict(x(1, 2), model="strict").output, x(2, 4))
    with pytest.raises(Internal) as caught:
        client.predict(x(1, -1), model="strict")
    assert caught.value.message == (
        "step 'detect': output 'y' has 1 rows, its inputs have 2; where that is meant, pipeline.toml says "
        "changes_rows = true"
    )


def test_what_the_tool_shows(daemon: Daemon) -> None:
    shown = run("models", "show", "diamond", "--host", daemon.endpoint, "--timeout", 60)
    assert shown.exit_code == 0
    assert "format    pipeline" in shown.stdout
    graph = shown.stdout[shown.stdout.index("○ x") :].split("\n\n")[0]
    assert graph.splitlines() == [
        "○ x            FP32 [-1,2]",
        "├─● left       double       x = x",
        "╰─│─● right    triple       x = x",
        "  ╰─┼─● join   adds         a = left.y, b = right.y",
        "    │ ╰─○ sum  FP32 [-1,2]  join.sum",
        "    ╰─○ right  FP32 [-1,2]  right.y",
    ]
    document = json.loads(run("models", "show", "line", "--json", "--host", daemon.endpoint, "--timeout", 60).stdout)
    assert document["pipeline"]["steps"][1] == {"name": "second", "model": "triple@1", "inputs": {"x": "first.y"}}
    assert document["pipeline"]["outputs"] == {"y": "third.y"}
    listed = run("models", "--host", daemon.endpoint, "--timeout", 60).stdout
    assert len([line for line in listed.splitlines() if " ready " in line]) == 9

    said = run("predict", "--model", "line", "--count", "3", "--host", daemon.endpoint, "--timeout", 60)
    assert said.exit_code == 0
    steps = said.stdout[said.stdout.index("step ") :].splitlines()
    assert [line.split()[:3] for line in steps] == [
        ["step", "model", "batch"],
        ["first", "double@1", "1.0"],
        ["second", "triple@1", "1.0"],
        ["third", "double@1", "1.0"],
    ]
    answer = json.loads(run("predict", "--model", "line", "--json", "--host", daemon.endpoint, "--timeout", 60).stdout)
    assert [step["name"] for step in answer["answers"][0]["steps"]] == ["first", "second", "third"]
    assert [step["step"] for step in answer["step_means"]] == ["first", "second", "third"]


def test_the_example_call_of_the_tool_works(daemon: Daemon, client: Client) -> None:
    info = client.metadata("diamond")
    assert (info.format, info.max_batch_size, info.memory_mb, info.devices) == ("pipeline", 8, 0.0, ("cpu",))
    call = json.loads(run("models", "show", "diamond", "--json", "--host", daemon.endpoint, "--timeout", 60).stdout)[
        "example"
    ]["python"]
    exec(compile(call, "call", "exec"), {})
    detect = run("models", "show", "detect", "--host", daemon.endpoint, "--timeout", 60).stdout
    assert "Not all steps count rows" in detect


# --- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRONG)
def test_a_pipeline_that_cannot_be_served_says_why(name: str, client: Client) -> None:
    """Found at load, one by one; everything else is served."""
    (info,) = [info for info in client.models() if info.name == name]
    assert info.status == "failed"
    assert info.error.startswith(f"{name}/1/pipeline.toml: {WRONG[name][1]}")
    with pytest.raises(FailedPrecondition):
        client.predict(x(), model=name)


def test_some_of_that_is_found_without_a_start(daemon: Daemon) -> None:
    command = [sys.executable, "-m", "tnxd", "--check", "--model-repository", str(daemon.log.parent / "models")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 1
    for said in (
        "nowhere/1/pipeline.toml: steps[1].model: there is no model 'tripple', only ",
        "version/1/pipeline.toml: steps[1].model: there is no version 7 of 'triple', only 1",
        "circle/1/pipeline.toml: steps: first -> second -> third -> first: ",
    ):
        assert said in checked.stderr


# --- versions that come and go -------------------------------------------------------------------------------


class Asking:
    """Clients that ask a model without a pause, each on a thread of its own, within a `with` block.

    Attributes: answers: how often each number came. errors: how often each code and message did.
    """

    def __init__(self, endpoint: str, *models: str, clients: int = 4) -> None:
        self.answers: Counter[float] = Counter()
        self.errors: Counter[tuple[str, str]] = Counter()
        self._endpoint = endpoint
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._count = threading.Condition(self._lock)
        self._threads = [threading.Thread(target=self._ask, args=(models[n % len(models)],)) for n in range(clients)]

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def await_more(self, number: float | None = None, times: int = 20) -> None:
        """Wait for so many more answers, with that number, or for errors if it is None."""
        with self._lock:
            until = self._seen(number) + times
            assert self._count.wait_for(lambda: self._seen(number) >= until, 60), (self.answers, self.errors)

    def _seen(self, number: float | None) -> int:
        return self.errors.total() if number is None else self.answers[number]

    def _ask(self, model: str) -> None:
        with Client(self._endpoint, timeout=60.0) as tnx:
            while not self._stop.is_set():
                try:
                    answer = float(tnx.predict(x(), model=model).output[0, 0])
                    with self._lock:
                        self.answers[answer] += 1
                except TensorNextError as error:
                    with self._lock:
                        self.errors[error.code, error.message] += 1
                with self._lock:
                    self._count.notify_all()


def test_a_step_is_swapped_unloaded_and_loaded_under_load(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> None:
    models = standard(tmp_path / "models")
    daemon = run_daemon("--model-repository", str(models.root))
    with Client(daemon.endpoint, timeout=60.0) as control, Asking(daemon.endpoint, "line") as asking:
        asking.await_more(12.0)
        models.times("double", 5, version=2)
        assert control.reload().loaded == ("double@2",)
        asking.await_more(75.0)  # the steps without a version follow
        models.times("triple", 7, version=2)
        assert control.reload().loaded == ("triple@2",)
        assert {info.version: info.status for info in control.models() if info.name == "triple"} == {
            "1": "ready",  # a pipeline that serves needs it
            "2": "ready",
        }
        asking.await_more(75.0)
        assert not asking.errors
        assert asking.answers.keys() <= {12.0, 30.0, 75.0}

        control.unload("triple@1")
        asking.await_more(None)
        said = "step 'second': model 'triple@1' is {}; tnxctl models load triple@1"
        assert ("FAILED_PRECONDITION", said.format("unloaded")) in asking.errors
        assert set(asking.errors) <= {("FAILED_PRECONDITION", said.format(state)) for state in ("draining", "unloaded")}
        np.testing.assert_array_equal(control.predict(x(), model="diamond").outputs["right"], x(7))
        line = control.metadata("line")
        assert (line.status, line.error) == (
            "failed",
            "line/1/pipeline.toml: steps[1].model: model 'triple@1' is unloaded; tnxctl models load triple@1",
        )
        health = run("health", "--host", daemon.endpoint, "--timeout", 60)
        assert health.exit_code == 9
        assert "line@1" in health.stdout
        assert control.reload().loaded == ("triple@1",)  # since a pipeline names it
        asking.await_more(75.0)
        assert control.metadata("line").status == "ready"

        # Its last pipeline takes the version with it.
        models.pipeline("line", LINE.format("double", "triple", "double"), version=2)
        changes = control.reload()
        assert set(changes.loaded) == {"line@2"}
        assert set(changes.unloaded) == {"line@1", "triple@1"}
        asking.await_more(175.0)
    assert {code for code, _ in asking.errors} == {"FAILED_PRECONDITION"}
    with Client(daemon.endpoint, timeout=20.0) as client:
        drain(daemon, client)


def drain(daemon: Daemon, client: Client) -> None:
    """Stop a daemon that has much to do: what it has taken in is answered, the rest refused, and nothing forgotten."""
    futures = [client.submit(x(k), model="line") for k in range(200)]
    futures[0].result()
    daemon.process.send_signal(signal.SIGTERM)
    refused = []
    for k, future in enumerate(futures):
        try:
            np.testing.assert_array_equal(future.result().output, x(175 * k))
        except Unavailable as error:
            refused.append(error.message)
    assert len(refused) < len(futures)
    assert not [message for message in refused if "step" in message]
    assert daemon.process.wait(60) == 0


def test_a_step_that_had_to_make_room_comes_back(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> None:
    models = Models(tmp_path / "models")
    for name, factor in (("double", 2), ("triple", 3), ("other", 4)):
        models.settings(name, SAYS_TOML)
        models.publish(name, 1, heavy(factor))
    models.pipeline("line", LINE.format("double", "triple", "double"))
    config = tmp_path / "tnxd.toml"
    config.write_text("[memory]\ncpu_mb = 2.5\n")
    daemon = run_daemon("--model-repository", str(models.root), "--config", str(config))
    with Client(daemon.endpoint, timeout=60.0) as client:
        for _ in range(2):
            np.testing.assert_array_equal(client.predict(x(), model="line").output, x(12))
            np.testing.assert_array_equal(client.predict(x(), model="other").output, x(4))
        models.pipeline("wide", LINE.format("double", "triple", "other"))
        failed = client.reload().failed
        assert "steps: their models take 3 MiB together, and cpu may hold 2 MiB in all" in failed["wide@1"]
    assert daemon.stop() == 0


WIDENS = """
import numpy as np

class Model:
    def predict(self, x):
        return {"y": np.repeat(x[:, :1], 1 << 18, axis=1)}
"""
"""A model.py that makes a MiB of four bytes."""

SUMS = """
import os, threading

class Model:
    def predict(self, x):
        while not os.path.exists({go!r}):
            threading.Event().wait(0.01)
        return {{"y": x[:, :1]}}
"""
"""A model.py that waits for a file."""

PLAIN_TOML = """
max_batch_size = 8
inputs = [{{ name = "x", datatype = "FP32", shape = [-1, {0}] }}]
outputs = [{{ name = "y", datatype = "FP32", shape = [-1, {1}] }}]
"""

WIDEN = """
inputs = ["x"]
steps = [
    { name = "widen", model = "widens", inputs = { x = "x" } },
    { name = "sum", model = "sums", inputs = { x = "widen.y" } },
]
outputs = { y = "sum.y" }
"""


def test_what_steps_give_each_other_counts_among_what_a_client_has_in_flight(
    tmp_path: Path, run_daemon: Callable[..., Daemon]
) -> None:
    """The first step of many small requests would fill the memory before the second is through with them."""
    models = Repository(tmp_path / "models")
    go = tmp_path / "go"
    go.touch()
    sums = SUMS.format(go=str(go))
    for name, source, shape in (("widens", WIDENS, (1, 1 << 18)), ("sums", sums, (1 << 18, 1))):
        models.settings(name, PLAIN_TOML.format(*shape))
        models.publish(name, 1, {"model.py": source.encode()})
    models.publish("pipe", 1, {"pipeline.toml": WIDEN.encode()})
    config = tmp_path / "tnxd.toml"
    config.write_text(
        "[limits]\nmessage_bytes = 4194304\n[clients]\nmax_mb = 20\n[cpu]\nworkers = 4\ninline_limit_us = 0\n"
    )
    daemon = run_daemon("--model-repository", str(models.root), "--config", str(config))
    with Client(daemon.endpoint, timeout=60.0) as client:
        one = np.ones((1, 1), np.float32)
        for _ in range(2):  # first nobody knows what is to come, then it is refused on arrival
            go.unlink()
            futures = [client.submit(one, model="pipe") for _ in range(200)]
            wait(futures, return_when=FIRST_COMPLETED)  # one that is refused: the second step answers none
            go.touch()
            errors = [future.exception() for future in futures]
            refused = [error for error in errors if error is not None]
            assert {type(error) for error in refused} == {ResourceExhausted}
            assert "bytes of 127.0.0.1 are in flight, the limit is 20971520" in str(refused[0])
            assert len(refused) < len(futures)
            np.testing.assert_array_equal(client.predict(one, model="pipe").output, one)
        many = np.ones((30, 1), np.float32)  # more than the limit, but alone
        np.testing.assert_array_equal(client.predict(many, model="pipe").output, many)
    assert daemon.stop() == 0


def heavy(factor: float) -> dict[str, bytes]:
    """A model that multiplies, with a mebibyte of weights."""
    source = TIMES.format(factor="self.weight.amax()").replace(
        "    def forward", "    def __init__(self):\n        super().__init__()\n"
        "        self.weight = torch.nn.Parameter(torch.empty(262144))\n    def forward", 1
    )  # fmt: skip
    weights = {"weight": torch.full((262144,), float(factor))}
    return {"model.safetensors": safetensors.torch.save(weights), "says.py": source.encode()}


def test_the_shadow_and_the_audit_of_a_step(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> None:
    models = standard(tmp_path / "models")
    models.times("double", 2.5, version=2, more='audit = 1.0\nversions = "all"\n[traffic]\nshadow = "2"')
    models.pipeline("line", LINE.format("double", "triple", "double"), version=2)
    models.settings("line", 'versions = "all"\n')
    daemon = run_daemon("--model-repository", str(models.root))
    with Client(daemon.endpoint, timeout=60.0) as client:
        with pytest.raises(FailedPrecondition, match="is a pipeline and runs no batches to be copied"):
            client.route("line", {"1": 1}, shadow="2")
        client.route("line", {"1": 1, "2": 1})
        versions = {client.predict(x(), model="line", route_key=str(key)).version for key in range(20)}
        assert versions == {"1", "2"}
        while True:
            client.predict(x(), model="line")
            infos = {f"{info.name}@{info.version}": info for info in client.models()}
            try:
                compared = client.compare("double", "1", "2")
            except FailedPrecondition:
                continue
            if compared.requests and infos["double@1"].audited:
                break
        assert compared.outputs[0].max_abs > 0
        assert infos["double@1"].audit_differences == 0
    assert daemon.stop() == 0
