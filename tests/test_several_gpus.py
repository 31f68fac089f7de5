"""A daemon with two GPUs, which are pretended: which of them requests go to, and what happens where one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from daemons import running
from model_repositories import MODEL_TOML, Repository, scaled
from pretended import order, program
from tnxctl import Client
from tnxctl.protocol.errors import InvalidArgument, ResourceExhausted, Unavailable
from tnxctl.protocol.wire import HealthReport

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has real GPUs")

_SMALL_MB, _LARGE_MB = 48, 112
"""Memory of cuda:0 and of cuda:1."""

_WEIGHTS_MB = 60
"""MiB of the weights of a model that has room on the larger one alone."""

_WAITS, _TOO_LARGE = 7.25, 9.25
"""Inputs with which a batch waits for a file, and with which it takes more memory than any GPU has."""

_HUNGRY = f"""
import os, time
import torch

class Hungry(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        if x.device.type == "cuda":
            mib = 1000 if bool((x == {_TOO_LARGE}).any()) else 13 * len(x)  # twice two rows find no room on cuda:0
            workspace = torch.empty(mib << 20, dtype=torch.uint8, device=x.device)
            if bool((x == {_WAITS}).any()):
                open(GO + "-waits", "w").close()
                while not os.path.exists(GO):
                    time.sleep(0.005)
        return x + self.one

make = Hungry
"""

_HUNGRY_TOML = """
factory = "hungry:make"
max_batch_size = 2
optimize = "none"
inputs = [{ name = "x", datatype = "FP32", shape = [-1, 2] }]
outputs = [{ name = "y", datatype = "FP32", shape = [-1, 2] }]
"""

_CONFIG = """
on_device_loss = "continue"
default_model = "hungry"
[cuda]
lanes = 2
depth = 1
"""


def _with_few_read(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same, where a forward does not look at all of the weights, which would take a core for seconds."""
    source = files["network.py"].replace(b"self.weight.am", b"self.weight[:9].am")
    assert source != files["network.py"]
    return {**files, "network.py": source}


class Gpus:
    """A daemon, a client of it, and the file that batches wait for. Args: folder: of all files."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.go, self.waits, self.control = folder / "go", folder / "go-waits", folder / "control"
        repository = Repository(folder / "models")
        weights = safetensors.torch.save({"one": torch.ones(())})
        source = _HUNGRY.replace("GO", repr(str(self.go)))
        repository.settings("hungry", _HUNGRY_TOML)
        repository.publish("hungry", 1, {"hungry.py": source.encode(), "model.safetensors": weights})
        repository.settings("large", 'optimize = "none"\n' + MODEL_TOML)
        repository.publish("large", 1, _with_few_read(scaled(3.0, mib=_WEIGHTS_MB)))
        machine = program(devices=2, memory_mb=(_SMALL_MB, _LARGE_MB), control=self.control)
        arguments = ("--model-repository", str(repository.root))
        daemon = stack.enter_context(running(folder, *arguments, program=machine, config=_CONFIG))
        self.client = stack.enter_context(Client(daemon.endpoint, timeout=60.0))

    def await_health(self, arrived: Callable[[HealthReport], bool]) -> HealthReport:
        """Ask until something has arrived; the test's own time limit ends the asking."""
        while not arrived(report := self.client.health()):
            pass
        return report


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpus]:
    """Two GPUs, which the last tests of this module lose."""
    with ExitStack() as stack:
        made = Gpus(tmp_path_factory.mktemp("gpus"), stack)
        made.await_health(lambda report: report.status != "starting")
        yield made


def two_rows(value: float = 1.0) -> np.ndarray:
    return np.full((2, 2), value, np.float32)


def test_devices_have_the_names_of_the_runtime_and_memory_of_their_own(gpus: Gpus) -> None:
    report = gpus.client.health()
    assert report.status == "ready"
    assert {device.name: device.status for device in report.devices} == dict.fromkeys(
        ("cuda:0", "cuda:1", "cpu"), "ready"
    )
    assert [device.memory_total_mb for device in report.devices[:2]] == [_SMALL_MB, _LARGE_MB]
    assert report.cuda_available


def test_a_model_is_where_it_has_room_and_says_where_it_has_none(gpus: Gpus) -> None:
    models = {model.name: model for model in gpus.client.health().models}
    assert set(models["hungry"].devices) == {"cuda:0", "cuda:1", "cpu"}
    assert set(models["large"].devices) == {"cuda:1", "cpu"}
    assert any("not on cuda:0: " in note and "MiB are free there" in note for note in models["large"].notes)
    result = gpus.client.predict(np.ones((1, 8), np.float32), model="large")
    assert result.device == "cuda:1"
    assert np.array_equal(result.outputs["low"], np.full((1, 8), 3.0, np.float32))


def test_a_request_is_where_it_asked_to_be_or_is_told_why_not(gpus: Gpus) -> None:
    predict, ones = gpus.client.predict, two_rows()
    for device in ("cuda:0", "cuda:1", "cpu"):
        result = predict(ones, device=device)
        assert result.device == device
        assert np.array_equal(result.output, ones + 1)
    assert predict(ones).device in ("cuda:0", "cuda:1")
    assert predict(ones, prefer_gpu=False).device == "cpu"
    assert predict(ones, device="auto").device in ("cuda:0", "cuda:1", "cpu")
    with pytest.raises(InvalidArgument, match="there are cuda:0, cuda:1, cpu, and auto"):
        predict(ones, device="cuda:2")
    with pytest.raises(Unavailable, match="device cuda:0 has not loaded"):
        predict(np.ones((1, 8), np.float32), model="large", device="cuda:0")


def test_a_request_goes_to_a_gpu_with_the_memory_that_it_asks_for(gpus: Gpus) -> None:
    """The smaller one has not as much in all as is free on the larger one, once that is seen to do nothing."""
    gpus.await_health(lambda report: report.devices[1].memory_free_mb > _SMALL_MB)
    result = gpus.client.predict(two_rows(), min_gpu_memory_mb=_SMALL_MB + 0.5)
    assert result.device == "cuda:1"
    result = gpus.client.predict(two_rows(), min_gpu_memory_mb=_LARGE_MB + 1000)
    assert result.device == "cpu"
    assert f"no GPU has {_LARGE_MB + 1000:g} MiB free" in result.reason


def test_a_batch_that_finds_no_memory_beside_another_runs_when_that_is_over(gpus: Gpus) -> None:
    try:
        waits = gpus.client.submit(two_rows(_WAITS), device="cuda:0")
        gpus.await_health(lambda _: gpus.waits.exists())  # it has its memory
        crowded = gpus.client.submit(two_rows(2.0), device="cuda:0")
        gpus.await_health(lambda report: report.queued == 1 and report.devices[0].busy_lanes == 1)
    finally:
        gpus.go.touch()
    assert np.array_equal(waits.result(60).output, two_rows(_WAITS) + 1)
    result = crowded.result(60)
    assert (result.device, result.batch_size) == ("cuda:0", 2)
    assert np.array_equal(result.output, two_rows(3.0))
    gpus.go.unlink()


def test_a_request_that_no_gpu_has_memory_for_runs_on_the_cpu_unless_it_named_one(gpus: Gpus) -> None:
    """From then on, rows of that model run there one by one."""
    result = gpus.client.predict(two_rows(_TOO_LARGE))
    assert result.device == "cpu"
    assert "cuda:0 had no memory left for it, cuda:1 had no memory left for it" in result.reason
    assert np.array_equal(result.output, two_rows(_TOO_LARGE) + 1)
    with pytest.raises(ResourceExhausted, match="cuda:1 has no memory left for this request"):
        gpus.client.predict(two_rows(_TOO_LARGE), device="cuda:1")


def test_a_lost_gpu_is_left_out_and_the_others_go_on(gpus: Gpus) -> None:
    order(gpus.control, "lose", device=1)
    with pytest.raises(Unavailable, match="cuda:1 failed"):
        gpus.client.predict(two_rows(), device="cuda:1")
    report = gpus.client.health()
    assert {device.name: device.status for device in report.devices} == {
        "cuda:0": "ready",
        "cuda:1": "failed",
        "cpu": "ready",
    }
    models = {model.name: model for model in report.models}
    assert set(models["hungry"].devices) == {"cuda:0", "cpu"}
    assert models["large"].devices == ("cpu",)
    assert gpus.client.predict(two_rows()).device == "cuda:0"
    assert gpus.client.predict(np.ones((1, 8), np.float32), model="large").device == "cpu"
    with pytest.raises(Unavailable, match="device cuda:1 failed"):
        gpus.client.predict(two_rows(), device="cuda:1")


def test_a_gpu_that_is_lost_while_it_does_nothing_is_left_out_too(gpus: Gpus) -> None:
    order(gpus.control, "vanish", device=0)
    report = gpus.await_health(lambda report: report.devices[0].status == "failed")
    assert report.devices[0].error
    assert not report.cuda_available
    result = gpus.client.predict(two_rows())
    assert result.device == "cpu"
    assert "no GPU is ready: cuda:0 failed, cuda:1 failed" in result.reason
