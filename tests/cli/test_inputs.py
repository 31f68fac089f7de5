"""Inputs that the tool generates, or converts to the datatypes of a model."""

from __future__ import annotations

import click
import ml_dtypes
import numpy as np
import pytest

from fake_daemon import DIGITS, MLP
from tnxctl import casting
from tnxctl.cli import inputs
from tnxctl.protocol import errors, wire
from tnxctl.protocol.datatypes import STORAGE


def model(*specs: wire.TensorSpec, max_batch_size: int = 8) -> wire.ModelInfo:
    return wire.ModelInfo(name="m", version="1", status="ready", inputs=specs, max_batch_size=max_batch_size)


def generate(info: wire.ModelInfo, batch_size: int | None = None, input_dim: int | None = None, seed: int = 0):
    return inputs.random_inputs(info, batch_size=batch_size, input_dim=input_dim, seed=seed)


def test_random_inputs_fit_the_signature() -> None:
    assert generate(MLP)["input"].shape == (1, 256)
    assert generate(MLP, batch_size=4)["input"].shape == (4, 256)
    assert generate(MLP, batch_size=4, input_dim=7)["input"].shape == (4, 7)
    free = model(wire.TensorSpec("x", "FP32", (-1, -1, 3)), wire.TensorSpec("n", "INT64", ()), max_batch_size=0)
    assert {name: array.shape for name, array in generate(free).items()} == {"x": (1, 1, 3), "n": ()}


def test_a_model_that_is_not_loaded_takes_what_nobody_knows() -> None:
    assert inputs.known(MLP) is MLP
    failed = wire.ModelInfo(name="m", version="2", status="failed", error="m/2/model.pt2: incomplete")
    with pytest.raises(errors.FailedPrecondition, match=r"'m@2' is not loaded: m/2/model\.pt2: incomplete"):
        inputs.known(failed)
    with pytest.raises(errors.FailedPrecondition, match="'m@2' is unloaded; tnxctl models load m@2"):
        inputs.known(wire.ModelInfo(name="m", version="2", status="unloaded"))
    with pytest.raises(errors.Unavailable, match="'m@2' is still being loaded"):
        inputs.known(wire.ModelInfo(name="m", version="2", status="starting"))


@pytest.mark.parametrize("datatype", STORAGE)
def test_random_inputs_have_the_datatype(datatype: str) -> None:
    array = generate(model(wire.TensorSpec("x", datatype, (-1, 64))))["x"]
    assert array.dtype == (ml_dtypes.bfloat16 if datatype == "BF16" else STORAGE[datatype])
    assert len(np.unique(array)) > 1
    if array.dtype.kind in "biu":
        assert set(array.ravel().tolist()) <= {0, 1}


def test_the_same_seed_gives_the_same_inputs() -> None:
    np.testing.assert_array_equal(generate(MLP)["input"], generate(MLP)["input"])
    assert (generate(MLP)["input"] != generate(MLP, seed=1)["input"]).any()


@pytest.mark.parametrize(
    ("info", "options", "message"),
    [
        (model(wire.TensorSpec("x", "FP32", (3,)), max_batch_size=0), {"batch_size": 2}, "takes no batch axis"),
        (model(wire.TensorSpec("x", "FP32", (-1,))), {"input_dim": 2}, "no axis but the rows"),
        (MLP, {"batch_size": 10**12}, "too large"),
    ],
)
def test_options_that_do_not_apply(info: wire.ModelInfo, options: dict[str, int], message: str) -> None:
    with pytest.raises(click.UsageError, match=message):
        generate(info, **options)


def test_a_datatype_from_the_future() -> None:
    with pytest.raises(errors.Unimplemented, match="FP8"):
        generate(model(wire.TensorSpec("x", "FP8", (-1, 3))))


def test_cast_converts_what_the_signature_names() -> None:
    scans = np.arange(64, dtype=np.float64).reshape(1, 64)
    for name in ("", "image"):
        assert casting.cast({name: scans}, DIGITS)[name].dtype == np.float32
    assert casting.cast({"other": scans}, DIGITS)["other"] is scans
