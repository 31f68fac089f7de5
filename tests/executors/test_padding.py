"""Batches of requests of different lengths on their way in and out."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import Internal
from tnxctl.protocol.wire import TensorSpec
from tnxd.executors.batching import Staging
from tnxd.executors.padding import pad, padded_shapes, split_ragged, units
from tnxd.models.model import Item, Model
from tnxd.models.ragged import Ragged

MODEL = Model(
    "sounds",
    "1",
    (
        TensorSpec("kind", "INT64", (-1,)),
        TensorSpec("waves", "FP32", (-1, 2, -1)),
        TensorSpec("half", "BF16", (-1, -1)),
    ),
    (TensorSpec("label", "FP32", (-1, 3)), TensorSpec("steps", "FP32", (-1, 2, -1))),
    8,
    factory=lambda: None,  # type: ignore[arg-type, return-value]
    ragged=Ragged((0, 2, 1), (0, -1.5, 1.0), (0, 2), 64, 512),
)


def item(rows: int, length: int, value: float) -> Item:
    half = np.full((rows, length), 0x4000, np.uint16)  # 2.0
    return np.full(rows, rows, np.int64), np.full((rows, 2, length), value, np.float32), half


def staging() -> Staging:
    return Staging(lambda shape, dtype: np.full(shape, 77, dtype))


def padded(kept: Staging, items: list[Item], rows: int) -> list[Array | None]:
    return pad(partial(kept.room, MODEL.key, ()), MODEL, items, padded_shapes(MODEL, items, rows))


def test_shorter_rows_are_filled_up_along_their_own_axes() -> None:
    kind, waves, half = padded(staging(), [item(2, 3, 5.0), item(1, 4, 6.0)], 3)
    assert kind is not None
    assert waves is not None
    assert half is not None
    assert kind.tolist() == [2, 2, 1]
    assert waves.shape == (3, 2, 4)
    assert waves[:2, :, :3].tolist() == np.full((2, 2, 3), 5.0).tolist()
    assert waves[:2, :, 3].tolist() == np.full((2, 2), -1.5).tolist()
    assert waves[2].tolist() == np.full((2, 4), 6.0).tolist()
    assert half.tolist() == [[0x4000] * 3 + [0x3F80]] * 2 + [[0x4000] * 4]  # 0x3F80: 1.0


def test_a_buffer_that_held_longer_rows_leaves_nothing_of_them_behind() -> None:
    kept = staging()
    padded(kept, [item(4, 40, 9.0), item(1, 3, 9.0)], 5)
    _, waves, _ = padded(kept, [item(1, 2, 1.0), item(1, 5, 2.0)], 2)
    assert waves is not None
    assert waves[0].tolist() == [[1.0, 1.0, -1.5, -1.5, -1.5]] * 2
    assert waves[1].tolist() == [[2.0] * 5] * 2


def test_buffers_of_a_model_are_freed_with_it() -> None:
    kept = staging()
    padded(kept, [item(1, 2, 1.0), item(1, 5, 2.0)], 2)
    assert kept._nbytes > 0
    kept.forget(MODEL.key)
    assert kept._nbytes == 0


def test_outputs_are_cut_back_to_the_length_of_each_request() -> None:
    items = [item(2, 3, 0.0), item(1, 4, 0.0)]
    label = np.arange(9, dtype=np.float32).reshape(3, 3)
    steps = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    (first, short), (second, long) = split_ragged(MODEL, [label, steps], items, [2, 1])
    assert np.array_equal(first, label[:2])
    assert np.array_equal(second, label[2:])
    assert np.array_equal(short, steps[:2, :, :3])
    assert np.array_equal(long, steps[2:])
    assert short.flags.c_contiguous


def test_an_output_of_another_length_cannot_be_cut_back() -> None:
    steps = np.zeros((2, 2, 5), np.float32)
    with pytest.raises(Internal, match=r"'steps' is 5 long along axis 2, the inputs are 4: it cannot be cut back"):
        split_ragged(MODEL, [np.zeros((2, 3), np.float32), steps], [item(1, 3, 0.0), item(1, 4, 0.0)], [1, 1])


def test_a_forward_is_counted_with_its_padding() -> None:
    assert units(MODEL, [item(2, 3, 0.0), item(1, 4, 0.0)], 3) == 12
