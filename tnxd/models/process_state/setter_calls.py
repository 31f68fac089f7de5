"""Setter calls: functions that set a state of all models, recorded as they are called.

    names: set[str] = set()
    with recorded(names):
        module(x)               names == {"torch's default dtype"}

A forward that sets float64 as default and restores the old one leaves nothing to see afterwards. But the forwards of
other models ran with float64 meanwhile. So the setters have wrappers in their places while anybody records. A wrapper
records the calls of the threads that do; other threads pass through. A setter that code refers to in a way of its own,
other than as a global of a module beside weights, is not seen.

Calls by torch itself are passed over, as torch restores the state of its generator: where nothing is seeded, others may
draw a number twice, but none that can be foreseen.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tnxd.models.formats.modules import is_private

DTYPE = "torch's default dtype"
SEED = "torch's random seed"
PYTHON_SEED = "the seed of Python's random numbers"
NUMPY_SEED = "the seed of numpy's random numbers"

_SETTERS = {
    DTYPE: ((torch,), ("set_default_dtype", "set_default_tensor_type")),
    SEED: (
        (torch, torch.random, torch.cuda, torch.cuda.random),
        ("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all"),
    ),
    PYTHON_SEED: ((random,), ("seed", "setstate")),
    NUMPY_SEED: ((np.random,), ("seed", "set_state")),
}
"""Modules and names of the setters, by the name of what they set."""

_thread = threading.local()
"""Attribute `recordings`: the sets of names that a thread records into."""

_lock = threading.Lock()
_recorders = 0
_replaced: list[tuple[Any, str, Any, Any]] = []


@contextmanager
def recorded(names: set[str]) -> Iterator[None]:
    """Record the setter calls of this thread in the block: adds the names of what they set."""
    recordings = _thread.__dict__.setdefault("recordings", [])
    recordings.append(names)
    _install()
    try:
        yield
    finally:
        _uninstall()
        recordings[:] = [recording for recording in recordings if recording is not names]


def _install() -> None:
    global _recorders
    with _lock:
        _recorders += 1
        if _recorders > 1:
            return
        wrappers: dict[int, tuple[Any, Any]] = {}
        for name, (owners, attributes) in _SETTERS.items():
            for owner in owners:
                for attribute in attributes:
                    function = getattr(owner, attribute, None)
                    if function is not None and id(function) not in wrappers:
                        wrappers[id(function)] = function, _wrapped(name, function)
                    if function is not None:
                        _replace(owner, attribute, *wrappers[id(function)])
        for name, module in sys.modules.copy().items():
            if is_private(name):
                for attribute, value in vars(module).copy().items():
                    if id(value) in wrappers:
                        _replace(module, attribute, *wrappers[id(value)])


def _replace(owner: Any, attribute: str, function: Any, wrapper: Any) -> None:
    _replaced.append((owner, attribute, function, wrapper))
    setattr(owner, attribute, wrapper)


def _uninstall() -> None:
    global _recorders
    with _lock:
        _recorders -= 1
        if _recorders:
            return
        while _replaced:
            owner, attribute, function, wrapper = _replaced.pop()
            # torch puts something around one of them when it first compiles, and a model may do so, too.
            if getattr(owner, attribute, None) is wrapper:
                setattr(owner, attribute, function)


def _wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        recordings = getattr(_thread, "recordings", ())
        if recordings and sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] != "torch":
            for names in recordings:
                names.add(name)
        return function(*args, **kwargs)

    return wrapper
