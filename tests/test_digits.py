"""The built-in networks, the digits example's data and training, and the demo from end to end."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from tnxctl.protocol import wire
from tnxd.models import networks

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits"


@pytest.fixture(scope="module")
def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    """Scans and labels that the committed weights were not trained on."""
    with np.load(EXAMPLE / "scans.npz", allow_pickle=False) as arrays:
        return torch.from_numpy(arrays["scans"]), torch.from_numpy(arrays["labels"].astype(np.int64))


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """The demo as a module."""
    spec = importlib.util.spec_from_file_location("digits_demo", EXAMPLE / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- networks ------------------------------------------------------------------------------------------------


def test_digits_reads_the_held_out_scans(held_out: tuple[torch.Tensor, torch.Tensor]) -> None:
    scans, labels = held_out
    scores = networks.digits()(scans)
    assert scores.dtype == torch.float32
    assert scores.shape == (len(scans), 10)
    assert (scores.argmax(dim=1) == labels).float().mean() >= 0.97


def test_mlp_has_the_documented_layers() -> None:
    layers = [
        (layer.in_features, layer.out_features) if isinstance(layer, torch.nn.Linear) else type(layer)
        for layer in networks.mlp().children()
    ]
    assert layers == [(256, 512), torch.nn.ReLU, (512, 512), torch.nn.ReLU, (512, 128)]
    assert networks.mlp()(torch.zeros(3, 256)).shape == (3, 128)


def test_mlp_is_the_same_whatever_the_global_seed() -> None:
    torch.manual_seed(1)
    first = networks.mlp().state_dict()
    torch.manual_seed(2)
    second = networks.mlp().state_dict()
    assert first.keys() == second.keys()
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name


def test_mlp_keeps_its_weights_from_release_to_release() -> None:
    """Benchmarks and clients compare outputs between versions; the tolerance only forgives another torch's rounding."""
    weights = networks.mlp().state_dict()
    sums = {name: float(values.double().abs().sum()) for name, values in weights.items()}
    assert sums == pytest.approx(
        {
            "0.weight": 4114.5386,
            "0.bias": 15.83199,
            "2.weight": 5788.78284,
            "2.bias": 11.15439,
            "4.weight": 1448.90105,
            "4.bias": 2.75787,
        },
        rel=1e-5,
    )
    assert float(networks.mlp()(torch.ones(1, 256)).sum()) == pytest.approx(-3.13058, abs=1e-4)


@pytest.mark.parametrize("make", [networks.mlp, networks.digits])
class TestBothNetworks:
    def test_are_ready_for_inference(self, make: Callable[[], torch.nn.Module]) -> None:
        net = make()
        assert not any(module.training for module in net.modules())
        assert not any(parameter.requires_grad for parameter in net.parameters())
        assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
        assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}

    def test_leave_the_global_random_state_alone(self, make: Callable[[], torch.nn.Module]) -> None:
        before = torch.get_rng_state()
        make()
        assert torch.equal(torch.get_rng_state(), before)

    def test_do_not_share_weights(self, make: Callable[[], torch.nn.Module]) -> None:
        first, second = make(), make()
        for parameter in first.parameters():
            parameter.zero_()
        assert all(parameter.any() for parameter in second.parameters())

    def test_take_zero_rows(self, make: Callable[[], torch.nn.Module]) -> None:
        width = 256 if make is networks.mlp else 64
        assert len(make()(torch.zeros(0, width))) == 0

    def test_pass_on_nan_and_infinity_in_their_own_row_only(self, make: Callable[[], torch.nn.Module]) -> None:
        rows = torch.ones(3, 256 if make is networks.mlp else 64)
        rows[1] = torch.nan
        rows[2] = torch.inf
        output = make()(rows)
        assert output[0].isfinite().all()
        assert output[1].isnan().all()
        assert not output[2].isfinite().all()


# --- the weights file ----------------------------------------------------------------------------------------


def test_weights_file_is_safetensors_and_holds_tensors_only() -> None:
    """Read by hand: 8 bytes of length, JSON, then raw numbers up to the last byte. No place for code."""
    raw = networks.DIGITS_WEIGHTS.read_bytes()
    assert len(raw) < 200_000
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"F32"}
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(raw) - 8 - length
    assert header.keys() == networks.DigitsNet().state_dict().keys()


def test_weights_load_without_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "torch.serialization.load"):
        monkeypatch.setattr(name, forbidden)
    networks.digits()


def test_weights_of_another_network_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "digits.safetensors"
    safetensors.torch.save_file({"layers.1.weight": torch.zeros(2)}, wrong)
    monkeypatch.setattr(networks, "DIGITS_WEIGHTS", wrong)
    with pytest.raises(RuntimeError, match="size mismatch"):
        networks.digits()


# --- the data and the training -------------------------------------------------------------------------------


def test_scans_are_the_last_rows_of_the_data_set(held_out: tuple[torch.Tensor, torch.Tensor]) -> None:
    data = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits()
    scans, labels = held_out
    assert scans.dtype == torch.float32
    assert np.array_equal(scans, data.data[-len(scans) :])
    assert np.array_equal(labels, data.target[-len(scans) :])
    assert len(scans) >= 300


@pytest.mark.slow
def test_training_writes_weights_and_held_out_scans(
    tmp_path: Path, held_out: tuple[torch.Tensor, torch.Tensor]
) -> None:
    pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    weights, scans = tmp_path / "weights.safetensors", tmp_path / "scans.npz"
    options = ["--epochs", "3", "--weights", str(weights), "--scans", str(scans)]
    done = subprocess.run(
        [sys.executable, EXAMPLE / "train.py", *options], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr

    printed = re.search(r"held out (\d+) scans: ([\d.]+)% right", done.stdout)
    assert printed is not None, done.stdout
    net = networks.DigitsNet().eval()
    net.load_state_dict(safetensors.torch.load_file(weights))
    images, labels = held_out
    accuracy = float((net(images).argmax(dim=1) == labels).float().mean())
    assert int(printed[1]) == len(images)
    assert float(printed[2]) == pytest.approx(100 * accuracy, abs=0.006)
    assert accuracy > 0.8  # three epochs of thirty; guessing gives 0.1
    assert weights.stat().st_mode == scans.stat().st_mode  # as readable as any new file: a service must read it
    with np.load(scans) as written:
        assert np.array_equal(written["scans"], images)
        assert np.array_equal(written["labels"], labels)


# --- the demo ------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_demo_runs_from_end_to_end() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE / "demo.py"],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "TNXD_MODELS": "no-such-model"},  # settings are not inherited
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    output = done.stdout
    assert re.search(r"^tnxd \S+ ready on tcp://127\.0\.0\.1:\d+;", output, re.MULTILINE)
    assert "$ tnxctl health" in output
    assert output.count("label: ") == 5
    found = re.search(r"(\d+) of (\d+) held-out scans read right", output)
    assert found is not None
    assert int(found[1]) / int(found[2]) >= 0.95
    for stage in ("receive", "queue", "gather", "h2d", "compute", "d2h", "reply", "total", "round trip"):
        assert re.search(rf"^  {stage} +[\d.]+ +[\d.]+ ", output, re.MULTILINE), stage
    assert output.rstrip().endswith("exit code 0")
    pictures_and_times = output[output.index("scans of handwritten digits") :]
    assert max(map(len, pictures_and_times.splitlines())) <= 80


def test_demo_says_why_when_the_daemon_dies_at_once(demo: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    daemon = (sys.executable, "-c", "import sys; sys.exit('no room on this machine')")
    assert demo.main(daemon) == 1
    error = capfd.readouterr().err
    assert "did not become ready" in error
    assert "exit code 1" in error
    assert "no room on this machine" in error


def test_demo_gives_up_on_a_daemon_that_never_becomes_ready(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "START_TIMEOUT", 0.5)
    daemon = (sys.executable, "-c", "import time; time.sleep(3600)")
    assert demo.main(daemon) == 1
    assert "did not become ready" in capfd.readouterr().err


def test_demo_fails_when_no_daemon_is_behind_the_ready_line(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TNXCTL", (sys.executable, "-c", "import sys; sys.exit(3)"))
    fake = "import time; print('tnxd 0 ready on tcp://127.0.0.1:9; devices:', flush=True); time.sleep(3600)"
    assert demo.main((sys.executable, "-c", fake)) == 1
    error = capfd.readouterr().err
    assert "tnxctl health ended with exit code 3" in error
    assert "still running" in error


def test_demo_fails_when_the_daemon_does_not_stop_cleanly(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "show_health", lambda endpoint: None)
    monkeypatch.setattr(demo, "show_predictions", lambda endpoint: None)
    fake = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('tnxd 0 ready on tcp://127.0.0.1:9; devices:', flush=True)\n"
        "time.sleep(3600)"
    )
    assert demo.main((sys.executable, "-c", fake)) == 1
    assert "left with exit code 7" in capfd.readouterr().err


def test_demo_fails_when_too_few_scans_are_read_right(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class AlwaysZero:
        """A client of a daemon that reads a 0 in every scan."""

        def __init__(self, endpoint: str, timeout: float) -> None:
            self.result = SimpleNamespace(
                output=np.eye(1, 10, dtype=np.float32),
                device="cpu",
                timing=wire.Timing(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 7.0),
            )

        def __enter__(self) -> AlwaysZero:
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

        def predict(self, scan: np.ndarray, model: str) -> SimpleNamespace:
            return self.result

    monkeypatch.setattr(demo, "Client", AlwaysZero)
    with pytest.raises(demo.DemoError, match="scans were read right, not 95%"):
        demo.show_predictions("tcp://127.0.0.1:9")


def test_demo_pictures_fall_back_to_ascii_and_mark_mistakes(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, held_out: tuple[torch.Tensor, torch.Tensor]
) -> None:
    monkeypatch.setattr(demo, "can_print", lambda text: False)
    scans, labels = held_out[0].numpy()[:5], held_out[1].numpy()[:5]
    scores = np.eye(10, dtype=np.float32)[labels] * 10
    scores[4] = np.roll(scores[4], 1)
    picture = demo.side_by_side(scans, labels, scores)
    assert picture.isascii()
    assert picture.count("WRONG") == 1
    assert max(map(len, picture.splitlines())) <= 80
