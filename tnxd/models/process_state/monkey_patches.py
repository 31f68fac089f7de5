"""Monkey patches: functions and methods of torch that code has replaced, though all models call them.

So are the functions of `time` and `threading`, by which the daemon itself runs: its limits, its lanes, its log.

    names = undo()              ["torch.nn.functional.relu"]
    sentence("importing it", names)

To undo a patch changes the meaning of the code that made it, so the caller refuses that code. `functools.wraps` hides
no patch: a function belongs to the module whose globals it has. torch patches itself, as `torch.nn.Module.__init__`
when it first compiles. Such a patch is left alone, unless it leads to code that is not torch's, or is another original.
Names that are added are left alone as well, unless they hide a method of a base class.

Import this before any code of a model: the functions that are there then count as the originals.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch

_MOST_NAMED = 3
_MOST_WRAPPED = 20

_VARYING = ("torch.Storage",)
"""Names that torch sets anew together with its default dtype."""

_OUR_OWN = ("torch", "tnxd")


def undo() -> list[str]:
    """Undo all patches. Returns the names of the originals. A fraction of a millisecond."""
    return sorted(name for namespace in _namespaces for name in namespace.undo())


def sentence(what: str, names: Sequence[str]) -> str:
    """Sentence for operators about the step `what`, which has replaced the functions of those names."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{what} replaced {', '.join(names[:_MOST_NAMED])}{more}, which all models use"


class _Namespace:
    """Module or class, with its originals.

    Args:
        path: its name.
    """

    def __init__(self, path: str, owner: Any) -> None:
        self._path = path
        self._owner = owner
        self._seen = vars(owner).copy()  # at the last look: mostly, a comparison with that is enough
        counts: Callable[[Any], bool] = _is_method if isinstance(owner, type) else callable
        self.originals = {
            name: value
            for name, value in vars(owner).copy().items()
            if counts(value) and f"{path}.{name}" not in _VARYING
        }
        self._by_torch: dict[str, Any] = {}  # torch's patches of itself

    def undo(self) -> list[str]:
        if self._is_as_seen():
            return []
        seen = vars(self._owner).copy()  # before the look: what another thread changes meanwhile is for the next one
        names = list(self._found())
        if not names:
            self._seen = seen
        return names

    def _is_as_seen(self) -> bool:
        try:
            return bool(vars(self._owner) == self._seen)
        except Exception:  # whatever a value makes of a comparison
            return False

    def _found(self) -> Iterator[str]:
        now = vars(self._owner)
        for name in [name for name in self._by_torch if now.get(name) is self.originals[name]]:
            del self._by_torch[name]  # it has put the original back
        for name in [name for name, value in self.originals.items() if now.get(name) is not value]:
            value = now.get(name)
            if value is self._by_torch.get(name, _NOTHING):
                continue
            if _is_torchs(value):
                if value.__globals__["__name__"].startswith("torch"):
                    self._by_torch[name] = value
                continue
            setattr(self._owner, name, self._by_torch.get(name, self.originals[name]))
            yield f"{self._path}.{name}"
        if isinstance(self._owner, type):
            for name in list(now.keys() - self.originals.keys()):
                if self._hides(name, now):
                    delattr(self._owner, name)
                    yield f"{self._path}.{name}"

    def _hides(self, name: str, now: Mapping[str, Any]) -> bool:
        """Whether a name that was added to a class hides a method of a base."""
        value = now[name]
        inherited = any(_is_method(vars(base).get(name)) for base in self._owner.__mro__[1:])
        return inherited and _is_method(value) and not _is_torchs(value)


_NOTHING = object()


def _is_method(value: Any) -> bool:
    return callable(value) or hasattr(type(value), "__get__")


def _is_torchs(value: Any) -> bool:
    """Whether a patch is torch's or TensorNext's own: a new function of theirs that leads to no other code."""
    if id(value) in _known:
        return False
    for _ in range(_MOST_WRAPPED):
        if (
            not isinstance(value, FunctionType)
            or value.__globals__.get("__name__", "").partition(".")[0] not in _OUR_OWN
        ):
            return False
        value = getattr(value, "__wrapped__", None)
        if value is None or isinstance(value, BuiltinFunctionType) or id(value) in _known:
            return True
    return False


def _classes() -> dict[type, str]:
    """Classes of torch.nn, and their names."""
    found: dict[type, str] = {torch.Tensor: "torch.Tensor"}
    modules = [module for name, module in sys.modules.copy().items() if name.startswith("torch.nn.modules.")]
    for module in (torch.nn, *modules):
        for name, value in vars(module).copy().items():
            if isinstance(value, type) and value.__module__.startswith("torch.nn."):
                found.setdefault(value, f"{module.__name__}.{name}")
    return found


_MODULES: tuple[ModuleType, ...] = (
    *(torch, torch.nn, torch.nn.functional, torch.nn.init),
    *(torch.linalg, torch.fft, torch.special),
    *(time, threading),
)

_namespaces = [
    *(_Namespace(module.__name__, module) for module in _MODULES),
    *(_Namespace(path, owner) for owner, path in _classes().items()),
]

_known = {id(value): value for namespace in _namespaces for value in namespace.originals.values()}
"""All originals: one in the place of another is a patch, too."""
