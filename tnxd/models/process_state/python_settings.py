"""Settings of Python, its standard library, numpy and the operating system, in the order in which they are restored."""

from __future__ import annotations

import faulthandler
import gc
import locale
import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from tnxd.models.process_state.affinity import Affinity
from tnxd.models.process_state.setting import Setting, attribute, sequence


def _own_loggers() -> list[logging.Logger]:
    """Root logger, and the loggers of TensorNext."""
    known = logging.root.manager.loggerDict.copy()
    names = [name for name in list(known) if name.partition(".")[0] in ("tnxd", "tnxctl")]
    return [logging.root, *(logger for name in names if isinstance(logger := known[name], logging.Logger))]


_NEW_LOGGER: tuple[Any, ...] = (logging.NOTSET, [], [], False, True)


def _logging() -> dict[str, tuple[Any, ...]]:
    """State of each own logger that differs from a new one: new ones come with any module."""
    states = {
        logger.name: (logger.level, logger.handlers[:], logger.filters[:], logger.disabled, logger.propagate)
        for logger in _own_loggers()
    }
    return {name: state for name, state in states.items() if state != _NEW_LOGGER}


def _set_logging(kept: dict[str, tuple[Any, ...]]) -> None:
    for logger in _own_loggers():
        level, handlers, filters, disabled, propagate = kept.get(logger.name, _NEW_LOGGER)
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:] = handlers, filters
        logger.disabled, logger.propagate = disabled, propagate


def _foreign_loggers() -> Iterator[logging.Logger]:
    own = {logger.name for logger in _own_loggers()}
    for logger in logging.root.manager.loggerDict.copy().values():
        if isinstance(logger, logging.Logger) and logger.name not in own:
            yield logger


def _disabled() -> frozenset[str]:
    """Loggers of libraries that are disabled. logging.config disables all; torch.export's say why a load fails."""
    return frozenset(logger.name for logger in _foreign_loggers() if logger.disabled)


def _set_disabled(kept: frozenset[str]) -> None:
    for logger in _foreign_loggers():
        logger.disabled = logger.name in kept


_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGCHLD")
    if hasattr(signal, name)
]


def _set_signals(kept: list[Any]) -> None:
    for number, handler in zip(_SIGNALS, kept, strict=True):
        if handler is not None and signal.getsignal(number) is not handler:  # None: it was not set from Python
            signal.signal(number, handler)


def _set_faulthandler(enabled: bool) -> None:
    if enabled:
        faulthandler.enable()
    else:
        faulthandler.disable()


def _set_filters(kept: list[Any]) -> None:
    warnings.filters[:] = kept  # type: ignore[index]
    warnings.simplefilter("default", append=True)  # which makes the module drop its cache
    del warnings.filters[len(kept) :]  # type: ignore[attr-defined]


def _umask() -> int:
    """Umask of the process, read from /proc: os.umask would change it for a moment."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)


_TORCH_PREFIXES = ("TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_", "TORCH_WARM_POOL")
"""Prefixes of the variables that torch sets for itself when it compiles."""

_MOST_VARIABLES = 3


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_TORCH_PREFIXES)}


def _set_environment(kept: dict[str, str]) -> None:
    for name in _environment().keys() - kept.keys():
        del os.environ[name]
    for name, value in kept.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _variables(before: dict[str, str], now: dict[str, str]) -> str:
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    more = f" and {len(names) - _MOST_VARIABLES} more" if len(names) > _MOST_VARIABLES else ""
    return f"the environment variable{'s' if len(names) > 1 else ''} {', '.join(names[:_MOST_VARIABLES])}{more}"


_OWN_RECURSION_LIMIT = sys.getrecursionlimit()
_RECURSION_LIMIT_OF_TORCH = 2000
"""Limit that inductor sets before it compiles, and leaves so."""


def _recursion_limit() -> int:
    limit = sys.getrecursionlimit()
    return _OWN_RECURSION_LIMIT if limit == _RECURSION_LIMIT_OF_TORCH else limit


def _start_method() -> str:
    """Start method in effect. Where none is set, its first user, such as a DataLoader, sets the system's."""
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


_LIMITS = [
    getattr(resource, name) for name in ("RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_DATA", "RLIMIT_NOFILE", "RLIMIT_STACK")
]


def _set_limits(kept: list[tuple[int, int]]) -> None:
    for limit, values in zip(_LIMITS, kept, strict=True):
        resource.setrlimit(limit, values)


PYTHON_SETTINGS = [
    Setting("the level or the handlers of loggers", _logging, _set_logging),
    Setting("the other loggers that are disabled", _disabled, _set_disabled, harmless=True),
    Setting("what logging disables", lambda: logging.root.manager.disable, logging.disable),
    attribute("logging's errors", logging, "raiseExceptions"),
    Setting("signal handlers", lambda: [signal.getsignal(number) for number in _SIGNALS], _set_signals),
    Setting("faulthandler", faulthandler.is_enabled, _set_faulthandler),
    Setting("the filters of warnings", lambda: list(warnings.filters), _set_filters, watched=False, harmless=True),
    attribute("how warnings are shown", warnings, "showwarning"),
    Setting("the working directory", os.getcwd, os.chdir),
    Setting("the environment", _environment, _set_environment, describe=_variables),
    Setting("the umask", _umask, os.umask),
    Setting("limits of resources", lambda: [resource.getrlimit(limit) for limit in _LIMITS], _set_limits),
    Setting("the processor affinity of the thread", Affinity, Affinity.restore),
    sequence("sys.path", sys, "path"),
    sequence("sys.argv", sys, "argv"),
    Setting("the recursion limit", _recursion_limit, sys.setrecursionlimit),
    Setting("the switch interval", sys.getswitchinterval, sys.setswitchinterval),
    attribute("sys.stdin", sys, "stdin"),
    attribute("sys.stdout", sys, "stdout"),
    attribute("sys.stderr", sys, "stderr"),
    attribute("sys.excepthook", sys, "excepthook"),
    attribute("sys.unraisablehook", sys, "unraisablehook"),
    attribute("sys.dont_write_bytecode", sys, "dont_write_bytecode"),
    attribute("threading.excepthook", threading, "excepthook"),
    Setting("the trace function", sys.gettrace, sys.settrace),
    Setting("the profile function", sys.getprofile, sys.setprofile),
    Setting("the stack size of threads", threading.stack_size, threading.stack_size),
    Setting(
        "the locale",
        lambda: locale.setlocale(locale.LC_ALL),
        lambda value: locale.setlocale(locale.LC_ALL, value),
    ),
    Setting("the default timeout of sockets", socket.getdefaulttimeout, socket.setdefaulttimeout),
    Setting("the garbage collector", gc.isenabled, lambda enabled: gc.enable() if enabled else gc.disable()),
    Setting("the thresholds of the garbage collector", gc.get_threshold, lambda values: gc.set_threshold(*values)),
    Setting("the debugging of the garbage collector", gc.get_debug, gc.set_debug),
    Setting("numpy's handling of floating-point errors", np.geterr, lambda kept: np.seterr(**kept)),
    Setting(
        "numpy's print options",
        np.get_printoptions,
        lambda kept: np.set_printoptions(**kept),
        harmless=True,
    ),
    Setting(
        "the start method of multiprocessing",
        _start_method,
        lambda method: multiprocessing.set_start_method(method, force=True),
    ),
]
