"""Changes of the process by a model are undone, or the model is refused by name."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tnxctl import Client
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import TensorNextError
from zoo import keeper
from zoo.case import NETWORKS
from zoo.networks.switches import SWITCHES

TOML = """
factory = "network:make"
max_batch_size = 0
[[inputs]]
name = "x"
datatype = "FP32"
shape = [2]
[[outputs]]
name = "y"
datatype = "{datatype}"
shape = [{length}]
"""

NETWORK = """\
import contextlib, gc, locale, logging, os, random, signal, socket, sys, warnings
import numpy as np
import torch

{on_import}


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))

    def forward(self, x):
        {on_forward}
        return x * 2


def make():
    {on_build}
    return Network()
"""

# What is promised: a statement for each switch of the process. Where it may, it sets another value in each place, {n}.
PROMISED = {
    "default-dtype": "torch.set_default_dtype((torch.float64, torch.float16, torch.bfloat16)[{n}])",
    "grad-mode": "torch.set_grad_enabled(False)",
    "grad-mode-on": "torch.set_grad_enabled(True)",
    "seed-torch": "torch.manual_seed({n})",
    "seed-python": "random.seed({n})",
    "seed-numpy": "np.random.seed({n})",
    "logging-disabled": "logging.disable(50 + {n})",
    "logging-level": "logging.getLogger().setLevel(50 + {n})",
    "logging-handlers": "logging.basicConfig(force=True, level=logging.DEBUG)",
    "warnings": "warnings.filterwarnings('error', message='zoo{n}')",
    "directory": "os.chdir(('/', '/usr', '/tmp')[{n}])",
    "environment": "os.environ['ZOO_POISON'] = '{n}'",
    "environment-less": "del os.environ['ZOO_PRESENT']",
}

# Nobody promised these, and each makes others answer otherwise, or fail.
BEYOND = {
    "default-device": "torch.set_default_device('meta')",
    "autocast": "torch.autocast('cpu', torch.bfloat16).__enter__()",
    "inference-mode": "torch.inference_mode(False).__enter__()",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "matmul-precision": "torch.set_float32_matmul_precision('medium')",
    "threads": "torch.set_num_threads(2)",
    "anomaly": "torch.autograd.set_detect_anomaly(True)",
    "denormals": "torch.set_flush_denormal(True)",
    "mkldnn": "torch.backends.mkldnn.set_flags(False)",
    "umask": "os.umask(0o777)",
    "recursion": "sys.setrecursionlimit(5000)",
    "stderr": "sys.stderr = open(os.devnull, 'w')",
    "path": "sys.path.insert(0, '/nowhere')",
    "excepthook": "sys.excepthook = print",
    "collector": "gc.disable()",
    "numpy-errors": "np.seterr(all='raise')",
    "socket-timeout": "socket.setdefaulttimeout(0.01)",
}

RANDOM = {f"random state of {who}" for who in ("torch", "Python", "numpy")}
"""Generators that get an unforeseeable seed with each load: others have drawn from them meanwhile."""

LEFT = {("grad-mode-on", "on_forward"), ("warnings", "on_forward")}
"""Changes that a forward may make: the one means nothing within inference mode, many a library makes the other."""

PLACES = ("on_import", "on_build", "on_forward")


class Zoo:
    """A daemon whose models come and go.

    Args:
        root: its repository.

    Attributes:
        worn: whether a model has left something behind in a thread, as it may.
    """

    def __init__(self, root: Path, tnx: Client) -> None:
        self.root = root
        self.tnx = tnx
        self.worn = False

    def switches(self) -> Array:
        """State of the process now, as a model sees it."""
        return self.tnx.predict(np.ones(2, np.float32), model="switches").output


def publish(root: Path, name: str, source: str, datatype: str = "FP32", length: int = 2) -> None:
    staged = root / f".{name}"
    (staged / "1").mkdir(parents=True)
    state = 'state = "shared"\n' if name == "switches" else ""  # what it answers is not for it to decide
    (staged / "model.toml").write_text(state + TOML.format(datatype=datatype, length=length))
    (staged / "1" / "network.py").write_text(source)
    safetensors.torch.save_file({"weight": torch.zeros(1)}, staged / "1" / "model.safetensors")
    staged.rename(root / name)


class Zoos:
    """Daemons with one lane, or with none but the serving thread, so that all models share a thread.

    One serves all tests until a test fails: what that has left behind is nothing that the next one has to bear.
    """

    def __init__(self, folder: Path, inline: bool) -> None:
        self._folder = folder
        self._inline = inline
        self._stack: ExitStack | None = None
        self._zoo: Zoo | None = None
        self._number = 0

    def get(self) -> Zoo:
        """The daemon, or another one."""
        if self._zoo is None:
            self._number += 1
            folder = self._folder / str(self._number)
            root = folder / "models"
            root.mkdir(parents=True)
            source = (NETWORKS / "switches.py").read_text() + "\n\nmake = Switches\n"
            publish(root, "switches", source, "FP64", len(SWITCHES))
            config = keeper.settings(inline=self._inline).replace("workers = 3", "workers = 1")
            self._stack = ExitStack()
            self._daemon, clients = self._stack.enter_context(keeper.serve(folder, root, config))
            self._zoo = Zoo(root, clients[0])
        return self._zoo

    def drop(self, *, spoiled: bool) -> None:
        """End the daemon. Args: spoiled: it may hang, or have ended."""
        stack, self._stack, self._zoo = self._stack, None, None
        if stack is None:
            return
        if not spoiled:
            stack.close()
            return
        self._daemon.process.kill()
        self._daemon.process.wait()
        with contextlib.suppress(AssertionError):
            stack.close()


@pytest.fixture(scope="module", params=["lane", pytest.param("inline", marks=pytest.mark.zoo)])
def zoos(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoos]:
    all_of_them = Zoos(tmp_path_factory.mktemp("process"), request.param == "inline")
    yield all_of_them
    all_of_them.drop(spoiled=False)


@pytest.fixture
def zoo(zoos: Zoos, request: pytest.FixtureRequest) -> Iterator[Zoo]:
    failed = request.session.testsfailed
    one = zoos.get()
    yield one
    spoiled = request.session.testsfailed > failed
    if spoiled or one.worn:
        zoos.drop(spoiled=spoiled)


def poison(statement: str, place: str) -> str:
    places = dict.fromkeys(PLACES, "pass") | {place: statement.replace("{n}", str(PLACES.index(place)))}
    return NETWORK.format(**places)


def changed(before: Array, after: Array) -> list[str]:
    pairs = zip(SWITCHES, before, after, strict=True)
    return [name for name, one, other in pairs if one != other and name not in RANDOM]


def examine(zoo: Zoo, name: str, statement: str, place: str) -> None:
    x = np.ones(2, np.float32)
    before = zoo.switches()
    publish(zoo.root, name, poison(statement, place))
    try:
        report = zoo.tnx.reload(timeout=60)
        assert changed(before, zoo.switches()) == [], "after it was loaded"
        if not report.failed:
            answer = zoo.tnx.predict(x, model=name).output
            np.testing.assert_array_equal(answer, x * 2)
            zoo.worn = (name, place) in LEFT
            if not zoo.worn:
                assert changed(before, zoo.switches()) == [], "after it was asked"
        else:
            (title,) = report.failed
            assert title == f"{name}@1"
    finally:
        shutil.rmtree(zoo.root / name)
        zoo.tnx.reload(timeout=60)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", PROMISED)
def test_a_switch_of_the_process_is_put_back(zoo: Zoo, name: str, place: str) -> None:
    examine(zoo, name, PROMISED[name], place)


@pytest.mark.zoo
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BEYOND)
def test_another_switch_of_the_process_is_put_back(zoo: Zoo, name: str, place: str) -> None:
    examine(zoo, name, BEYOND[name], place)


@pytest.mark.parametrize("place", PLACES)
def test_signal_handlers_are_put_back(zoo: Zoo, place: str) -> None:
    """Only the main thread may set one, which is where batches run inline: elsewhere the model fails."""
    before = zoo.switches()
    publish(zoo.root, "signals", poison("signal.signal(signal.SIGTERM, signal.SIG_IGN)", place))
    try:
        report = zoo.tnx.reload(timeout=60)
        if not report.failed:
            try:
                zoo.tnx.predict(np.ones(2, np.float32), model="signals")
            except TensorNextError as error:
                assert "signals" in str(error)  # noqa: PT017
        assert changed(before, zoo.switches()) == []
    finally:
        shutil.rmtree(zoo.root / "signals")
        zoo.tnx.reload(timeout=60)


# The last of them stops every generator that it is thrown into, and what loads models is one.
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("statement", ["sys.exit(3)", "raise KeyboardInterrupt", "raise GeneratorExit"])
def test_a_model_that_wants_to_end_the_program_ends_nothing(zoo: Zoo, place: str, statement: str) -> None:
    publish(zoo.root, "ends", poison(statement, place))
    try:
        report = zoo.tnx.reload(timeout=60)
        if not report.failed:
            with pytest.raises(TensorNextError, match="ends"):
                zoo.tnx.predict(np.ones(2, np.float32), model="ends")
        assert zoo.switches().shape == (len(SWITCHES),)
    finally:
        shutil.rmtree(zoo.root / "ends")
        zoo.tnx.reload(timeout=60)
