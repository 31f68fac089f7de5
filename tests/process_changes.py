"""Changes of the process, at least one for each setting, as tests make them."""

from __future__ import annotations

import faulthandler
import gc
import locale
import logging
import logging.config
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from tnxd.models.process_state.setter_calls import SEED
from tnxd.models.process_state.side_effects import SideEffectDetector
from tnxd.models.process_state.snapshot import SETTINGS, read

backends = torch.backends


def set_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


def silence_loggers() -> None:
    logging.config.dictConfig({"version": 1})  # it disables all loggers that there are


def add_filter() -> None:
    warnings.simplefilter("ignore")


def enter(context: Any) -> Callable[[], None]:
    """Enter a context and never leave it."""

    def never_leave() -> None:
        entered = context()
        entered.__enter__()
        _entered.append(entered)  # some end when they are freed

    return never_leave


_entered: list[Any] = []


def disable_a_logger() -> None:
    logging.getLogger("torch.export").disabled = True


CHANGES: dict[str, list[Callable[[], Any]]] = {
    "torch's default dtype": [lambda: torch.set_default_dtype(torch.float64)],
    "torch's default device or function modes": [
        lambda: torch.set_default_device("meta"),
        enter(lambda: torch.device("meta")),
        enter(torch.overrides.BaseTorchFunctionMode),
    ],
    "torch's grad mode": [lambda: torch.set_grad_enabled(False)],
    "torch's inference mode": [enter(torch.inference_mode)],
    "torch's autocast": [enter(lambda: torch.autocast("cpu", torch.bfloat16))],
    "torch's autocast cache": [lambda: torch.set_autocast_cache_enabled(False)],
    "torch's number of threads": [lambda: torch.set_num_threads(torch.get_num_threads() + 1)],
    "the flushing of denormals": [lambda: torch.set_flush_denormal(True)],
    "torch's deterministic algorithms": [lambda: torch.use_deterministic_algorithms(True, warn_only=True)],
    "torch's filling of uninitialized memory": [
        set_attribute(torch.utils.deterministic, "fill_uninitialized_memory", False)
    ],
    "torch's anomaly detection": [lambda: torch.autograd.set_detect_anomaly(True)],
    "torch's precision of FP32 products": [lambda: torch.set_float32_matmul_precision("medium")],
    "torch.backends.fp32_precision": [set_attribute(backends, "fp32_precision", "tf32")],
    "torch.backends.cuda.matmul.fp32_precision": [
        set_attribute(backends.cuda.matmul, "fp32_precision", "tf32"),
        set_attribute(backends.cuda.matmul, "allow_tf32", True),
    ],
    "torch.backends.cudnn.conv.fp32_precision": [set_attribute(backends.cudnn, "allow_tf32", False)],
    "cuDNN's use of TF32": [set_attribute(backends.cudnn, "allow_tf32", False)],
    "torch.backends.mkldnn.matmul.fp32_precision": [set_attribute(backends.mkldnn.matmul, "fp32_precision", "bf16")],
    "cuDNN's use": [set_attribute(backends.cudnn, "enabled", False)],
    "cuDNN's benchmarking": [set_attribute(backends.cudnn, "benchmark", True)],
    "cuDNN's determinism": [set_attribute(backends.cudnn, "deterministic", True)],
    "CUDA's reduced precision of BF16 sums": [
        set_attribute(backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    ],
    "CUDA's reduced precision of FP16 sums": [
        set_attribute(backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)
    ],
    "oneDNN's use": [set_attribute(backends.mkldnn, "enabled", False)],
    "oneDNN's determinism": [set_attribute(backends.mkldnn, "deterministic", True)],
    "the choice of attention kernels": [lambda: backends.cuda.enable_flash_sdp(False)],
    "torch's engine of quantized operators": [lambda: setattr(backends.quantized, "engine", _another_engine())],
    "the hooks of all modules": [
        lambda: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
        lambda: torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None),
        lambda: torch.nn.modules.module.register_module_parameter_registration_hook(lambda *_: None),
    ],
    "torch's way of sharing memory": [lambda: torch.multiprocessing.set_sharing_strategy("file_system")],
    SEED: [lambda: torch.manual_seed(0)],
    "the level or the handlers of loggers": [
        lambda: logging.getLogger().setLevel(logging.CRITICAL),
        lambda: logging.getLogger().addHandler(logging.NullHandler()),
        lambda: logging.getLogger("tnxd.serving.server").setLevel(logging.CRITICAL),
        lambda: logging.getLogger("tnxd").addFilter(lambda record: False),
        silence_loggers,
    ],
    "the other loggers that are disabled": [disable_a_logger],
    "what logging disables": [logging.disable],
    "logging's errors": [set_attribute(logging, "raiseExceptions", not logging.raiseExceptions)],
    "signal handlers": [lambda: signal.signal(signal.SIGTERM, lambda *_: None)],
    "faulthandler": [lambda: faulthandler.disable() if faulthandler.is_enabled() else faulthandler.enable()],
    "the filters of warnings": [add_filter],
    "how warnings are shown": [lambda: setattr(warnings, "showwarning", print)],
    "the working directory": [lambda: os.chdir("/")],
    "the environment": [
        lambda: os.environ.update(OMP_NUM_THREADS="7"),
        lambda: os.environ.pop("PATH"),
        lambda: os.environ.update(PATH="/nowhere"),
    ],
    "the umask": [lambda: os.umask(0)],
    "limits of resources": [lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, _core_limit()))],
    "the processor affinity of the thread": [lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})],
    "sys.path": [lambda: sys.path.insert(0, "/nowhere"), lambda: setattr(sys, "path", ["/nowhere"])],
    "sys.argv": [lambda: sys.argv.append("--more")],
    "the recursion limit": [lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 1)],
    "the switch interval": [lambda: sys.setswitchinterval(0.5)],
    "sys.stdin": [set_attribute(sys, "stdin", None)],
    "sys.stdout": [set_attribute(sys, "stdout", None)],
    "sys.stderr": [set_attribute(sys, "stderr", None)],
    "sys.excepthook": [set_attribute(sys, "excepthook", print)],
    "sys.unraisablehook": [set_attribute(sys, "unraisablehook", print)],
    "sys.dont_write_bytecode": [set_attribute(sys, "dont_write_bytecode", not sys.dont_write_bytecode)],
    "threading.excepthook": [set_attribute(threading, "excepthook", print)],
    "the trace function": [lambda: sys.settrace(lambda *_: None)],
    "the profile function": [lambda: sys.setprofile(lambda *_: None)],
    "the stack size of threads": [lambda: threading.stack_size(1 << 20)],
    "the locale": [lambda: locale.setlocale(locale.LC_ALL, _another_locale())],
    "the default timeout of sockets": [lambda: socket.setdefaulttimeout(1.0)],
    "the garbage collector": [gc.disable],
    "the thresholds of the garbage collector": [lambda: gc.set_threshold(5)],
    "the debugging of the garbage collector": [lambda: gc.set_debug(gc.DEBUG_UNCOLLECTABLE)],
    "numpy's handling of floating-point errors": [lambda: np.seterr(all="raise")],
    "numpy's print options": [lambda: np.set_printoptions(precision=2)],
    "the start method of multiprocessing": [lambda: multiprocessing.set_start_method("spawn", force=True)],
}
DETAILED = ("the environment",)
"""Settings whose changes are told with details behind the name."""

UNTRIED = {  # of devices that this computer lacks, or with the effect of a setting above
    "CUDA's use of TF32",
    "the current CUDA device",
    "torch.backends.cudnn.fp32_precision",
    "torch.backends.cudnn.rnn.fp32_precision",
    "torch.backends.mkldnn.fp32_precision",
    "torch.backends.mkldnn.conv.fp32_precision",
    "torch.backends.mkldnn.rnn.fp32_precision",
}


def _core_limit() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if soft == 0:
        pytest.skip("core dumps are off already")
    return hard


def _another_engine() -> str:
    engines = set(backends.quantized.supported_engines) - {backends.quantized.engine, "none"}
    return engines.pop() if engines else pytest.skip("one engine alone")


def _another_locale() -> str:
    current = locale.setlocale(locale.LC_CTYPE)
    return "C" if current != "C" else "C.UTF-8"


def is_among(name: str, names: list[str]) -> bool:
    """True if a setting is among the changes that are told."""
    return any(each.startswith(name) if name in DETAILED else each == name for each in names)


HARMLESS = {setting.name for setting in SETTINGS if setting.harmless}
ALL = [(name, change) for name, changes in CHANGES.items() for change in changes]
IDS = [name for name, _ in ALL]


def state() -> dict[str, Any]:
    """Values of all settings, by name."""
    return {setting.name: read(setting) for setting in SETTINGS}


def in_own_thread(work: Callable[[], Any]) -> Any:
    """Outcome of work on a thread of its own, which ends then: no setting of that thread stays."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def complaint(forward: Callable[[], Any], times: int = 2) -> str:
    """Complaint about the side effects of a forward that is run several times."""
    detector = SideEffectDetector()
    for _ in range(times):
        with detector:
            forward()
    return detector.complaint()
