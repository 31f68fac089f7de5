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


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports at run time, inside functions too."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
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


def test_one_file_of_the_daemon_knows_zeromq() -> None:
    assert {path for path in users("zmq") if path.startswith("tnxd/")} == {"tnxd/transport/router.py"}


def test_the_daemon_knows_the_protocol_and_the_errors_of_the_client() -> None:
    allowed = {"tnxctl", "tnxctl.protocol.wire", "tnxctl.protocol.frames", "tnxctl.protocol.errors"}
    for path in SOURCES:
        if path.is_relative_to(ROOT / "tnxd"):
            used = {name for name in imports(path) if name == "tnxctl" or name.startswith("tnxctl.")}
            modules = {name for name in used if (ROOT / (name.replace(".", "/") + ".py")).exists() or name == "tnxctl"}
            assert modules <= allowed, (path, modules)


def test_the_client_does_not_know_the_daemon() -> None:
    assert not {path for path in users("tnxd") if path.startswith("tnxctl/")}


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


def test_deployment_does_not_know_the_serving_loop() -> None:
    assert not {path for path in users("tnxd.serving") if path.startswith("tnxd/deployment/")}


def test_a_repository_does_not_know_the_formats() -> None:
    assert "tnxd/models/repository.py" not in users("tnxd.models.formats")


def test_a_plan_knows_the_registry_and_its_versions_alone() -> None:
    modules = {name for name in imports(ROOT / "tnxd/deployment/plan.py") if (ROOT / as_path(name)).exists()}
    assert modules == {"tnxd.deployment.registry", "tnxd.deployment.version"}


def as_path(module: str) -> str:
    return module.replace(".", "/") + ".py"
