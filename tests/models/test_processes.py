"""Processes of a model.py: what a process that ends, hangs, eats memory or talks costs, and how it ends itself."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from python_models import DOUBLES, SIGNATURE, await_end, opened, put, rows, source
from tnxctl.protocol.datatypes import STORAGE, Array
from tnxctl.protocol.errors import FailedPrecondition, Internal, InvalidArgument, TensorNextError
from tnxctl.protocol.strings import array_of
from tnxctl.protocol.wire import BYTES, TensorSpec
from tnxd.models.model import Model
from tnxd.models.python import process
from tnxd.models.python.channel import Region
from tnxd.models.python.failures import ProcessAway, ProcessFull, ProcessLost
from tnxd.models.tensors import TORCH_DTYPES, to_array, to_tensor
from tnxd.models.time_limits import TimeLimits

OBEYS = """
import ctypes, os, sys, threading, time
import numpy as np

class Model:
    def load(self, context):
        self.kept = []
    def predict(self, x):
        command = x[0, 0]
        if command == 1: os._exit(3)
        if command == 2: ctypes.string_at(0)
        if command == 3: threading.Event().wait()
        if command == 4: self.kept.append(np.ones(1 << 30, np.uint8))
        if command == 5: raise ValueError("no fives\\nreally")
        if command == 6: sys.exit("gone")
        if command == 7: print("seven", flush=True)
        if command == 8: return x[:, :1].astype(np.float64)
        if command == 9: raise KeyError("nine")
        if command == 10: os.closerange(3, 65_536)
        if command == 11: x += os.getpid() - 11
        if command == 12: raise ExceptionGroup("twelve", [ValueError("one"), ValueError("two")])
        if command == 13: raise StopIteration
        return x * 2
"""
ISOLATED = 'isolation = "process"'


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow processes a minute to end, so that what they ended with is told on a busy machine, too."""
    for name in ("_END_S", "PROCESS_END_S"):
        monkeypatch.setattr(process, name, 60.0)


class Started:
    """A model of `OBEYS`, in processes."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.module: Any = model.factory()

    def ask(self, *values: float) -> Array:
        return self.module(torch.from_numpy(rows(*values)))[0].numpy()  # type: ignore[no-any-return]

    def again(self, *values: float) -> Array:
        """The answer, as soon as a process is there."""
        while True:
            try:
                return self.ask(*values)
            except ProcessAway:
                time.sleep(0.02)  # the test's own time limit ends this

    def ask_within(self, limit_s: float, *values: float) -> Array:
        """The same with another time limit than the other batches have."""
        processes, limits = self.module._processes, self.module._processes._limits
        processes._limits = replace(limits, batch_s=limit_s)
        try:
            return self.ask(*values)
        finally:
            processes._limits = limits

    @property
    def pid(self) -> int:
        return int(self.again(11)[0, 0] / 2)


def start(root: Path, settings: str = "", text: str = OBEYS, batch_s: float = 60.0) -> Started:
    return Started(opened(root, text, settings=f"{ISOLATED}\n{settings}", batch_s=batch_s))


def test_answers_are_those_of_a_thread(tmp_path: Path) -> None:
    started = start(tmp_path, text=DOUBLES)
    for count in (1, 3, 100_000, 2, 0):
        x = np.random.default_rng(count).random((count, 2), np.float32)
        assert np.array_equal(started.module(torch.from_numpy(x))[0].numpy(), x * 2)
    assert started.model.devices == ("process",)
    assert started.model.may_use("process")
    assert not started.model.may_use("cpu")


STRINGS = """
inputs = [{ name = "x", datatype = "BYTES", shape = [-1, -1] }, { name = "n", datatype = "INT64", shape = [-1] }]
outputs = [{ name = "m", datatype = "INT64", shape = [-1] }, { name = "y", datatype = "BYTES", shape = [-1, -1] }]
"""

ECHOES = """
import numpy as np
from tnxctl.protocol.errors import InvalidArgument
class Model:
    def predict(self, x, n):
        assert all(type(element) is bytes for element in x.ravel())
        if 1 in n: return n, np.array([["a"]], object)
        if 2 in n: return n, np.array([["a"]])
        if 3 in n: raise InvalidArgument("not three")
        return n + 1, x[:, ::-1]
"""


def test_strings_go_there_and_back(tmp_path: Path) -> None:
    module = opened(tmp_path, ECHOES, settings=ISOLATED, signature=STRINGS).factory()
    large = [b"", b"\0", b"a\0\0", bytes(100_000), "w\xf6rter".encode(), b"x" * 63]
    for elements, shape in ((large, (3, 2)), (large, (2, 3)), ([b"a"], (1, 1)), ([], (0, 2)), ([], (2, 0))):
        x = array_of(elements, shape)
        m, y = module(x, torch.full(shape[:1], 6))
        assert m.tolist() == [7] * shape[0]
        assert y.dtype == object
        assert y.shape == shape
        assert y.tolist() == x[:, ::-1].tolist()


@pytest.mark.parametrize(
    ("command", "kind", "said"),
    [
        (1, Internal, "output 'y' is BYTES, and has an element that is str"),
        (2, Internal, "output 'y' is <U1, its signature says BYTES: np.array([text.encode() for text in texts], obj"),
        (3, InvalidArgument, "not three"),
    ],
)
def test_strings_are_checked_there(tmp_path: Path, command: int, kind: type[TensorNextError], said: str) -> None:
    module = opened(tmp_path, ECHOES, settings=ISOLATED, signature=STRINGS).factory()
    with pytest.raises(kind) as raised:
        module(array_of([b"a"], (1, 1)), torch.tensor([command]))
    assert said in raised.value.message
    assert raised.value.code == kind.code


@pytest.mark.parametrize("size", [-8, 0, 3, 8, 1 << 40, (1 << 63) - 1])
def test_a_region_whose_strings_lie_is_refused(size: int) -> None:
    descriptor = Region.create("lies")
    try:
        region = Region(descriptor)
        specs = (TensorSpec("x", "BYTES", (-1,)),)
        shapes = region.write([array_of([b"abc"], (1,))])
        assert [array.tolist() for array in region.read(specs, shapes) if array is not None] == [[b"abc"]]
        region.write([np.array([size])])
        with pytest.raises(ValueError, match=r"."):
            list(region.read(specs, shapes))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("command", "kind", "said"),
    [
        (1, ProcessLost, "its process ended with exit code 3 while a batch ran"),
        (2, ProcessLost, "its process was ended by SIGSEGV while a batch ran"),
        (3, ProcessLost, "its process gave no answer for 1.5 s and was ended while a batch ran"),
        (10, ProcessLost, "its process closed its connection to the daemon while a batch ran"),
    ],
)
def test_a_process_that_is_lost_is_started_again(
    tmp_path: Path, command: float, kind: type[TensorNextError], said: str
) -> None:
    started = start(tmp_path)
    pid = started.pid
    with pytest.raises(kind) as raised:
        started.ask_within(1.5 if command == 3 else 60.0, command)
    assert said in raised.value.message
    assert raised.value.code == "INTERNAL"
    assert started.again(20).tolist() == [[40, 40]]
    assert not os.path.exists(f"/proc/{pid}")
    assert started.model.restarts is not None
    assert started.model.restarts.count == 1
    assert started.model.restarts.last in said


def test_memory_is_limited(tmp_path: Path) -> None:
    started = start(tmp_path, "memory_limit_mb = 600")
    with pytest.raises(ProcessFull, match="ran out of its memory of 600 MiB") as raised:
        started.ask(4)
    assert raised.value.code == "RESOURCE_EXHAUSTED"
    assert started.again(20).tolist() == [[40, 40]]


@pytest.mark.parametrize(
    ("command", "kind", "said"),
    [
        (5, ValueError, "no fives"),
        (6, Exception, "gone"),
        (9, KeyError, "'nine'"),
        (12, Exception, "twelve (2 sub-exceptions)"),
        (13, StopIteration, ""),
    ],
)
def test_what_a_model_raises_ends_no_process(tmp_path: Path, command: float, kind: type[Exception], said: str) -> None:
    started = start(tmp_path)
    pid = started.pid
    with pytest.raises(kind) as raised:
        started.ask(command)
    assert str(raised.value) == said
    assert started.pid == pid


def test_outputs_are_checked_there(tmp_path: Path) -> None:
    with pytest.raises(Internal, match="output 'y' is float64, its signature says FP32"):
        start(tmp_path).ask(8)


def test_replicas_run_side_by_side_and_one_that_ends_leaves_the_other(tmp_path: Path) -> None:
    started = start(tmp_path, "replicas = 2")
    pids: set[int] = set()
    while len(pids) < 2:
        pids.add(started.pid)
    lost: list[BaseException] = []

    def hang() -> None:
        try:
            started.ask(3)
        except ProcessLost as error:
            lost.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    answering = {started.pid for _ in range(50)}  # by both until one hangs
    while len(answering) > 1:
        answering = {started.pid for _ in range(50)}
    assert not lost
    (hanging,) = pids - answering
    os.kill(hanging, signal.SIGKILL)
    thread.join()
    assert "was ended by SIGKILL" in str(lost[0])
    while started.pid in answering:
        pass  # until another one is there, too
    assert started.model.restarts is not None
    assert started.model.restarts.count == 1


def test_processes_end_with_their_model_and_what_they_started_with_them(tmp_path: Path) -> None:
    text = """
    import subprocess, sys
    class Model:
        def load(self, context):
            self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        def predict(self, x):
            x[:] = self.child.pid
            return x
    """
    started = start(tmp_path, text=text)
    pid = int(started.ask(1)[0, 0])
    assert os.path.exists(f"/proc/{pid}")
    del started
    gc.collect()
    await_end(pid)


def test_signals_of_the_service_do_not_end_a_process(tmp_path: Path) -> None:
    started = start(tmp_path)
    pid = started.pid
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
    assert started.ask(20).tolist() == [[40, 40]]
    assert started.pid == pid


def test_what_a_process_prints_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    started = start(tmp_path)
    started.ask(7)
    with pytest.raises(ValueError, match="no fives"):
        started.ask(5)
    with pytest.raises(ProcessLost):
        started.ask(2)
    started.again(20)
    assert "odd@1: seven" in caplog.messages
    assert "odd@1: ValueError: no fives" in caplog.messages
    assert "odd@1: Fatal Python error: Segmentation fault" in caplog.messages
    assert any("its process was ended by SIGSEGV: it is started again" in message for message in caplog.messages)


def test_a_process_holds_nothing_of_the_daemon(tmp_path: Path) -> None:
    with open(__file__, "rb") as file:
        os.set_inheritable(file.fileno(), True)
        started = start(tmp_path)
        pid = started.pid
        held = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
    assert __file__ not in held
    assert sorted(name.partition(":")[0] for name in held if not name.startswith(("/memfd", "/dev/null"))) == [
        "pipe",
        "pipe",
        "socket",
    ]


# --- load ------------------------------------------------------------------------------------------------------

LOADS: dict[str, tuple[str, str]] = {
    "raises": ("raise ValueError('no weights')", r"odd/1/model.py: Model.load\(\) raised ValueError: no weights"),
    "exits": ("import os; os._exit(4)", "its process ended with exit code 4 while it was loaded"),
    "hangs": ("import threading; threading.Event().wait()", "gave no answer for 1 s and was ended while it was loaded"),
}


@pytest.mark.parametrize("case", LOADS)
def test_a_load_that_fails_leaves_no_process(tmp_path: Path, case: str) -> None:
    statement, said = LOADS[case]
    text = f"""
    class Model:
        def load(self, context):
            (context.directory.parent / "pid").write_text(str(__import__("os").getpid()))
            {statement}
        def predict(self, x):
            return x
    """
    put(tmp_path, text, settings=ISOLATED)
    found = source(tmp_path)
    limits = TimeLimits(load_s=1.0 if case == "hangs" else 60.0)
    with pytest.raises(FailedPrecondition, match=said):
        replace(found, limits=limits).open(0)
    if case != "hangs" or (tmp_path / "odd/pid").exists():  # on a busy machine it may not have come so far
        await_end(int((tmp_path / "odd/pid").read_text()))


def test_a_load_that_fails_later_is_tried_again(tmp_path: Path) -> None:
    text = """
    import os
    class Model:
        def load(self, context):
            assert not (context.directory.parent / "broken").exists()
        def predict(self, x):
            if x[0, 0] == 1: os._exit(3)
            return x
    """
    started = start(tmp_path, text=text)
    (tmp_path / "odd/broken").touch()
    with pytest.raises(ProcessLost):
        started.ask(1)
    assert started.model.restarts is not None
    while started.model.restarts.count < 3:
        with pytest.raises(ProcessAway) as raised:
            started.ask(2)
        assert raised.value.retry_after_s
    assert "AssertionError" in started.model.restarts.last
    (tmp_path / "odd/broken").unlink()
    assert started.again(2).tolist() == [[2, 2]]


# --- the end of the daemon -------------------------------------------------------------------------------------

DAEMON = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from test_processes import start
import torch
started = start(Path(sys.argv[1]), text=sys.argv[2])
print(started.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_no_process_outlives_the_daemon(tmp_path: Path, how: str) -> None:
    """Nor when it is busy in C, and nothing in it could notice."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    text = OBEYS.replace("class Model", "import atexit\nclass Model")
    with subprocess.Popen(
        [sys.executable, "-c", DAEMON.format(paths=paths), str(tmp_path), text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as daemon:
        assert daemon.stdin is not None
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        if how == "killed":
            os.kill(pid, signal.SIGSTOP)  # it cannot do anything by itself
            daemon.kill()
        else:
            daemon.stdin.close()
        daemon.wait()
        await_end(pid)


def test_a_process_that_needs_no_torch_has_none(tmp_path: Path) -> None:
    text = """
    import sys
    class Model:
        def preprocess(self, x):
            return {"x": x}
        def predict(self, x):
            return x * 0 + ("torch" in sys.modules)
    """
    assert start(tmp_path, text=text).ask(1).tolist() == [[0, 0]]


def test_torch_computes_without_gradients_there_too(tmp_path: Path) -> None:
    text = """
    import torch
    class Model:
        framework = "torch"
        def load(self, context):
            self.net = torch.nn.Linear(2, 2)
        def predict(self, x):
            y = self.net(x)
            assert not y.requires_grad
            return y * 0
    """
    assert start(tmp_path, text=text).ask(1).tolist() == [[0, 0]]


def test_what_is_started_and_prints_on_holds_nobody_up(tmp_path: Path) -> None:
    text = """
    import os, subprocess
    class Model:
        def load(self, context):
            self.child = subprocess.Popen(["sh", "-c", "while :; do echo on; done"], start_new_session=True)
        def predict(self, x):
            if x[0, 0] == 1: os._exit(3)
            return x * 0 + self.child.pid
    """
    started = start(tmp_path, text=text)
    pid = int(started.ask(2)[0, 0])
    try:
        with pytest.raises(ProcessLost, match="exit code 3"):
            started.ask(1)
        other = int(started.again(2)[0, 0])
        os.kill(other, signal.SIGKILL)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it ends by itself once nobody reads what it prints
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_every_datatype_goes_there_and_back(tmp_path: Path, isolation: str, framework: str) -> None:
    specs = [f'{{ name = "{name.lower()}", datatype = "{name}", shape = [-1, 3] }}' for name in STORAGE]
    signature = f"inputs = [{', '.join(specs)}]\noutputs = [{', '.join(specs)}]\n"
    text = f'class Model:\n    framework = "{framework}"\n    def predict(self, **inputs):\n        return inputs\n'
    model = opened(tmp_path, text, settings=f'isolation = "{isolation}"', signature=signature)
    module = model.factory()
    if isolation == "thread":
        module = module.to("cpu")
    for rows_ in (1, 2, 5, 0):
        numbers = np.arange(3 * rows_).reshape(-1, 3)
        arrays = [
            array_of([b"%d" % number for number in numbers.flat], numbers.shape)
            if name == BYTES
            else numbers.astype(dtype)
            for name, dtype in STORAGE.items()
        ]
        answer = module(*[to_tensor(array, name) for array, name in zip(arrays, STORAGE, strict=True)])
        for array, tensor, name in zip(arrays, answer, STORAGE, strict=True):
            assert tensor.dtype is (np.dtype(object) if name == BYTES else TORCH_DTYPES[name])
            assert np.array_equal(to_array(tensor), array)


def test_an_argument_with_a_default_makes_an_optional_input_there_too(tmp_path: Path) -> None:
    signature = SIGNATURE.replace("}]", '}, { name = "by", datatype = "FP32", shape = [-1] }]', 1)
    text = """
    class Model:
        def predict(self, x, by=None):
            return x if by is None else x * by[:, None]
    """
    model = opened(tmp_path, text, settings=ISOLATED, signature=signature)
    module = model.factory()
    assert model.optional == {"by": None}
    assert module(torch.from_numpy(rows(2)), None)[0].tolist() == [[2, 2]]
    assert module(torch.from_numpy(rows(2)), torch.tensor([3.0]))[0].tolist() == [[6, 6]]
