"""Calls of lanes: they stand between a lane and a module, so that nothing crosses from one request to another.

A pure module is called as it is, by all lanes. A module that writes to its state is copied for each lane: the tensors
that it writes to are the lane's own, all other tensors are shared. One lane at a time calls a module that cannot be
copied, or that is meant to be shared. The answers of both are copied, since the module may keep their memory.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from tnxd.device_kinds import KINDS
from tnxd.executors.trial.held import memory
from tnxd.executors.trial.undo import Undo, attributes_of
from tnxd.models import structures
from tnxd.models.tensors import Value

Call = Callable[..., Any]
"""A module, or an object that stands before one: takes the inputs in order, None for one that did not come."""


class Own:
    """Call of a lane's own copy of a module.

    The writes of a forward are undone after each call. So no request leaves anything behind that the next one could
    read on a path that no trial has taken.

    Args:
        module: the copy. undo: puts its writes back.
    """

    def __init__(self, module: torch.nn.Module, undo: Undo) -> None:
        self._module = module
        self._undo = undo

    def __call__(self, *inputs: Value | None) -> Any:
        try:
            return cloned(self._module(*inputs))
        finally:
            self._undo.put_back()


class Sparing:
    """Call of a module that writes to its inputs: it gets copies, since a request may be run or compared once more.

    Args:
        positions: of the inputs that the module writes to.
    """

    def __init__(self, call: Call, positions: Collection[int]) -> None:
        self._call = call
        self._positions = positions

    def __call__(self, *inputs: Value | None) -> Any:
        own = [
            _clone(tensor) if tensor is not None and position in self._positions else tensor
            for position, tensor in enumerate(inputs)
        ]
        return self._call(*own)


class Serial:
    """Call of a module by one lane at a time.

    On a device with streams the module has a stream of its own, whichever lane calls it. Memory is used again in the
    order of the stream that it was taken for: were a state made on one lane's stream, and replaced on another's, it
    could be overwritten while it is still read.

    A module whose writes stay gets inputs of its own. It may keep them, and their memory is that of the next batch, or
    of a client.

    Args:
        undo: puts the writes of a forward back; None: they are meant for the next request.
    """

    def __init__(self, module: torch.nn.Module, undo: Undo | None) -> None:
        self._module = module
        self._undo = undo
        self._lock = threading.Lock()
        self._stream: torch.Stream | None = None

    def __call__(self, *inputs: Value | None) -> Any:
        with self._lock:
            device = next((each.device for each in inputs if isinstance(each, torch.Tensor)), None)
            if device is None or not KINDS[device.type].has_streams:
                return self._called(inputs)
            if self._stream is None:
                self._stream = torch.Stream(device)
            lane = torch.accelerator.current_stream(device)
            self._stream.wait_stream(lane)
            torch.accelerator.set_stream(self._stream)
            try:
                return self._called(inputs)
            finally:
                last = torch.accelerator.current_stream(device)
                torch.accelerator.set_stream(lane)
                if last != self._stream:  # the module has chosen another one
                    self._stream.wait_stream(last)
                lane.wait_stream(self._stream)

    def _called(self, inputs: Sequence[Value | None]) -> Any:
        own = inputs if self._undo is not None else [None if each is None else _clone(each) for each in inputs]
        try:
            return cloned(self._module(*own))
        finally:
            if self._undo is not None:
                self._undo.put_back()


class Differentiating:
    """Call outside of inference mode, for a module that differentiates while it answers, such as a force field."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __call__(self, *inputs: Value | None) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors that were made in inference mode take no part in autograd, their copies do.
            own = [None if tensor is None else _clone(tensor) for tensor in inputs]
            return _changed(self._call(*own), torch.Tensor.detach)


def cloned(raw: Any) -> Any:
    """A module's result with all its tensors copied."""
    return _changed(raw, torch.Tensor.clone)


def _clone(value: Value) -> Value:
    return value.clone() if isinstance(value, torch.Tensor) else value.copy()


def _changed(raw: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A module's result, of any structure, with its tensors changed, its arrays copied and their names the same."""
    if isinstance(raw, torch.Tensor):
        return change(raw)
    if isinstance(raw, np.ndarray):
        return raw.copy()
    parts = structures.children(raw)
    if parts is None:
        return raw
    changed = {name: _changed(part, change) for name, part in parts}
    if structures.has_names(raw):
        return changed
    return type(raw)(*changed.values()) if hasattr(raw, "_fields") else tuple(changed.values())


def duplicate(module: torch.nn.Module, written: Collection[torch.Tensor]) -> torch.nn.Module:
    """A copy of a module that shares all tensors with it but those that share memory with `written`.

    Raises:
        Exception: there is something in it that cannot be copied, such as a lock.
    """
    own = {memory(tensor) for tensor in written}
    shared = {
        id(tensor): tensor
        for tensor in (*module.parameters(), *module.buffers(), *attributes_of(module))
        if memory(tensor) not in own
    }
    made: torch.nn.Module = copy.deepcopy(module, dict(shared))
    # TorchScript copies in C++, where nothing is known of what has been copied.
    for original, other in zip(module.modules(), made.modules(), strict=True):
        if isinstance(original, torch.jit.ScriptModule):
            for name, tensor in (*original.named_parameters(recurse=False), *original.named_buffers(recurse=False)):
                if id(tensor) in shared or memory(tensor) not in own:
                    setattr(other, name, tensor)
    return made
