"""The trial of a version when it is loaded: what running a module shows about it, and what lanes then call."""

from __future__ import annotations

import dataclasses
import functools
import random
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from format_tools import open_model, save_program
from tnxctl.protocol.errors import FailedPrecondition
from tnxctl.protocol.wire import TensorSpec
from tnxd.device_kinds import CPU, CUDA
from tnxd.executors.trial.copies import Call, Own, Serial, Sparing
from tnxd.executors.trial.examples import telling_examples
from tnxd.executors.trial.held import Held, checksum
from tnxd.executors.trial.isolation import lane_calls
from tnxd.executors.trial.lane_comparison import rows_of_a_lane_apart
from tnxd.executors.trial.suspects import suspects
from tnxd.executors.trial.trial import try_out
from tnxd.executors.trial.undo import Undo
from tnxd.executors.trial.verdict import Verdict
from tnxd.models.model import Model
from tnxd.models.rounding import difference, tolerance
from tnxd.models.tensors import check_outputs

WIDTH = 4
X = TensorSpec("x", "FP32", (-1, WIDTH))
Y = TensorSpec("y", "FP32", (-1, WIDTH))


def model(inputs: tuple[TensorSpec, ...] = (X,), outputs: tuple[TensorSpec, ...] = (Y,), **options: Any) -> Model:
    return Model("net", "1", inputs, outputs, **{"max_batch_size": 16, "factory": nn.Identity, **options})


def tried(make: Callable[[], nn.Module], served: Model | None = None) -> Verdict:
    with torch.inference_mode():
        return try_out(make().eval(), served or model(), torch.device("cpu"), lambda: make().eval())


def called(make: Callable[[], nn.Module], served: Model | None = None) -> tuple[Verdict, list[Call]]:
    """The verdict on a module, and what two lanes call for it."""
    verdict = tried(make, served)
    calls = lane_calls(make().eval(), verdict)
    return verdict, [calls(), calls()]


def ask(call: Call, *values: float) -> list[float]:
    """The first column of what a lane answers for rows of these values."""
    rows = torch.tensor([[float(value)] * WIDTH for value in values])
    with torch.inference_mode():
        return [float(row[0]) for row in call(rows)]


def module_of(call: Call) -> Any:
    """The module that a lane's call runs."""
    ran: list[nn.Module] = []
    with register_module_forward_pre_hook(lambda module, inputs: ran.append(module)):
        ask(call, 1)
    return ran[0]


class Module(nn.Module):
    """Runs a function with itself and its input. Args: held: attributes."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **held: Any) -> None:
        super().__init__()
        self._run = run
        for name, value in held.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self._run(self, x)


def adding(tensor: Tensor, x: Tensor, write: Callable[[], object]) -> Tensor:
    answer = x + tensor
    write()
    return answer


# --- state ---------------------------------------------------------------------------------------------------


STATEFUL: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "copy_": ("last", lambda: Module(lambda m, x: adding(m.last, x, lambda: m.last.copy_(x[0])), last=torch.zeros(4))),
    "data": (
        "last",
        lambda: Module(lambda m, x: adding(m.last, x, lambda: m.last.data.copy_(x[0])), last=torch.zeros(4)),
    ),
    "slice": (
        "last",
        lambda: Module(lambda m, x: adding(m.last, x, lambda: m.last.__setitem__(0, x[0, 0])), last=torch.zeros(4)),
    ),
    "numpy": (
        "last",
        lambda: Module(
            lambda m, x: adding(m.last, x, lambda: np.copyto(m.last.numpy(), x[0].numpy())), last=torch.zeros(4)
        ),
    ),
    "parameter": (
        "last",
        lambda: Module(
            lambda m, x: adding(m.last, x, lambda: m.last.add_(1)), last=nn.Parameter(torch.zeros(4), False)
        ),
    ),
    "attribute": (
        "last",
        lambda: Module(lambda m, x: adding(m.last, x, lambda: setattr(m, "last", x[0].clone())), last=torch.zeros(4)),
    ),
    "list": ("seen", lambda: Module(lambda m, x: x + (m.seen.append(0) or len(m.seen)), seen=[])),
    "dict": (
        "seen",
        lambda: Module(lambda m, x: adding(m.seen.get("n", torch.zeros(4)), x, lambda: m.seen.update(n=x[0])), seen={}),
    ),
    "deque": ("seen", lambda: Module(lambda m, x: x + (m.seen.append(0) or len(m.seen)), seen=deque())),
    "every tenth call": (
        "n",
        lambda: Module(lambda m, x: (setattr(m, "n", m.n + 1), x + (m.n % 10 == 0))[1], n=0),
    ),
    "first request": ("seen", lambda: Module(lambda m, x: x + m.seen.setdefault("n", float(x[0, 0])), seen={})),
}


@pytest.mark.parametrize(("held", "make"), STATEFUL.values(), ids=STATEFUL)
def test_an_answer_that_depends_on_earlier_requests_is_refused_by_name(
    held: str, make: Callable[[], nn.Module]
) -> None:
    with pytest.raises(FailedPrecondition, match=f"depends on earlier requests, through '{held}") as caught:
        tried(make)
    assert 'state = "shared"' in caught.value.message


@pytest.mark.parametrize(("held", "make"), STATEFUL.values(), ids=STATEFUL)
def test_state_that_is_meant_to_be_shared_is_shared(held: str, make: Callable[[], nn.Module]) -> None:
    verdict, (first, second) = called(make, model(state="shared"))
    assert (verdict.kind, verdict.serial, verdict.model.max_batch_size) == ("shared", True, 0)
    assert first is second
    assert "one at a time" in verdict.notes[0]


def reuse(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.out[: len(x)]
    return out.copy_(x * 2)


def hide(m: Any, x: Tensor) -> Tensor:
    m.hidden = x * 2
    answer: Tensor = m.hidden + 0
    return answer


def keep(m: Any, x: Tensor) -> Tensor:
    m.kept["x"] = x * 2
    answer: Tensor = m.kept["x"]
    return answer


SCRATCH: dict[str, Callable[[], nn.Module]] = {
    "buffer": lambda: Module(reuse, out=torch.zeros(32, WIDTH)),
    "attribute": lambda: Module(hide),
    "dict": lambda: Module(keep, kept={}),
    "counter": lambda: Module(lambda m, x: (setattr(m, "n", m.n + 1), x * 2)[1], n=0),
}


@pytest.mark.parametrize("make", SCRATCH.values(), ids=SCRATCH)
def test_state_written_before_it_is_read_is_copied_for_each_lane(make: Callable[[], nn.Module]) -> None:
    verdict, (first, second) = called(make)
    assert (verdict.kind, verdict.model.max_batch_size) == ("scratch", 16)
    assert isinstance(first, Own)
    rows = torch.ones(3, WIDTH)
    with torch.inference_mode():
        answer = first(rows)
        second(rows * 5)
        first(rows * 7)
    assert torch.equal(answer, rows * 2)


@dataclasses.dataclass
class Fields:
    y: Tensor


class Named(NamedTuple):
    y: Tensor


@pytest.mark.parametrize("wrap", [Fields, Named, lambda y: {"y": y}, lambda y: deque([y]), lambda y: [y]])
def test_answers_in_any_structure_are_copies(wrap: Callable[[Tensor], Any]) -> None:
    served = model()
    _, (call, _) = called(lambda: Module(lambda m, x: wrap(reuse(m, x)), out=torch.zeros(32, WIDTH)), served)
    rows = torch.ones(3, WIDTH)
    with torch.inference_mode():
        (answer,) = check_outputs(served, call(rows), 3)
        call(rows * 5)
    assert torch.equal(answer, rows * 2)


def test_a_lanes_copy_shares_the_weights_and_leaves_nothing_behind() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.hidden = m.layer(x)
        m.out[: len(x)].copy_(m.hidden)
        return m.out[: len(x)]  # type: ignore[no-any-return]

    layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    verdict, (first, second) = called(
        lambda: Module(run, layer=layer, out=torch.zeros(32, WIDTH), unused=torch.ones(9))
    )
    assert isinstance(first, Own)
    assert isinstance(second, Own)
    one, other = module_of(first), module_of(second)
    assert one.layer.weight.data_ptr() == other.layer.weight.data_ptr() == layer.weight.data_ptr()
    assert one.unused.data_ptr() == other.unused.data_ptr()
    assert one.out.data_ptr() != other.out.data_ptr()
    ask(first, 1, 2)
    assert not hasattr(one, "hidden")
    assert "'out'" in verdict.notes[0]


def test_a_failed_forward_leaves_nothing_behind_either() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.hidden = x
        if bool((x == 13).any()):
            raise ValueError("no")
        return m.hidden * 2  # type: ignore[no-any-return]

    _, (first, _) = called(lambda: Module(run))
    assert isinstance(first, Own)
    with pytest.raises(ValueError, match="no"):
        ask(first, 13)
    assert not hasattr(module_of(first), "hidden")


def lazily(m: Any, x: Tensor) -> Tensor:
    if m.table is None:
        m.table = torch.full((WIDTH,), 2.0)
    return x * m.table


PURE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "identity": nn.Identity,
    "made once": lambda: Module(lazily, table=None),
    "constant": lambda: Module(lambda m, x: m.anchor.expand(len(x), WIDTH), anchor=torch.ones(WIDTH)),
    "cached function": lambda: Module(lambda m, x: x * two(WIDTH)),
    "not a number": lambda: Module(lambda m, x: x * 2, limit=float("nan")),
}


@functools.lru_cache
def two(width: int) -> Tensor:
    return torch.full((width,), 2.0)


@pytest.mark.parametrize("make", PURE.values(), ids=PURE)
def test_a_module_that_changes_nothing_is_called_as_it_is(make: Callable[[], nn.Module]) -> None:
    module = make().requires_grad_(False)
    verdict = tried(lambda: module)
    assert (verdict.kind, verdict.notes, verdict.serial) == ("pure", (), False)
    assert lane_calls(module, verdict)() is module


def squared(m: Any, x: Tensor) -> Tensor:
    """Twice the input, as a gradient."""
    with torch.enable_grad():
        x.requires_grad_(True)
        (gradient,) = torch.autograd.grad((x * x).sum(), x)
    return gradient


def squared_into_buffer(m: Any, x: Tensor) -> Tensor:
    m.hidden = x * x
    (gradient,) = torch.autograd.grad(m.hidden.sum(), x)
    return gradient


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        (squared, "pure"),
        (lambda m, x: squared_into_buffer(m, x.requires_grad_(True)), "scratch"),
    ],
)
def test_a_forward_that_differentiates_runs_outside_of_inference_mode(
    run: Callable[[Any, Tensor], Tensor], kind: str
) -> None:
    verdict, calls = called(lambda: Module(run))
    assert (verdict.kind, verdict.model.max_batch_size) == (kind, 16)
    assert "differentiates" in verdict.notes[0]
    for call in calls:
        assert ask(call, 1, 2, 3) == [2, 4, 6]
        with torch.inference_mode():
            assert not call(torch.ones(1, WIDTH)).requires_grad


def test_a_module_that_cannot_be_copied_is_called_by_one_lane_at_a_time() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        with m.lock:
            return reuse(m, x)

    verdict, (first, second) = called(lambda: Module(run, lock=threading.Lock(), out=torch.zeros(32, WIDTH)))
    assert verdict.kind == "scratch"
    assert isinstance(first, Serial)
    assert first is second


SHARED_SCRATCH = torch.zeros(32, WIDTH)


def test_memory_that_nobody_sees_is_found_by_its_reuse() -> None:
    verdict, (first, second) = called(lambda: Module(lambda m, x: SHARED_SCRATCH[: len(x)].copy_(x)))
    assert (verdict.kind, verdict.serial) == ("scratch", True)
    assert first is second
    rows = torch.ones(2, WIDTH)
    answer = first(rows)
    second(rows * 5)
    assert torch.equal(answer, rows)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Module(lambda m, x: nn.functional.dropout(x, 0.5, training=True)),
        lambda: Module(lambda m, x: x + torch.rand(1, generator=m.own), own=torch.Generator()),
    ],
)
def test_random_answers_are_no_state_and_share_no_batch(make: Callable[[], nn.Module]) -> None:
    verdict = tried(make)
    assert (verdict.kind, verdict.state.random, verdict.model.max_batch_size) == ("pure", True, 0)
    assert "at random" in verdict.notes[0]


def test_random_numbers_after_a_trial_cannot_be_foreseen() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        tried(lambda: Module(lambda m, x: nn.functional.dropout(x, 0.5, training=True)))
        drawn.append((torch.rand(()).item(), random.random(), np.random.random()))
    assert all(one != other for one, other in zip(*drawn, strict=True))


def test_inputs_that_a_forward_writes_to_are_copied() -> None:
    verdict, (first, _) = called(lambda: Module(lambda m, x: x.add_(1)))
    assert verdict.written_inputs == {0}
    rows = torch.zeros(2, WIDTH)
    assert torch.equal(first(rows), rows + 1)
    assert torch.equal(rows, torch.zeros(2, WIDTH))


def test_missing_inputs_are_none_wherever_a_module_is_called() -> None:
    def run(m: Any, x: Tensor, y: Tensor | None) -> Tensor:
        return x if y is None else x.add_(y)

    module = Two(run)
    for call in (Serial(module, None), Sparing(module, {0, 1}), Own(module, Undo(()))):
        assert torch.equal(call(torch.ones(1, WIDTH), None), torch.ones(1, WIDTH))


def test_a_picture_shows_a_write_that_torch_does_not_count() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = Held(net)
    assert not before.changed(Held(net))
    net[1].running_mean.data.add_(1)  # torch counts no version of this
    assert [place.name for place in before.changed(Held(net))] == ["1.running_mean"]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 2**21 + 3])
def test_a_checksum_changes_with_every_byte_and_with_their_order(size: int) -> None:
    data = torch.arange(size, dtype=torch.int64).to(torch.uint8).clone()
    first = checksum(data.untyped_storage())
    assert checksum(data.clone().untyped_storage()) == first
    for place in {0, size // 2, size - 1} if size else ():
        data[place] ^= 1
        assert checksum(data.untyped_storage()) != first
        data[place] ^= 1
    if size > 9:
        assert checksum(data.roll(8).untyped_storage()) != first


# --- rows ----------------------------------------------------------------------------------------------------


MIXING: dict[str, Callable[[Any, Tensor], Any]] = {
    "maximum over all": lambda m, x: x - x.amax(0),
    "mean": lambda m, x: x - x.mean(0),
    "softmax": lambda m, x: x.softmax(0),
    "sorted": lambda m, x: x.sort(0).values,
    "cumulative": lambda m, x: x.cumsum(0),
    "backwards": lambda m, x: x.flip(0),
    "neighbours": lambda m, x: x + x.roll(1, 0),
    "normalised": lambda m, x: x / x.norm(),
    "position": lambda m, x: x + torch.arange(len(x)).reshape(-1, 1),
    "first row": lambda m, x: x * 0 + x[:1],
    "count": lambda m, x: x * len(x),
}


@pytest.mark.parametrize("run", MIXING.values(), ids=MIXING)
def test_an_axis_0_that_does_not_count_rows_is_no_batch(run: Callable[[Any, Tensor], Any]) -> None:
    verdict = tried(lambda: Module(run))
    assert (verdict.kind, verdict.model.max_batch_size) == ("pure", 0)
    assert "axis 0 does not count rows" in verdict.notes[0]
    with pytest.raises(FailedPrecondition, match=r"max_batch_size: 16, but axis 0 does not count rows.* is .* and "):
        tried(lambda: Module(run), model(batching_asked=True))


def edges(m: Any, nodes: Tensor, edges: Tensor) -> Tensor:
    return nodes + edges.sum(0)


def added(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return x + y


def ignored(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return x * 2


class Two(nn.Module):
    """Runs a function with itself and two inputs."""

    def __init__(self, run: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._run = run

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self._run(self, x, y)


@pytest.mark.parametrize(("run", "limit"), [(edges, 0), (added, 16), (ignored, 16)])
def test_inputs_of_different_lengths_are_no_rows(run: Callable[[Any, Tensor, Tensor], Tensor], limit: int) -> None:
    inputs = (X, TensorSpec("z", "FP32", (-1, WIDTH)))
    assert tried(lambda: Two(run), model(inputs=inputs)).model.max_batch_size == limit


def test_a_limit_of_one_row_has_no_company_to_look_at() -> None:
    assert tried(lambda: Module(MIXING["mean"]), model(max_batch_size=1)).model.max_batch_size == 1


def test_a_choice_that_rounding_decides_is_no_proof_against_a_batch() -> None:
    """Indices differ in company for the first pair of requests alone, as where two values are nearly equal."""
    pairs = iter([1] + [0] * 1000)

    def run(m: Any, x: Tensor) -> Tensor:
        index = x.argmax(1)
        return index + next(pairs) if len(x) == 3 else index

    verdict = tried(lambda: Module(run), model(outputs=(TensorSpec("y", "INT64", (-1,)),)))
    assert verdict.model.max_batch_size == 16


# --- examples ------------------------------------------------------------------------------------------------


def test_ones_are_tried_where_zeros_fail() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        if bool((x <= 0).any()):
            raise ValueError("every length must be positive")
        return x

    verdict = tried(lambda: Module(run))
    assert (verdict.kind, verdict.model.max_batch_size, verdict.notes) == ("pure", 16, ())
    assert verdict.make is not None
    assert verdict.make(2, 0)[0].min() > 0


def test_a_model_that_takes_no_example_is_served_unbatched_with_a_note() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        if bool((x < 100).any()):
            raise ValueError("everything must be large")
        return x

    verdict, (first, second) = called(lambda: Module(run))
    assert (verdict.make, verdict.serial, verdict.model.max_batch_size) == (None, True, 0)
    assert first is second
    assert "everything must be large" in verdict.notes[0]
    assert "example.npz" in verdict.notes[0]
    values = {"x": np.float32([[100, 200, 300, 400], [500, 600, 700, 800]])}
    assert tried(lambda: Module(run), model(example_values=values)).notes == ()


def test_errors_of_the_code_fail_a_model_whatever_the_input() -> None:
    with pytest.raises(FailedPrecondition, match="AttributeError: "):
        tried(lambda: Module(lambda m, x: m.nothing))


def test_the_zeros_that_a_program_was_exported_with_tell_nothing() -> None:
    zeros = {"x": np.zeros((2, WIDTH), np.float32)}
    assert tried(lambda: Module(MIXING["maximum over all"]), model(example_values=zeros)).model.max_batch_size == 0


@pytest.mark.parametrize(("call", "apart"), [(lambda x: x * 2, False), (lambda x: x / x.amax(), True)])
def test_lanes_are_asked_whether_they_keep_rows_apart(call: Call, apart: bool) -> None:
    makes = list(telling_examples(model(), CPU))
    assert bool(rows_of_a_lane_apart(call, model(), torch.device("cpu"), makes, 2e-4)) is apart


def test_a_number_that_a_request_gives_for_all_its_rows_is_tried_with_another(tmp_path: Path) -> None:
    """Such as a task: in company, the first request would choose for all."""
    tasks = TensorSpec("task", "INT64", (-1,))
    served = model((X, tasks), example_values={"task": np.zeros(1, np.int64)})
    verdict = tried(lambda: Two(lambda m, x, task: x * (1 + int(task[0]))), served)
    assert verdict.model.max_batch_size == 0
    assert tried(lambda: Two(lambda m, x, task: x * (1 + task[:, None])), served).model.max_batch_size == 16


def test_a_program_is_tried_with_other_values_than_it_was_exported_with(tmp_path: Path) -> None:
    class Scales(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.amax() > 1, x / 255, x)

    rows = torch.export.Dim("rows")
    save_program(tmp_path / "net/1/model.pt2", Scales(), (torch.rand(2, WIDTH),), ({0: rows},))
    served = open_model(tmp_path)
    verdict = tried(served.factory, served)
    assert verdict.model.max_batch_size == 0
    assert "axis 0 does not count rows" in verdict.notes[0]


def test_telling_examples_differ_from_row_to_row_and_from_variant_to_variant() -> None:
    specs = tuple(
        TensorSpec(kind, kind, (-1, 8)) for kind in ("FP32", "FP64", "FP16", "BF16", "INT64", "UINT8", "BOOL")
    )
    make = next(iter(telling_examples(model(inputs=specs), CPU)))
    for one, other in zip(make(3, 0), make(3, 1), strict=True):
        assert not np.array_equal(one, other)
        assert not np.array_equal(one[0], one[1])
        assert one.shape == (3, 8)


# --- code that may write -------------------------------------------------------------------------------------


CODE = """
import torch
from torch import nn

CACHE = {{}}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("last", torch.zeros(4))
        self.seen = []
    def helper(self, x):
        {helper}
    def forward(self, x):
        {forward}
        return x * self.weight + self.last

def build():
    return Net()
"""

TOML = """
factory = "net:build"
max_batch_size = 8
inputs = [{ name = "x", datatype = "FP32", shape = [-1, 4] }]
outputs = [{ name = "y", datatype = "FP32", shape = [-1, 4] }]
"""

RARELY = "if bool((x == 77).any()): "

WRITES = {
    "in place": ("last", "self.last.copy_(x[0])"),
    "slice": ("last", "self.last[:] = x[0]"),
    "alias": ("last", "last = self.last; last.add_(x[0])"),
    "view": ("last", "self.last.view(2, 2).add_(float(x[0, 0]))"),
    "augmented": ("last", "self.last += x[0]"),
    "out": ("last", "torch.add(self.last, x[0], out=self.last)"),
    "function": ("last", "torch.relu_(self.last)"),
    "attribute": ("last", "self.last = x[0].clone()"),
    "setattr": ("last", "setattr(self, 'last', x[0].clone())"),
    "unpacked": ("last", "self.last, _ = x[0].clone(), 1"),
    "list": ("seen", "self.seen.append(1)"),
    "two names": ("last", "k, w = self.last, 1; k.add_(x[0])"),
    "through a method": ("last", "self.helper(x)"),
}


def written(root: Path, forward: str, helper: str = "self.last.copy_(x[0])") -> Model:
    folder = root / "net/1"
    folder.mkdir(parents=True)
    (folder / "net.py").write_text(CODE.format(forward=forward, helper=helper))
    weights = {"weight": torch.ones(4), "last": torch.zeros(4)}
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(weights))
    return open_model(root, TOML)


@pytest.mark.parametrize(("held", "statement"), WRITES.values(), ids=WRITES)
def test_a_forward_that_only_sometimes_writes_leaves_nothing_behind(tmp_path: Path, held: str, statement: str) -> None:
    served = written(tmp_path, RARELY + statement)
    module = served.factory()
    assert suspects(module) == [("", held)]
    verdict = tried(served.factory, served)
    assert (verdict.kind, verdict.model.max_batch_size) == ("scratch", 8)
    assert f"'{held}'" in verdict.notes[0]
    calls = lane_calls(served.factory(), verdict)
    lane = calls()
    before = ask(lane, 1, 2)
    ask(lane, 77)
    assert ask(lane, 1, 2) == before == [1, 2]


def test_code_that_only_reads_is_not_suspected(tmp_path: Path) -> None:
    served = written(
        tmp_path, "last = self.last.clone(); last.add_(1); y = [self.weight]; y.append(2); self.last.sum()"
    )
    assert suspects(served.factory()) == []
    assert tried(served.factory, served).kind == "pure"


@pytest.mark.parametrize("statement", ["CACHE['last'] = x", "Net.last_seen = x", "self.helper.__func__.last = x"])
def test_a_module_that_writes_beside_the_network_has_one_lane_at_a_time(tmp_path: Path, statement: str) -> None:
    served = written(tmp_path, statement)
    verdict = tried(served.factory, served)
    assert (verdict.kind, verdict.serial) == ("scratch", True)


def test_a_global_that_an_answer_depends_on_is_named(tmp_path: Path) -> None:
    served = written(tmp_path, "CACHE['n'] = CACHE.get('n', 0) + 1; x = x + CACHE['n']")
    with pytest.raises(FailedPrecondition, match=r"through 'net.CACHE\[n\]'"):
        tried(served.factory, served)


# --- rounding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("datatype", "one", "other", "same"),
    [
        ("FP32", [1.0, 1000.0], [1.01, 1000.0], True),  # beside the largest value it is nothing
        ("FP32", [1.0, 1.0], [1.01, 1.0], False),
        ("FP32", [np.nan, 1.0], [np.nan, 1.0], True),
        ("FP32", [np.nan, 1.0], [2.0, 1.0], False),
        ("FP32", [np.inf, 1.0], [-np.inf, 1.0], False),
        ("INT64", [3, 4], [3, 5], False),
        ("BOOL", [True, False], [True, False], True),
        ("FP32", [], [], True),
    ],
)
def test_a_difference_is_more_than_rounding(datatype: str, one: list[float], other: list[float], same: bool) -> None:
    specs = [TensorSpec("y", datatype, (-1,))]
    arrays = [[np.array(values, {"FP32": "f4", "INT64": "i8", "BOOL": "?"}[datatype])] for values in (one, other)]
    found = difference(specs, *arrays, tolerance([datatype], CPU))
    assert (found is None) is same
    if found is not None:
        assert "output 'y'[" in found.text


@pytest.mark.parametrize(("boxes", "off", "same"), [(100, 0.05, False), (100, 0.0005, True), (3, 0.05, True)])
def test_small_values_beside_large_ones_are_held_against_their_like(boxes: int, off: float, same: bool) -> None:
    """As scores beside the corners of boxes, if there are enough to say how large they are."""
    one = np.random.default_rng(1).uniform(0, 640, (1, boxes, 5)).astype(np.float32)
    one[..., 4] /= 640
    other = one.copy()
    other[0, 1, 4] += off
    found = difference([TensorSpec("y", "FP32", (-1, -1, 5))], [one], [other], tolerance(["FP32"], CPU))
    assert (found is None) is same


def test_half_precision_and_graphics_processors_round_more() -> None:
    kinds = [tolerance([datatype], CPU) for datatype in ("FP64", "FP32", "FP16", "BF16")]
    assert kinds == sorted(kinds)
    assert tolerance(["FP32"], CUDA) > tolerance(["FP32"], CPU)
    assert tolerance(["INT64"], CPU) == tolerance(["FP32"], CPU)
