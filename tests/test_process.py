"""Changes of the process by code: each found, named and undone, and what is no change left alone."""

from __future__ import annotations

import faulthandler
import gc
import locale
import logging
import logging.config
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tnxd.models import process
from tnxd.models.formats import compiling
from tnxd.models.process import SEED, SETTINGS, Scope, Watch, Witness, settings_kept

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
"""Names with more behind them, in what is told."""

UNTRIED = {  # of what this computer lacks, or what has the effect of one above
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
    return any(each.startswith(name) if name in DETAILED else each == name for each in names)


HARMLESS = {setting.name for setting in SETTINGS if setting.harmless}
ALL = [(name, change) for name, changes in CHANGES.items() for change in changes]
IDS = [name for name, _ in ALL]


def state() -> dict[str, Any]:
    return {setting.name: process._read(setting) for setting in SETTINGS}


def in_own_thread(work: Callable[[], Any]) -> Any:
    """The outcome of work on a thread that ends then, so that nothing of it stays."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.fixture(autouse=True)
def _traced(request: pytest.FixtureRequest) -> None:
    if sys.gettrace() is not None:
        pytest.skip("a tracer is at work")


def test_every_setting_is_tried() -> None:
    names = {setting.name for setting in SETTINGS} | {SEED}
    assert names == CHANGES.keys() | UNTRIED
    assert len(names) == len(SETTINGS) + 1


@pytest.mark.parametrize(("name", "change"), ALL, ids=IDS)
def test_a_change_is_undone_and_named(name: str, change: Callable[[], Any]) -> None:
    before = state()
    with settings_kept("importing net.py") as changes:
        change()
    assert is_among(name, changes.names)
    assert changes.lasting == []
    after = state()
    assert {setting: value for setting, value in after.items() if process._differs(before[setting], value)} == {}
    assert any(name in note for note in changes.note()) == (name not in HARMLESS)


def test_what_changes_nothing_is_told_nothing_of() -> None:
    with settings_kept() as changes:
        torch.nn.Linear(3, 3)(torch.rand(2, 3))
        random.random()
        np.random.random()
        logging.getLogger("tnxd.new")
        with torch.inference_mode(), torch.autocast("cpu"), np.errstate(all="raise"), warnings.catch_warnings():
            pass
    assert changes.names == []
    assert changes.note() == ()


def test_what_is_changed_before_an_error_is_undone_too() -> None:
    with suppress(SystemExit), settings_kept() as changes:
        torch.set_default_dtype(torch.float64)
        sys.exit(1)
    assert torch.get_default_dtype() is torch.float32
    assert changes.names == ["torch's default dtype"]


def test_a_directory_that_is_gone_keeps_nothing_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "gone"
    place.mkdir()
    monkeypatch.chdir(place)
    place.rmdir()
    with settings_kept() as changes:
        torch.set_default_dtype(torch.float64)
    assert changes.names == ["torch's default dtype"]
    os.chdir(tmp_path)


def test_what_cannot_be_put_back_is_told() -> None:
    kept = signal.getsignal(signal.SIGUSR2)
    go, gone = threading.Event(), threading.Event()

    def import_elsewhere() -> process.Changes:
        with settings_kept("importing net.py") as changes:
            go.set()
            assert gone.wait(20)
        return changes

    try:
        with ThreadPoolExecutor(1) as pool:
            importing = pool.submit(import_elsewhere)
            assert go.wait(20)
            signal.signal(signal.SIGUSR2, lambda *_: None)
            gone.set()
            changes = importing.result()
    finally:
        signal.signal(signal.SIGUSR2, kept)
    assert changes.lasting == ["signal handlers"]
    assert changes.note() == ("importing net.py changed signal handlers, which could not be put back there",)


@pytest.mark.parametrize(
    ("seed", "draw"),
    [
        (torch.manual_seed, lambda: torch.rand(4).tolist()),
        (random.seed, lambda: [random.random() for _ in range(4)]),
        (np.random.seed, lambda: np.random.rand(4).tolist()),
    ],
    ids=["torch", "random", "numpy"],
)
def test_after_a_seed_numbers_are_unforeseeable_and_none_comes_twice(
    seed: Callable[[int], Any], draw: Callable[[], list[float]]
) -> None:
    drawn = []
    for _ in range(2):
        with settings_kept():
            seed(7)
            drawn.append(draw())  # a lane that samples meanwhile
        drawn.append(draw())
    assert drawn[0] == drawn[2]
    assert len({tuple(numbers) for numbers in drawn}) == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda: os.environ.update(OMP_NUM_THREADS="7"), "the environment variable OMP_NUM_THREADS"),
        (lambda: os.environ.pop("PATH"), "the environment variable PATH"),
        (lambda: os.environ.update(A="1", B="2"), "the environment variables A, B"),
        (
            lambda: os.environ.update({f"A{index}": "1" for index in range(9)}),
            "the environment variables A0, A1, A2 and 6 more",
        ),
    ],
)
def test_variables_are_named(change: Callable[[], Any], told: str) -> None:
    with settings_kept() as changes:
        change()
    assert changes.names == [told]
    with settings_kept():
        assert complaint(change) == f"a forward changes {told}, for all models of the process"


def test_what_torch_sets_for_itself_is_left_alone() -> None:
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_WARM_POOL")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    limit = sys.getrecursionlimit()
    try:
        with settings_kept() as changes:
            sys.setrecursionlimit(2000)
            for name in names:
                os.environ[name] = "/somewhere"
            os.environ["MORE"] = "1"
        assert changes.names == ["the environment variable MORE"]
        assert [os.environ[name] for name in names] == ["/somewhere"] * 3
        assert sys.getrecursionlimit() == 2000
    finally:
        sys.setrecursionlimit(limit)
        for name in names:
            del os.environ[name]
        os.environ.update(kept)


@pytest.mark.slow
@pytest.mark.skipif(bool(compiling.missing()), reason=compiling.missing())
@pytest.mark.filterwarnings("ignore")  # they are torch's own
def test_a_forward_may_compile() -> None:
    net = torch.nn.Linear(2, 2)
    x = torch.ones(1, 2)
    with settings_kept() as changes:
        assert complaint(lambda: torch.compile(net, dynamic=False)(x), times=3) == ""
    assert changes.names == []


def test_a_forward_may_use_the_start_method_of_the_system() -> None:
    """The first to use it settles it."""
    with settings_kept() as changes:
        assert complaint(lambda: multiprocessing.Lock()) == ""
    assert changes.names == []


def test_a_forward_may_have_a_data_loader_with_workers() -> None:
    assert complaint(lambda: list(torch.utils.data.DataLoader([1, 2], num_workers=1))) == ""


# --- forwards ------------------------------------------------------------------------------------------------


def complaint(forward: Callable[[], Any], times: int = 2) -> str:
    witness = Witness()
    for _ in range(times):
        with witness:
            forward()
    return witness.complaint()


@pytest.mark.parametrize(("name", "change"), ALL, ids=IDS)
def test_a_forward_that_changes_a_setting_each_time_is_found(name: str, change: Callable[[], Any]) -> None:
    with settings_kept():
        told = complaint(change)
    assert (name in told) == (name not in HARMLESS)


@pytest.mark.parametrize("forward", [lambda: random.seed(3), lambda: np.random.seed(3), lambda: torch.manual_seed(3)])
@pytest.mark.parametrize("draws", [lambda: None, lambda: (random.random(), np.random.random(), torch.rand(1))])
def test_a_forward_that_seeds_is_found(forward: Callable[[], Any], draws: Callable[[], Any]) -> None:
    assert "seed" in complaint(lambda: (forward(), draws()))


def test_a_forward_that_draws_is_left_alone() -> None:
    assert complaint(lambda: (random.random(), np.random.random(), torch.rand(3), torch.randperm(5)), times=5) == ""


def test_numbers_that_somebody_else_seeded_before_are_not_held_against_a_forward() -> None:
    witness = Witness()
    for _ in range(4):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        with witness:
            random.random()
            np.random.random()
            torch.rand(1)
    assert witness.complaint() == ""


def test_what_a_library_sets_up_at_its_first_use_is_left_alone() -> None:
    first = [True]

    def forward() -> None:
        if first.pop() if first else False:
            socket.setdefaulttimeout(3.0)

    with settings_kept():
        assert complaint(forward, times=3) == ""


def test_a_forward_that_cleans_up_is_left_alone() -> None:
    def forward() -> None:
        with torch.autocast("cpu"), torch.no_grad(), np.errstate(all="ignore"), torch.device("meta"):
            pass

    assert complaint(forward) == ""


def for_a_while_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_dtype(torch.float32)


def for_a_while_tensor_type() -> None:
    torch.set_default_tensor_type(torch.DoubleTensor)
    torch.set_default_tensor_type(torch.FloatTensor)


def for_a_while_torch() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)


def for_a_while_torch_state() -> None:
    state = torch.get_rng_state()
    torch.rand(1)
    torch.set_rng_state(state)


def for_a_while_python() -> None:
    state = random.getstate()
    random.seed(5)
    random.setstate(state)


def for_a_while_numpy() -> None:
    state = np.random.get_state()
    np.random.seed(5)
    np.random.set_state(state)


def for_a_while_in_another_namespace() -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(5)


FOR_A_WHILE = [
    (for_a_while_dtype, "torch's default dtype"),
    (for_a_while_tensor_type, "torch's default dtype"),
    (for_a_while_torch, SEED),
    (for_a_while_torch_state, SEED),
    (for_a_while_python, "the seed of Python's random numbers"),
    (for_a_while_numpy, "the seed of numpy's random numbers"),
    (for_a_while_in_another_namespace, SEED),
]


@pytest.mark.parametrize(("forward", "name"), FOR_A_WHILE)
@pytest.mark.filterwarnings("ignore:torch.set_default_tensor_type")
def test_a_forward_that_sets_what_all_share_for_a_while_is_found(forward: Callable[[], None], name: str) -> None:
    assert complaint(forward) == f"a forward sets {name}, if only for a while: other models run meanwhile"


def test_so_is_one_whose_module_has_a_name_of_its_own_for_it() -> None:
    module = ModuleType("tnxd_repository.net@1#0.net")
    exec(
        "import torch\nfrom torch import manual_seed as seed\n"
        "def forward():\n    with torch.random.fork_rng():\n        seed(5)",
        vars(module),
    )
    sys.modules[module.__name__] = module
    try:
        assert SEED in complaint(module.forward)
        assert module.seed is torch.manual_seed
    finally:
        del sys.modules[module.__name__]


def test_what_is_lasting_is_told_once() -> None:
    with settings_kept():
        told = complaint(lambda: (torch.set_default_dtype(torch.float64), for_a_while_python()))
    assert told == (
        "a forward changes torch's default dtype, for all models of the process; "
        "and sets the seed of Python's random numbers, if only for a while: other models run meanwhile"
    )


@pytest.mark.parametrize(
    "forward",
    [
        lambda: torch.rand(2, generator=torch.Generator().manual_seed(5)),
        lambda: random.Random(5).random(),
        lambda: np.random.RandomState(5).rand(2),
        lambda: np.random.default_rng(5).random(2),
        lambda: torch.get_rng_state(),
    ],
)
def test_generators_of_its_own_are_left_alone(forward: Callable[[], Any]) -> None:
    assert complaint(forward) == ""


def test_random_numbers_that_are_forked_and_not_seeded_are_left_alone() -> None:
    """Others may draw a number twice. They draw no foreseeable one."""

    def forward() -> None:
        with torch.random.fork_rng():
            torch.rand(1)

    assert complaint(forward) == ""


def test_what_other_threads_set_is_not_held_against_a_forward() -> None:
    def forward() -> None:
        in_own_thread(for_a_while_dtype)

    assert complaint(forward) == ""


def test_a_witness_leaves_all_functions_as_they_were() -> None:
    def functions() -> list[Any]:
        return [
            *(torch.manual_seed, torch.random.manual_seed, torch.set_rng_state, torch.set_default_dtype),
            *(random.seed, random.setstate, np.random.seed, np.random.set_state),
        ]

    before = functions()
    one, other = Witness(), Witness()
    for _ in range(2):
        with one, other:
            assert functions() != before
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        other.__exit__(None, None, None)
    assert all(now is kept for now, kept in zip(functions(), before, strict=True))


# --- while it serves -----------------------------------------------------------------------------------------

WATCHED = [(name, change) for name, change in ALL if name != SEED and name not in ("the filters of warnings",)]


@pytest.mark.parametrize(("name", "change"), WATCHED, ids=[name for name, _ in WATCHED])
def test_what_drifts_is_put_back_and_logged_once(
    name: str, change: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    with settings_kept():
        watch = Watch()
        assert watch.look() == []
        for _ in range(2):
            change()
            assert is_among(name, watch.look())
            assert watch.look() == []
    assert len([record for record in caplog.records if f"changed {name}" in record.getMessage()]) == 1


def test_only_what_concerns_a_thread_stays_on_it() -> None:
    """A change of PROCESS is seen on other threads, as `Scope` says."""
    scopes = {setting.name: setting.scope for setting in SETTINGS}
    for name in ("torch's default dtype", "cuDNN's benchmarking", "sys.path", "the locale", "the umask"):
        assert scopes[name] is Scope.PROCESS
    setting = next(each for each in SETTINGS if each.name == "torch's default device or function modes")
    assert setting.scope is Scope.THREAD
    before = setting.read()
    with settings_kept():
        torch.set_default_device("meta")
        assert in_own_thread(setting.read) == before


def test_what_is_put_back_can_be_read_by_torch() -> None:
    """torch.export asks for it, and refuses to work where conv and rnn were set apart from each other."""
    with process.settings_kept():
        backends.cudnn.allow_tf32 = False
    assert backends.cudnn.allow_tf32
    with process.settings_kept():
        backends.cudnn.conv.fp32_precision = "ieee"
    assert backends.cudnn.allow_tf32
