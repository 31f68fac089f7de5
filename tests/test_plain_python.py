"""Models in plain Python through a daemon: they are tried, batched and reported like others, and harm no others."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest

import tool
from conftest import Daemon, serving_daemon
from python_models import DOUBLES, SIGNATURE, await_end, put, rows
from test_common_exports import run
from tnxctl import Client
from tnxctl.protocol.errors import Internal, TensorNextError, Unavailable
from tnxctl.protocol.wire import ModelInfo

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")

ISOLATED = 'isolation = "process"\nmax_batch_size = 8\nwarm_up = [1, 8]\n'
THREAD = "max_batch_size = 8\nwarm_up = [1, 8]\n"

HANGS = """
import time
class Model:
    def load(self, context): self.folder = context.directory
    def predict(self, x):
        while (x == 8).any() and not (self.folder.parent / "go").exists(): time.sleep(0.01)
        return x * 2
"""

OBEYS = """
import os, threading
class Model:
    def predict(self, x):
        if (x == 7).any(): os._exit(3)
        if (x == 8).any(): threading.Event().wait()
        if (x == 9).any(): raise ValueError("nine")
        return x * 2
"""

ODD: dict[str, tuple[str, str]] = {
    "counts": (
        "",
        """
        class Model:
            def load(self, context): self.calls = 0
            def predict(self, x):
                self.calls += 1
                return x + self.calls
        """,
    ),
    "counts_in_process": (
        ISOLATED,
        """
        class Model:
            calls = 0
            def predict(self, x):
                Model.calls += 1
                return x + self.calls
        """,
    ),
    "shared": (
        'state = "shared"\n',
        """
        class Model:
            calls = 0
            def predict(self, x):
                self.calls += 1
                return x * 0 + self.calls
        """,
    ),
    "random": (
        'state = "random"\nisolation = "process"\n',
        """
        import numpy as np
        class Model:
            def load(self, context): self.generator = np.random.default_rng()
            def predict(self, x): return self.generator.random(x.shape, np.float32)
        """,
    ),
    "undeclared": (
        ISOLATED,
        """
        import numpy as np
        class Model:
            def load(self, context): self.generator = np.random.default_rng()
            def predict(self, x): return self.generator.random(x.shape, np.float32)
        """,
    ),
    "mixes": (
        "",
        """
        class Model:
            def predict(self, x): return x - x.mean(axis=0)
        """,
    ),
    "short": (
        THREAD,
        """
        class Model:
            def predict(self, x): return x[:-1] if len(x) > 1 else x
        """,
    ),
    "keeps": (
        THREAD,
        """
        import collections, functools
        class Model:
            def load(self, context): self.seen = collections.deque(maxlen=10); self.calls = 0
            @functools.lru_cache
            def scale(self, rows): return 2
            def predict(self, x):
                self.calls += 1
                self.seen.append(x.copy())
                return x * self.scale(len(x))
        """,
    ),
    "writes": (
        THREAD,
        """
        class Model:
            def predict(self, x):
                x *= 2
                return x
        """,
    ),
    "raises": (
        "",
        """
        class Model:
            def load(self, context): raise OSError("no weights")
            def predict(self, x): return x
        """,
    ),
    "dies": (
        ISOLATED,
        """
        import os
        class Model:
            def predict(self, x): os._exit(5)
        """,
    ),
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    root = tmp_path_factory.mktemp("python")
    models = root / "models"
    for name, (settings, text) in ODD.items():
        put(models, text, name=name, settings=settings)
    put(models, OBEYS, name="obeys", settings=f"{ISOLATED}replicas = 2\naudit = 0.0\n")
    put(models, OBEYS, name="limited", settings=f"{ISOLATED}time_limit_s = 2.0\nreplicas = 2\naudit = 0.0\n")
    put(models, OBEYS, name="thread", settings=THREAD)
    put(models, HANGS, name="hangs", settings=f"{THREAD}time_limit_s = 1.0\n")
    put(models, DOUBLES, name="none", settings=f'{THREAD}isolation = "none"\n')
    found = re.search(r"^## Plain Python\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    with chdir(root):
        run(BLOCK.findall(found[1]))
        run(BLOCK.findall(readme.partition("## Serve your own models")[2])[:2])
    np.save(models / "nearest/1/points.npy", np.array([[0, 0], [3, 4]], np.float32))
    with serving_daemon(root / "log", "--model-repository", str(models)) as running:
        yield running


@pytest.fixture
def tnx(daemon: Daemon) -> Iterator[Client]:
    with Client(daemon.endpoint, timeout=60.0) as client:
        yield client


def info(tnx: Client, name: str) -> ModelInfo:
    return next(each for each in tnx.models() if each.name == name)


def test_the_example_of_the_page_answers(tnx: Client) -> None:
    outputs = tnx.predict(np.array([[0, 1], [3, 3]], np.float32), model="nearest").outputs
    assert {name: output.tolist() for name, output in outputs.items()} == {"nearest": [0, 1], "distance": [1, 1]}


def test_the_example_of_the_readme_answers(tnx: Client) -> None:
    x = np.array([[1, 2, 3]], np.float32)
    assert tnx.predict(x, model="double").output.tolist() == [[2, 4, 6]]


@pytest.mark.parametrize("name", ["thread", "obeys", "keeps", "writes"])
def test_it_batches_and_each_request_has_its_own_answer(tnx: Client, name: str) -> None:
    futures = [tnx.submit(rows(value), model=name) for value in range(20, 60)]
    assert [future.result().output[0, 0] for future in futures] == [2 * value for value in range(20, 60)]
    found = info(tnx, name)
    assert (found.status, found.format, found.max_batch_size, found.state) == ("ready", "python", 8, "pure")
    assert (
        "none that shows: no answer depends on"
        in tool.run("models", "show", name, "--host", tnx.endpoint, "--timeout", 60).stdout
    )


def test_where_it_ran_is_told(tnx: Client) -> None:
    assert tnx.predict(rows(1), model="obeys").device == "process"
    assert tnx.predict(rows(1), model="thread").device == "cpu"
    assert [device.name for device in tnx.health().devices] == ["cpu", "process"]


# --- the trial -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("counts", "an answer depends on earlier requests"),
        ("counts_in_process", "an answer depends on earlier requests"),
        ("undeclared", "an answer depends on earlier requests"),
        ("short", "output 'y' has shape"),
        ("raises", "raises/1/model.py: Model.load() raised OSError: no weights"),
        ("dies", "its process ended with exit code 5 while a batch ran"),
    ],
)
def test_what_cannot_be_served_says_why(tnx: Client, name: str, said: str) -> None:
    found = info(tnx, name)
    assert found.status == "failed"
    assert said in found.error


def test_state_that_is_meant_is_kept(tnx: Client) -> None:
    before = tnx.predict(rows(0), model="shared").output[0, 0]
    assert tnx.predict(rows(0), model="shared").output[0, 0] == before + 1
    assert info(tnx, "shared").state == "shared"


def test_answers_may_be_drawn(tnx: Client) -> None:
    assert tnx.predict(rows(0), model="random").output[0, 0] != tnx.predict(rows(0), model="random").output[0, 0]


def test_rows_that_mix_do_not_share_a_batch(tnx: Client) -> None:
    found = info(tnx, "mixes")
    assert found.max_batch_size == 0
    assert any("axis 0 does not count rows" in note for note in found.notes)


# --- what goes wrong while it serves ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("obeys", 7, "its process ended with exit code 3"),
        ("limited", 8, "gave no answer for 2 s and was ended"),
    ],
)
def test_a_process_that_is_lost_costs_its_batch_alone(tnx: Client, name: str, value: float, said: str) -> None:
    before, lost = info(tnx, name).restarts, 1
    bad = tnx.submit(rows(value), model=name)
    others = [tnx.submit(rows(20), model="thread") for _ in range(20)]
    assert all(other.result().output[0, 0] == 40 for other in others)
    with pytest.raises(Internal, match=said):
        bad.result()
    for _ in range(20):
        try:
            assert tnx.predict(rows(20), model=name).output[0, 0] == 40
        except Internal as error:  # a machine that does nothing for two seconds holds up a batch as well
            assert name == "limited"
            assert said in error.message  # noqa: PT017
            lost += 1
    found = info(tnx, name)
    assert found.restarts == before + lost
    shown = tool.run("health", "--host", tnx.endpoint, "--timeout", 60).stdout
    assert f"{name}@1: its process was started again " in shown
    why = said.removeprefix("its process ")
    assert any("its process was started again" in note and why in note for note in found.notes)


def test_each_request_of_a_lost_batch_has_one_error(tnx: Client) -> None:
    """And none of the others: a second process answers them, or they wait for the first. It is not tried again."""
    before = info(tnx, "obeys").restarts
    futures = [tnx.submit(rows(7 if place == 20 else 20), model="obeys") for place in range(60)]
    failed = 0
    for future in futures:
        try:
            assert future.result().output[0, 0] == 40
        except TensorNextError as error:
            assert "its process ended with exit code 3" in error.message  # noqa: PT017
            failed += 1
    assert 1 <= failed <= 8
    assert tnx.predict(rows(20), model="obeys").output[0, 0] == 40
    assert info(tnx, "obeys").restarts == before + 1


def test_a_thread_that_hangs_costs_its_lane_and_what_runs_inline_goes_on(daemon: Daemon, tnx: Client) -> None:
    bad = tnx.submit(rows(8), model="hangs")
    with pytest.raises(Internal, match=r"ran for over 1 s on cpu"):
        bad.result()
    assert [tnx.predict(rows(20), model="none").output[0, 0] for _ in range(20)] == [40] * 20
    assert [tnx.predict(rows(20), model="obeys").output[0, 0] for _ in range(20)] == [40] * 20
    (daemon.log.parent / "models/hangs/go").touch()
    answer = None
    while answer is None:  # another lane finds its only object taken until the first one is back
        with contextlib.suppress(Unavailable, Internal):
            answer = tnx.predict(rows(20), model="hangs").output[0, 0]
    assert answer == 40


@pytest.mark.parametrize("name", ["thread", "obeys"])
def test_what_it_raises_costs_one_request(tnx: Client, name: str) -> None:
    before = info(tnx, name).restarts
    futures = [tnx.submit(rows(9 if place == 5 else 20), model=name) for place in range(12)]
    for place, future in enumerate(futures):
        if place == 5:
            with pytest.raises(Internal, match=rf"model '{name}' raised ValueError: nine"):
                future.result()
        else:
            assert future.result().output[0, 0] == 40
    assert info(tnx, name).restarts == before


# --- versions ---------------------------------------------------------------------------------------------------


def test_a_version_in_a_process_takes_over_and_leaves_none(tmp_path: Path, run_daemon: type) -> None:
    """From a thread to a process and to another process, while requests come; at the end no process is left."""
    models = tmp_path / "models"
    place = put(models, DOUBLES, name="net")
    daemon = run_daemon("--model-repository", str(models))
    pids = []
    with Client(daemon.endpoint, timeout=60.0) as tnx:
        for version in (2, 3):
            text = "import os\nclass Model:\n    def predict(self, x):\n        return x * 0 + os.getpid()\n"
            place = models / "net" / f".{version}"
            place.mkdir()
            (place / "model.py").write_text(text)
            (models / "net/model.toml").write_text(ISOLATED + SIGNATURE)
            place.rename(models / "net" / str(version))
            futures = [tnx.submit(rows(1), model="net") for _ in range(50)]
            assert tnx.reload().loaded == (f"net@{version}",)
            assert all(future.result() for future in futures)
            pids.append(int(tnx.predict(rows(1), model="net").output[0, 0]))
        await_end(pids[0])
        assert os.path.exists(f"/proc/{pids[1]}")
    assert daemon.stop() == 0
    await_end(pids[1])
