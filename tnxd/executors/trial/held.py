"""State that a module holds between two forwards: its tensors, its attributes, and the globals of its own code.

A `Held` is a picture of that state. Two pictures, before and after a forward, show the forward's writes: into a buffer,
over an attribute, into a list or a dict, a class attribute, a closure or a global of the module that the factory stands
in. State in installed libraries and in C++ is out of sight; different answers alone show it.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import types
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tnxd.models.formats.modules import is_private
from tnxd.models.formats.program import Program

_MOST_ITEMS = 200_000  # a model of a thousand layers has a tenth of that

_MOST_PARTS = 10_000
"""Most parts of a container that is looked into. A larger container changes with the number of its parts alone."""

_OF_NN_MODULE = frozenset(vars(torch.nn.Module()))
"""Attributes of every module: `_buffers` and the like, which are looked into by hand, and hooks."""

HOOKS = frozenset({"_forward_hooks", "_forward_pre_hooks"})
"""Functions that are called with a module. A copy of the module shares the variables that they enclose."""

_CLOSED = frozenset({"torch", "numpy", "onnxruntime", "safetensors", "sympy", "tnxd", *sys.stdlib_module_names})
"""Libraries whose objects are not looked into. They are large, or no Python."""

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, range)


@dataclass(frozen=True)
class Tensor:
    """A tensor that is held.

    Attributes:
        version: torch's count of writes, which misses some; -1 for an inference tensor, which has none.
        content: checksum of the storage, which shows all writes; 0: it was not read.
    """

    tensor: torch.Tensor = field(repr=False, compare=False)
    identity: int
    version: int
    content: int


@dataclass(frozen=True)
class Place:
    """Place of a piece of state.

    Attributes:
        name: for people: "layers.0.running_mean", "cache[k]", "net.CACHE".
        owner: path of the module of the network that has the state; None: it is outside of the network.
        attribute: the attribute of that module, or of the holder.
        holder: outside of the network, the class or the Python module that has the state.
    """

    name: str
    owner: str | None
    attribute: str
    holder: Any = field(default=None, repr=False, compare=False)


def submodule(module: torch.nn.Module, path: str) -> torch.nn.Module:
    """A module within a network, of TorchScript too, which has no `get_submodule`. Raises AttributeError."""
    for step in path.split(".") if path else ():
        module = getattr(module, step)
    return module


class Held:
    """Picture of the state that a module holds now.

    Attributes:
        places: by name. tokens: a value for the content of each place, by name; equal as long as nothing was written.
        complete: whether all state was seen. draws: whether there are generators of random numbers.
    """

    def __init__(self, module: torch.nn.Module, attributes: Iterable[str] = (), *, contents: bool = True) -> None:
        """Take the picture.

        Args:
            attributes: names of attributes of TorchScript modules, which do not tell the names themselves.
            contents: whether to read the tensors; else only writes that torch counts are seen.
        """
        self.places: dict[str, Place] = {}
        self.tokens: dict[str, Any] = {}
        self.complete = True
        self.draws = False
        self._contents = contents
        self._alive: list[Any] = []  # so that no id is taken again
        self._seen: set[int] = set()
        self._checksums: dict[int, int] = {}
        for path, child in module.named_modules():
            self._module(path, child)
        for name in attributes:
            path, _, attribute = name.rpartition(".")
            with contextlib.suppress(AttributeError):
                owner = submodule(module, path)
                if isinstance(owner, torch.jit.ScriptModule):
                    self._value(Place(name, path, attribute), getattr(owner, attribute))
        for holder, variable, value in _outside(module):
            self._value(Place(f"{short(holder)}.{variable}", None, variable, holder), value)

    def forget_caches(self) -> None:
        """Empty the caches of functions (`functools.lru_cache`), whose content is out of sight."""
        for value in self._alive:
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()

    @property
    def tensors(self) -> Iterator[tuple[Place, torch.Tensor]]:
        """Every tensor, at the first place where it was found."""
        for name, token in self.tokens.items():
            if isinstance(token, Tensor):
                yield self.places[name], token.tensor

    def changed(self, later: Held) -> list[Place]:
        """Places where a later picture shows something else: written over, bound anew, added or removed."""
        names = dict.fromkeys([*self.tokens, *later.tokens])
        return [
            later.places.get(name) or self.places[name]
            for name in names
            if _unlike(self.tokens.get(name, _MISSING), later.tokens.get(name, _MISSING))
        ]

    def has_same_content(self, later: Held, name: str) -> bool:
        """Whether a tensor has the same values in a later picture, though it was written to meanwhile."""
        one, other = self.tokens.get(name), later.tokens.get(name)
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            return False
        return one.identity == other.identity and 0 != one.content == other.content

    def _module(self, path: str, module: torch.nn.Module) -> None:
        prefix = f"{path}." if path else ""
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        # An exported program holds them under names of its own; people know those of the network.
        called = {held: name for name, held in module.held.items()} if isinstance(module, Program) else {}
        for name, tensor in tensors:
            self._value(Place(prefix + called.get(name, name), path, name), tensor)
        if isinstance(module, torch.jit.ScriptModule):
            return
        for name, value in vars(module).copy().items():
            if name in HOOKS or name not in _OF_NN_MODULE:
                self._value(Place(prefix + name, path, name), value)

    def _value(self, root: Place, value: Any) -> None:
        waiting = [(root, value)]
        while waiting:
            place, value = waiting.pop()
            if len(self.tokens) >= _MOST_ITEMS:
                self.complete = False
                return
            self.places[place.name] = place
            self._alive.append(value)
            self.tokens[place.name] = self._token(value)
            if id(value) in self._seen and not isinstance(value, _PLAIN):
                continue
            self._seen.add(id(value))
            for step, child in _children(value):
                waiting.append((Place(f"{place.name}{step}", place.owner, place.attribute, place.holder), child))

    def _token(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, _PLAIN):
            return type(value), repr(value) if isinstance(value, (float, complex)) else value  # NaN is unlike itself
        if isinstance(value, np.ndarray):
            plain = self._contents and value.dtype != object
            return id(value), zlib.crc32(np.ascontiguousarray(value).data) if plain and value.size else 0
        if isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
            self.draws = True  # what it gives next depends on how often it was asked, and on nobody's request
        if isinstance(value, functools._lru_cache_wrapper):
            return id(value), value.cache_info().currsize
        if isinstance(value, (set, frozenset, dict, list, deque)):
            return id(value), len(value)
        return id(value)

    def _tensor(self, tensor: torch.Tensor) -> Tensor:
        version = -1 if tensor.is_inference() else tensor._version
        content = 0
        if self._contents and type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta:
            try:
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key not in self._checksums:
                    self._checksums[key] = checksum(storage)
                content = self._checksums[key]
            except (RuntimeError, NotImplementedError):  # sparse ones and others have no storage
                content = 0
        return Tensor(tensor, id(tensor), version, content)


_MISSING = object()


def _unlike(one: Any, other: Any) -> bool:
    return one is not other and bool(one != other)


def _children(value: Any) -> Iterable[tuple[str, Any]]:
    """Parts of a container or an object, each with the suffix for its name."""
    if isinstance(value, (torch.Tensor, torch.nn.Module, types.ModuleType, type, *_PLAIN)):
        return ()
    if isinstance(value, (dict, list, tuple, deque)) and len(value) > _MOST_PARTS:
        return ()  # a vocabulary
    if isinstance(value, dict):
        return [(f"[{key!s:.60}]", child) for key, child in list(value.items())]
    if isinstance(value, (list, tuple, deque)):
        return [(f"[{index}]", child) for index, child in enumerate(list(value))]
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=False)
        found = [(f".{name}", cell.cell_contents) for name, cell in cells if is_filled(cell)]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        found += [(f".default{index}", child) for index, child in enumerate(defaults)]
        return [*found, *((f".{name}", child) for name, child in vars(value).items())]
    if isinstance(value, functools.partial):
        return [
            (f"({index})", child) for index, child in enumerate((value.func, *value.args, *value.keywords.values()))
        ]
    if isinstance(value, functools._lru_cache_wrapper):
        return ()
    if type(value).__module__.partition(".")[0] in _CLOSED:
        return ()
    try:
        attributes = getattr(value, "__dict__", {})
        slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
        return [
            *((f".{name}", child) for name, child in list(attributes.items())),
            *((f".{name}", getattr(value, name)) for name in slots),
        ]
    except Exception:  # of a class that answers for its attributes itself
        return ()


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def is_filled(cell: types.CellType) -> bool:
    """Whether a variable of an enclosing function has a value."""
    try:
        cell.cell_contents  # noqa: B018 - it raises where there is nothing yet
    except ValueError:
        return False
    return True


def _outside(module: torch.nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """State of the code of a network, beside it: class attributes, and globals of the modules beside the weights.

    Yields: the class or the Python module, the name of the attribute, and its value.
    """
    for holder in _code(module):
        for name, value in vars(holder).copy().items():
            if is_state(name, value):
                yield holder, name, value


def _code(module: torch.nn.Module) -> Iterator[Any]:
    """Classes of a network, and the Python modules beside its weights."""
    kinds = {type(child) for child in module.modules()}
    packages = set()
    for kind in kinds:
        if kind.__module__.partition(".")[0] not in _CLOSED:
            yield kind
        if is_private(kind.__module__):
            packages.add(kind.__module__.rpartition(".")[0])
    for name, code in sys.modules.copy().items():  # others may import meanwhile
        if name.rpartition(".")[0] in packages:
            yield code


def code_of(module: torch.nn.Module) -> list[Any]:
    """Classes and Python modules beside the weights of a network."""
    return [
        holder
        for holder in _code(module)
        if is_private(holder.__module__ if isinstance(holder, type) else holder.__name__)
    ]


def own_state(module: torch.nn.Module) -> list[tuple[Any, str]]:
    """Class attributes and globals that the code beside the weights may keep something in, as (holder, name)."""
    return [
        (holder, name)
        for holder in code_of(module)
        for name, value in vars(holder).copy().items()
        if is_state(name, value) and not isinstance(value, functools._lru_cache_wrapper)
    ]


def is_state(name: str, value: Any) -> bool:
    """Whether a class attribute or a global may be state."""
    kinds = (types.ModuleType, type, property, staticmethod, classmethod, torch.nn.Module)
    return not name.startswith("__") and not isinstance(value, kinds)


def short(holder: Any) -> str:
    """The name of a class or a Python module, as people know it."""
    return str(holder.__name__).rpartition(".")[2]


def memory(tensor: torch.Tensor) -> int:
    """Address of the storage of a tensor: the same for tensors that share it."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse ones and others have no storage
        return id(tensor)


_CHUNK = 1 << 18  # of 8 bytes: what fits into a cache
_FACTORS: dict[torch.device, torch.Tensor] = {}


def checksum(storage: torch.UntypedStorage) -> int:
    """Checksum of a storage: it changes with the bytes and with their order, on any device."""
    device = storage.device
    if device not in _FACTORS:
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randint(-(2**62), 2**62, (_CHUNK,), dtype=torch.int64, generator=generator)
        _FACTORS[device] = (drawn | 1).to(device)  # odd: no bit is lost
    size = storage.nbytes()
    data = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    words = data[: size // 8 * 8].view(torch.int64)
    found = 0
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        found = found * 31 + int((part * _FACTORS[device][: len(part)]).sum())
    for byte in data[size // 8 * 8 :].tolist():
        found = found * 257 + byte
    return found & (2**64 - 1)
