"""Defects planted in the lanes of accelerators, and whether they are noticed.

Races show as wrong answers on the pretended device, and there are none where none is planted. Other defects fail the
tests of `test_accelerator`.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import test_accelerator
import torch

from pretended import pretended
from pretended.planted import Defect, planted
from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.wire import TensorSpec
from tnxd.executors import arena
from tnxd.executors.accelerator import Accelerator
from tnxd.executors.accelerator_pool import AcceleratorPool
from tnxd.executors.accelerator_runner import AcceleratorRunner, Ticket
from tnxd.executors.cuda import Cuda
from tnxd.executors.execution import Execution
from tnxd.executors.inbound import Inbound
from tnxd.executors.outbound import Outbound
from tnxd.executors.slots import Slot
from tnxd.executors.trial.copies import Serial
from tnxd.models.model import Model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the device has to be pretended")

WIDTH = 8
VALUES = "other values"
EARLY = "Both events must be completed before calculating elapsed time"
X = TensorSpec("x", "FP32", (-1, WIDTH))


class Steps(torch.nn.Module):
    """Two outputs, by way of values in between. Its weights are computed on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(WIDTH, device="cuda:0") * 3, requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * self.weight + 1, (x + 1) * 2

    @staticmethod
    def expected(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return x * 3 + 1, (x + 1) * 2


class Strays(Steps):
    """Leaves another stream behind as the current one."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(stream)
        return super().forward(x)


def model() -> Model:
    return Model("m", "1", (X,), (X, TensorSpec("y", "FP32", (-1, WIDTH))), 1 << 20, Steps)


def on_thread(function: Callable[[], Any]) -> Any:
    """The result of a function on a thread of its own, as a lane has one."""
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((function(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    result, error = results.get(timeout=60)
    if error is not None:
        raise error
    return result


def serves(
    module: Callable[[], torch.nn.Module] = Steps, rows: Sequence[int] = (3,) * 8, *, unloads: bool = False
) -> str:
    """Fault of the answers of a lane with two slots, the next batch issued before the last one is over; ""
    if they are right.

    Args:
        unloads: whether the model is unloaded with the last batch under way.
    """
    accelerator = Cuda("cuda:0")
    runner = AcceleratorRunner(accelerator, 2)
    served = model()
    runner.calls[served.key] = accelerator.place(module())
    sent = [np.arange(count * WIDTH, dtype=np.float32).reshape(count, WIDTH) + 7 * n for n, count in enumerate(rows)]
    executions = [Execution(0, 0, served, [(x,)], [len(x)], ()) for x in sent]

    def serve() -> None:
        runner.enter_thread()
        under_way: deque[Ticket] = deque()
        for execution in executions:
            ticket = runner.issue(execution)
            if ticket.flight is not None:
                under_way.append(ticket)
            if len(under_way) == 2:
                land(under_way.popleft())
        if unloads:
            del runner.calls[served.key]
        while under_way:
            land(under_way.popleft())

    def land(ticket: Ticket) -> None:
        if not runner.finish(ticket):
            runner.recover(ticket)

    on_thread(serve)
    for execution, x in zip(executions, sent, strict=True):
        (outcome,) = execution.outcomes
        if isinstance(outcome, TensorNextError):
            return str(outcome)
        if not all(map(np.array_equal, outcome, Steps.expected(x))):
            return VALUES
    return ""


def serves_strays() -> str:
    return serves(Strays)


def serves_until_unloaded() -> str:
    return serves(unloads=True)


def serves_pieces() -> str:
    """The same with batches that go through the arena in pieces, more than there are at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "MOST_PINNED", 4096)
        return serves(rows=[700] * 4)


def serves_growing() -> str:
    """The same with batches that grow, so that a slot needs more memory while others are under way."""
    return serves(rows=[3, 200, 2000, 5, 9000, 20000, 7, 40000])


def shares() -> str:
    """The same for two lanes that share a module with a state, one after the other."""

    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.add_(x)
            return self.total * 1

    call = Serial(Counts().to("cuda:0"), None)
    one = torch.ones(1, device="cuda:0")
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    counted = []
    for index in range(6):
        with torch.cuda.stream(streams[index % 2]):
            counted.append(call(one * 1))
    streams[1].synchronize()
    streams[0].synchronize()
    return "" if [each.item() for each in counted] == [1, 2, 3, 4, 5, 6] else VALUES


class Race(NamedTuple):
    """A planted race. Attributes: serve: shows it, under that policy. sign: what is wrong then."""

    defect: Defect
    serve: Callable[[], str] = serves
    sign: str = VALUES
    policy: str = "late"


LANE = AcceleratorRunner

RACES = [
    Race(
        Defect(
            *("answers are read before they are copied", Outbound, "land"),
            right="slot.out_ready.synchronize()",
            wrong="slot.packed.synchronize()",
        ),
        sign=EARLY,
    ),
    Race(
        Defect(
            *("times are read before anything is done", Outbound, "land"),
            right="slot.out_ready.synchronize()",
            wrong="pass",
        ),
        sign=EARLY,
    ),
    Race(
        Defect(
            *("a batch is computed before its inputs came", LANE, "_launched"),
            right="compute.wait_event(slot.in_ready)",
            wrong="pass",
        ),
        sign=EARLY,
    ),
    Race(
        Defect(
            *("outputs are copied before they are computed", Outbound, "fetch"),
            right="self.stream.wait_event(slot.packed)",
            wrong="pass",
        ),
        sign=EARLY,
    ),
    Race(
        Defect(
            *("a slot is used again while its batch is under way", LANE, "issue"),
            right="failure = self._try_to_launch(ticket)",
            wrong="failure = self._try_to_launch(ticket); self._free.put(ticket.slot)",
        ),
    ),
    Race(
        Defect(
            *("answers are left in the slot", Outbound, "_block"),
            right="slot.answers.array[:nbytes].copy()",
            wrong="slot.answers.array[:nbytes]",
        ),
    ),
    Race(
        Defect(
            *("outputs are freed before they are copied", Outbound, "fetch"),
            right="slot.out_ready.record(self.stream)",
            wrong="slot.out_ready.record(self.stream); flight.sources, flight.held = [], []",
        ),
    ),
    Race(Defect("weights are not waited for", Accelerator, "place", right="self.settle()", wrong="pass")),
    Race(
        Defect(
            *("the stream that a model chose is not waited for", LANE, "_put_back"),
            right="self._compute.wait_stream(current)",
            wrong="pass",
        ),
        serves_strays,
    ),
    Race(
        Defect(
            *("the stream that a model chose stays the current one", LANE, "_put_back"),
            right="if current != self._current:",
            wrong="if False:",
        ),
        serves_strays,
    ),
    Race(
        Defect(
            *("memory of a stream that a model chose is freed early", LANE, "_launched"),
            right="flight.held.append(outputs)",
            wrong="pass",
        ),
        serves_strays,
    ),
    Race(
        Defect(
            *("weights are freed while a batch reads them", LANE, "_launched"),
            right="flight.held.append(self.call(execution))",
            wrong="pass",
        ),
        serves_until_unloaded,
    ),
    Race(
        Defect(
            *("a piece is gathered over one that is under way", Inbound, "_send_pieces"),
            right="copied.synchronize()",
            wrong="pass",
        ),
        serves_pieces,
    ),
    Race(
        Defect(
            *("a piece is read before it came", Outbound, "_block_of_pieces"),
            right="slot.pieces[turn].synchronize()",
            wrong="pass",
        ),
        serves_pieces,
    ),
    Race(
        Defect(
            *("new memory is written to while it is in use", Inbound, "send"),
            right="self.order()",
            wrong="pass",
        ),
        serves_growing,
        policy="random",
    ),
    Race(
        Defect(
            *("lanes share a module, which does not wait for them", Serial, "__call__"),
            right="self._stream.wait_stream(lane)",
            wrong="pass",
        ),
        shares,
        policy="random",
    ),
]


@pytest.mark.parametrize("race", RACES, ids=[race.defect.what for race in RACES])
def test_a_race_is_seen(race: Race) -> None:
    """With `random`, by one of twenty orders."""
    with planted(race.defect):
        for seed in range(20 if race.policy == "random" else 1):
            with pretended(policy=race.policy, seed=seed):
                seen = race.serve()
            if seen:
                break
    assert race.sign in seen


@pytest.mark.parametrize("policy", ["eager", "late", "random"])
@pytest.mark.parametrize("serve", [serves, serves_strays, serves_until_unloaded, serves_pieces, serves_growing, shares])
def test_none_is_seen_where_there_is_none(serve: Callable[[], str], policy: str) -> None:
    for seed in range(3 if policy == "random" else 1):
        with pretended(policy=policy, seed=seed):
            assert serve() == ""


# --- other defects -------------------------------------------------------------------------------------------------

NOTICED = [
    (
        Defect(
            *("a wait for a batch uses a core", Cuda, "event"),
            right="blocking=True",
            wrong="blocking=False",
        ),
        test_accelerator.test_serving_allocates_nothing_pinned_and_waits_without_a_core,
    ),
    (
        Defect(
            *("every batch allocates pinned memory", Slot, "grow"),
            right="if self.answers.nbytes < answers:",
            wrong="if answers:",
        ),
        test_accelerator.test_serving_allocates_nothing_pinned_and_waits_without_a_core,
    ),
    (
        Defect(
            *("every output is copied by itself", Outbound, "_arrange"),
            right="together = len(found) > 1",
            wrong="together = False",
        ),
        test_accelerator.test_small_outputs_of_several_types_come_back_together,
    ),
    (
        Defect(
            *("a slot keeps the memory that went out with a reply", Outbound, "_block"),
            right="slot.answers = spare",
            wrong="pass",
        ),
        partial(test_accelerator.test_answers_are_in_memory_that_no_later_batch_writes, width=70_000),
    ),
    (
        Defect(
            *("lanes stay cold", AcceleratorPool, "_warm_lanes"),
            right="if loading.example is None or loading.make is None:",
            wrong="if True:",
        ),
        test_accelerator.test_every_lane_is_warm_for_all_sizes,
    ),
    (
        Defect(
            *("lanes that nobody waits for go first, too", Cuda, "stream"),
            right="-1 if first else 0",
            wrong="-1",
        ),
        test_accelerator.test_lanes_that_serve_go_first,
    ),
    (
        Defect(
            *("the error of the device hides that of the model", LANE, "_wait_for_all"),
            right="with contextlib.suppress(RuntimeError):",
            wrong="if True:",
        ),
        test_accelerator.test_the_error_of_a_model_is_not_hidden_by_that_of_the_device,
    ),
    (
        Defect(
            *("pinned memory of a lost device is freed", Outbound, "_give_back"),
            right="arena.leak(block)",
            wrong="pass",
        ),
        test_accelerator.test_a_lost_device_answers_all_that_is_under_way,
    ),
    (
        Defect(
            *("the cache is emptied that torch has emptied", LANE, "free_memory"),
            right="if not emptied:",
            wrong="if True:",
        ),
        test_accelerator.test_the_cache_is_not_emptied_twice_when_memory_runs_out,
    ),
]


@pytest.mark.parametrize(("defect", "test"), NOTICED, ids=[defect.what for defect, _ in NOTICED])
def test_a_defect_is_noticed(defect: Defect, test: Callable[[Any], None]) -> None:
    with pretended() as machine, planted(defect), pytest.raises(AssertionError):
        test(machine)
