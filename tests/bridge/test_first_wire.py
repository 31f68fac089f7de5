"""The first version's interface, field by field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bridges import Bridge, running_bridge
from conftest import Daemon
from daemons import ODD
from tnxctl import Client


def test_health_has_four_fields(bridge: Bridge) -> None:
    answer = bridge.ask("GET", "/health")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.document == {
        "status": "ready",
        "cuda_available": False,
        "current_device": "cpu",
        "gpu_memory_free_mb": 0.0,
    }


def test_predict_has_four_fields_and_the_values_of_the_client(bridge: Bridge, daemon: Daemon) -> None:
    rows = np.random.default_rng(1).random((3, 256), np.float32)
    body = {"input_data": rows.tolist(), "prefer_gpu": False, "min_gpu_memory_mb": 1000.0}
    document = bridge.ask("POST", "/predict", json.dumps(body).encode()).document
    assert [*document] == ["output", "device", "latency_ms", "gpu_memory_mb"]
    with Client(daemon.endpoint, timeout=60.0) as client:
        expected = client.predict(rows, device="cpu").output
    np.testing.assert_allclose(np.array(document["output"], np.float32), expected, rtol=1e-5)
    assert (document["device"], document["gpu_memory_mb"]) == ("cpu", 0.0)
    assert document["latency_ms"] > 0


def test_whole_numbers_another_model_and_a_field_of_the_future(bridge: Bridge) -> None:
    body = {"input_data": [[1] * 64, [0.5] * 64], "model": "digits@1", "mood": "good"}
    document = bridge.ask("POST", "/predict", json.dumps(body).encode()).document
    assert np.array(document["output"]).shape == (2, 10)


def test_errors_have_fitting_statuses(bridge: Bridge) -> None:
    for changes, status in (({"model": "nix"}, 404), ({"model": "digits@7"}, 404), ({"min_gpu_memory_mb": 1e9}, 200)):
        body = {"input_data": [[0] * 256], **changes}
        assert bridge.ask("POST", "/predict", json.dumps(body).encode()).status == status


def test_odd_models(run_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = run_daemon("--model", "odd", "--model", "twice", program=ODD)
    with running_bridge(tmp_path, daemon.endpoint) as bridge:
        failed = bridge.ask("POST", "/predict", b'{"model": "odd", "input_data": [[1, 2, 3, 4]]}')
        assert (failed.status, "poisoned row" in failed.error) == (500, True)
        several = bridge.ask("POST", "/predict", b'{"model": "twice", "input_data": [[1]]}')
        assert several.status == 400
        null = bridge.ask("POST", "/predict", b'{"model": "odd", "input_data": [[3e38, 3e38, -3e38, 100]]}')
        assert null.document["output"] == [[None, None, None, 200.0]]  # JSON has no infinity


@pytest.mark.parametrize("number", ["1.5", "9223372036854775808", "1e30"])
def test_a_number_that_a_model_of_integers_cannot_take(bridge: Bridge, number: str) -> None:
    """mlp takes floats, and all of them: nothing here overflows."""
    body = b'{"input_data": [[%s]]}' % ", ".join([number] * 256).encode()
    assert bridge.ask("POST", "/predict", body).status == 200
