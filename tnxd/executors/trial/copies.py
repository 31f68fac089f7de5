"""Calls of lanes: what stands between a lane and a module, so that nothing crosses from one request to another.

A pure module is called as it is, by all lanes. One that writes to what it holds is copied for each lane: what it writes
to is the lane's own, all other tensors are shared. What cannot be copied, and what is meant to be shared, is called by
one lane at a time. The answers of both are copied, since the module may keep their memory.
"""

from __future__ import annotations

import copy
import threading
import types
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import torch

from tnxd import structures
from tnxd.executors.trial.held import memory

Call = Callable[..., Any]
"""A module, or what stands before one: takes the inputs in order."""


class Own:
    """A lane's own copy of a module.

    What a forward does to attributes and tensors is undone after each call: no request leaves anything behind, though
    the next one may read it where no trial has led to.

    Args:
        module: the copy. written: attributes that its forward writes, as (module, name). suspected: those that it may
            write, of whose tensors torch counts the writes.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        written: Collection[tuple[torch.nn.Module, str]],
        suspected: Collection[tuple[torch.nn.Module, str]] = (),
    ) -> None:
        self._module = module
        self._bound: list[tuple[torch.nn.Module, str, Any]] = []
        self._made: list[tuple[torch.nn.Module, str, Any, Any]] = []
        self._contents: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._counted: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        for owner, name in written:
            self._remember(owner, name, seen=True)
        for owner, name in suspected:
            self._remember(owner, name, seen=False)

    def _remember(self, owner: torch.nn.Module, name: str, *, seen: bool) -> None:
        if isinstance(getattr(type(owner), name, None), property):
            return
        value = getattr(owner, name, _ABSENT)
        if value is _ABSENT or isinstance(value, (torch.Tensor, *_WITHOUT_PARTS)):
            self._bound.append((owner, name, value))
        else:
            self._made.append((owner, name, copy.deepcopy(value), None if seen else _parts(value)))
        for tensor in (value,) if isinstance(value, torch.Tensor) else held_by(value):
            content = tensor.detach().clone()
            if seen:
                self._contents.append((tensor, content))
            else:
                self._counted.append((tensor, content, tensor._version))

    def __call__(self, *inputs: torch.Tensor | None) -> Any:
        try:
            return cloned(self._module(*inputs))
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for owner, name, value in self._bound:
            now = getattr(owner, name, _ABSENT)
            if now is not value:
                if value is _ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)
        for owner, name, value, parts in self._made:
            if parts is None or _parts(getattr(owner, name, None)) != parts:
                setattr(owner, name, copy.deepcopy(value))
        for tensor, content in self._contents:
            tensor.copy_(content)
        for position, (tensor, content, version) in enumerate(self._counted):
            if tensor._version != version:
                tensor.copy_(content)
                self._counted[position] = (tensor, content, tensor._version)


_ABSENT = object()
_CODE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_VALUES = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, type)
_WITHOUT_PARTS: tuple[type, ...] = (*_VALUES, *_CODE, torch.nn.Module)


def held_by(value: Any) -> list[torch.Tensor]:
    """Tensors of a module that is an attribute, but for its weights; [] of anything else."""
    if not isinstance(value, torch.nn.Module):
        return []
    return [*value.buffers(), *attributes_of(value)]


def _parts(value: Any) -> Any:
    """Changes with what a container holds: which objects, and what was written to those that are tensors."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, (list, tuple, set, deque)):
        return id(value), _ABSENT
    return [(id(part), part._version if isinstance(part, torch.Tensor) else 0) for part in value]


class Sparing:
    """A module that writes to its inputs, and gets copies of these: a request may be run, or compared, once more.

    Args:
        positions: of the inputs that it writes to.
    """

    def __init__(self, call: Call, positions: Collection[int]) -> None:
        self._call = call
        self._positions = positions

    def __call__(self, *inputs: torch.Tensor | None) -> Any:
        own = [
            tensor.clone() if tensor is not None and position in self._positions else tensor
            for position, tensor in enumerate(inputs)
        ]
        return self._call(*own)


class Serial:
    """A module that one lane calls at a time."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._lock = threading.Lock()

    def __call__(self, *inputs: torch.Tensor | None) -> Any:
        with self._lock:
            answer = cloned(self._module(*inputs))
            if any(tensor is not None and tensor.is_cuda for tensor in inputs):
                torch.cuda.current_stream().synchronize()  # the next lane has a stream of its own
            return answer


class Differentiating:
    """A module that differentiates while it answers, such as a force field: inference mode would not let it."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __call__(self, *inputs: torch.Tensor | None) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors that were made in inference mode take no part in autograd, their copies do.
            own = [None if tensor is None else tensor.clone() for tensor in inputs]
            return _changed(self._call(*own), torch.Tensor.detach)


def cloned(raw: Any) -> Any:
    """A module's result with all its tensors copied."""
    return _changed(raw, torch.Tensor.clone)


def _changed(raw: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A module's result, whatever structure it is, with its tensors changed and their names the same."""
    if isinstance(raw, torch.Tensor):
        return change(raw)
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


def attributes_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """Tensors that are attributes, and neither parameters nor buffers."""
    return [
        value
        for child in module.modules()
        if not isinstance(child, torch.jit.ScriptModule)
        for value in vars(child).values()
        if isinstance(value, torch.Tensor)
    ]
