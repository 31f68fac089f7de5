"""`tnxd --check`: what is configured, where it comes from, and what would be served."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tnxd.config import Config, load

PATIENCE_S = 60.0

# Without torch: it must not be needed.
PROGRAM = "import sys; sys.modules['torch'] = None; from tnxd.__main__ import main; main()"


def check(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TNXD_")}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "--check", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment | variables,
        timeout=PATIENCE_S,
    )


def origins(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """KEY or TABLE.KEY -> where its value comes from, as printed."""
    found, table = {}, ""
    for line in done.stdout.splitlines():
        if line.startswith("["):
            table = line.strip("[]") + "."
        elif " = " in line and not line.startswith("#"):
            found[table + line.partition(" = ")[0]] = line.rpartition("  # ")[2]
    return found


def test_every_setting_says_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "tnxd.toml"
    path.write_text('default_model = "digits"\nlog_level = "debug"\n[cpu]\nworkers = 3\nthreads = 2\n')
    done = check(
        "--config", path, "--bind", "127.0.0.1:5620", "--cpu-workers", 1, TNXD_LOG_LEVEL="error", TNXD_MODEL="digits"
    )
    assert (done.returncode, done.stderr) == (0, "")
    came = origins(done)
    expected = {
        "bind": "flag --bind",
        "cpu.workers": "flag --cpu-workers",
        "log_level": "environment TNXD_LOG_LEVEL",
        "models": "environment TNXD_MODEL",
        "default_model": f"file {path}",
        "cpu.threads": f"file {path}",
    }
    assert {key: origin for key, origin in came.items() if origin != "default"} == expected
    assert {"spin_us", "queue.max_mb", "limits.rank", "clients.memory_mb"} <= came.keys()


def test_what_is_printed_is_a_configuration_with_the_same_effect(tmp_path: Path) -> None:
    path = tmp_path / "printed.toml"
    done = check("--bind", "127.0.0.1:*", "--devices", "cpu", "--cpu-threads", 2)
    path.write_text(done.stdout)
    expected = load(None, {"bind": ["tcp://127.0.0.1:*"], "devices": ["cpu"], "cpu": {"threads": 2}})
    assert load(path, {}) == expected
    assert tomllib.loads(done.stdout).keys() == set(Config.__struct_fields__)
    assert "# model mlp: versions 1 (built-in), of which 1 would be loaded\n" in done.stdout


def test_a_wrong_configuration_is_told_as_at_a_start(tmp_path: Path) -> None:
    path = tmp_path / "tnxd.toml"
    path.write_text("bnid = []\n")
    done = check("--config", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"tnxd: {path}: bnid: unknown key, did you mean bind?\n"
    missing = check("--default-model", "nope")
    assert missing.returncode == 2
    assert "'nope' is not among the models mlp, digits" in missing.stderr


def test_what_could_not_be_served_is_named(tmp_path: Path) -> None:
    for version in ("1", "2"):
        (tmp_path / "good" / version).mkdir(parents=True)
        (tmp_path / "good" / version / "model.pt2").write_bytes(b"not looked at before it is loaded")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd" / "1").mkdir(parents=True)
    (tmp_path / "odd" / "1" / "model.pt2").write_bytes(b"")
    (tmp_path / "odd" / "model.toml").write_text("max_batch = 3\n")
    done = check("--model-repository", tmp_path, TNXD_LOGLEVEL="debug")
    assert done.returncode == 1
    assert "# model good: versions 1, 2 (pt2), of which 2 would be loaded\n" in done.stdout
    assert done.stderr.splitlines() == [
        "tnxd: the environment variable TNXD_LOGLEVEL is none of the daemon's, did you mean TNXD_LOG_LEVEL?",
        "tnxd: empty has no version: empty/1/, with the model in it, would be one",
        "tnxd: odd/model.toml: max_batch: unknown key, did you mean max_batch_size?",
    ]


def test_a_repository_without_a_model_is_no_mistake(tmp_path: Path) -> None:
    done = check("--model-repository", tmp_path, "--default-model", "net")
    assert done.returncode == 0
    assert done.stderr == "tnxd: there is no model yet: publish one, then tnxctl reload\n"


@pytest.mark.parametrize(
    ("given", "endpoint"),
    [
        ("127.0.0.1:5620", "tcp://127.0.0.1:5620"),
        ("0.0.0.0:*", "tcp://0.0.0.0:*"),
        ("[::1]:5620", "tcp://[::1]:5620"),
        ("gpu-box:5620", "tcp://gpu-box:5620"),
        ("ipc:///run/tnx.sock", "ipc:///run/tnx.sock"),
    ],
)
def test_an_address_and_a_port_are_an_endpoint(given: str, endpoint: str) -> None:
    assert load(None, {"bind": [given]}).bind == (endpoint,)
