"""Installations: requirements and their pins, the unit, the commented configuration."""

from __future__ import annotations

import configparser
import http.server
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tnxctl.bridge.settings import HttpLimits
from tnxd.config import Config, load

SOURCE = Path(__file__).parent.parent
UNIT = SOURCE / "systemd/tensornext.service"
BRIDGE = SOURCE / "systemd/tensornext-http.service"
CONFIG = SOURCE / "systemd/tnxd.toml"

MOST_EXPOSURE = 1.5
"""Most exposure, of 10, as `systemd-analyze security` counts."""


OF_CUDA = re.compile(r"(cuda|nvidia)-|triton$")
"""Packages that a build of torch for CUDA brings along, in the versions that it was built with."""


def pins() -> dict[str, str]:
    """Version of each package in constraints.txt, by normalized name."""
    lines = (line for line in (SOURCE / "constraints.txt").read_text().splitlines() if line and line[0] != "#")
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def needed(package: str, extras: set[str]) -> dict[str, list[Requirement]]:
    """Requirements that `package[extras]` brings along on this computer, without CUDA: by name, what is asked of it."""
    found: dict[str, list[Requirement]] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(package, extra) for extra in {"", *extras}]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # only installed with an extra that this environment was made without
            continue
        for requirement in map(Requirement, lines):
            if OF_CUDA.match(canonicalize_name(requirement.name)):
                continue
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
                waiting += [(requirement.name, other) for other in {"", *requirement.extras}]
    return found


def sections(unit: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    return parser


def test_the_client_needs_no_torch() -> None:
    assert "torch" not in needed("tensornext", set())
    assert "torch" in needed("tensornext", {"daemon"})


def test_every_package_that_is_installed_is_pinned() -> None:
    versions = pins()
    for name, requirements in needed("tensornext", {"daemon", "http", "grpc", "bench", "test", "check"}).items():
        assert name in versions, f"{name} is missing in constraints.txt"
        for requirement in requirements:
            assert requirement.specifier.contains(versions[name]), f"{requirement}, but {versions[name]} is pinned"


def test_what_a_build_of_torch_for_cuda_brings_need_not_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"tensornext": ["torch"], "torch": ["filelock", "nvidia-nccl-cu13==2.29.7", "cuda-bindings<14", "triton"]}
    monkeypatch.setitem(globals(), "requires", lambda name: asked.get(name, []))
    assert set(needed("tensornext", set())) == {"torch", "filelock"}


def test_no_package_is_pinned_twice() -> None:
    names = [line.partition("==")[0] for line in (SOURCE / "constraints.txt").read_text().splitlines() if "==" in line]
    assert sorted(set(names)) == sorted(names)


def test_every_package_of_the_examples_is_pinned() -> None:
    lines = (SOURCE / "examples/requirements.txt").read_text().splitlines()
    assert {canonicalize_name(line) for line in lines if line and line[0] != "#"} <= pins().keys()


def build(kind: str, source: Path, target: Path) -> Path:
    """The "sdist" or "wheel" that pip and other tools would build of that source tree, without asking an index."""
    program = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    target.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", program, target], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = target.iterdir()
    return built


def test_sdist_and_wheel_hold_the_packages_as_they_are_and_no_tests(tmp_path: Path) -> None:
    packages = ("tnxctl", "tnxd")
    for name in packages:
        shutil.copytree(SOURCE / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(SOURCE / name, tmp_path / "source")
    (tmp_path / "source/tests").mkdir()
    shutil.copy(__file__, tmp_path / "source/tests")
    files = {
        str(path.relative_to(tmp_path / "source"))
        for name in packages
        for path in (tmp_path / "source" / name).rglob("*")
        if path.is_file()
    }
    sdist = build("sdist", tmp_path / "source", tmp_path / "sdist")
    subprocess.run(["tar", "-xf", sdist, "-C", tmp_path / "sdist"], check=True)
    unpacked = tmp_path / "sdist" / sdist.name.removesuffix(".tar.gz")
    assert not (unpacked / "tests").exists()
    # What an earlier build left, of a module that has been deleted since.
    (unpacked / "build/lib/tnxd").mkdir(parents=True)
    (unpacked / "build/lib/tnxd/deleted.py").write_text("")
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path / "wheel")) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == files


def test_every_build_tool_is_pinned() -> None:
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())
    for requirement in map(Requirement, project["build-system"]["requires"]):
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


@pytest.fixture
def torch_build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that `make` and install.sh ask for pip's options."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # nothing is written beside install.sh
    spec = importlib.util.spec_from_file_location("torch_build", SOURCE / "systemd/torch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "REACH_SECONDS", 60)
    return module


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """An index of builds that can be reached."""
    (tmp_path / "index/torch").mkdir(parents=True)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "index"))
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


def test_a_machine_without_a_gpu_gets_torch_without_cuda(
    torch_build: ModuleType, index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_build, "DEVICE_FILES", tmp_path)
    options, said = torch_build.options("", index)
    assert options == ["--extra-index-url", index]
    assert "no NVIDIA GPU" in said
    assert "TORCH=cuda" in said
    (tmp_path / "nvidiactl").touch()
    options, said = torch_build.options("", index)
    assert options == []
    assert "TORCH=cpu" in said
    assert torch_build.options("cpu", index)[0] == ["--extra-index-url", index]


def test_torch_is_left_to_pip_where_its_index_cannot_be_reached(torch_build: ModuleType, index: str) -> None:
    options, said = torch_build.options("cpu", f"{index}/nowhere")
    assert options == []
    assert "cannot be reached" in said
    assert torch_build.options("cpu", "nonsense")[0] == []
    assert torch_build.options("cuda", index)[0] == []


def test_a_build_of_torch_that_does_not_exist_is_refused(torch_build: ModuleType, index: str) -> None:
    with pytest.raises(SystemExit, match="TORCH=rocm: it is cpu or cuda"):
        torch_build.options("rocm", index)


def test_a_daemon_without_torch_names_the_command_that_brings_it() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; from tnxd.cli import main; main(['--bind', 'tcp://127.0.0.1:*'])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=SOURCE, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"not installed: {shlex.quote(sys.executable)} -m pip install torch safetensors" in done.stderr


@pytest.mark.parametrize("unit", [UNIT, BRIDGE], ids=lambda unit: unit.stem)
def test_the_unit_is_hardened(unit: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    threshold = f"--threshold={round(MOST_EXPOSURE * 10)}"
    rating = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--offline=true", threshold, unit], capture_output=True, text=True
    )
    assert rating.returncode == 0, rating.stdout + rating.stderr


@pytest.mark.parametrize("unit", [UNIT, BRIDGE], ids=lambda unit: unit.stem)
def test_the_unit_has_no_mistakes(unit: Path, tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    installed = tmp_path / unit.name
    # The commands exist only once they are installed.
    installed.write_text(re.sub(r"(?m)^(Exec\w+)=\S+", rf"\1={sys.executable}", unit.read_text()))
    verdict = subprocess.run(["systemd-analyze", "verify", installed], capture_output=True, text=True)
    assert (verdict.returncode, verdict.stdout + verdict.stderr) == (0, "")


def test_systemd_waits_longer_than_the_drain_takes() -> None:
    for unit, drain_timeout_s in ((UNIT, Config().drain_timeout_s), (BRIDGE, HttpLimits().drain_timeout_s)):
        assert float(sections(unit)["Service"]["TimeoutStopSec"].removesuffix("s")) > drain_timeout_s


def test_the_installed_configuration_changes_nothing() -> None:
    assert load(CONFIG, {}) == Config()


def test_the_installed_configuration_shows_every_key_with_its_default() -> None:
    uncommented = re.sub(r"(?m)^# (\w+ = )", r"\1", CONFIG.read_text())
    assert tomllib.loads(uncommented) == msgspec.json.decode(msgspec.json.encode(Config()))
