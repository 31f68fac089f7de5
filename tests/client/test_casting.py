"""Inputs of any kind in the datatypes that a model takes, by the Python client."""

from __future__ import annotations

import asyncio
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest

from fake_daemon import MLP, FakeDaemon
from tnxctl import AsyncClient, Client
from tnxctl.casting import cast
from tnxctl.protocol import wire
from tnxctl.protocol.datatypes import STORAGE
from tnxctl.protocol.errors import InvalidArgument, NotFound, Unimplemented
from tnxctl.tensors import to_wire


class Frame:
    """Stand-in for a DataFrame, as numpy sees it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self.array


def taking(*datatypes: str) -> wire.ModelInfo:
    specs = tuple(wire.TensorSpec(f"x{index}", datatype, (-1, 2)) for index, datatype in enumerate(datatypes))
    return msgspec.structs.replace(MLP, inputs=specs)


@pytest.mark.parametrize("datatype", sorted(STORAGE.keys() - {wire.BYTES}))
@pytest.mark.parametrize(
    "value",
    [[[1, 0]], ((1.0, 0.0),), np.array([[1, 0]]), Frame(np.array([[1, 0.0]], object)), [[True, False]]],
    ids=["lists", "tuples", "array", "objects", "truths"],
)
def test_all_kinds_of_numbers_become_the_datatype(datatype: str, value: Any) -> None:
    array = cast(value, taking(datatype))[""]
    assert array.dtype == (ml_dtypes.bfloat16 if datatype == "BF16" else STORAGE[datatype])
    assert array.astype(float).tolist() == [[1, 0]]
    assert to_wire("", array)[0] == datatype


def test_arrays_of_the_right_datatype_are_not_copied() -> None:
    array = np.ones((1, 2), np.float32)
    assert cast(array, taking("FP32"))[""] is array


def test_inputs_go_by_name_and_what_the_signature_does_not_name_stays() -> None:
    inputs = cast({"x0": [[1, 2]], "x1": [[1, 0]], "y": [[1.5]]}, taking("FP16", "BOOL"))
    assert {name: array.dtype.name for name, array in inputs.items()} == {"x0": "float16", "x1": "bool", "y": "float64"}


def test_as_numpy_does_it_or_exactly() -> None:
    assert cast([[1.5, 300]], taking("UINT8"))[""].tolist() == [[1, 300 % 256]]
    with pytest.raises(InvalidArgument, match=r"the input takes UINT8, which cannot hold 1\.5"):
        cast([[1.5, 300]], taking("UINT8"), exact=True)
    assert np.isinf(cast([[1e300, 0]], taking("FP32"))[""]).any()
    with pytest.raises(InvalidArgument, match="too large"):
        cast([[1e300, 0]], taking("FP32"), exact=True)
    assert cast([[0.1, np.inf]], taking("FP32"), exact=True)[""].dtype == np.float32, "rounding is no harm"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([[1, 2], [3]], "input 'x0': these lists are no array"),
        ([["1", "2"]], "input 'x0': dtype <U1 holds no numbers"),
        (np.array([["2020-01-01"]], "M8[D]"), "holds no numbers"),
        (Frame(np.array([["a", 1]], object)), "input 'x0': no FP32 can be made of object"),
    ],
)
def test_values_that_are_no_numbers_are_named(value: Any, why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        cast({"x0": value}, taking("FP32", "FP32"))
    assert why in caught.value.message


def test_a_datatype_from_the_future() -> None:
    with pytest.raises(Unimplemented, match="FP8"):
        cast([1], taking("FP8"))


def test_the_clients_go_by_the_signature() -> None:
    async def later(endpoint: str) -> np.ndarray:
        async with AsyncClient(endpoint, timeout=60) as tnx:
            return (await tnx.cast([[0] * 256]))[""]

    with FakeDaemon() as fake, Client(fake.endpoint, timeout=60) as tnx:
        inputs = tnx.cast([[0] * 64], "digits")
        assert tnx.predict(inputs, model="digits").model == "digits"
        assert asyncio.run(later(fake.endpoint)).dtype == np.float32
        with pytest.raises(NotFound):
            tnx.cast([[0]], "nope")
        with pytest.raises(InvalidArgument, match=r"np\.asarray\(x, dtype=np\.float32\).*Client\.cast"):
            tnx.predict([[0] * 64], model="digits")
        with pytest.raises(
            InvalidArgument, match=r"the input: element \[0, 1\] of row 0 is int, .*DataFrame.*\.astype\(np\.float32\)"
        ):
            tnx.predict(Frame(np.array([["a", 1]], object)), model="digits")
