"""Requests held against signatures."""

from __future__ import annotations

import numpy as np
import pytest

from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import TensorSpec
from tnxd.models.model import BoundInputs, Model


def factory() -> None:
    raise AssertionError("binding must not build the module")


def model(*inputs: TensorSpec, max_batch_size: int = 8) -> Model:
    return Model("m", "1", inputs, (), max_batch_size, factory)  # type: ignore[arg-type]


def bind(served: Model, *specs: TensorSpec) -> BoundInputs:
    return served.bind(specs, [np.zeros(spec.shape, np.float32) for spec in specs])


ONE = model(TensorSpec("x", "FP32", (-1, 4)))
TOKENS = model(TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("mask", "INT64", (-1, -1)))
WHOLE = model(TensorSpec("x", "FP32", (2, -1)), max_batch_size=0)


@pytest.mark.parametrize("name", ["x", ""])
def test_a_single_input_may_go_without_a_name(name: str) -> None:
    bound = bind(ONE, TensorSpec(name, "FP32", (3, 4)))
    assert (bound.rows, bound.group) == (3, ())


def test_inputs_come_in_the_order_of_the_signature() -> None:
    ids = np.zeros((2, 7), np.int64)
    mask = np.ones((2, 7), np.int64)
    specs = [TensorSpec("mask", "INT64", (2, 7)), TensorSpec("ids", "INT64", (2, 7))]
    bound = TOKENS.bind(specs, [mask, ids])
    assert bound.arrays[0] is ids
    assert bound.arrays[1] is mask
    assert (bound.rows, bound.group) == (2, (7, 7))


def test_a_model_without_a_batch_axis_counts_as_one_row() -> None:
    bound = bind(WHOLE, TensorSpec("x", "FP32", (2, 5)))
    assert (bound.rows, bound.group) == (1, (5,))


@pytest.mark.parametrize(
    ("served", "specs", "named"),
    [
        (ONE, [TensorSpec("y", "FP32", (1, 4))], "no input 'y'"),
        (ONE, [], "needs the input 'x'"),
        (ONE, [TensorSpec("x", "FP64", (1, 4))], "takes FP32, got FP64"),
        (ONE, [TensorSpec("x", "FP32", (4,))], "takes rank 2 [-1, 4], got rank 1 [4]"),
        (ONE, [TensorSpec("x", "FP32", (1, 5))], "got [1, 5]: axis 1"),
        (ONE, [TensorSpec("x", "FP32", (1, 4)), TensorSpec("x", "FP32", (1, 4))], "came twice"),
        (ONE, [TensorSpec("x", "FP32", (1, 4)), TensorSpec("z", "FP32", (1, 4))], "no input 'z'"),
        (TOKENS, [TensorSpec("ids", "INT64", (2, 7))], "needs the input 'mask'"),
        (TOKENS, [TensorSpec("", "INT64", (2, 7))], "takes several inputs, ['ids', 'mask']: each needs its name"),
        (TOKENS, [TensorSpec("ids", "INT64", (2, 7)), TensorSpec("mask", "INT64", (3, 7))], "3 rows"),
        (WHOLE, [TensorSpec("x", "FP32", (3, 5))], "axis 0"),
    ],
)
def test_what_does_not_fit_is_named(served: Model, specs: list[TensorSpec], named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        bind(served, *specs)
    assert named in caught.value.message
    assert "'m'" in caught.value.message


def test_example_shapes_fit_the_signature() -> None:
    for served, rows in ((ONE, 3), (TOKENS, 2), (WHOLE, 1)):
        specs = [
            TensorSpec(expected.name, expected.datatype, shape)
            for expected, shape in zip(served.inputs, served.example_shapes(rows), strict=True)
        ]
        assert bind(served, *specs).rows == rows
