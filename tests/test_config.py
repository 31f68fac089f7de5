from __future__ import annotations

from pathlib import Path

import pytest

from tnxctl.protocol.errors import InvalidArgument
from tnxd.config import Config, load


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tnxd.toml"
    path.write_text(text)
    return path


def test_no_file_is_the_defaults() -> None:
    config = load(None, {})
    assert config == Config()
    assert config.bind == ("tcp://127.0.0.1:5555",)


def test_overrides_win_over_the_file_and_none_is_not_given(tmp_path: Path) -> None:
    path = write(tmp_path, 'models = ["digits"]\nlog_level = "debug"\n[cpu]\nworkers = 3\nthreads = 2\n')
    config = load(path, {"log_level": "error", "models": None, "cpu": {"workers": 1, "threads": None}})
    assert (config.log_level, config.models) == ("error", ("digits",))
    assert (config.cpu.workers, config.cpu.threads) == (1, 2)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("bnid = []", "bnid"),
        ("[cpu]\nworkrs = 1", "workrs"),
        ("[limits]\ntensor = 1", "tensor"),
        ("bind = []", "bind"),
        ('on_device_loss = "weep"', "on_device_loss"),
        ("[memory]\ncpu_mb = -1.0", "cpu_mb"),
        ("load_timeout_s = 0.0", "load_timeout_s"),
        ('bind = ["udp://127.0.0.1:1"]', "udp://127.0.0.1:1"),
        ('devices = ["tpu"]', "tpu"),
        ('log_level = "loud"', "log_level"),
        ("drain_timeout_s = -1.0", "drain_timeout_s"),
        ("drain_timeout_s = nan", "drain_timeout_s"),
        ("[queue]\nmax_mb = nan", "max_mb"),
        ("[queue]\nmax_requests = 0", "max_requests"),
        ("[cpu]\nworkers = 99999999", "workers"),
        ('cpu = "fast"', "cpu"),
        ("= 1", "not TOML"),
    ],
)
def test_mistakes_are_named_with_the_file(tmp_path: Path, text: str, named: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InvalidArgument) as caught:
        load(path, {"cpu": {"threads": None}})
    assert named in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bnid = []", "bnid: unknown key, did you mean bind?"),
        ("[queue]\nmax_mib = 1.0", "queue.max_mib: unknown key, did you mean max_mb?"),
        ("workers = 1", "workers: unknown key, did you mean cpu.workers?"),
        ("xyzzy = 1", "xyzzy: unknown key"),
    ],
)
def test_an_unknown_key_may_have_been_meant_for_another(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InvalidArgument) as caught:
        load(path, {})
    assert caught.value.message == f"{path}: {said}"


def test_a_missing_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="No such file"):
        load(tmp_path / "missing.toml", {})
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidArgument, match="not TOML"):
        load(path, {})
