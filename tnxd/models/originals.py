"""Functions and methods of torch that all models call, as they were: what code puts in their places is found.

    names = put_back()          ["torch.nn.functional.relu"]
    sentence("importing it", names)

To put it back alone would change what the code means that replaced it, so whoever finds something refuses that.
`functools.wraps` hides nothing: what counts is the module whose globals a function has. torch replaces some of them
itself, as `torch.nn.Module.__init__` when it first compiles; that is left alone, unless it leads to code that is not
torch's, or is another one of the functions that there were. Names that are added are left alone as well, unless they
hide a method of a base class.

Import this before any code of a model: what is there then counts as the original.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch

_MOST_NAMED = 3
_MOST_WRAPPED = 20

_VARYING = ("torch.Storage",)
"""What torch sets anew together with its default dtype."""

_OUR_OWN = ("torch", "tnxd")


def put_back() -> list[str]:
    """Put the originals in the places of what is there instead. Their names. A fraction of a millisecond."""
    return sorted(name for place in _places for name in place.put_back())


def sentence(what: str, names: Sequence[str]) -> str:
    """A sentence for operators about the step `what`, which has replaced those."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{what} replaced {', '.join(names[:_MOST_NAMED])}{more}, which all models use"


class _Place:
    """A module or class of torch. Args: path: its name."""

    def __init__(self, path: str, owner: Any) -> None:
        self._path = path
        self._owner = owner
        self._seen = vars(owner).copy()  # at the last look: a comparison with that is all that it takes mostly
        counts: Callable[[Any], bool] = _is_method if isinstance(owner, type) else callable
        self.originals = {
            name: value
            for name, value in vars(owner).copy().items()
            if counts(value) and f"{path}.{name}" not in _VARYING
        }
        self._by_torch: dict[str, Any] = {}  # what it has put there itself, since

    def put_back(self) -> list[str]:
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
        """Whether what was added to a class takes the place of a method of a base."""
        value = now[name]
        inherited = any(_is_method(vars(base).get(name)) for base in self._owner.__mro__[1:])
        return inherited and _is_method(value) and not _is_torchs(value)


_NOTHING = object()


def _is_method(value: Any) -> bool:
    return callable(value) or hasattr(type(value), "__get__")


def _is_torchs(value: Any) -> bool:
    """Whether torch, or TensorNext, has put that somewhere: a new function of its own that leads to no other code."""
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
    """Classes of torch.nn, and what to call them."""
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
)

_places = [
    *(_Place(module.__name__, module) for module in _MODULES),
    *(_Place(path, owner) for owner, path in _classes().items()),
]

_known = {id(value): value for place in _places for value in place.originals.values()}
"""All originals: one in the place of another is not what was there."""
