"""Undo: attributes, globals and tensors are put back as they were before a forward wrote to them."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections import deque
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from tnxd.executors.trial.held import code_of, is_filled, is_state, own_state

Attribute = tuple[Any, str]
"""A module of a network, a class or a Python module, and the name of one of its attributes."""

_ABSENT = object()
_CODE = (types.FunctionType, types.MethodType, functools.partial)
_VALUES = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, type)
_WITHOUT_PARTS: tuple[type, ...] = (
    *_VALUES,
    types.BuiltinFunctionType,
    types.ModuleType,
    torch.nn.Module,
    functools._lru_cache_wrapper,
)


class Undo:
    """Copy of attributes as they are, to put them back.

    Args:
        written: attributes that a forward was seen to write.
        suspected: attributes that a forward may write. They are put back only where torch counts a write to a tensor,
            or a container holds other things.

    Raises:
        Exception: an attribute holds something that cannot be copied, such as a lock.
    """

    def __init__(self, written: Collection[Attribute], suspected: Collection[Attribute] = ()) -> None:
        self._bound: list[tuple[Any, str, Any]] = []
        self._made: list[tuple[Any, Any, Any]] = []
        self._contents: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._counted: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        for owner, name in written:
            self._remember(owner, name, seen=True)
        for owner, name in suspected:
            self._remember(owner, name, seen=False)

    def _remember(self, owner: Any, name: str, *, seen: bool) -> None:
        if isinstance(getattr(type(owner), name, None), property):
            return
        value = getattr(owner, name, _ABSENT)
        self._bound.append((owner, name, value))
        self._hold(value, seen=seen)

    def _hold(self, value: Any, *, seen: bool) -> None:
        """Copy the parts of a value."""
        if isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._hold(part, seen=seen)
        elif isinstance(value, types.MethodType):
            self._hold(value.__func__, seen=seen)
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                if is_filled(cell):
                    self._remember(cell, "cell_contents", seen=seen)
            for part in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), vars(value)):
                self._hold(part, seen=seen)
        elif value is not _ABSENT and not isinstance(value, (torch.Tensor, *_WITHOUT_PARTS)):
            self._made.append((value, copy.deepcopy(value), None if seen else _parts(value)))
            for part in list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
                if isinstance(part, _CODE):  # copies of containers share it
                    self._hold(part, seen=seen)
        for tensor in (value,) if isinstance(value, torch.Tensor) else held_by(value):
            content = tensor.detach().clone()
            if seen or tensor.is_inference():  # torch counts no writes to what a forward has made itself
                self._contents.append((tensor, content))
            else:
                self._counted.append((tensor, content, tensor._version))

    def put_back(self) -> None:
        """Put everything back."""
        with torch.inference_mode():  # elsewhere nobody may write to what a forward made in that mode
            for owner, name, value in self._bound:
                if getattr(owner, name, _ABSENT) is not value:
                    if value is _ABSENT:
                        delattr(owner, name)
                    else:
                        setattr(owner, name, value)
            for value, saved, parts in self._made:
                if parts is None or _parts(value) != parts:
                    _fill(value, copy.deepcopy(saved))
            for tensor, content in self._contents:
                tensor.copy_(content)
            for position, (tensor, content, version) in enumerate(self._counted):
                if tensor._version != version:
                    tensor.copy_(content)
                    self._counted[position] = (tensor, content, tensor._version)


class Beside:
    """Class attributes and globals of the code beside the weights, as they are before the first forward.

    Attributes:
        attributes: the attributes that can be put back.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.attributes: list[Attribute] = []
        self._undos: list[Undo] = []
        self._names: dict[int, tuple[Any, set[str]]] = {}
        for holder in code_of(module):
            self._names[id(holder)] = holder, set(vars(holder))
        for attribute in own_state(module):
            with contextlib.suppress(Exception):  # whatever it has against being copied
                self._undos.append(Undo([attribute]))
                self.attributes.append(attribute)

    def put_back(self) -> None:
        """Put the code back as it was imported."""
        for undo in self._undos:
            undo.put_back()
        for holder, names in self._names.values():
            for name, value in vars(holder).copy().items():
                if name not in names and is_state(name, value):
                    delattr(holder, name)


def held_by(value: Any) -> list[torch.Tensor]:
    """Tensors of a module that is an attribute, but for its weights; [] of anything else."""
    if not isinstance(value, torch.nn.Module):
        return []
    return [*value.buffers(), *attributes_of(value)]


def attributes_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """Tensors that are attributes, and neither parameters nor buffers."""
    return [
        value
        for child in module.modules()
        if not isinstance(child, torch.jit.ScriptModule)
        for value in vars(child).values()
        if isinstance(value, torch.Tensor)
    ]


def _fill(value: Any, saved: Any) -> None:
    """Fill a container, an array or an object with its former content, in place: others may refer to it."""
    if isinstance(value, (dict, set)):
        value.clear()
        value.update(saved)
    elif isinstance(value, (list, deque)):
        value.clear()
        value.extend(saved)
    elif isinstance(value, np.ndarray):
        np.copyto(value, saved)
    if hasattr(value, "__dict__"):
        vars(value).clear()
        vars(value).update(vars(saved))
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if not name.startswith("__") and hasattr(saved, name):
                setattr(value, name, getattr(saved, name))


def _parts(value: Any) -> Any:
    """Token of a container's content: it changes with the objects, and with writes to those that are tensors."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, (list, tuple, set, deque)):
        return object()  # unlike any other: what it holds is not looked at
    return [(id(part), _version(part)) for part in value]


def _version(part: Any) -> int:
    return part._version if isinstance(part, torch.Tensor) and not part.is_inference() else 0
