"""Time limits of batches that the dispatcher has sent to executors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tnxd.deployment.registry import Registry
from tnxd.serving.dispatcher import Dispatcher
from tnxd.serving.reports import Inventory


def limit_s(isolation: str, time_limit_s: float | None) -> float:
    parts: dict[str, Any] = dict.fromkeys(
        ("scheduler", "answers", "background", "shadows", "refusals", "quarantine"),
    )
    dispatcher = Dispatcher(
        **parts,
        inventory=Inventory(Registry(), {}, {}),
        reconciler=SimpleNamespace(audits=None),  # type: ignore[arg-type]
        limits=None,  # type: ignore[arg-type]
        stall_timeout_s=30.0,
        on_device_lost=lambda: None,
    )
    model = SimpleNamespace(isolation=isolation, time_limit_s=time_limit_s)
    return dispatcher.limit_s(SimpleNamespace(model=model))  # type: ignore[arg-type]


def test_a_batch_has_the_limit_of_its_model_or_the_daemons() -> None:
    for isolation in ("none", "thread"):
        assert limit_s(isolation, 2.0) == 2.0
        assert limit_s(isolation, None) == 30.0


def test_a_batch_in_a_process_is_first_given_up_by_whoever_waits_for_the_process() -> None:
    """The waiting thread may wait for its turn as long, and then ends the process and says how it ended."""
    assert limit_s("process", 2.0) > 2 * 2.0 + 1.0
    assert limit_s("process", None) > 2 * 30.0 + 1.0
