"""Models that fail, return nonsense or end the program: the request gets an error, the daemon goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import Daemon, serving_daemon
from dealer import Dealer, rows
from tnxctl.protocol import wire
from tnxctl.protocol.datatypes import Array

ODD = Path(__file__).parent / "odd_models.py"
MODELS = ("odd", "wide", "whole", "in-place", "twice", "broken")


@pytest.fixture(scope="module", params=["inline", "worker"])
def odd_daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The same models run on the serving thread and on a worker."""
    folder = tmp_path_factory.mktemp("odd")
    config = folder / "tnxd.toml"
    config.write_text(f"[cpu]\nworkers = 2\ninline_limit_us = {1e6 if request.param == 'inline' else 0}\n")
    arguments = [argument for name in MODELS for argument in ("--model", name)]
    with serving_daemon(folder / "log", "--config", str(config), *arguments, program=(str(ODD),)) as running:
        yield running


@pytest.fixture
def dealer(odd_daemon: Daemon) -> Iterator[Dealer]:
    with Dealer(odd_daemon.endpoint) as one:
        yield one


def command(value: float, count: int = 1) -> Array:
    x = rows(count, 4, 1000.0)
    x[0, 0] = value
    return x


@pytest.mark.parametrize(
    ("value", "code", "named"),
    [
        (1, "INTERNAL", "'odd' raised ValueError: poisoned row"),
        (2, "INTERNAL", "SystemExit: 3"),
        (3, "INTERNAL", "KeyboardInterrupt"),
        (4, "INTERNAL", "shape [1, 2], not [1, 4]"),
        (5, "INTERNAL", "torch.float64, its signature says FP32"),
        (6, "INTERNAL", "shape [0, 4], not [1, 4]"),
        (7, "INTERNAL", "returned NoneType"),
        (8, "INTERNAL", "output 'y', only ['other']"),
        (9, "INTERNAL", "2 outputs"),
        (10, "INTERNAL", "str"),
        (11, "RESOURCE_EXHAUSTED", "no memory"),
        (12, "INTERNAL", "a lone surrogate ? has no UTF-8"),
        (13, "INTERNAL", "Unprintable"),
    ],
)
def test_a_misbehaving_model_is_that_requests_error(
    odd_daemon: Daemon, dealer: Dealer, value: float, code: str, named: str
) -> None:
    failing = dealer.predict(command(value), model="odd")
    error = dealer.error()
    assert (error.id, error.code) == (failing, code)
    assert named in error.message
    assert "\n" not in error.message
    dealer.predict(command(500.0), model="odd")
    _, (output,) = dealer.result()
    np.testing.assert_array_equal(output, command(500.0) * 2)
    odd_daemon.logged("odd on cpu")


def test_one_poisoned_row_fails_its_request_alone(dealer: Dealer) -> None:
    """Sixty-four requests that can share batches, three of them poisoned."""
    poisoned = {5, 6, 40}
    for index in range(64):
        dealer.predict(command(1 if index in poisoned else 200 + index), model="odd", id=index)
    seen = set()
    for _ in range(64):
        reply, outputs = dealer.receive()
        assert reply.id not in seen
        seen.add(reply.id)
        if reply.id in poisoned:
            assert isinstance(reply, wire.ErrorReply)
            assert reply.code == "INTERNAL"
        else:
            assert reply.id is not None
            np.testing.assert_array_equal(outputs[0], command(200 + reply.id) * 2)
    assert seen == set(range(64))


def test_a_model_that_hands_its_input_through_answers_each_with_its_own(dealer: Dealer) -> None:
    """The outputs are too large to be copied into ZeroMQ: they would show a reused staging buffer."""
    count, width = 40, 40_000
    for index in range(count):
        dealer.predict(rows(1, width, float(index)), model="wide", id=index)
    for _ in range(count):
        result, (output,) = dealer.result()
        assert output.shape == (1, width)
        assert (output == result.id).all()


def test_requests_of_different_width_do_not_mix(dealer: Dealer) -> None:
    for index in range(60):
        dealer.predict(rows(1 + index % 3, 1 + index % 7, float(index)), model="wide", id=index)
    for _ in range(60):
        result, (output,) = dealer.result()
        np.testing.assert_array_equal(output, rows(1 + result.id % 3, 1 + result.id % 7, float(result.id)))


def test_more_rows_than_the_limit_are_run_in_pieces_and_joined(dealer: Dealer) -> None:
    x = np.arange(50 * 4, dtype=np.float32).reshape(50, 4) + 1000
    dealer.predict(x, model="odd")
    result, (output,) = dealer.result()
    np.testing.assert_array_equal(output, x * 2)
    assert result.batch_size == 50


def test_more_rows_than_the_limit_without_an_element_are_refused(dealer: Dealer) -> None:
    """They take no bytes, whatever their number, but a forward for every piece."""
    header = wire.Predict(v=wire.VERSION, id=7, model="wide", inputs=(wire.TensorSpec("x", "FP32", (2**40, 0)),))
    dealer.socket.send_multipart([wire.encode(header), b""])
    error = dealer.error()
    assert (error.id, error.code) == (7, "INVALID_ARGUMENT")
    assert str(2**40) in error.message
    dealer.predict(np.empty((5, 0), np.float32), model="wide")
    assert dealer.result()[1][0].shape == (5, 0)


def test_a_poisoned_row_in_a_large_request(dealer: Dealer) -> None:
    dealer.predict(command(1, count=50), model="odd")
    assert dealer.error().code == "INTERNAL"


@pytest.mark.parametrize("size", [3, 300_000])
def test_models_without_a_batch_axis(dealer: Dealer, size: int) -> None:
    x = np.arange(size, dtype=np.float32)
    sent = {dealer.predict(part, model="whole"): part for part in (x, x[:2])}
    for _ in range(2):
        result, (output,) = dealer.result()
        np.testing.assert_array_equal(output, sent.pop(result.id))


@pytest.mark.parametrize("size", [3, 300_000])
def test_a_model_that_writes_its_input_harms_nobody(dealer: Dealer, size: int) -> None:
    x = np.arange(size, dtype=np.float32)
    for _ in range(3):
        dealer.predict(x, model="in-place")
        np.testing.assert_array_equal(dealer.result()[1][0], x + 1)


def test_several_inputs_and_outputs_of_several_datatypes(dealer: Dealer) -> None:
    ids = np.array([[1, 2, 3], [4, 5, 6]], np.int64)
    mask = np.array([[1, 1, 0], [0, 0, 0]], np.int64)
    dealer.predict(mask, ids, names=("mask", "ids"), model="twice")
    result, (total, some, half) = dealer.result()
    assert [spec.name for spec in result.outputs] == ["total", "any", "half"]
    assert [spec.datatype for spec in result.outputs] == ["INT64", "BOOL", "BF16"]
    assert total.tolist() == [3, 0]
    assert some.tolist() == [True, False]
    patterns = np.float32([[0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]).view(np.uint32) >> 16  # bfloat16 is float32's upper half
    assert half.tolist() == patterns.tolist()


def test_a_model_that_cannot_be_loaded_is_reported_and_the_rest_serves(dealer: Dealer) -> None:
    dealer.predict(rows(1, 4), model="broken")
    error = dealer.error()
    assert error.code == "FAILED_PRECONDITION"
    assert "these weights are broken" in error.message
    models = {model.name: model for model in dealer.health().models}
    assert models["broken"].status == "failed"
    assert "these weights are broken" in models["broken"].error
    assert models["odd"].status == "ready"
