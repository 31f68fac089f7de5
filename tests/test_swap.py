"""Versions come and go under load: no request fails, none is answered by the wrong weights, memory comes back.

To see that memory comes back takes SWAPS swaps, 9 by default; `SWAPS=100 make slow TESTS=tests/test_swap.py` takes
longer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
import pytest
import torch

from conftest import Daemon, serving_daemon
from model_repositories import MODEL_TOML, WIDTH, Repository, Scaled, exported, rows, rss_mb, scaled, scaled_program
from tnxctl import Client
from tnxctl.protocol.errors import FailedPrecondition, TensorNextError

SWAPS = int(os.environ.get("SWAPS", "9"))

CLIENTS = 4

RunDaemon = Callable[..., Daemon]


@dataclass
class Load:
    """Clients that ask one model, each from a thread of its own and without a pause, within a `with` block.

    The model is a `Scaled`; its scales grow with time. An answer has to come from one scale alone, not from one that
    had been replaced when the request was sent, and not from one that was not there yet when the answer came.

    Attributes:
        current: the scale that serves, at least. published: the scale that may already serve.
        pause: seconds between an answer and the next request of a client.
        wrong, errors: what went wrong, in words.
        answers: how many came, by scale.
    """

    endpoint: str
    model: str
    current: float
    published: float = 0.0
    pause: float = 0.0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    answers: dict[float, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.published = max(self.published, self.current)
        self._stop = threading.Event()
        self._answered = [threading.Event() for _ in range(CLIENTS)]
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.await_answers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def await_answers(self) -> None:
        """Wait until every client has got an answer to a request that it sends from now on, or cannot go on."""
        for _ in range(2):  # the first one may be to a request that was sent before
            for answered in self._answered:
                answered.clear()
            for answered, thread in zip(self._answered, self._threads, strict=True):
                while thread.is_alive() and not answered.wait(0.1):
                    pass

    def clean(self) -> bool:
        """True if nothing went wrong; prints what did."""
        for line in [*self.wrong[:5], *self.errors[:5]]:
            print(line)
        return not self.wrong and not self.errors

    def _ask(self, number: int) -> None:
        x = rows(*(1.0 + number + row for row in range(1 + number)))
        with Client(self.endpoint, timeout=60.0) as tnx:
            while not self._stop.is_set():
                oldest = self.current
                try:
                    result = tnx.predict(x, model=self.model)
                except TensorNextError as error:
                    self.errors.append(f"{type(error).__name__}: {error}")
                    return
                newest = self.published
                scale = float(next(iter(result.outputs.values()))[0, 0] / x[0, 0])
                if not oldest <= scale <= newest:
                    self.wrong.append(f"scale {scale}, not {oldest} to {newest}")
                for name, output in result.outputs.items():
                    if not np.array_equal(output, x * scale):
                        self.wrong.append(f"{name} of scale {scale}: {output.tolist()}")
                with self._lock:
                    self.answers[scale] = self.answers.get(scale, 0) + 1
                self._answered[number].set()
                self._stop.wait(self.pause)


def slope(samples: list[float]) -> float:
    """Growth per sample, of the line that fits best."""
    return float(np.polyfit(range(len(samples)), samples, 1)[0])


# --- swaps ---------------------------------------------------------------------------------------------------

MIB = 16.0
"""Size of the weights of a version that is swapped."""

MOST_GROWTH_MIB = MIB / 2
"""Per swap; a version that stays in memory is twice as much. The allocator may keep one or two for a while."""

LEAK = f"import builtins; builtins.__dict__.setdefault('leak', []).append(torch.ones({int(1.5 * MIB * 2**18)}))"
"""Statement of a factory that leaks. One runs in two of three swaps, so that is as much per swap as a version."""


def swap(
    folder: Path, daemon: Daemon, repository: Repository, *, times: int, before: str = "pass", mib: float = MIB
) -> list[float]:
    """Swap the versions of the model "swapped" under load, one after the other.

    They come by turns as a new number, as new files of the same number, and as a new number in another format.

    Args:
        before: what the factories do first. mib: size of the weights of each.

    Returns:
        The daemon's memory in MiB after each swap.
    """
    number, scale = 1, 1.0
    memory: list[float] = []
    scaled_program(folder, scale)  # imports what takes seconds of a core beside the load
    with Client(daemon.endpoint, timeout=60) as tnx, Load(daemon.endpoint, "swapped", current=scale) as load:
        for count in range(times):
            scale += 1
            kind = count % 3
            files = scaled_program(folder, scale, mib) if kind == 2 else scaled(scale, mib, before=before)
            old, number = number, number if kind == 1 else number + 1
            load.published = scale
            repository.publish("swapped", number, files)
            report = tnx.reload()
            load.current = scale
            assert report.failed == {}
            assert report.loaded == (f"swapped@{number}",)
            assert report.unloaded == (() if number == old else (f"swapped@{old}",))
            if number != old:
                repository.remove("swapped", old)
            load.await_answers()
            memory.append(rss_mb(daemon.process.pid))
            assert load.clean()
    assert load.clean()
    assert set(load.answers) == set(np.arange(1, scale + 1))
    print(f"{len(memory)} swaps, {sum(load.answers.values())} answers:", ", ".join(f"{each:.0f}" for each in memory))
    return memory


@pytest.fixture
def swapped(run_daemon: RunDaemon, tmp_path: Path) -> tuple[Daemon, Repository]:
    """A daemon that serves version 1 of the model "swapped", with scale 1."""
    repository = Repository(tmp_path / "models")
    repository.settings("swapped", f'optimize = "none"\n{MODEL_TOML}')  # to compile takes a busy machine a minute
    repository.publish("swapped", 1, scaled(1.0, MIB))
    return run_daemon("--model-repository", str(repository.root)), repository


def test_no_request_fails_while_versions_are_swapped(swapped: tuple[Daemon, Repository], tmp_path: Path) -> None:
    """In each of the three ways. Whether memory comes back is not looked at, so the weights are small."""
    daemon, repository = swapped
    swap(tmp_path, daemon, repository, times=3, mib=MIB / 8)
    assert daemon.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(180 + 6 * SWAPS)
def test_memory_comes_back_from_versions_that_are_swapped(swapped: tuple[Daemon, Repository], tmp_path: Path) -> None:
    memory = swap(tmp_path, *swapped, times=SWAPS)
    assert slope(memory[3:]) < MOST_GROWTH_MIB


@pytest.mark.slow
def test_a_version_that_stays_in_memory_would_be_seen(swapped: tuple[Daemon, Repository], tmp_path: Path) -> None:
    memory = swap(tmp_path, *swapped, times=8, before=LEAK)
    assert slope(memory[3:]) > MOST_GROWTH_MIB


# --- versions that cannot be loaded --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Repository]]:
    """A daemon with a repository that holds one model."""
    folder = tmp_path_factory.mktemp("shared")
    repository = Repository(folder / "models")
    repository.settings("first")
    repository.publish("first", 1, scaled(1.0))
    with serving_daemon(folder / "log", "--model-repository", str(repository.root)) as running:
        yield running, repository


@pytest.fixture
def shared(shared_daemon: tuple[Daemon, Repository]) -> Iterator[tuple[Daemon, Repository]]:
    """The same for one test; the models that it adds are taken away afterwards."""
    daemon, repository = shared_daemon
    yield daemon, repository
    for model in repository.root.iterdir():
        if model.name != "first":
            repository.discard(model.name)
    with Client(daemon.endpoint, timeout=60) as tnx:
        assert tnx.reload().failed == {}
        assert {model.name for model in tnx.models()} == {"first"}


def cut(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same, with half of the weights."""
    return {name: content if name.endswith(".py") else content[: len(content) // 2] for name, content in files.items()}


def with_network(old: str, new: str) -> dict[str, bytes]:
    """A version whose module of the factory differs."""
    files = scaled(2.0)
    source = files["network.py"].decode()
    assert old in source
    return {**files, "network.py": source.replace(old, new).encode()}


BROKEN = [
    pytest.param(cut(scaled(2.0)), "model.safetensors: damaged", id="truncated weights"),
    pytest.param({"network.py": b""}, "model.safetensors", id="no weights"),
    pytest.param({**scaled(2.0), "network.py": b"def scaled(:"}, "network.py", id="factory that does not compile"),
    pytest.param({**scaled(2.0), "network.py": b""}, "the factory 'scaled'", id="factory that is missing"),
    pytest.param(scaled(2.0, before="raise OSError('no licence')"), "OSError: no licence", id="factory that raises"),
    pytest.param(scaled(2.0, before="raise SystemExit(3)"), "SystemExit: 3", id="factory that exits"),
    pytest.param(scaled(2.0, before="return 3"), "int, not a torch.nn.Module", id="factory that makes no module"),
    pytest.param(with_network("self.weight =", "self.other ="), "'other' is missing", id="weights of another network"),
    pytest.param(with_network("x * self.weight.amax()", "x[:, :2]"), "shape [1, 2]", id="output of another shape"),
    pytest.param(
        with_network("x * self.weight.amax()", "(x * self.weight.amax()).double()"),
        "output 'high' is torch.float64",
        id="output of another type",
    ),
    pytest.param(
        with_network("return self", "assert len(x) < 16, 'too many rows'; return self"),
        "too many rows",
        id="warm-up that fails",
    ),
]


def publish_in_vain(
    daemon: Daemon, repository: Repository, tnx: Client, load: Load, files: dict[str, bytes]
) -> tuple[str, ...]:
    """Publish a version 2 that cannot take over; version 1 goes on.

    Returns:
        What is said about it in the answer to the reload, in health and in the log.
    """
    name = load.model
    repository.publish(name, 2, files)
    report = tnx.reload()
    load.await_answers()
    log = daemon.logged(f"{name}@2 cannot be")
    assert (report.loaded, report.unloaded) == ((), ())
    assert list(report.failed) == [f"{name}@2"]
    with pytest.raises(TensorNextError):
        tnx.predict(rows(1.0), model=f"{name}@2")
    health = tnx.health()
    versions = {model.version: model for model in health.models if model.name == name}
    assert health.status == "ready"
    assert (versions["1"].status, versions["1"].traffic) == ("ready", 1.0)
    assert (versions["2"].status, versions["2"].traffic) == ("failed", 0.0)
    logged = "\n".join(line for line in log.splitlines() if f"{name}@2" in line)
    return report.failed[f"{name}@2"], versions["2"].error, logged


def refuse_version_2(
    daemon: Daemon, repository: Repository, name: str, files: dict[str, bytes], named: str, mended: dict[str, bytes]
) -> None:
    """Under load, publish a version 2 that cannot be served; then one that can.

    Args:
        name: of a model with a version 1 of scale 1. mended: a version of scale 2.
        named: what has to be said in the answer to the reload, in that to the load, in health and in the log.
    """
    with Client(daemon.endpoint, timeout=60) as tnx:
        assert tnx.reload().loaded == (f"{name}@1",)
        with Load(daemon.endpoint, name, current=1.0) as load:
            said = publish_in_vain(daemon, repository, tnx, load, files)
            with pytest.raises(FailedPrecondition) as refused:
                tnx.load(f"{name}@2")
            for why in (*said, str(refused.value)):
                assert named in why
            load.published = 2.0
            repository.publish(name, 2, mended)
            report = tnx.reload()
            load.current = 2.0
            assert (report.loaded, report.unloaded, report.failed) == ((f"{name}@2",), (f"{name}@1",), {})
            load.await_answers()
        assert load.clean()


@pytest.mark.parametrize(("files", "named"), BROKEN)
def test_a_version_that_cannot_be_loaded_leaves_the_old_one_serving(
    shared: tuple[Daemon, Repository], request: pytest.FixtureRequest, files: dict[str, bytes], named: str
) -> None:
    daemon, repository = shared
    name = request.node.callspec.id.replace(" ", "-")
    repository.settings(name)
    repository.publish(name, 1, scaled(1.0))
    refuse_version_2(daemon, repository, name, files, named, mended=scaled(2.0))


@pytest.mark.parametrize("content", [None, b""], ids=["truncated", "empty"])
def test_a_program_that_cannot_be_loaded_leaves_the_old_one_serving(
    shared: tuple[Daemon, Repository], tmp_path: Path, content: bytes | None
) -> None:
    daemon, repository = shared
    repository.publish("program", 1, scaled_program(tmp_path, 1.0))
    files = cut(scaled_program(tmp_path, 2.0)) if content is None else {"model.pt2": content}
    refuse_version_2(daemon, repository, "program", files, "model.pt2", mended=scaled_program(tmp_path, 2.0))


def test_a_version_with_another_signature_does_not_take_over(shared: tuple[Daemon, Repository], tmp_path: Path) -> None:
    """Asked for by its number it is served beside; traffic without a number cannot be routed to it."""
    daemon, repository = shared
    repository.publish("other", 1, scaled_program(tmp_path, 1.0))
    wider = exported(tmp_path, Scaled(torch.full((3,), 2.0)), torch.zeros(2, WIDTH + 1), max_batch=16)
    with Client(daemon.endpoint, timeout=60) as tnx:
        assert tnx.reload().loaded == ("other@1",)
        with Load(daemon.endpoint, "other", current=1.0) as load:
            for why in publish_in_vain(daemon, repository, tnx, load, {"model.pt2": wider}):
                for word in ("signature", "version 1", str(WIDTH + 1)):
                    assert word in why
            traffic = {model.version: (model.status, model.traffic) for model in tnx.load("other@2")}
            assert traffic == {"1": ("ready", 1.0), "2": ("ready", 0.0)}
            x = np.ones((1, WIDTH + 1), np.float32)
            assert all((output == 2).all() for output in tnx.predict(x, model="other@2").outputs.values())
            with pytest.raises(FailedPrecondition, match=str(WIDTH + 1)):
                tnx.route("other", {1: 50, 2: 50})
            load.await_answers()
        assert load.clean()


def test_files_that_change_under_a_version_that_serves(shared: tuple[Daemon, Repository]) -> None:
    """Broken ones under the same number: what was loaded before goes on."""
    daemon, repository = shared
    repository.settings("changed")
    repository.publish("changed", 1, scaled(1.0))
    with Client(daemon.endpoint, timeout=60) as tnx:
        assert tnx.reload().failed == {}
        with Load(daemon.endpoint, "changed", current=1.0) as load:
            repository.publish("changed", 1, scaled(2.0, before="raise OSError('no licence')"))
            report = tnx.reload()
            assert (report.loaded, report.unloaded, list(report.failed)) == ((), (), ["changed@1"])
            (model,) = [model for model in tnx.models() if model.name == "changed"]
            assert model.status == "ready"
            assert "no licence" in model.error
            load.await_answers()
            load.published = 3.0
            repository.publish("changed", 1, scaled(3.0))
            assert tnx.reload().loaded == ("changed@1",)
            load.current = 3.0
            load.await_answers()
        assert load.clean()
        assert set(load.answers) == {1.0, 3.0}


@pytest.mark.parametrize("shorter", [False, True])
def test_weights_that_are_written_over_in_place(shared: tuple[Daemon, Repository], shorter: bool) -> None:
    """The file that a model was loaded from gets other contents, or fewer, while it serves, as by `cp`."""
    daemon, repository = shared
    name = f"overwritten-{shorter}"
    repository.settings(name)
    version = repository.publish(name, 1, scaled(1.0, 8))
    new = scaled(2.0, 1 if shorter else 8)
    with Client(daemon.endpoint, timeout=60) as tnx:
        assert tnx.reload().failed == {}
        with Load(daemon.endpoint, name, current=1.0) as load:
            for file, content in new.items():
                (version / file).write_bytes(content)
            load.await_answers()
            load.published = 2.0
            assert tnx.reload().loaded == (f"{name}@1",)
            load.current = 2.0
            load.await_answers()
        assert load.clean()


def test_what_is_no_version_is_named_and_the_rest_serves(shared: tuple[Daemon, Repository]) -> None:
    daemon, repository = shared
    repository.settings("odd-versions")
    for version in ("1", "two", "03", "-4", "0"):
        repository.publish("odd-versions", version, scaled(1.0))
    repository.settings("typing-mistake", MODEL_TOML.replace("max_batch_size", "max_batchsize"))
    repository.publish("typing-mistake", 1, scaled(1.0))
    with Client(daemon.endpoint, timeout=60) as tnx:
        report = tnx.reload()
        failures = "\n".join(f"{what}: {why}" for what, why in report.failed.items())
        for word in ("two", "03", "-4", "max_batchsize", "typing-mistake"):
            assert word in failures
        assert tnx.predict(rows(3.0), model="first").outputs["low"][0, 0] == 3.0
        assert tnx.predict(rows(3.0), model="odd-versions").version == "1"
        with pytest.raises(TensorNextError, match="typing-mistake"):
            tnx.predict(rows(3.0), model="typing-mistake")


def test_a_factory_that_never_returns_is_given_up(run_daemon: RunDaemon, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "models")
    repository.settings("stuck")
    repository.publish("stuck", 1, scaled(1.0))
    config = tmp_path / "tnxd.toml"
    config.write_text("load_timeout_s = 15.0\n")  # in which a busy machine loads one, too
    daemon = run_daemon("--config", str(config), "--model-repository", str(repository.root))
    with Client(daemon.endpoint, timeout=60) as tnx:
        with Load(daemon.endpoint, "stuck", current=1.0, pause=0.05) as waiting:  # for as long as a load may take
            repository.publish("stuck", 2, scaled(2.0, before="import threading; threading.Event().wait()"))
            report = tnx.reload()
            assert list(report.failed) == ["stuck@2"]
            assert "load_timeout_s" in report.failed["stuck@2"]
            waiting.await_answers()
        assert waiting.clean()
        with Load(daemon.endpoint, "stuck", current=1.0) as load:
            load.published = 3.0
            repository.publish("stuck", 3, scaled(3.0))  # the daemon can still load
            assert tnx.reload().loaded == ("stuck@3",)
            load.current = 3.0
            load.await_answers()
        assert load.clean()
    assert daemon.stop() == 0


# --- memory --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["safetensors", "pt2"])
def test_memory_comes_back(run_daemon: RunDaemon, tmp_path: Path, kind: str) -> None:
    """A model of 100 MiB, loaded and unloaded ten times."""
    repository = Repository(tmp_path / "models")
    repository.settings("small")
    repository.publish("small", 1, scaled(1.0))
    repository.settings("large")
    repository.publish("large", 1, scaled(1.0, 100) if kind == "safetensors" else scaled_program(tmp_path, 1.0, 100))
    daemon = run_daemon("--model-repository", str(repository.root))
    loaded, unloaded = [], []
    with Client(daemon.endpoint, timeout=60) as tnx:
        for _ in range(10):
            tnx.load("large@1")
            assert tnx.predict(rows(3.0), model="large").outputs["high"][0, 0] == 3.0
            loaded.append(rss_mb(daemon.process.pid))
            tnx.unload("large@1")
            unloaded.append(rss_mb(daemon.process.pid))
            with pytest.raises(TensorNextError):
                tnx.predict(rows(3.0), model="large")
    print(", ".join(f"{high:.0f} {low:.0f}" for high, low in zip(loaded, unloaded, strict=True)))
    assert min(loaded) > max(unloaded) + 80
    # The first time brings what stays: code that is only loaded when it is used, arenas of the allocator.
    assert max(unloaded[1:]) < unloaded[0] + 25
    assert daemon.stop() == 0
