"""Structure of the code: one rule for each room about what it may import, and no imports in a circle.

Imports inside functions count, and those for type checkers alone. `ROOMS` has the rules of the table in
docs/architecture.md, `MODULES` those of some modules within a room. `PLANTED` breaks each of them once.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for half in ("tnxctl", "tnxd")
    for path in sorted((ROOT / half).rglob("*.py"))
}
"""Modules of both halves, and where they are."""

SOURCES = {module: path.read_text() for module, path in PATHS.items()}


@dataclass(frozen=True)
class Rule:
    """Rule about the imports of a room, or of one module.

    Attributes:
        may: rooms and modules of ours that it may import; the modules of a room may also import each other.
        never: packages and modules that it never imports, ours or not.
    """

    may: frozenset[str]
    never: frozenset[str] = frozenset()


def rule(*may: str, never: tuple[str, ...] = ()) -> Rule:
    return Rule(frozenset(may), frozenset(never))


VERSION = "tnxctl:__version__"

MALLOC = "tnxctl.malloc"

SANS_IO = tuple(
    f"tnxctl.{module}"
    for module in (
        "backoff",
        "balancer",
        "call",
        "connection",
        "encoder",
        "endpoints",
        "failures",
        "hedging",
        "request_windows",
        "resending",
        "session",
        "throttling",
        "waiting",
    )
)
"""Modules of the client that are pure: but for the random part of waits, all depends on their arguments alone."""

MOVERS = tuple(
    f"tnxctl.{module}"
    for module in ("driver", "handshakes", "link", "links", "loop_driver", "process", "sessions", "sharing", "wakeups")
)
"""Modules of the client that move messages or wait, and what puts them together."""

IO = ("asyncio", "os", "select", "socket", "threading", "time", "zmq")

NETWORK = frozenset({"asyncio", "select", "socket", "zmq"})
"""Modules that reach other processes. ZeroMQ is also what makes keys."""

FLOOR = tuple(f"tnxd.{module}" for module in ("advice", "device_kinds", "error_text", "events", "lanes"))
"""Modules of the daemon that stand below every room, and know none."""

ROOMS = {
    "tnxctl.protocol": rule(never=("torch", *IO)),
    "tnxctl.files": rule("tnxctl.protocol", never=("torch", *NETWORK)),
    "tnxctl.keys": rule("tnxctl.protocol", "tnxctl.files", never=("torch", *(NETWORK - {"zmq"}))),
    "tnxctl.channels": rule("tnxctl.keys", never=("asyncio", "torch")),
    "tnxctl": rule("tnxctl.protocol", "tnxctl.keys", "tnxctl.channels", never=("click", "torch")),
    "tnxctl.bridge": rule(
        "tnxctl.protocol", "tnxctl.files", "tnxctl.keys", "tnxctl", never=("click", "torch", *SANS_IO, *MOVERS)
    ),
    "tnxctl.cli": rule(
        "tnxctl.protocol",
        "tnxctl.keys",
        "tnxctl",
        "tnxctl.bridge",
        "tnxctl.cli.bench",
        never=("torch", *SANS_IO, *MOVERS),
    ),
    "tnxctl.cli.bench": rule(
        "tnxctl.protocol", "tnxctl", "tnxctl.cli", "tnxctl.cli.bench.loops", never=("torch", *SANS_IO, *MOVERS)
    ),
    "tnxctl.cli.bench.loops": rule(
        "tnxctl.protocol",
        "tnxctl.keys",
        "tnxctl.channels",
        "tnxctl",
        "tnxctl.cli",
        "tnxctl.cli.bench",
        never=("torch",),
    ),
    "tnxd.process": rule("tnxd.events", never=("torch", "zmq")),
    "tnxd.models": rule("tnxctl.protocol", "tnxctl.files", *FLOOR, never=("zmq",)),
    "tnxd.executors": rule(
        "tnxctl.protocol", MALLOC, *FLOOR, "tnxd.config", "tnxd.models", "tnxd.process", never=("zmq",)
    ),
    "tnxd.scheduling": rule(
        "tnxctl.protocol", "tnxd.device_kinds", "tnxd.lanes", never=("logging", "numpy", "torch", *IO)
    ),
    "tnxd.transport": rule(
        "tnxctl.protocol", "tnxctl.keys", "tnxctl.descriptors", "tnxd.config", "tnxd.events", never=("torch",)
    ),
    "tnxd.deployment": rule(
        "tnxctl.protocol",
        *FLOOR,
        "tnxd.models",
        "tnxd.executors.execution",
        "tnxd.scheduling",
        never=("socket", "torch", "zmq"),
    ),
    "tnxd.tracing": rule("tnxctl.protocol", VERSION, "tnxd.events", never=("torch", "zmq")),
    "tnxd.recording": rule("tnxctl.protocol", "tnxd.events", never=("torch", *NETWORK)),
    "tnxd.serving": rule(
        "tnxctl.protocol",
        VERSION,
        MALLOC,
        *FLOOR,
        "tnxd.models",
        "tnxd.executors.execution",
        "tnxd.scheduling",
        "tnxd.transport",
        "tnxd.deployment",
        "tnxd.recording",
        "tnxd.process",
        "tnxd.tracing",
        never=("torch", "zmq"),
    ),
    "tnxd": rule(
        "tnxctl.protocol",
        "tnxctl.files",
        "tnxctl.keys",
        VERSION,
        MALLOC,
        "tnxd.process",
        "tnxd.models",
        "tnxd.executors",
        "tnxd.scheduling",
        "tnxd.transport",
        "tnxd.deployment",
        "tnxd.recording",
        "tnxd.serving",
        "tnxd.tracing",
        never=("torch", "zmq"),
    ),
}
"""Rules by room. A room is a folder, without what has a rule of its own: loops.py alone uses parts of the client."""

MODULES = {
    **{
        module: rule("tnxctl", "tnxctl.protocol", "tnxctl.keys.credentials", never=(*IO, *MOVERS)) for module in SANS_IO
    },
    **{module: rule("tnxctl.protocol", *FLOOR) for module in FLOOR},
    "tnxctl.statistics": rule("tnxctl.protocol", never=IO),
    "tnxd.deployment.plan": rule("tnxctl.protocol", "tnxd.deployment.registry", "tnxd.deployment.version"),
    "tnxd.executors.execution": rule("tnxctl.protocol", *FLOOR, "tnxd.models", never=("torch",)),
    "tnxd.models.repository": rule("tnxctl.protocol", *FLOOR, "tnxd.models", never=("tnxd.models.formats", "torch")),
}
"""Rules of single modules, beside that of their room."""

PLANTED = [
    ("tnxctl.protocol", "tnxctl.protocol.wire", "import tnxctl.endpoint"),
    ("tnxctl.protocol", "tnxctl.protocol.frames", "import socket"),
    ("tnxctl.files", "tnxctl.files.writing", "from tnxctl.keys import pairs"),
    ("tnxctl.files", "tnxctl.files.reading", "import zmq"),
    ("tnxctl.keys", "tnxctl.keys.authorized", "from tnxctl import endpoint"),
    ("tnxctl.keys", "tnxctl.keys.pairs", "import socket"),
    ("tnxctl.channels", "tnxctl.channels.stream", "from tnxctl.protocol import wire"),
    ("tnxctl.channels", "tnxctl.channels.zmtp", "import asyncio"),
    ("tnxctl", "tnxctl.client", "from tnxctl.cli import output"),
    ("tnxctl", "tnxctl.driver", "from tnxd import config"),
    ("tnxctl", "tnxctl.results", "import torch"),
    ("tnxctl.bridge", "tnxctl.bridge.bridge", "from tnxctl.session import Session"),
    ("tnxctl.cli", "tnxctl.cli.predict", "from tnxctl.session import Session"),
    ("tnxctl.cli", "tnxctl.cli.models", "import tnxd.models.repository"),
    ("tnxctl.cli.bench", "tnxctl.cli.bench.runs", "from tnxctl import driver"),
    ("tnxctl.cli.bench.loops", "tnxctl.cli.bench.loops", "import torch"),
    ("tnxd.process", "tnxd.process.logs", "from tnxctl.files import reading"),
    ("tnxd.models", "tnxd.models.formats.onnx", "from tnxd.executors.execution import Execution"),
    ("tnxd.models", "tnxd.models.model", "import tnxd.config"),
    ("tnxd.executors", "tnxd.executors.trial.rows", "from tnxd.scheduling.costs import CostModel"),
    ("tnxd.executors", "tnxd.executors.lane", "from tnxctl import Client"),
    ("tnxd.scheduling", "tnxd.scheduling.costs", "from time import monotonic"),
    ("tnxd.scheduling", "tnxd.scheduling.device", "from tnxd.models import Model"),
    ("tnxd.transport", "tnxd.transport.router", "from tnxd.scheduling.request import Request"),
    ("tnxd.transport", "tnxd.transport.outbox", "import torch"),
    ("tnxd.deployment", "tnxd.deployment.reconciler", "from tnxd.serving import reports"),
    ("tnxd.deployment", "tnxd.deployment.shadow", "from tnxd.executors.pool import LanePool"),
    ("tnxd.recording", "tnxd.recording.recorder", "from tnxd.config import Config"),
    ("tnxd.recording", "tnxd.recording.recording", "import zmq"),
    ("tnxd.serving", "tnxd.serving.server", "import torch.cuda"),
    ("tnxd.serving", "tnxd.serving.control_plane", "from tnxd import daemon"),
    ("tnxd.tracing", "tnxd.tracing.spans", "from tnxd.executors.execution import Execution"),
    ("tnxd", "tnxd.daemon", "import zmq"),
    ("tnxd", "tnxd.cli", "from tnxctl import Client"),
    *[(module, module, "import time") for module in SANS_IO],
    *[(module, module, "from tnxctl import link") for module in SANS_IO],
    *[(module, module, "import tnxd.models.model") for module in FLOOR],
    ("tnxctl.statistics", "tnxctl.statistics", "from time import monotonic"),
    ("tnxd.deployment.plan", "tnxd.deployment.plan", "from tnxd.deployment import reconciler"),
    ("tnxd.executors.execution", "tnxd.executors.execution", "import torch"),
    ("tnxd.models.repository", "tnxd.models.repository", "from tnxd.models.formats import opening"),
]
"""Imports that break a rule: whose rule, where they are planted, and the statement."""


def room_of(name: str) -> str:
    """Room that a module belongs to; "" for a package that is not ours."""
    while name and name not in ROOMS:
        name = name.rpartition(".")[0]
    return name


@functools.cache
def imports(source: str) -> tuple[str, ...]:
    """Modules that a source imports, as "package.module", or "package.module:name" for a name in one."""
    return tuple(_imports(ast.parse(source)))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "the rules read absolute names"
            assert not node.level, "the rules read absolute names"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in PATHS else f"{node.module}:{alias.name}"


def breaches(owner: str, sources: Mapping[str, str]) -> list[str]:
    """Imports that break the rule of a room, or of a module."""
    is_room = owner in ROOMS
    rule = ROOMS[owner] if is_room else MODULES[owner]
    found = []
    for module, source in sources.items():
        if (room_of(module) if is_room else module) != owner:
            continue
        for name in imports(source):
            target = name.partition(":")[0]
            room = room_of(target)
            is_own = is_room and room == owner
            if any(f"{target}.".startswith(f"{other}.") for other in rule.never) or (
                room and not is_own and not {name, target, room} & rule.may
            ):
                found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize("owner", [*ROOMS, *MODULES])
def test_rule_is_kept(owner: str) -> None:
    assert owner in ROOMS or owner in PATHS
    assert breaches(owner, SOURCES) == []


@pytest.mark.parametrize(("owner", "module", "statement"), PLANTED)
def test_planted_import_breaks_a_rule(owner: str, module: str, statement: str) -> None:
    source = f"{SOURCES[module]}\n\ndef planted() -> None:\n    {statement}\n"
    assert len(breaches(owner, {**SOURCES, module: source})) == 1


def test_every_rule_is_broken_by_a_planted_import() -> None:
    assert {owner for owner, _, _ in PLANTED} == {*ROOMS, *MODULES}


def test_every_folder_is_a_room_or_within_one() -> None:
    """A folder of its own beside the rooms needs a rule; below a room, it has that of the room."""
    folders = {
        f"{half}.{path.name}" for half in ("tnxctl", "tnxd") for path in (ROOT / half).iterdir() if path.is_dir()
    }
    assert {folder for folder in folders if not folder.endswith("__pycache__")} <= {*ROOMS}


# --- circles -------------------------------------------------------------------------------------------------


def circles(sources: Mapping[str, str]) -> set[frozenset[str]]:
    """Sets of modules that import each other, directly or not."""
    used = {
        module: {name.partition(":")[0] for name in imports(source)} & sources.keys() - {module}
        for module, source in sources.items()
    }
    reached = {}
    for module in used:
        seen: set[str] = set()
        left = [module]
        while left:
            new = used[left.pop()] - seen
            seen |= new
            left += new
        reached[module] = seen
    return {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in used
        if module in reached[module]
    }


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(SOURCES) == set()


def test_planted_circle_is_found() -> None:
    first, second = "tnxd.scheduling.scheduler", "tnxd.scheduling.costs"
    source = f"{SOURCES[second]}\n\ndef planted() -> None:\n    from {first} import Scheduler\n"
    (found,) = circles({**SOURCES, second: source})
    assert {first, second} <= found


# --- what an import brings with it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        (
            "tnxd.scheduling.scheduler",
            ("torch", "zmq", "threading", "tnxd.serving", "tnxd.executors", "tnxd.transport"),
        ),
        ("tnxd.scheduling.costs", ("torch", "zmq", "threading")),
        ("tnxd.serving.server", ("torch",)),
        ("tnxd.executors.batching", ("torch", "zmq")),
        (
            "tnxd.executors.execution",
            ("torch", "zmq", "tnxd.scheduling", "tnxd.serving", "tnxd.deployment", "tnxd.transport"),
        ),
        ("tnxctl.protocol.wire", ("zmq", "torch", "asyncio", "tnxctl.protocol.frames")),
        ("tnxctl.keys.authorized", ("zmq", "torch", "asyncio", "tnxctl.protocol.frames")),
        ("tnxctl.client", ("torch", "asyncio", "tnxctl.protocol.frames")),
        ("tnxctl.session", ("zmq", "torch", "asyncio", "tnxctl.protocol.frames")),
    ],
)
def test_importing_a_module_brings_nothing_of_another_layer(module: str, forbidden: tuple[str, ...]) -> None:
    code = (
        f"import sys; before = set(sys.modules); import numpy, msgspec; before |= set(sys.modules); import {module};"
        f"print([name for name in {forbidden} if name in sys.modules and name not in before])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"


# --- kinds of devices ----------------------------------------------------------------------------------------


def decisions_by_name(source: str) -> list[int]:
    """Lines that compare with the name of a kind of device, or with what it begins with."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        compared: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            compared = node.args
        if any(isinstance(each, ast.Constant) and each.value in ("cpu", "cuda", "cuda:") for each in compared):
            lines.append(node.lineno)
    return lines


def test_kinds_of_devices_are_told_apart_by_their_properties() -> None:
    assert not {module for module, source in SOURCES.items() if decisions_by_name(source)}


def test_cuda_is_known_to_its_executor_and_to_the_settings_of_torch_alone() -> None:
    found = {
        module
        for module, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and (node.attr == "is_cuda" or ast.unparse(node) == "torch.cuda")
    }
    assert {module for module in found if "process_state" not in module} == {"tnxd.executors.cuda"}


@pytest.mark.parametrize("condition", ['device == "cpu"', '"cuda" != device.type', 'device.name.startswith("cuda:")'])
def test_decision_by_the_name_of_a_kind_is_found(condition: str) -> None:
    assert decisions_by_name(f"if {condition}:\n    pass\n") == [1]
