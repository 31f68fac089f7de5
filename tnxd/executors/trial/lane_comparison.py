"""Company: whether the calls of lanes answer as the trial did, one after the other and at the same time.

This is the last check of the calls. A copy of a module may still reach into the original, and a network may keep things
that a forward needs where no picture shows them.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from tnxctl.protocol.datatypes import Array
from tnxd.device_kinds import KINDS
from tnxd.executors.trial.copies import Call
from tnxd.executors.trial.examples import Item, Make, arguments
from tnxd.executors.trial.rows import rows_apart
from tnxd.executors.trial.state import Answer
from tnxd.models.model import Model
from tnxd.models.rounding import difference
from tnxd.models.tensors import check_outputs, copied, on_device

_ROUNDS = 500
_SECONDS = 0.2
_SWITCH_SECONDS = 1e-5
"""Python's switch interval meanwhile: one thread finds the things that another leaves for a moment."""


def lanes_apart(
    calls: Sequence[Call],
    model: Model,
    device: torch.device,
    known: Sequence[tuple[Item, Sequence[Array]]],
    allowed: float,
) -> str:
    """The difference between an answer of a lane and that of the trial to the same input, in words; "": there is none.

    Args:
        calls: of two lanes. known: two inputs, and the answers of the trial.
        allowed: difference that rounding may make, relative to the largest value of an output.
    """

    def ask(call: Call, item: Item, answer: Sequence[Array]) -> str:
        try:
            arrays = answer_of(call, model, device, item)[1]
        except Exception as error:
            return f"it raises {type(error).__name__}"
        found = difference(model.outputs, answer, arrays, allowed)
        return found.text if found is not None and not found.counted else ""

    for item, answer in (*known, *known):  # one after the other, on one lane and on both
        for call in calls:
            apart = ask(call, item, answer)
            if apart:
                return apart
    if KINDS[device.type].has_streams:
        return ""
    return _at_once([partial(ask, call, *pair) for call, pair in zip(calls, known, strict=True)])


def rows_of_a_lane_apart(call: Call, model: Model, device: torch.device, makes: Sequence[Make], allowed: float) -> str:
    """`rows_apart` of a lane's call: the state that it puts back may have kept rows apart in the trial."""
    return rows_apart(model, partial(answer_of, call, model, device), makes, allowed)


def answer_of(call: Call, model: Model, device: torch.device, item: Item) -> Answer:
    """The answer of a call to an item. Raises whatever the call raises."""
    tensors = [
        on_device(array, spec.datatype, device)
        for array, spec in zip(arguments(model, item), model.arguments, strict=True)
    ]
    outputs = check_outputs(model, call(*tensors), len(item[0]) if model.max_batch_size else 1)
    return outputs, [copied(output) for output in outputs]


def _at_once(asks: Sequence[Callable[[], str]]) -> str:
    """The first complaint of two functions that two threads call over and over at the same time; "": there is none."""
    complaints: list[str] = []
    until = time.monotonic() + _SECONDS
    inference = torch.is_inference_mode_enabled()
    threads = torch.get_num_threads()

    both = threading.Barrier(2)

    def work(ask: Callable[[], str]) -> None:
        torch.set_num_threads(threads)
        both.wait()
        with torch.inference_mode(inference):
            for _ in range(_ROUNDS):
                complaint = ask()
                if complaint:
                    complaints.append(complaint)
                if complaints or time.monotonic() > until:
                    return

    other = threading.Thread(target=work, args=(asks[1],), name="trial", daemon=True)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        other.start()
        work(asks[0])
        other.join()
    finally:
        sys.setswitchinterval(interval)
    return complaints[0] if complaints else ""
