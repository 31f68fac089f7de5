"""Ragged inputs: what model.toml may say about them, and requests that are held against it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument
from tnxctl.protocol.wire import TensorSpec
from tnxd.models import settings
from tnxd.models.formats.signature import Signature
from tnxd.models.model import BoundInputs, Model
from tnxd.models.ragged import Ragged, resolve

IDS = TensorSpec("ids", "INT64", (-1, -1))
MASK = TensorSpec("mask", "INT64", (-1, -1))
FEATURES = TensorSpec("features", "FP32", (-1, 7, -1))
KIND = TensorSpec("kind", "INT64", (-1, 2))
TOKENS = TensorSpec("tokens", "FP32", (-1, -1, 4))

DECLARED: dict[str, Any] = {
    "max_length": 64,
    "mask": "mask",
    "inputs": {"ids": {}, "mask": {}},
    "outputs": {"tokens": 1},
}


def resolved(
    *, signature: tuple[TensorSpec, ...] = (IDS, MASK), limit: int = 8, example: int = 1, **said: Any
) -> Ragged:
    """The declaration with some keys changed, for a signature."""
    given = msgspec.convert({**DECLARED, **said}, settings.Ragged)
    examples = tuple(tuple(example if length < 0 else length for length in spec.shape) for spec in signature)
    return resolve(given, Signature(signature, (TOKENS,), limit, examples, (0,)), "texts/model.toml")


def test_a_declaration_becomes_places_in_the_signature() -> None:
    said = {"features": {"axis": 2, "pad": -1.5}, "ids": {"pad": 3}}
    found = resolved(signature=(KIND, FEATURES, IDS), inputs=said, mask="", outputs={}, max_length=9, max_tokens=40)
    assert found == Ragged((0, 2, 1), (0, -1.5, 3), (0,), 9, 40)


def test_the_most_tokens_are_those_of_a_full_batch_or_what_packing_gains_by() -> None:
    assert resolved().max_tokens == 8 * 64
    assert resolved(packed=True, outputs={}).max_tokens == 2048
    assert resolved(packed=True, outputs={}, max_length=4096).max_tokens == 4096


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"inputs": {}}, "ragged.inputs: at least one input has to be named"),
        (
            {"inputs": {"ids": {}, "mask": {}, "token": {}}},
            "ragged.inputs.token: there is no such input, only ids, mask",
        ),
        ({"outputs": {"hidden": 1}}, "ragged.outputs.hidden: there is no such output, only tokens"),
        ({"inputs": {"ids": {"axis": 0}, "mask": {}}}, "ragged.inputs.ids: axis 0 counts rows"),
        ({"inputs": {"ids": {"axis": 2}, "mask": {}}}, "ragged.inputs.ids: axis 2, but its shape is [-1, -1]"),
        ({"outputs": {"tokens": 2}}, "ragged.outputs.tokens: axis 2 always has length 4"),
        ({"inputs": {"ids": {"pad": 0.5}, "mask": {}}}, "ragged.inputs.ids.pad: 0.5 is no INT64"),
        ({"mask": "kept"}, "ragged.mask: 'kept' is none of ragged.inputs: ids, mask"),
        (
            {"inputs": {"ids": {}, "mask": {"pad": 1}}},
            "ragged.inputs.mask.pad: 1, but a mask is 0 where there is padding",
        ),
        ({"max_tokens": 63}, "ragged.max_tokens: 63, but a row may have 64 (max_length)"),
        ({"example": 65}, "ragged.max_length: 64, but the example of 'ids' is 65 long"),
        ({"limit": 0}, "ragged: requests would share batches, but no axis counts rows: max_batch_size is 0"),
        ({"packed": True}, "ragged.outputs: a packed model answers with a row for each row: nothing is cut back"),
        (
            {"packed": True, "outputs": {}, "inputs": {"mask": {}}},
            "ragged.packed: no input is left for the model but the mask",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_file_and_key(said: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        resolved(**said)
    assert refusal.value.message == f"texts/model.toml: {sentence}"


def test_a_mask_has_a_number_for_each_token() -> None:
    wide = TensorSpec("mask", "FP32", FEATURES.shape)
    with pytest.raises(InvalidArgument, match=r"ragged\.mask: 'mask' is \[-1, 7, -1\]: a mask has a number for each"):
        resolved(signature=(IDS, wide), inputs={"ids": {}, "mask": {"axis": 2}})


# --- requests --------------------------------------------------------------------------------------------------


def model(**said: Any) -> Model:
    return Model(
        "texts",
        "1",
        (IDS, MASK),
        (TOKENS,),
        8,
        factory=lambda: None,
        ragged=resolved(**said),  # type: ignore[arg-type, return-value]
    )


def bound(served: Model, ids: Array, mask: Array) -> BoundInputs:
    specs = [TensorSpec("ids", "INT64", ids.shape), TensorSpec("mask", "INT64", mask.shape)]
    return served.bind(specs, [ids, mask])


def ones(rows: int, length: int) -> Array:
    return np.ones((rows, length), np.int64)


def test_a_padded_request_is_counted_by_its_tokens_and_may_share_a_batch_with_other_lengths() -> None:
    served = model()
    short, long = (bound(served, ones(rows, length), ones(rows, length)) for rows, length in ((2, 5), (1, 9)))
    assert short.group == long.group == ()
    assert [(one.rows, one.units, one.length) for one in (short, long)] == [(2, 10, 5), (1, 9, 9)]


def test_a_packed_request_is_counted_by_what_its_mask_says() -> None:
    served = model(packed=True, outputs={})
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], np.int64)
    found = bound(served, ones(2, 4), mask)
    assert (found.rows, found.units, found.length) == (2, 4, 0)


def test_where_padding_changes_answers_lengths_are_kept_apart() -> None:
    served = model()
    assert served.ragged is not None
    found = bound(replace(served, ragged=served.ragged.apart()), ones(3, 5), ones(3, 5))
    assert (found.group, found.units, found.length) == ((5, 5), 3, 0)


def test_a_packed_model_goes_on_to_be_packed_where_requests_have_to_run_alone() -> None:
    alone = model(packed=True, outputs={}).singly()
    assert (alone.max_units, alone.arguments) == (1, (IDS, TensorSpec("offsets", "INT64", (-1,))))
    with pytest.raises(FailedPrecondition, match=r"texts/model.toml: ragged.packed: its requests cannot share a batch"):
        alone.unbatched()
    assert (model().singly().max_units, model().singly().joins) == (0, False)


def test_axes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"input 'mask' is 6 long along axis 1, 'ids' is 5: they count the same"):
        bound(model(), ones(1, 5), ones(1, 6))


def test_more_than_the_maximum_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"input 'ids' is 65 long; it takes 64 \(ragged.max_length\)"):
        bound(model(), ones(1, 65), ones(1, 65))


def test_a_packed_model_needs_its_tokens_in_front() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 1]], np.int64)
    with pytest.raises(InvalidArgument, match="the mask of row 1 has a token behind padding"):
        bound(model(packed=True, outputs={}), ones(2, 3), mask)


def test_tokens_are_packed_in_order() -> None:
    ragged = resolved(packed=True, outputs={})
    first = (np.array([[1, 2, 9], [3, 9, 9]], np.int64), np.array([[1, 1, 0], [1, 0, 0]], np.int64))
    second = (np.array([[4, 5]], np.int64), ones(1, 2))
    ids, offsets = ragged.pack([first, second], "texts")
    assert ids is not None
    assert offsets is not None
    assert (ids.tolist(), offsets.tolist()) == ([1, 2, 3, 4, 5], [0, 2, 3, 5])
