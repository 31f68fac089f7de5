"""Time limits of batches that the dispatcher has sent to executors."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from tnxd.deployment.registry import Registry
from tnxd.serving.dispatcher import Dispatcher
from tnxd.serving.reports import Inventory


def dispatcher_of(inventory: Inventory, **given: Any) -> Dispatcher:
    parts: dict[str, Any] = dict.fromkeys(
        ("scheduler", "answers", "background", "shadows", "refusals", "quarantine"),
    )
    return Dispatcher(
        **{**parts, **given},
        inventory=inventory,
        reconciler=SimpleNamespace(audits=None),  # type: ignore[arg-type]
        limits=None,  # type: ignore[arg-type]
        stall_timeout_s=30.0,
        on_device_lost=lambda: None,
    )


def limit_s(isolation: str, time_limit_s: float | None) -> float:
    dispatcher = dispatcher_of(Inventory(Registry(), {}, {}))
    model = SimpleNamespace(isolation=isolation, time_limit_s=time_limit_s)
    return dispatcher.limit_s(SimpleNamespace(model=model))  # type: ignore[arg-type]


class Run:
    """An execution, which was handed to its lane, and began there, so many seconds ago; 0: it has not begun."""

    def __init__(self, handed_over_s: float, began_s: float, lane: int) -> None:
        now_ns = time.perf_counter_ns()
        self.model = SimpleNamespace(isolation="none", time_limit_s=10.0)
        self.started_ns = now_ns - round(began_s * 1e9) if began_s else 0
        self.batch: Any = SimpleNamespace(
            device=SimpleNamespace(name="cuda:0"),
            started_ns=now_ns - round(handed_over_s * 1e9),
            lane=lane,
            hung=False,
            requests=[],
            model="m",
        )


def given_up(*runs: Run, shares_chip: bool) -> list[int]:
    """Lanes whose batches are given up."""
    executor: Any = SimpleNamespace(shares_chip=shares_chip, lanes=2)
    inventory = Inventory(Registry(), {}, {"cuda:0": executor})
    inventory.on_lanes.update({run: run.batch for run in runs})  # type: ignore[misc]
    found: list[int] = []
    scheduler = SimpleNamespace(mark_hung=lambda batch: found.append(batch.lane))
    hung = dispatcher_of(inventory, scheduler=scheduler).give_up_hung()
    assert sum(hung.values()) == len(found)
    return found


def test_a_batch_that_waits_on_its_lane_has_its_own_time_afterwards() -> None:
    assert given_up(Run(9, 9, 0), Run(9, 0, 1), shares_chip=True) == []
    assert given_up(Run(12, 9, 0), Run(12, 0, 1), shares_chip=True) == []
    assert given_up(Run(12, 12, 0), Run(11, 0, 1), shares_chip=True) == [0, 1]
    assert given_up(Run(12, 12, 0), Run(9, 0, 1), shares_chip=True) == [0]


def test_a_lane_that_does_not_even_begin_hangs() -> None:
    assert given_up(Run(12, 0, 0), Run(9, 9, 1), shares_chip=False) == [0]
    assert given_up(Run(19, 0, 0), Run(9, 9, 1), shares_chip=True) == []
    assert given_up(Run(21, 0, 0), Run(9, 9, 1), shares_chip=True) == [0]


def test_a_batch_has_the_limit_of_its_model_or_the_daemons() -> None:
    for isolation in ("none", "thread"):
        assert limit_s(isolation, 2.0) == 2.0
        assert limit_s(isolation, None) == 30.0


def test_a_batch_in_a_process_is_first_given_up_by_whoever_waits_for_the_process() -> None:
    """The waiting thread may wait for its turn as long, and then ends the process and says how it ended."""
    assert limit_s("process", 2.0) > 2 * 2.0 + 1.0
    assert limit_s("process", None) > 2 * 30.0 + 1.0
