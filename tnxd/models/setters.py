"""Calls that set what all models share, noted while they are made: afterwards there may be nothing to see.

    names: set[str] = set()
    with noted(names):
        module(x)               names == {"torch's default dtype"}

A forward that sets float64 as default and puts back what was there has had the forwards of other models run with it
meanwhile. The functions have others in their places as long as somebody looks, and those note what the thread of that
somebody calls; other threads pass through. A function that code holds in a way of its own, other than as a global of a
module beside weights, is not seen.

What torch itself calls is passed over, as it puts back the state of its generator: where nothing is seeded, others may
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

from tnxd.models.formats.factories import is_private

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
"""Where they are, and what they are called, by the name of what they set."""

_own = threading.local()
"""Attribute `names`: the sets of the thread that looks."""

_lock = threading.Lock()
_users = 0
_replaced: list[tuple[Any, str, Any, Any]] = []


@contextmanager
def noted(names: set[str]) -> Iterator[None]:
    """Add the names of what this thread sets in the block."""
    looking = _own.__dict__.setdefault("names", [])
    looking.append(names)
    _install()
    try:
        yield
    finally:
        _uninstall()
        looking.remove(names)


def _install() -> None:
    global _users
    with _lock:
        _users += 1
        if _users > 1:
            return
        noting: dict[int, tuple[Any, Any]] = {}
        for name, (owners, attributes) in _SETTERS.items():
            for owner in owners:
                for attribute in attributes:
                    function = getattr(owner, attribute, None)
                    if function is not None and id(function) not in noting:
                        noting[id(function)] = function, _noting(name, function)
                    if function is not None:
                        _replace(owner, attribute, *noting[id(function)])
        for name, module in sys.modules.copy().items():
            if is_private(name):
                for attribute, value in vars(module).copy().items():
                    if id(value) in noting:
                        _replace(module, attribute, *noting[id(value)])


def _replace(owner: Any, attribute: str, function: Any, noting: Any) -> None:
    _replaced.append((owner, attribute, function, noting))
    setattr(owner, attribute, noting)


def _uninstall() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users:
            return
        while _replaced:
            owner, attribute, function, noting = _replaced.pop()
            # torch puts something around one of them when it first compiles, and a model may do so, too.
            if getattr(owner, attribute, None) is noting:
                setattr(owner, attribute, function)


def _noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def noting(*args: Any, **kwargs: Any) -> Any:
        looking = getattr(_own, "names", ())
        if looking and sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] != "torch":
            for names in looking:
                names.add(name)
        return function(*args, **kwargs)

    return noting
