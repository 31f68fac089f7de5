"""Forwards of a trial: a module is run on an example, and what it writes to its inputs and the process is noted."""

from __future__ import annotations

import contextlib
import copy

import torch

from tnxd.executors.trial.copies import Call, Differentiating
from tnxd.executors.trial.examples import Item, arguments
from tnxd.executors.trial.state import Answer
from tnxd.models.model import Model
from tnxd.models.process_state.side_effects import SideEffectDetector
from tnxd.models.tensors import check_outputs, copied, on_device

_WITNESSED = 6
"""Calls whose changes of the process are looked for: each look costs some milliseconds."""


class Asking:
    """Forward of a module on an example; implements `tnxd.executors.trial.state.Ask`.

    Attributes:
        module, model, device: the module, which is on the device, and the signature that it is run by.
        written_inputs: positions of the inputs that the module has written to.
        witness: sees the changes that the module makes in the process.
        differentiates: whether the module runs outside of inference mode, see `Differentiating`.
    """

    def __init__(self, module: torch.nn.Module, model: Model, device: torch.device) -> None:
        self.model = model
        self.written_inputs: set[int] = set()
        self.witness = SideEffectDetector()
        self._calls = 0
        self.module = module
        self.device = device
        self.differentiates = False

    def as_another(self, model: Model) -> Asking:
        """The same module by the signature of another model, seen together with this."""
        other = copy.copy(self)
        other.model = model
        return other

    def differentiating(self) -> Asking:
        """The same module outside of inference mode, seen together with this."""
        other = copy.copy(self)
        other.differentiates = True
        return other

    def of_another(self, module: torch.nn.Module) -> Asking:
        """Another module by the same signature, seen by itself."""
        other = Asking(module, self.model, self.device)
        other.differentiates = self.differentiates
        return other

    def __call__(self, item: Item) -> Answer:
        model = self.model
        given = arguments(model, item)
        tensors = [
            on_device(array, spec.datatype, self.device) for array, spec in zip(given, model.arguments, strict=True)
        ]
        rows = len(item[0]) if model.max_batch_size else 1
        self._calls += 1
        call: Call = Differentiating(self.module) if self.differentiates else self.module
        with self.witness if self._calls <= _WITNESSED else contextlib.nullcontext():
            raw = call(*tensors)
        outputs = check_outputs(model, raw, rows)
        answer = [copied(output) for output in outputs]
        for position, (tensor, array) in enumerate(zip(tensors, given, strict=True)):
            if copied(tensor).tobytes() != array.tobytes():  # of BYTES: other objects
                self.written_inputs.add(position)
        return outputs, answer
