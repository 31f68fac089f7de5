"""The process that all models share: what the code of one changes in it is found, put back, and told by name.

    with settings_kept("building it") as changes:       around reading a model, its build and its warm-up
        ...
    changes.note()                          "building it changed torch's default dtype: put back"

    witness = Witness()                     around each of several forwards
    with witness:
        module(x)
    witness.complaint()                     what it changes every time

    watch = Watch()                         on the thread that serves; costs requests nothing
    watch.look()                            at times: puts back what has drifted

A setting is compared before and after, so what is changed and put back by the code itself does not count, save for what
`tnxd.models.setters` notes: forwards of other models would run with another default dtype, or with numbers that were
seeded.

**What cannot be promised.** Python code can change anything in its process, and this is a list of what models are
known to change, not a sandbox. Models are built while others serve: from a change until the end of the step that made
it, import or build, forwards of other models run with it. That cannot be had otherwise, for the code that sets float64
as default may need it to build its network. TensorNext's own code on the way of a request says datatype and device of
every tensor that it makes, and depends on none of this. What a thread has of its own (`Scope.THREAD`) is seen only on
the thread that the code ran on, which is that of the loader, of a trial, or of the serving loop. Settings in C that
have no getter, such as the handlers of faulthandler.register, are not seen. A signal handler can be put back on the
main thread alone: elsewhere it is found, and put back by the watch.

**Functions of torch** that code replaces (`tnxd.models.originals`) are put back, and the step has failed: with the
originals, the code that replaced them would mean something else.

**Random numbers** are drawn by models that sample, and drawing is no change. Seeding is: all models would draw the same
numbers from then on. After a step that has seeded, torch's generators get a seed from the system again, not their old
state: lanes that sample have drawn from it meanwhile, and would draw it all twice. Python's and numpy's generators,
which tell nothing of seeds, get one whenever they were used at all. A forward that seeds a generator that all share is
refused: `torch.Generator` gives it one of its own.
"""

from __future__ import annotations

import enum
import faulthandler
import gc
import locale
import logging
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.nn.modules import module as module_hooks

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.device_kinds import KINDS
from tnxd.models import originals
from tnxd.models.setters import DTYPE, NUMPY_SEED, PYTHON_SEED, SEED, noted

log = logging.getLogger(__name__)


class Scope(enum.Enum):
    """Whom a setting concerns: all of the process, or the thread that changed it and nobody else."""

    PROCESS = "process"
    THREAD = "thread"


@dataclass(frozen=True)
class Setting:
    """Something that code can change and others depend on.

    Attributes:
        name: for people, as the object of a sentence.
        read: its value, one that `==` compares; what raises cannot be read and is left out.
        write: puts a value back that was read.
        watched: whether `Watch` looks at it: what libraries may rightly change later, when they are first used, is not.
        harmless: whether nobody is harmed if a model changes it.
        tell: its name with what has changed of it, given the value before and now.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    scope: Scope = Scope.PROCESS
    watched: bool = True
    harmless: bool = False
    tell: Callable[[Any, Any], str] | None = None


# --- torch ---------------------------------------------------------------------------------------------------


def _attribute(name: str, owner: Any, attribute: str, **options: Any) -> Setting:
    return Setting(name, lambda: getattr(owner, attribute), lambda value: setattr(owner, attribute, value), **options)


def _readable(library: str, owner: Any, attribute: str) -> Setting:
    """One that cannot always be read, and is put back only where it could be."""

    def read() -> Any:
        try:
            return getattr(owner, attribute)
        except RuntimeError:
            return None

    def write(value: Any) -> None:
        if value is not None:
            setattr(owner, attribute, value)

    return Setting(f"{library}'s use of TF32", read, write)


def _modes() -> tuple[torch.device, int]:
    """The device that new tensors are on, and how many modes are entered: one of them may be what sets it."""
    return torch.get_default_device(), torch._C._len_torch_function_stack()


def _set_modes(kept: tuple[torch.device, int]) -> None:
    device, depth = kept
    torch.set_default_device(None)
    while torch._C._len_torch_function_stack() > depth:
        torch._C._pop_torch_function_stack()
    if torch.get_default_device() != device:
        torch.set_default_device(device)


_inference_guards: list[Any] = []  # one that is freed ends its effect


def _set_inference_mode(enabled: bool) -> None:
    guard = torch.inference_mode(enabled)
    guard.__enter__()
    _inference_guards.append(guard)


_AUTOCAST_KINDS = tuple(KINDS)


def _set_autocast(states: tuple[tuple[bool, torch.dtype], ...]) -> None:
    for kind, (enabled, dtype) in zip(_AUTOCAST_KINDS, states, strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


_ATTENTION = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")


def _attention() -> list[bool]:
    return [getattr(torch.backends.cuda, f"{kind}_enabled")() for kind in _ATTENTION]


def _set_attention(kept: list[bool]) -> None:
    for kind, enabled in zip(_ATTENTION, kept, strict=True):
        getattr(torch.backends.cuda, f"enable_{kind}")(enabled)


def _hooks() -> dict[str, Any]:
    """The hooks of all modules, which torch keeps in dictionaries of that module."""
    kept = {name: value for name, value in vars(module_hooks).items() if name.startswith("_global_")}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def _set_hooks(kept: dict[str, Any]) -> None:
    for name, value in kept.items():
        current = getattr(module_hooks, name)
        if isinstance(current, dict):
            current.clear()
            current.update(value)
        else:
            setattr(module_hooks, name, value)


def _flushes_denormals() -> bool:
    smallest = 5e-324
    return smallest * 1.0 == 0.0  # so does Python's arithmetic then


def _cuda_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


def _set_cuda_device(index: int | None) -> None:
    if index is not None:
        torch.cuda.set_device(index)


def _precisions() -> list[Setting]:
    """Precisions of products of FP32. One is settled by the one above it where it says "none"."""
    backends = torch.backends
    owners = {
        "torch.backends": backends,
        "torch.backends.cuda.matmul": backends.cuda.matmul,
        "torch.backends.cudnn": backends.cudnn,
        "torch.backends.cudnn.conv": getattr(backends.cudnn, "conv", None),
        "torch.backends.cudnn.rnn": getattr(backends.cudnn, "rnn", None),
        "torch.backends.mkldnn": backends.mkldnn,
        "torch.backends.mkldnn.matmul": getattr(backends.mkldnn, "matmul", None),
        "torch.backends.mkldnn.conv": getattr(backends.mkldnn, "conv", None),
        "torch.backends.mkldnn.rnn": getattr(backends.mkldnn, "rnn", None),
    }
    return [_attribute(f"{path}.fp32_precision", owner, "fp32_precision") for path, owner in owners.items()]


_MATMUL = torch.backends.cuda.matmul

_TORCH = [
    Setting(DTYPE, torch.get_default_dtype, torch.set_default_dtype),
    Setting("torch's default device or function modes", _modes, _set_modes, Scope.THREAD),
    Setting("torch's grad mode", torch.is_grad_enabled, torch.set_grad_enabled, Scope.THREAD, harmless=True),
    Setting("torch's inference mode", torch.is_inference_mode_enabled, _set_inference_mode, Scope.THREAD),
    Setting(
        "torch's autocast",
        lambda: tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _AUTOCAST_KINDS),
        _set_autocast,
        Scope.THREAD,
    ),
    Setting("torch's autocast cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, Scope.THREAD),
    # A thread has a number of its own, but to set it sets that of threads to come as well.
    Setting("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
    Setting("the flushing of denormals", _flushes_denormals, torch.set_flush_denormal, Scope.THREAD),
    Setting("torch's deterministic algorithms", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    _attribute("torch's filling of uninitialized memory", torch.utils.deterministic, "fill_uninitialized_memory"),
    Setting(
        "torch's anomaly detection",
        torch.is_anomaly_enabled,
        torch.set_anomaly_enabled,
    ),
    # First this, since it sets some of those below.
    Setting(
        "torch's precision of FP32 products",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    *_precisions(),
    # And these last: torch refuses to read them, as torch.export does, where what they stand for was set one by one.
    *[_readable(name, owner, "allow_tf32") for name, owner in (("cuDNN", torch.backends.cudnn), ("CUDA", _MATMUL))],
    _attribute("cuDNN's use", torch.backends.cudnn, "enabled"),
    _attribute("cuDNN's benchmarking", torch.backends.cudnn, "benchmark"),
    _attribute("cuDNN's determinism", torch.backends.cudnn, "deterministic"),
    _attribute(
        "CUDA's reduced precision of BF16 sums",
        torch.backends.cuda.matmul,
        "allow_bf16_reduced_precision_reduction",
    ),
    _attribute(
        "CUDA's reduced precision of FP16 sums",
        torch.backends.cuda.matmul,
        "allow_fp16_reduced_precision_reduction",
    ),
    _attribute("oneDNN's use", torch.backends.mkldnn, "enabled"),
    _attribute("oneDNN's determinism", torch.backends.mkldnn, "deterministic"),
    Setting("the choice of attention kernels", _attention, _set_attention),
    _attribute("torch's engine of quantized operators", torch.backends.quantized, "engine"),
    Setting("the current CUDA device", _cuda_device, _set_cuda_device, Scope.THREAD),
    Setting("the hooks of all modules", _hooks, _set_hooks),
    Setting(
        "torch's way of sharing memory",
        torch.multiprocessing.get_sharing_strategy,
        torch.multiprocessing.set_sharing_strategy,
    ),
]


# --- Python --------------------------------------------------------------------------------------------------


def _own_loggers() -> list[logging.Logger]:
    """The root of all loggers, and those of TensorNext."""
    known = logging.root.manager.loggerDict.copy()
    names = [name for name in list(known) if name.partition(".")[0] in ("tnxd", "tnxctl")]
    return [logging.root, *(logger for name in names if isinstance(logger := known[name], logging.Logger))]


_FRESH: tuple[Any, ...] = (logging.NOTSET, [], [], False, True)


def _logging() -> dict[str, tuple[Any, ...]]:
    """The loggers that are not as a new one is: those come with any module."""
    states = {
        logger.name: (logger.level, logger.handlers[:], logger.filters[:], logger.disabled, logger.propagate)
        for logger in _own_loggers()
    }
    return {name: state for name, state in states.items() if state != _FRESH}


def _set_logging(kept: dict[str, tuple[Any, ...]]) -> None:
    for logger in _own_loggers():
        level, handlers, filters, disabled, propagate = kept.get(logger.name, _FRESH)
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:] = handlers, filters
        logger.disabled, logger.propagate = disabled, propagate


def _others() -> Iterator[logging.Logger]:
    own = {logger.name for logger in _own_loggers()}
    for logger in logging.root.manager.loggerDict.copy().values():
        if isinstance(logger, logging.Logger) and logger.name not in own:
            yield logger


def _disabled() -> frozenset[str]:
    """Those of libraries: logging.config disables all that there are, and torch.export's say why a load fails."""
    return frozenset(logger.name for logger in _others() if logger.disabled)


def _set_disabled(kept: frozenset[str]) -> None:
    for logger in _others():
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
    warnings.simplefilter("default", append=True)  # only this way the module learns of it
    del warnings.filters[len(kept) :]  # type: ignore[attr-defined]


def _umask() -> int:
    """The umask of the process. To ask the system for it would mean to change it for a moment."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)


_OF_TORCH = ("TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_", "TORCH_WARM_POOL")
"""What variables begin with that torch sets for itself when it compiles."""

_MOST_VARIABLES = 3


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_OF_TORCH)}


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
"""inductor raises it to that before it compiles, and leaves it so."""


def _recursion_limit() -> int:
    limit = sys.getrecursionlimit()
    return _OWN_RECURSION_LIMIT if limit == _RECURSION_LIMIT_OF_TORCH else limit


def _start_method() -> str:
    """The method in effect. Where none is set, whoever first uses one, as a DataLoader does, sets the system's."""
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


def _list(name: str, owner: Any, attribute: str, **options: Any) -> Setting:
    def write(kept: list[Any]) -> None:
        getattr(owner, attribute)[:] = kept

    return Setting(name, lambda: list(getattr(owner, attribute)), write, **options)


_LIMITS = [
    getattr(resource, name) for name in ("RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_DATA", "RLIMIT_NOFILE", "RLIMIT_STACK")
]


def _set_limits(kept: list[tuple[int, int]]) -> None:
    for limit, values in zip(_LIMITS, kept, strict=True):
        resource.setrlimit(limit, values)


_PYTHON = [
    Setting("the level or the handlers of loggers", _logging, _set_logging),
    Setting("the other loggers that are disabled", _disabled, _set_disabled, harmless=True),
    Setting("what logging disables", lambda: logging.root.manager.disable, logging.disable),
    _attribute("logging's errors", logging, "raiseExceptions"),
    Setting("signal handlers", lambda: [signal.getsignal(number) for number in _SIGNALS], _set_signals),
    Setting("faulthandler", faulthandler.is_enabled, _set_faulthandler),
    Setting("the filters of warnings", lambda: list(warnings.filters), _set_filters, watched=False, harmless=True),
    _attribute("how warnings are shown", warnings, "showwarning"),
    Setting("the working directory", os.getcwd, os.chdir),
    Setting("the environment", _environment, _set_environment, tell=_variables),
    Setting("the umask", _umask, os.umask),
    Setting("limits of resources", lambda: [resource.getrlimit(limit) for limit in _LIMITS], _set_limits),
    Setting(
        "the processor affinity of the thread",
        lambda: os.sched_getaffinity(0),
        lambda cores: os.sched_setaffinity(0, cores),
        Scope.THREAD,
    ),
    _list("sys.path", sys, "path"),
    _list("sys.argv", sys, "argv"),
    Setting("the recursion limit", _recursion_limit, sys.setrecursionlimit),
    Setting("the switch interval", sys.getswitchinterval, sys.setswitchinterval),
    _attribute("sys.stdin", sys, "stdin"),
    _attribute("sys.stdout", sys, "stdout"),
    _attribute("sys.stderr", sys, "stderr"),
    _attribute("sys.excepthook", sys, "excepthook"),
    _attribute("sys.unraisablehook", sys, "unraisablehook"),
    _attribute("sys.dont_write_bytecode", sys, "dont_write_bytecode"),
    _attribute("threading.excepthook", threading, "excepthook"),
    Setting("the trace function", sys.gettrace, sys.settrace, Scope.THREAD),
    Setting("the profile function", sys.getprofile, sys.setprofile, Scope.THREAD),
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
    Setting("numpy's handling of floating-point errors", np.geterr, lambda kept: np.seterr(**kept), Scope.THREAD),
    Setting(
        "numpy's print options",
        np.get_printoptions,
        lambda kept: np.set_printoptions(**kept),
        Scope.THREAD,
        harmless=True,
    ),
    Setting(
        "the start method of multiprocessing",
        _start_method,
        lambda method: multiprocessing.set_start_method(method, force=True),
    ),
]

SETTINGS: tuple[Setting, ...] = (*_TORCH, *_PYTHON)
"""In the order in which they are put back."""

_HARMLESS = {setting.name for setting in SETTINGS if setting.harmless}

_UNREADABLE = object()


def _read(setting: Setting) -> Any:
    try:
        return setting.read()
    except Exception:  # a directory that is gone, a platform or a release of torch without it
        return _UNREADABLE


def _differs(before: Any, now: Any) -> bool:
    if before is now or before is _UNREADABLE or now is _UNREADABLE:
        return False
    try:
        return not bool(before == now)
    except Exception:  # whatever a handler or a hook makes of a comparison
        return True


def _changed(before: Mapping[Setting, Any]) -> Iterator[tuple[Setting, str, bool]]:
    """The settings that are not what they were, each put back: what to call the change, and whether that worked."""
    for setting, value in before.items():
        now = _read(setting)
        if _differs(value, now):
            with suppress(Exception):  # signal handlers, off the main thread
                setting.write(value)
            told = setting.name if setting.tell is None else setting.tell(value, now)
            yield setting, told, not _differs(value, _read(setting))


# --- around a step -------------------------------------------------------------------------------------------


@dataclass
class Changes:
    """Changes of the process by a step.

    Attributes:
        what: the step, as the subject of a sentence.
        names: of the settings, and what has changed of them. lasting: those that could not be put back.
    """

    what: str
    names: list[str] = field(default_factory=list)
    lasting: list[str] = field(default_factory=list)

    def note(self) -> tuple[str, ...]:
        """A sentence for operators, if there is something to say.

        What is harmless and undone is not worth one: many a library has warnings of its own ignored.
        """
        undone = [name for name in self.names if name not in self.lasting and name not in _HARMLESS]
        told = [f"{', '.join(undone)}: put back"] if undone else []
        if self.lasting:
            told.append(f"{', '.join(self.lasting)}, which could not be put back there")
        return (f"{self.what} changed {'; and '.join(told)}",) if told else ()


@contextmanager
def settings_kept(what: str = "it") -> Iterator[Changes]:
    """Put back what the block changes. Whatever it raises, the changes are complete after it.

    Args:
        what: the block, as the subject of a sentence.

    Raises:
        FailedPrecondition: it has put something in the place of a function of torch.
    """
    changes = Changes(what)
    earlier = originals.put_back()
    if earlier:
        log.warning("%s: put back", originals.sentence("a model that serves", earlier))
    before = {setting: _read(setting) for setting in SETTINGS}
    chance = _Chance()
    try:
        yield changes
    finally:
        for _, told, undone in _changed(before):
            changes.names.append(told)
            if not undone:
                changes.lasting.append(told)
        if chance.renewed():
            changes.names.append(SEED)
        replaced = originals.put_back()
    if replaced:
        raise FailedPrecondition(originals.sentence(what, replaced))


class _Chance:
    """The random generators that all share, as they were."""

    def __init__(self) -> None:
        self._seed = torch.initial_seed()
        self._python = random.getstate()
        self._numpy = _numpy_state()

    def renewed(self) -> bool:
        """Give those that were used an unforeseeable seed. Whether torch's had been seeded."""
        if random.getstate() != self._python:
            random.seed()
        if _numpy_state() != self._numpy:
            np.random.seed()
        if torch.initial_seed() == self._seed:
            return False
        torch.seed()
        return True


def _numpy_state() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return (kind, np.asarray(keys).tobytes(), *rest)


# --- around forwards -----------------------------------------------------------------------------------------


class Witness:
    """Finds what the forwards of one model change, over several of them, and puts it back after each.

    The first forward may change what a library sets up when it is first used. What is changed again, though it had been
    put back, is the model's own doing.
    """

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        self._told: dict[str, str] = {}
        self._begins: dict[tuple[str, int], int] = {}
        self._seeds: set[str] = set()
        self._sets: Counter[str] = Counter()

    def __enter__(self) -> None:
        self._before = {setting: _read(setting) for setting in SETTINGS if not setting.harmless}
        self._torch = torch.initial_seed(), torch.get_rng_state()
        # Else a forward that seeds a generator and draws would find it as the last one left it.
        random.random()
        np.random.random()
        self._generators = _generators()
        self._set: set[str] = set()
        self._noted = noted(self._set)
        self._noted.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._noted.__exit__(None, None, None)
        self._sets.update(self._set)
        for setting, told, _ in _changed(self._before):
            self._times[setting.name] += 1
            self._told[setting.name] = told  # as it was the last time: what a library sets up comes first
        del self._before
        seed, state = self._torch
        if torch.initial_seed() != seed:
            self._times[SEED] += 1
            torch.set_rng_state(state)
        for name, end in _generators().items():
            begin = self._generators[name]
            # Two forwards that begin differently and end the same have set the generator.
            if end != begin and self._begins.setdefault((name, end), begin) != begin:
                self._seeds.add(name)

    def complaint(self) -> str:
        """A sentence about what a forward changes, or sets, every time; "" if nothing."""
        lasting = [*(name for name, times in self._times.items() if times > 1), *sorted(self._seeds)]
        brief = [name for name, times in self._sets.items() if times > 1 and name not in lasting]
        told = []
        if lasting:
            names = ", ".join(self._told.get(name, name) for name in lasting)
            told.append(f"changes {names}, for all models of the process")
        if brief:
            told.append(f"sets {', '.join(sorted(brief))}, if only for a while: other models run meanwhile")
        return f"a forward {'; and '.join(told)}" if told else ""


def _generators() -> dict[str, int]:
    """Hashes of the states of those that do not tell what they were seeded with."""
    return {
        PYTHON_SEED: hash(random.getstate()),
        NUMPY_SEED: hash(_numpy_state()),
    }


# --- while it serves -----------------------------------------------------------------------------------------


class Watch:
    """Settings as they are to stay while models serve. Make it, and use it, on the thread that serves."""

    def __init__(self) -> None:
        self._kept = {setting: _read(setting) for setting in SETTINGS if setting.watched}
        self._told: set[str] = set()

    def look(self) -> list[str]:
        """Put back what has drifted, and log each name once. Returns the names. A fraction of a millisecond."""
        drifted = []
        for setting, told, undone in _changed(self._kept):
            drifted.append(told)
            if setting.name not in self._told:
                self._told.add(setting.name)
                log.warning("a model that serves has changed %s: %s", told, "put back" if undone else "it stays so")
        for name in originals.put_back():
            drifted.append(name)
            if name not in self._told:
                self._told.add(name)
                log.warning("a model that serves has replaced %s, which all models use: put back", name)
        return drifted
