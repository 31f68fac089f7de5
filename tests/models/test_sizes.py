"""Sizes of rows and messages, as signatures tell them."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import torch

from tnxctl import FailedPrecondition
from tnxctl.protocol.wire import Limits, TensorSpec
from tnxd.models.model import Model
from tnxd.models.sizes import check_message_sizes, row_nbytes


def test_a_row_is_known_where_only_the_rows_vary() -> None:
    specs = (TensorSpec("a", "FP32", (-1, 3)), TensorSpec("b", "INT8", (-1,)))
    assert row_nbytes(specs, batches=True) == 13
    assert row_nbytes(specs, batches=False) == 0
    assert row_nbytes((TensorSpec("a", "FP64", (2, 2)), TensorSpec("s", "BF16", ())), batches=False) == 34
    assert row_nbytes((*specs, TensorSpec("c", "FP32", (-1, -1))), batches=True) == 0


def test_a_model_without_a_batch_axis_is_measured_whole() -> None:
    spec = TensorSpec("x", "FP32", (300,))
    model = Model("m", "1", (spec,), (spec,), 0, torch.nn.Identity)
    limits = Limits(message_bytes=1200)
    check_message_sizes(model, limits)
    assert model.reply_row_nbytes == 1200
    with pytest.raises(FailedPrecondition, match="the inputs of a request would take 1200 bytes"):
        check_message_sizes(model, msgspec.structs.replace(limits, message_bytes=1199))
    assert (
        replace(model, max_batch_size=4, inputs=(), outputs=(TensorSpec("y", "UINT8", (-1, 7)),)).reply_row_nbytes == 7
    )


def test_an_example_that_no_request_could_have_is_named() -> None:
    spec = TensorSpec("x", "FP32", (-1, -1))
    model = Model("m", "1", (spec,), (spec,), 4, torch.nn.Identity, examples=((1, 300),))
    check_message_sizes(model, Limits(message_bytes=1200))
    with pytest.raises(FailedPrecondition, match=r"the example of input 'x', \[1, 300\], takes 1200 bytes"):
        check_message_sizes(model, Limits(message_bytes=1199))
