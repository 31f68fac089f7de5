"""Side effects of forwards: those that come every time are found, all others are left alone."""

from __future__ import annotations

import multiprocessing
import random
import socket
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from process_changes import ALL, HARMLESS, IDS, complaint, in_own_thread
from tnxd.models.formats import compiling
from tnxd.models.process_state.restoration import settings_restored
from tnxd.models.process_state.setter_calls import SEED
from tnxd.models.process_state.side_effects import SideEffectDetector


@pytest.fixture(autouse=True)
def _traced(request: pytest.FixtureRequest) -> None:
    if sys.gettrace() is not None:
        pytest.skip("a tracer is at work")


@pytest.mark.slow
@pytest.mark.skipif(bool(compiling.missing() or not compiling.has_python_headers()), reason="no compiler or headers")
@pytest.mark.filterwarnings("ignore")  # they are torch's own
def test_forward_may_compile() -> None:
    net = torch.nn.Linear(2, 2)
    x = torch.ones(1, 2)
    with settings_restored() as changes:
        assert complaint(lambda: torch.compile(net, dynamic=False)(x), times=3) == ""
    assert changes.names == []


def test_forward_may_use_the_start_method_of_the_system() -> None:
    """The first to use it settles it."""
    with settings_restored() as changes:
        assert complaint(lambda: multiprocessing.Lock()) == ""
    assert changes.names == []


def test_forward_may_have_a_data_loader_with_workers() -> None:
    assert complaint(lambda: list(torch.utils.data.DataLoader([1, 2], num_workers=1))) == ""


@pytest.mark.parametrize(("name", "change"), ALL, ids=IDS)
def test_forward_that_changes_a_setting_each_time_is_found(name: str, change: Callable[[], Any]) -> None:
    with settings_restored():
        told = complaint(change)
    assert (name in told) == (name not in HARMLESS)


@pytest.mark.parametrize("forward", [lambda: random.seed(3), lambda: np.random.seed(3), lambda: torch.manual_seed(3)])
@pytest.mark.parametrize("draws", [lambda: None, lambda: (random.random(), np.random.random(), torch.rand(1))])
def test_forward_that_seeds_is_found(forward: Callable[[], Any], draws: Callable[[], Any]) -> None:
    assert "seed" in complaint(lambda: (forward(), draws()))


def test_forward_that_draws_is_left_alone() -> None:
    assert complaint(lambda: (random.random(), np.random.random(), torch.rand(3), torch.randperm(5)), times=5) == ""


def test_numbers_that_somebody_else_seeded_before_are_not_held_against_a_forward() -> None:
    detector = SideEffectDetector()
    for _ in range(4):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        with detector:
            random.random()
            np.random.random()
            torch.rand(1)
    assert detector.complaint() == ""


def test_setup_of_a_library_at_its_first_use_is_left_alone() -> None:
    first = [True]

    def forward() -> None:
        if first.pop() if first else False:
            socket.setdefaulttimeout(3.0)

    with settings_restored():
        assert complaint(forward, times=3) == ""


def test_forward_that_cleans_up_is_left_alone() -> None:
    def forward() -> None:
        with torch.autocast("cpu"), torch.no_grad(), np.errstate(all="ignore"), torch.device("meta"):
            pass

    assert complaint(forward) == ""


def for_a_while_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_dtype(torch.float32)


def for_a_while_tensor_type() -> None:
    torch.set_default_tensor_type(torch.DoubleTensor)
    torch.set_default_tensor_type(torch.FloatTensor)


def for_a_while_torch() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)


def for_a_while_torch_state() -> None:
    state = torch.get_rng_state()
    torch.rand(1)
    torch.set_rng_state(state)


def for_a_while_python() -> None:
    state = random.getstate()
    random.seed(5)
    random.setstate(state)


def for_a_while_numpy() -> None:
    state = np.random.get_state()
    np.random.seed(5)
    np.random.set_state(state)


def for_a_while_in_another_namespace() -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(5)


FOR_A_WHILE = [
    (for_a_while_dtype, "torch's default dtype"),
    (for_a_while_tensor_type, "torch's default dtype"),
    (for_a_while_torch, SEED),
    (for_a_while_torch_state, SEED),
    (for_a_while_python, "the seed of Python's random numbers"),
    (for_a_while_numpy, "the seed of numpy's random numbers"),
    (for_a_while_in_another_namespace, SEED),
]


@pytest.mark.parametrize(("forward", "name"), FOR_A_WHILE)
@pytest.mark.filterwarnings("ignore:torch.set_default_tensor_type")
def test_forward_that_sets_what_all_share_for_a_while_is_found(forward: Callable[[], None], name: str) -> None:
    assert complaint(forward) == f"a forward sets {name}, if only for a while: other models run meanwhile"


def test_setter_under_another_name_beside_weights_is_found() -> None:
    module = ModuleType("tnxd_repository.net@1#0.net")
    exec(
        "import torch\nfrom torch import manual_seed as seed\n"
        "def forward():\n    with torch.random.fork_rng():\n        seed(5)",
        vars(module),
    )
    sys.modules[module.__name__] = module
    try:
        assert SEED in complaint(module.forward)
        assert module.seed is torch.manual_seed
    finally:
        del sys.modules[module.__name__]


def test_complaint_names_lasting_and_brief_side_effects() -> None:
    with settings_restored():
        told = complaint(lambda: (torch.set_default_dtype(torch.float64), for_a_while_python()))
    assert told == (
        "a forward changes torch's default dtype, for all models of the process; "
        "and sets the seed of Python's random numbers, if only for a while: other models run meanwhile"
    )


@pytest.mark.parametrize(
    "forward",
    [
        lambda: torch.rand(2, generator=torch.Generator().manual_seed(5)),
        lambda: random.Random(5).random(),
        lambda: np.random.RandomState(5).rand(2),
        lambda: np.random.default_rng(5).random(2),
        lambda: torch.get_rng_state(),
    ],
)
def test_generators_of_the_model_itself_are_left_alone(forward: Callable[[], Any]) -> None:
    assert complaint(forward) == ""


def test_random_numbers_that_are_forked_and_not_seeded_are_left_alone() -> None:
    """Others may draw a number twice. They draw no foreseeable one."""

    def forward() -> None:
        with torch.random.fork_rng():
            torch.rand(1)

    assert complaint(forward) == ""


def test_setter_calls_of_other_threads_are_not_held_against_a_forward() -> None:
    def forward() -> None:
        in_own_thread(for_a_while_dtype)

    assert complaint(forward) == ""


def test_detector_leaves_all_functions_as_they_were() -> None:
    def functions() -> list[Any]:
        return [
            *(torch.manual_seed, torch.random.manual_seed, torch.set_rng_state, torch.set_default_dtype),
            *(random.seed, random.setstate, np.random.seed, np.random.set_state),
        ]

    before = functions()
    one, other = SideEffectDetector(), SideEffectDetector()
    for _ in range(2):
        with one, other:
            assert functions() != before
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        other.__exit__(None, None, None)
    assert all(now is kept for now, kept in zip(functions(), before, strict=True))
