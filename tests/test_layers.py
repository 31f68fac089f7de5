"""The structure that the design promises, read from the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("tnxd/**/*.py"), *ROOT.glob("tnxctl/**/*.py")])


def imports(path: Path, *, typing_too: bool = False) -> Iterator[str]:
    """Dotted names that a file imports at run time, inside functions too.

    Args:
        typing_too: under TYPE_CHECKING, too.
    """
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing_too
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def users(package: str) -> set[str]:
    """Files that import a package."""
    return {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }


def test_torch_is_used_by_executors_and_models_alone() -> None:
    found = users("torch")
    assert found
    assert all(path.startswith(("tnxd/executors/", "tnxd/models/")) for path in found), found


def test_the_daemon_knows_the_protocol_and_the_errors_of_the_client() -> None:
    allowed = {"tnxctl", "tnxctl.protocol.wire", "tnxctl.protocol.frames", "tnxctl.protocol.errors"}
    for path in SOURCES:
        if path.is_relative_to(ROOT / "tnxd"):
            used = {name for name in imports(path) if name == "tnxctl" or name.startswith("tnxctl.")}
            modules = {name for name in used if (ROOT / (name.replace(".", "/") + ".py")).exists() or name == "tnxctl"}
            assert modules <= allowed, (path, modules)


def test_the_client_does_not_know_the_daemon() -> None:
    assert not {path for path in users("tnxd") if path.startswith("tnxctl/")}


ABOVE = ("tnxd.scheduling", "tnxd.serving", "tnxd.deployment", "tnxd.transport")
"""Rooms that decide and talk; executors and models do neither."""


@pytest.mark.parametrize(
    ("room", "forbidden"), [("tnxd/executors", ABOVE), ("tnxd/models", (*ABOVE, "tnxd.executors"))]
)
def test_executors_and_models_import_nothing_of_the_rooms_above_them(room: str, forbidden: tuple[str, ...]) -> None:
    paths = [path for path in SOURCES if path.is_relative_to(ROOT / room)]
    assert paths
    for path in paths:
        found = {
            name
            for name in imports(path, typing_too=True)
            if any(name == other or name.startswith(other + ".") for other in forbidden)
        }
        assert not found, (path, found)


def decisions_by_name(path: Path) -> list[int]:
    """Lines that compare with the name of a kind of device, or with what it begins with."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        compared: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            compared = node.args
        if any(isinstance(each, ast.Constant) and each.value in ("cpu", "cuda", "cuda:") for each in compared):
            lines.append(node.lineno)
    return lines


def test_kinds_of_devices_are_told_apart_by_their_properties() -> None:
    assert not {str(path.relative_to(ROOT)) for path in SOURCES if decisions_by_name(path)}


def test_cuda_is_known_to_its_executor_and_to_the_settings_of_torch_alone() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and (node.attr == "is_cuda" or ast.unparse(node) == "torch.cuda")
    }
    assert {path for path in found if not path.startswith("tnxd/models/process_state/")} == {"tnxd/executors/cuda.py"}


# --- rooms of transport and of the process -------------------------------------------------------------------


def imports_of_room(room: str) -> set[str]:
    """Dotted names that the files of a room import, those for type checking alone included."""
    paths = [path for path in SOURCES if path.is_relative_to(ROOT / room)]
    assert paths, room
    return {name for path in paths for name in imports(path, typing_too=True)}


def test_no_import_is_relative() -> None:
    """The rules read absolute names."""
    nodes = [(path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    assert not [path for path, node in nodes if isinstance(node, ast.ImportFrom) and node.level]


def test_zeromq_is_known_to_the_transport_room_alone() -> None:
    found = {path for path in users("zmq") if path.startswith("tnxd/")}
    assert found
    assert all(path.startswith("tnxd/transport/") for path in found), found


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("tnxd/transport", {"tnxd.transport", "tnxd.config", "tnxctl.protocol"}),
        ("tnxd/process", {"tnxd.process"}),
    ],
)
def test_room_imports_nothing_of_other_rooms(room: str, allowed: set[str]) -> None:
    own = {name for name in imports_of_room(room) if name.partition(".")[0] in ("tnxd", "tnxctl")}
    packages = {"tnxd", "tnxctl"} | {name.rpartition(".")[0] for name in allowed}  # as in `from tnxd import files`
    foreign = {
        name
        for name in own - packages
        if not any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)
    }
    assert not foreign, foreign


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        (
            "tnxd.scheduling.scheduler",
            ["torch", "zmq", "threading", "tnxd.serving.server", "tnxd.executors", "tnxd.transport.router"],
        ),
        ("tnxd.scheduling.costs", ["torch", "zmq", "threading"]),
        ("tnxd.serving.server", ["torch"]),
        ("tnxd.executors.batching", ["torch", "zmq"]),
        ("tnxd.executors.execution", ["torch", "zmq", *ABOVE]),
        ("tnxctl.protocol.wire", ["zmq", "torch", "asyncio", "tnxctl.protocol.frames"]),
        ("tnxctl.client", ["torch", "asyncio", "tnxctl.protocol.frames"]),
        ("tnxctl.session", ["zmq", "torch", "asyncio", "tnxctl.protocol.frames"]),
    ],
)
def test_importing_a_module_brings_nothing_of_another_layer(module: str, forbidden: list[str]) -> None:
    code = (
        f"import sys; before = set(sys.modules); import numpy, msgspec; before |= set(sys.modules); import {module};"
        f"print([name for name in {forbidden} if name in sys.modules and name not in before])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"


# --- rooms of the client -------------------------------------------------------------------------------------

SANS_IO = ("call", "connection", "encoder", "failures", "session", "throttling", "windows")
"""Modules of the client that are pure: what they do depends on their arguments alone."""

TRANSPORTS = ("driver", "link", "process", "wakeups")
"""Modules of the client that move messages or wait."""


def client_imports(*folders: str, apart_from: str = "-") -> dict[str, set[str]]:
    """Modules of the client that the files in a folder of it import, by file."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / "tnxctl").glob(folder)):
            name = str(path.relative_to(ROOT))
            if not name.startswith(f"tnxctl/{apart_from}"):
                found[name] = {used for used in imports(path) if used == "tnxctl" or used.startswith("tnxctl.")}
    assert found
    return found


def test_the_protocol_imports_nothing_else_of_the_client() -> None:
    for path, used in client_imports("protocol/*.py").items():
        assert all(name.startswith("tnxctl.protocol") for name in used), path


@pytest.mark.parametrize("module", SANS_IO)
def test_calls_and_connections_are_without_io(module: str) -> None:
    forbidden = {"asyncio", "os", "select", "socket", "threading", "time", "zmq", *(f"tnxctl.{m}" for m in TRANSPORTS)}
    used = set(imports(ROOT / "tnxctl" / f"{module}.py"))
    assert not {name for name in used if name in forbidden or name.partition(".")[0] in forbidden}


def test_commands_use_the_clients_and_not_their_parts() -> None:
    parts = {f"tnxctl.{module}" for module in (*SANS_IO, *TRANSPORTS)}
    for path, used in client_imports("cli/**/*.py", apart_from="cli/bench/").items():
        assert not used & parts, path


def test_of_the_benchmark_one_file_uses_parts_of_the_client() -> None:
    parts = {f"tnxctl.{module}" for module in (*SANS_IO, *TRANSPORTS)}
    assert {path for path, used in client_imports("cli/bench/*.py").items() if used & parts} == {
        "tnxctl/cli/bench/loops.py"
    }


def test_the_library_does_not_know_the_tool() -> None:
    for path, used in client_imports("*.py", "protocol/*.py").items():
        assert not {name for name in used if name == "tnxctl.cli" or name.startswith("tnxctl.cli.")}, path


@pytest.mark.parametrize("half", ["tnxctl", "tnxd"])
def test_no_module_imports_itself_in_a_circle(half: str) -> None:
    """Not even for type checkers."""
    modules = {}
    for path in sorted((ROOT / half).glob("**/*.py")):
        modules[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    left = {module: set(imports(path, typing_too=True)) & modules.keys() - {module} for module, path in modules.items()}
    for module, used in left.items():  # an import of a module names its package, too, which is no use of that
        left[module] = {name for name in used if not any(other.startswith(f"{name}.") for other in used | {module})}
    while done := {module for module, used in left.items() if not used & left.keys()}:
        for module in done:
            del left[module]
    assert not left


# --- scheduling ----------------------------------------------------------------------------------------------


def test_scheduling_is_pure() -> None:
    """No tensor, thread, clock, socket or log: whoever calls it tells it the time and does what it says."""
    sources = [path for path in SOURCES if path.is_relative_to(ROOT / "tnxd/scheduling")]
    assert sources
    impure = {"torch", "zmq", "threading", "time", "logging", "numpy"}
    allowed = ("tnxd.scheduling.", "tnxd.lanes.", "tnxd.device_kinds.", "tnxctl.protocol.")
    for path in sources:
        for name in imports(path):
            assert name.split(".")[0] not in impure, (path, name)
            if name.split(".")[0] in {"tnxd", "tnxctl"}:
                assert f"{name}.".startswith(allowed), (path, name)


def test_deployment_does_not_know_the_serving_loop() -> None:
    assert not {path for path in users("tnxd.serving") if path.startswith("tnxd/deployment/")}


def test_a_repository_does_not_know_the_formats() -> None:
    assert "tnxd/models/repository.py" not in users("tnxd.models.formats")


def test_a_plan_knows_the_registry_and_its_versions_alone() -> None:
    modules = {name for name in imports(ROOT / "tnxd/deployment/plan.py") if (ROOT / as_path(name)).exists()}
    assert modules == {"tnxd.deployment.registry", "tnxd.deployment.version"}


def as_path(module: str) -> str:
    return module.replace(".", "/") + ".py"
