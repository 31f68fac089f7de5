"""Installation of a pretended machine in place of torch's devices, in this process, and its removal."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._device import _device_constructors

from pretended import operations
from pretended.capture import refuse_in_capture
from pretended.devices import Machine
from pretended.graphs import CUDAGraph, Graph, pool_handle
from pretended.possible import skip_where_impossible
from pretended.streams import CudaEvent, CudaStream, Event, Stream, active, as_kind

_ABSENT = object()

_PATIENCE_S = 5.0

_PINNING = ("empty", "empty_like", "empty_strided", "full", "ones", "zeros", "zeros_like")
"""Functions of torch that take `pin_memory`, as far as they are pretended."""


@contextlib.contextmanager
def pretended(
    devices: int = 1, memory_mb: int | Sequence[int] = 8192, policy: str = "late", seed: int = 0
) -> Iterator[Machine]:
    """Pretend that this process has CUDA devices, for the length of a block.

    Threads that were started meanwhile and are still there at the end, as those of lanes are, end with their next call.

    Args:
        devices: how many. memory_mb: of each, in MiB; one number for all of them, or one for each.
        policy, seed: see `pretended.work`.
    """
    skip_where_impossible()
    before = set(threading.enumerate())
    installation = Installation(devices, memory_mb, policy, seed)
    try:
        yield installation.machine
    finally:
        for thread in set(threading.enumerate()) - before:
            _dismiss(thread)
        installation.remove()


def _dismiss(thread: Any) -> None:
    """Have a thread end with its next call to a pretended machine, and say nothing about how it ended."""
    thread.dismissed = True
    thread._invoke_excepthook = lambda _: None


class Installation:
    """A machine in place of torch's devices. Args: as of `pretended`."""

    def __init__(self, devices: int, memory_mb: int | Sequence[int], policy: str, seed: int) -> None:
        totals = [memory_mb] * devices if isinstance(memory_mb, int) else memory_mb
        self.machine = active.machine = Machine([total << 20 for total in totals], policy, seed)
        self._replaced: list[tuple[Any, str, Any]] = []
        self._libraries = (torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL"))
        self._guard = _DeviceGuard()
        self._under_way = _UnderWay()
        fallback, aten = self._libraries
        fallback.fallback(_counted(operations.dispatch, self._under_way), "CUDA")
        for name, function in (
            ("copy_", operations.copy_),
            ("_to_copy", operations.to_copy),
            ("convolution", operations.convolution),
            ("index.Tensor", operations.index),
        ):
            aten.impl(name, _counted(function, self._under_way), "CUDA")
        for owner, names in _surface(self.machine).items():
            for name, value in names.items():
                self._replace(owner, name, value)
        _device_constructors()  # torch keeps the set of them for good: it shall be that of its own functions
        for name in _PINNING:
            self._replace(torch, name, _counted(_pinning(getattr(torch, name)), self._under_way))
        _accept_replacements()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._replaced.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def remove(self) -> None:
        """Put everything back that was there before."""
        while self._replaced:
            owner, name, value = self._replaced.pop()
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._under_way.wait()
        for library in self._libraries:
            library._destroy()
        self._guard.remove()
        _accept_replacements()


def _accept_replacements() -> None:
    """Have the daemon's guard against patched libraries take torch as it is now for torch's own."""
    guard: Any = sys.modules.get("tnxd.models.process_state.monkey_patches")
    if guard is not None:  # else it looks at torch later
        for namespace in guard._namespaces:
            if namespace._owner in (torch, torch.Tensor):
                namespace.__init__(namespace._path, namespace._owner)
                guard._known.update((id(value), value) for value in namespace.originals.values())


class _UnderWay:
    """Operations under way. Lanes may be in one when a test ends, and torch does not survive its removal then."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    def __enter__(self) -> None:
        with self._changed:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until there is none; not for one that hangs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._count, _PATIENCE_S)


def _counted(function: Callable[..., Any], under_way: _UnderWay) -> Callable[..., Any]:
    """A function that is under way while it runs."""

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        with under_way:
            return function(*args, **kwargs)

    return counted


class _DeviceGuard:
    """An entry in torch's table of device guards, which C++ code asks before it touches a device.

    A torch without CUDA has none for it. That of meta tensors does nothing, which is what is needed.
    """

    _CUDA, _META, _KINDS = 1, 14, 20  # c10/core/DeviceType.h

    def __init__(self) -> None:
        library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libc10.[sd]*"))))
        self._table = (ctypes.c_void_p * self._KINDS).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
        self._before = self._table[self._CUDA]
        self._table[self._CUDA] = self._table[self._META]

    def remove(self) -> None:
        self._table[self._CUDA] = self._before


def _pinning(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function that makes tensors, with `pin_memory` pretended."""

    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not kwargs.pop("pin_memory", False):
            return function(*args, **kwargs)
        plain = function(*args, **kwargs)
        if plain.is_cuda:
            raise RuntimeError("Only dense CPU tensors can be pinned")
        made = operations.pinned(plain.size(), plain.stride(), plain.dtype)
        return made if function.__name__.startswith("empty") else made.copy_(plain)

    return make


def _pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    if operations.is_pinned(tensor):
        return tensor
    return operations.pinned(tensor.size(), tensor.contiguous().stride(), tensor.dtype).copy_(tensor)


def _surface(machine: Machine) -> dict[Any, dict[str, Any]]:
    """Replacements of torch's own: by the module or class, by name."""
    cuda = {**_devices(machine), **_memory(machine), **_cuda_alone(machine)}
    accelerator = {**_devices(machine), **_memory(machine), **_accelerator_alone(machine)}
    return {
        torch: {"Stream": Stream, "Event": Event},
        torch.cuda: cuda,
        torch.accelerator: {name: value for name, value in accelerator.items() if hasattr(torch.accelerator, name)},
        torch.version: {"cuda": "13.0"},
        torch.Tensor: _methods(machine),
        torch.UntypedStorage: {"clone": _storage_clone(torch.UntypedStorage.clone)},
    }


def _devices(machine: Machine) -> dict[str, Any]:
    """Devices and streams, which torch.cuda and torch.accelerator name alike."""
    return {
        "is_available": lambda: True,
        "device_count": lambda: len(machine.devices),
        "set_stream": machine.set_stream,
        "synchronize": lambda device=None: machine.synchronize(machine.device(device)),
        "get_device_capability": lambda device=None: (9, 0),
    }


def _memory(machine: Machine) -> dict[str, Any]:
    def settled(device: Any) -> Any:
        with machine.lock:
            machine.settle()
        return machine.device(device).memory

    def free_and_total(device: Any = None) -> tuple[int, int]:
        machine.device(device).check()
        refuse_in_capture(machine)
        memory = settled(device)
        return memory.total - max(memory.reserved, memory.held), memory.total

    return {
        "mem_get_info": free_and_total,
        "get_memory_info": free_and_total,
        "memory_allocated": lambda device=None: settled(device).allocated,
        "max_memory_allocated": lambda device=None: settled(device).peak,
        "memory_reserved": lambda device=None: settled(device).reserved,
        "max_memory_reserved": lambda device=None: settled(device).peak_reserved,
        "reset_peak_memory_stats": lambda device=None: settled(device).reset_peak(),
        "reset_accumulated_memory_stats": lambda device=None: None,
        "memory_stats": lambda device=None: settled(device).statistics(),
        "empty_cache": lambda: _empty_caches(machine),
        "empty_host_cache": lambda: None,
    }


def _empty_caches(machine: Machine) -> None:
    machine.counts["empty_cache"] += 1
    refuse_in_capture(machine)
    with machine.lock:
        machine.settle()
        for device in machine.devices:
            device.check()
            device.memory.empty_cache()


def _block(machine: Machine, index_of: Callable[[Any], int]) -> type:
    """`torch.cuda.device`, or `torch.accelerator.device_index`: a block in which a device is the current one.

    Args:
        index_of: the number of the device that is given; None, which stands for the one that is current, it never gets.
    """

    class Block:
        def __init__(self, device: Any) -> None:
            self.idx = None if device is None else index_of(device)

        def __enter__(self) -> None:
            self.prev_idx = machine.current_index()
            if self.idx is not None:
                machine.set_index(self.idx)

        def __exit__(self, *exception: object) -> None:
            machine.set_index(self.prev_idx)

    return Block


def _cuda_alone(machine: Machine) -> dict[str, Any]:
    def limit(fraction: float, device: Any = None) -> None:
        memory = machine.device(device).memory
        memory.limit = int(memory.total * fraction)

    def seed(number: int, device: Any = None) -> None:
        machine.device(device).generator.manual_seed(number)

    def seed_all(number: int) -> None:
        for device in machine.devices:
            device.generator.manual_seed(number)

    return {
        "Stream": CudaStream,
        "Event": CudaEvent,
        "current_stream": lambda device=None: as_kind(machine.current_stream(device), CudaStream),
        "CUDAGraph": CUDAGraph,
        "graph_pool_handle": pool_handle,
        "is_current_stream_capturing": lambda: machine.current_stream().capture is not None,
        "default_stream": lambda device=None: as_kind(machine.device(device).default_stream, CudaStream),
        "set_device": lambda device: machine.set_index(machine.index_of(device)),
        "current_device": machine.current_index,
        "device": _block(machine, machine.index_of),
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_name": lambda device=None: machine.device(device).properties.name,
        "get_device_properties": lambda device=None: machine.device(device).properties,
        "set_per_process_memory_fraction": limit,
        "manual_seed": seed,
        "manual_seed_all": seed_all,
        "seed_all": lambda: None,
        "get_rng_state": lambda device="cuda": machine.device(device).generator.get_state(),
        "set_rng_state": lambda state, device="cuda": machine.device(device).generator.set_state(state),
        "ipc_collect": lambda: None,
    }


def _accelerator_alone(machine: Machine) -> dict[str, Any]:
    def choose(device: Any) -> None:
        machine.set_index(machine.index_of(device))

    return {
        "current_stream": lambda device=None: as_kind(machine.current_stream(device), Stream),
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_device_index": machine.current_index,
        "current_device_idx": machine.current_index,
        "set_device_index": choose,
        "set_device_idx": choose,
        "device_index": _block(machine, lambda index: index),
        "Graph": Graph,
    }


def _methods(machine: Machine) -> dict[str, Any]:
    """Methods of tensors: those that pin, and those in which a device without a number is the current one."""
    plain_to = torch.Tensor.to

    def exact(value: Any) -> Any:
        if isinstance(value, (str, torch.device)) and torch.device(value) == torch.device("cuda"):
            return torch.device("cuda", machine.current_index())
        return value

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = exact(kwargs["device"])
        return plain_to(tensor, *[exact(value) for value in args[:1]], *args[1:], **kwargs)

    def cuda(tensor: torch.Tensor, device: Any = None, non_blocking: bool = False, **_: Any) -> torch.Tensor:
        return plain_to(tensor, torch.device("cuda", machine.index_of(device)), non_blocking=non_blocking)

    return {
        "to": to,
        "cuda": cuda,
        "pin_memory": _pin_memory,
        "is_pinned": lambda tensor, device=None: operations.is_pinned(tensor),
        "record_stream": operations.record_stream,
    }


def _storage_clone(plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def clone(storage: Any) -> Any:
        return operations.storage_clone(storage) if storage.device.type == "cuda" else plain(storage)

    return clone
