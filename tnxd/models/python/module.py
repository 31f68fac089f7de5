"""Modules that stand before a model in plain Python, so that executors call it like a network."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tnxctl.protocol.errors import FailedPrecondition
from tnxctl.protocol.wire import TensorSpec
from tnxd.models.process_state import monkey_patches
from tnxd.models.python.failures import ProcessAway
from tnxd.models.python.instance import Code, Instance, Values
from tnxd.models.python.processes import Processes
from tnxd.models.tensors import Value, to_array, to_tensor


class InThread(torch.nn.Module):
    """Objects of the class `Model`, each called by one thread at a time.

    Outputs are copied, since the model may keep them.

    Args:
        first: an object that is not loaded yet; [] for another one. It is taken out.
        replicas: how many objects. limit_s: a call that takes longer counts as hung.
    """

    def __init__(self, code: Code, first: list[Instance], replicas: int, limit_s: float) -> None:
        super().__init__()
        self._made = _Objects(code, first, replicas, limit_s)

    def to(self, device: torch.device | str) -> InThread:  # type: ignore[override]
        """Load the objects, for a device. To be called once. Raises FailedPrecondition: they cannot be loaded."""
        self._made.load(str(device))
        return self

    def forward(self, *inputs: Value | None) -> tuple[Value, ...]:
        return self._made.call(inputs)


class _Objects:
    """The objects. Not looked into by a trial, which would take what they hold for the state of a network."""

    def __init__(self, code: Code, first: list[Instance], replicas: int, limit_s: float) -> None:
        self._code = code
        self._limit_s = limit_s
        made = [first.pop()] if first else []
        self._idle = made + [Instance(code) for _ in range(replicas - len(made))]
        self._running: dict[Instance, float] = {}
        self._changed = threading.Condition()

    def load(self, device: str) -> None:
        for instance in self._idle:
            instance.load(device)
        replaced = monkey_patches.undo()
        if replaced:
            raise FailedPrecondition(f"{self._code.label}: {monkey_patches.sentence('loading it', replaced)}")

    def call(self, inputs: Values) -> tuple[Value, ...]:
        instance = self._take()
        try:
            if self._code.framework == "numpy":
                inputs = [None if tensor is None else to_array(tensor) for tensor in inputs]
            made = instance(inputs)
            return tuple([_tensor(value, spec) for value, spec in zip(made, self._code.plan.outputs, strict=True)])
        finally:
            with self._changed:
                self._idle.append(instance)
                del self._running[instance]
                self._changed.notify()

    def _take(self) -> Instance:
        """An object that nobody calls. Raises ProcessAway: all of them hang."""
        with self._changed:
            while not self._idle:
                left = max(self._running.values()) + self._limit_s - time.monotonic()
                if left <= 0:
                    raise ProcessAway(f"model {self._code.plan.name!r} hangs, in all of its replicas")
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            instance = self._idle.pop(0)
            self._running[instance] = time.monotonic()
            return instance


class InProcess(torch.nn.Module):
    """Processes that run a model. Args: outputs: of its signature."""

    def __init__(self, processes: Processes, outputs: Sequence[TensorSpec]) -> None:
        super().__init__()
        self._processes = processes
        self._outputs = outputs

    def forward(self, *inputs: Value | None) -> tuple[Value, ...]:
        made = self._processes([None if tensor is None else to_array(tensor) for tensor in inputs])
        return tuple([to_tensor(array, spec.datatype) for array, spec in zip(made, self._outputs, strict=True)])


def _tensor(value: Any, spec: TensorSpec) -> Value:
    """A copy of an output as a tensor, or as an array if it is BYTES."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return to_tensor(np.array(value, order="C"), spec.datatype)
