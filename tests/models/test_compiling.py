"""Models compiled by inductor: by a child process, for every shape and thread, or not at all."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch

from format_tools import ask, open_model, save_program, source, tensors
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument, Unavailable
from tnxd.models.formats import compiler, compiler_process, compiling, conditions
from tnxd.models.formats.called import Called, Program
from tnxd.models.formats.compiling import Compiled
from tnxd.models.formats.frozen import Frozen
from tnxd.models.model import Model
from tnxd.models.variants import Workshop

needs_compiler = pytest.mark.skipif(bool(compiling.missing()), reason=compiling.missing() or "-")

NETWORK = """\
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(50, 8)
        self.linear = torch.nn.Linear(8, 8)
        self.register_buffer("shift", torch.ones(8), persistent=False)

    def forward(self, ids, mask):
        rows = torch.tanh(self.linear(self.table(ids)) + self.shift + torch.tensor([0.5] * 8))
        kept = rows * mask.unsqueeze(-1)
        return {"mean": kept.sum(1) / mask.sum(1, keepdim=True), "next": ids + torch.arange(ids.shape[1])}

def make():
    return Net()
"""
TOML = (
    'optimize = "inductor"\nfactory = "net:make"\nmax_batch_size = 16\n'
    + tensors("ids", "INT64", [-1, -1])
    + tensors("mask", "INT64", [-1, -1])
    + tensors("next", "INT64", [-1, -1], "outputs")
    + tensors("mean", "FP32", [-1, 8], "outputs")
)


def save(root: Path) -> None:
    (root / "net/1").mkdir(parents=True)
    (root / "net/1/net.py").write_text(NETWORK)
    generator = torch.Generator().manual_seed(5)
    weights = {
        "table.weight": torch.rand(50, 8, generator=generator),
        "linear.weight": torch.rand(8, 8, generator=generator),
        "linear.bias": torch.rand(8, generator=generator),
    }
    safetensors.torch.save_file(weights, root / "net/1/model.safetensors")


class Pair(NamedTuple):
    """A compiled model, and the same without."""

    model: Model
    compiled: torch.nn.Module
    eager: torch.nn.Module


def batch(rows: int, length: int) -> tuple[Array, Array]:
    generator = np.random.default_rng(rows * length)
    ids = generator.integers(0, 50, (rows, length))
    return ids, (np.arange(length) <= generator.integers(0, length, (rows, 1))).astype(np.int64)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that keeps compiled code from one model to the next, as TORCHINDUCTOR_CACHE_DIR does: less to do."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("cache")
        patch.setattr(compiling, "_KEPT", str(directory))
        yield directory


def make(model: Model, cache: Path | None = None) -> torch.nn.Module:
    """The only variant of a model that is wanted."""
    (variant,) = model.variants
    return variant.make(model.factory, Workshop(torch.device("cpu"), cache, 200.0))


@pytest.fixture(scope="module", params=[True, False], ids=["frozen", "as on a GPU"])
def compiled_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kept: Path) -> Pair:
    """Compiled, and asked once."""
    if not request.param and not compiling.has_python_headers():
        pytest.skip("no header files of Python")
    root = tmp_path_factory.mktemp("compiled")
    save(root)
    eager = open_model(root, TOML.replace('"inductor"', '"none"')).factory()
    model = open_model(root, TOML)
    assert model.notes == ()
    with pytest.MonkeyPatch.context() as patch:
        if not request.param:
            patch.setattr(compiling, "_FROZEN", frozenset())
        compiled = make(model)
    assert isinstance(compiled, Program if request.param else Compiled)
    ask(model, compiled, *batch(1, 1))
    return Pair(model, compiled, eager)


@pytest.fixture
def pair(compiled_once: Pair, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """The same, where nothing can be compiled any more: no process can be started."""

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    return compiled_once


def assert_equal(pair: Pair, rows: int, length: int) -> None:
    inputs = batch(rows, length)
    got, wanted = ask(pair.model, pair.compiled, *inputs), ask(pair.model, pair.eager, *inputs)
    np.testing.assert_array_equal(got["next"], wanted["next"])
    np.testing.assert_allclose(got["mean"], wanted["mean"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(240)
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("length", [1, 2, 7, 33])
def test_compiled_answers_are_those_of_eager(pair: Pair, rows: int, length: int) -> None:
    assert_equal(pair, rows, length)


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(240)
def test_lanes_run_it_at_the_same_time_with_threads_of_their_own(pair: Pair) -> None:
    """Threads other than the first run it, each with its number of torch threads, as lanes and serving thread do."""
    failures: list[BaseException] = []

    def lane(threads: int) -> None:
        try:
            torch.get_num_threads()
            torch.set_num_threads(threads)
            for round_ in range(30):
                assert_equal(pair, 1 + round_ % 16, 1 + round_ * 7 % 40)
        except BaseException as error:
            failures.append(error)

    lanes = [threading.Thread(target=lane, args=(threads,)) for threads in (1, 1, 2, 4)]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join()
    assert failures == []


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(240)
def test_lengths_that_do_not_fit_are_refused_before_the_code_runs(pair: Pair) -> None:
    ids, mask = batch(2, 5)[0], batch(2, 4)[1]
    with pytest.raises(InvalidArgument, match="axis 1"):
        ask(pair.model, pair.compiled, ids, mask)


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(240)
def test_weights_are_not_copied(pair: Pair) -> None:
    compiled = pair.compiled
    if not isinstance(compiled, Compiled):
        pytest.skip("they are, where they are frozen")
    before = ask(pair.model, compiled, *batch(2, 3))["mean"]
    bias = compiled.network.linear.bias  # type: ignore[union-attr]
    assert isinstance(bias, torch.Tensor)
    bias += 1
    try:
        assert not np.allclose(ask(pair.model, compiled, *batch(2, 3))["mean"], before)
    finally:
        bias -= 1


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, kept: Path) -> tuple[Path, torch.nn.Module]:
    """A folder with a frozen network of 8 MB, and the network."""
    folder = tmp_path_factory.mktemp("wide")
    network = torch.nn.Sequential(torch.nn.Linear(4, 2048), torch.nn.Linear(2048, 1024)).eval()
    save_program(folder / "models/net/1/model.pt2", network, (torch.zeros(2, 4),), ({0: torch.export.Dim("rows")},))
    compiler.freeze_into(source(folder / "models"), torch.device("cpu"), folder)
    return folder, network


def load(folder: Path) -> Program:
    called = Called.read(folder)
    return Program(Frozen(folder / compiling.LIBRARY, called.wanted), called)


def mapped(folder: Path) -> int:
    """KiB of memory that a library takes, beside what it has allocated."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-", line):
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(240)
def test_weights_are_in_memory_once_and_not_at_all_when_the_network_is_gone(wide: tuple[Path, torch.nn.Module]) -> None:
    """glibc does not unmap the library: this thread, which has called it, lives on."""
    folder, network = wide
    x = torch.rand(3, 4)
    with torch.inference_mode():
        for _ in range(3):
            program = load(folder)
            (found,) = program(x)
            assert mapped(folder) < 4096
            del program
            torch.testing.assert_close(found, network(x))
            assert mapped(folder) < 4096


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(240)
def test_another_number_of_inputs_is_an_error_of_one_call(wide: tuple[Path, torch.nn.Module]) -> None:
    program = Frozen(wide[0] / compiling.LIBRARY, range)
    x = torch.rand(1, 4)
    for inputs in ((), (x, x)):
        with pytest.raises(RuntimeError, match=f"takes 1 tensors; here are {len(inputs)}"):
            program(*inputs)
    assert program(x)[0].shape == (1, 1024)


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(240)
def test_an_operator_that_compiled_code_cannot_call_is_named(tmp_path: Path, kept: Path) -> None:
    class Middle(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.median(1)[0]

    axes = ({0: torch.export.Dim("rows")},)
    save_program(tmp_path / "models/net/1/model.pt2", Middle(), (torch.zeros(2, 4),), axes)
    with pytest.raises(FailedPrecondition, match=r"it uses aten::median\.dim, which"):
        compiler.freeze_into(source(tmp_path / "models"), torch.device("cpu"), tmp_path)


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_program_is_compiled_too_and_leaves_nothing_behind(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {0: torch.export.Dim("rows", max=8), 1: torch.export.Dim("length", min=3, max=9)}
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
    save_program(tmp_path / "models/net/1/model.pt2", network, (torch.zeros(2, 5, 4),), (axes,))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    model = open_model(tmp_path / "models", 'optimize = "inductor"')
    module = make(model)
    for rows, length in ((1, 5), (8, 3), (2, 9)):
        x = np.random.default_rng(rows).random((rows, length, 4)).astype(np.float32)
        with torch.inference_mode():
            wanted = network(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(ask(model, module, x)["output"], wanted, rtol=1e-5, atol=1e-6)
    for length, said in ((2, ">= 3"), (10, "<= 9")):
        with pytest.raises(InvalidArgument, match=f"{said}; here axis 1 of 'input' is {length}"):
            ask(model, module, np.zeros((2, length, 4), np.float32))
    assert list((tmp_path / "tmp").iterdir()) == []
    assert list(kept.iterdir())
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before


@needs_compiler
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "rows = torch",
            "assert float(mask.sum()) >= 0\n        rows = torch",
            "torch.export cannot follow the network",
        ),
        ('"mean": ', '"other": ', "the network returns ['other', 'next']"),
        ("ids + torch.arange", "ids if ids.shape[1] == 2 else ids + torch.arange", "'ids' would be fixed at [-1, 2]"),
    ],
)
def test_what_cannot_be_compiled_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    save(tmp_path)
    assert old in NETWORK
    (tmp_path / "net/1/net.py").write_text(NETWORK.replace(old, new))
    (tmp_path / "net/model.toml").write_text(TOML)
    with pytest.raises(FailedPrecondition) as caught:
        compiler.compile_into(source(tmp_path), torch.device("cpu"), tmp_path)
    assert said in caught.value.message


@needs_compiler
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os.kill(os.getpid(), 9)", "the compiler was ended by signal 9"),
        pytest.param("os._exit(3)", "the compiler ended with 3", marks=pytest.mark.slow),
        pytest.param("raise OSError('no')", "OSError: no", marks=pytest.mark.slow),
    ],
)
def test_a_compiler_that_ends_early_is_named(tmp_path: Path, end: str, said: str) -> None:
    """The factory ends the process, or raises, in the child alone."""
    save(tmp_path)
    network = NETWORK.replace(
        "def make():", f"import os\ndef make():\n    if os.getpid() != {os.getpid()}:\n        {end}"
    )
    (tmp_path / "net/1/net.py").write_text(network)
    model = open_model(tmp_path, TOML)
    with pytest.raises((FailedPrecondition, Unavailable)) as caught:
        make(model)
    assert said in caught.value.message


@needs_compiler
def test_header_files_of_python_are_needed_where_nothing_is_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    model = open_model(tmp_path, TOML)
    assert model.variants[0].missing == ""
    monkeypatch.setattr(compiling, "_FROZEN", frozenset())
    with pytest.raises(FailedPrecondition, match="python3-dev"):
        make(model)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_first_line_says_why_a_compiler_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch adds lines to the messages of others."""
    (tmp_path / "failing.py").write_text(
        "from tnxd.models.formats import compiler\n"
        "def fail(*_):\n    raise RuntimeError('no primitive\\n\\nUse tlparse to see more')\n"
        "compiler.COMPILERS['failing'] = fail\ncompiler.main()\n"
    )
    save(tmp_path / "models")
    (tmp_path / "models/net/model.toml").write_text(TOML)
    monkeypatch.setattr(compiler_process, "_PROGRAM", "failing")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with pytest.raises(Unavailable, match=r"^the compiler ended with 1: RuntimeError: no primitive$"):
        compiler_process.compile_in_child(
            source(tmp_path / "models"), "failing", torch.device("cpu"), tmp_path, 100.0, environment
        )


def test_a_compiler_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    (variant,) = open_model(tmp_path, TOML).variants
    assert variant.missing == "no C++ compiler (no-such-compiler)"


class Boxes(torch.nn.Module):
    """One picture and any number of boxes in it: axis 0 counts rows of the second input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, picture: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        return self.layer(boxes) + picture.mean((0, 1))


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(240)
@pytest.mark.parametrize("frozen", [True, False])
def test_inputs_whose_rows_differ_are_refused_before_the_code_runs(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, frozen: bool
) -> None:
    """Where axis 0 does not count rows, as only the trial finds, the network gets requests of any lengths."""
    if not frozen:
        monkeypatch.setattr(compiling, "_FROZEN", frozenset())
    (tmp_path / "net/1").mkdir(parents=True)
    (tmp_path / "net/1/net.py").write_text(
        f"import torch\n\n{inspect.getsource(Boxes)}\ndef make():\n    return Boxes()\n"
    )
    network = Boxes()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "net/1/model.safetensors")
    model = open_model(
        tmp_path,
        'optimize = "inductor"\nfactory = "net:make"\n'
        + tensors("picture", "FP32", [-1, -1, 8])
        + tensors("boxes", "FP32", [-1, 8])
        + tensors("output", "FP32", [-1, 8], "outputs"),
    )
    compiled = make(model)
    picture = np.random.default_rng(0).random((3, 5, 8)).astype(np.float32)
    with torch.inference_mode():
        wanted = network(torch.from_numpy(picture), torch.zeros(3, 8)).numpy()
    got = ask(model, compiled, picture, np.zeros((3, 8), np.float32))["output"]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(InvalidArgument, match=r"axis 0 of 'boxes' == axis 0 of 'picture'|axis 0 of 'picture' == axis"):
        compiled(torch.from_numpy(picture), torch.zeros(500, 8))


def test_what_a_compiler_decides_by_the_lengths_of_the_example_is_a_condition() -> None:
    axes = ({0: torch.export.Dim("rows", max=64), 1: torch.export.Dim("length")},)
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.zeros(2, 3, 4),), dynamic_shapes=axes)
    (given,) = [node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    with conditions.assumed(program) as assumed:
        assert bool(given.shape[0] * given.shape[1] <= 4096)
        assert not bool(given.shape[1] == 100)  # what holds for other lengths holds for that one, too
    demands = conditions.Conditions(["x"], assumed)
    for rows, length in ((8, 512), (1, 100)):
        demands.check([torch.empty(rows, length, 4)])
    with pytest.raises(InvalidArgument, match="axis 1 of 'x' is 513"):
        demands.check([torch.empty(8, 513, 4)])
