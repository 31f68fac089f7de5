"""Tally of answers: times, percentiles, and the exit code of several requests."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from fake_daemon import TIMING
from tnxctl.cli import exits, report
from tnxctl.cli.tally import Tally
from tnxctl.cli.workload import Answer
from tnxctl.protocol import errors
from tnxctl.protocol.strings import array_of
from tnxctl.results import Result


def result(device: str = "cpu", reason: str = "because", **outputs: np.ndarray) -> Result:
    return Result(
        outputs=outputs,
        model="mlp",
        version="1",
        device=device,
        reason=reason,
        batch_size=4,
        latency_ms=0.1,
        gpu_memory_mb=0.0,
        timing=TIMING,
        predicted_us=150.0,
    )


def test_a_tally_counts() -> None:
    tally = Tally(planned=103, concurrency=1)
    for index in range(1, 101):
        tally.add(Answer(index, float(index), result(device="cuda:0" if index % 4 == 0 else "cpu")))
    for index in range(101, 104):
        tally.add(Answer(index, 1e6, errors.ResourceExhausted(f"full {index}")))
    tally.elapsed_s = 2.0
    assert (tally.answered, tally.failed, tally.rate) == (100, 3, 50.0)
    assert tally.percentiles_ms() == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert tally.devices == {"cpu": 75, "cuda:0": 25}
    assert tally.versions == {("mlp", "1"): 100}
    assert tally.batch_mean() == 4.0
    assert tally.stage_means_us()["compute"] == pytest.approx(TIMING.compute_us)
    assert tally.prediction_errors_us() == {"p50": 25.0, "p90": 25.0, "p99": 25.0, "max": 25.0}
    assert tally.prediction_means_us() == (150.0, 125.0)
    assert tally.errors["RESOURCE_EXHAUSTED"].message == "full 103"
    assert report.document(tally)["errors"] == [{"code": "RESOURCE_EXHAUSTED", "count": 3, "message": "full 103"}]


def test_a_tally_without_a_result_has_no_times() -> None:
    tally = Tally(planned=2, concurrency=1)
    assert (tally.percentiles_ms(), tally.stage_means_us(), tally.batch_mean(), tally.rate) == ({}, {}, 0.0, 0.0)
    assert tally.prediction_errors_us() == {}
    assert list(report.summary(tally)) != []


@pytest.mark.parametrize(("count", "p99"), [(1, 1.0), (2, 2.0), (99, 99.0), (100, 99.0), (101, 100.0)])
def test_percentiles_are_nearest_ranks(count: int, p99: float) -> None:
    tally = Tally(count, 1)
    for index in range(count, 0, -1):
        tally.add(Answer(index, float(index), result()))
    assert tally.percentiles_ms()["p99"] == p99


@pytest.mark.parametrize(
    ("answered", "failures", "code"),
    [
        (5, [], 0),
        (0, [], 0),
        (0, [errors.DeadlineExceeded("x")], 6),
        (1, [errors.DeadlineExceeded("x")], 1),
        (0, [errors.InvalidArgument("x"), errors.NotFound("x")], 5),
        (0, [errors.InvalidArgument("x"), errors.DeadlineExceeded("x")], 1),
        (0, [errors.Internal("x")], 1),
    ],
)
def test_exit_code_of_several_requests(answered: int, failures: list[errors.TensorNextError], code: int) -> None:
    assert exits.of_run(answered, failures) == code


def test_strings_for_machines() -> None:
    def outputs(array: np.ndarray) -> dict[str, object]:
        tally = Tally(1, 1)
        tally.add(Answer(1, 1.0, result(y=array)))
        document = msgspec.json.decode(msgspec.json.encode(report.document(tally)))
        (found,) = document["answers"][0]["outputs"]
        return {key: value for key, value in found.items() if key not in ("name", "shape")}

    assert outputs(array_of(["é".encode(), b""], (2,))) == {"datatype": "BYTES", "data": ["é", ""]}
    assert outputs(array_of([b"\xff"], (1,))) == {"datatype": "BYTES", "encoding": "base64", "data": ["/w=="]}
    assert outputs(array_of([bytes(1 << 20)], (1,))) == {"datatype": "BYTES"}
