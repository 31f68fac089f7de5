from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tnxctl.protocol.datatypes import DATATYPES, STORAGE
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.tensors import from_wire, to_wire


class OnlyArray:
    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray[Any, Any]:
        return self.array


class OnlyDlpack:
    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class Broken:
    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray[Any, Any]:
        raise RuntimeError("it is on the moon")


@pytest.mark.parametrize("dtype", DATATYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 0), (2, 3)])
def test_every_numpy_dtype_and_shape_goes_unchanged(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    datatype, sent = to_wire("x", array)
    assert datatype == DATATYPES[dtype]
    assert sent is array
    assert from_wire(datatype, sent) is sent


def test_read_only_arrays_are_taken() -> None:
    array = np.ones(3)
    array.flags.writeable = False
    assert to_wire("x", array)[1] is array


@pytest.mark.parametrize("dtype", [np.longlong, np.ulonglong, np.intc, np.dtype("f4", metadata={"unit": "m"})])
def test_aliases_of_a_dtype_are_that_dtype(dtype: Any) -> None:
    array = np.zeros(2, dtype)
    assert STORAGE[to_wire("x", array)[0]] == array.dtype


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda a: a.T, id="transposed"),
        pytest.param(lambda a: a[:, ::2], id="strided"),
        pytest.param(lambda a: a[::-1], id="reversed"),
        pytest.param(lambda a: np.broadcast_to(a[0], (5, 6)), id="broadcast"),
        pytest.param(lambda a: np.asfortranarray(a), id="fortran"),
    ],
)
@pytest.mark.parametrize("dtype", ["f4", ml_dtypes.bfloat16])
def test_other_layouts_become_c_contiguous(view: Any, dtype: Any) -> None:
    array = view(np.arange(24).reshape(4, 6).astype(dtype))
    datatype, sent = to_wire("x", array)
    assert sent.flags.c_contiguous
    np.testing.assert_array_equal(from_wire(datatype, sent), array)


@pytest.mark.parametrize("wrap", [OnlyArray, OnlyDlpack])
def test_array_and_dlpack_protocols_share_memory(wrap: Any) -> None:
    array = np.arange(6, dtype="f4").reshape(2, 3)
    datatype, sent = to_wire("x", wrap(array))
    assert datatype == "FP32"
    assert sent.shape == (2, 3)
    assert np.shares_memory(sent, array)


def test_numpy_scalars_are_arrays_without_axes() -> None:
    datatype, sent = to_wire("x", np.float32(1.5))
    assert (datatype, sent.shape, sent.item()) == ("FP32", (), 1.5)


@pytest.mark.parametrize("shape", [(), (0, 2), (2, 2)])
def test_bfloat16_travels_as_bit_patterns(shape: tuple[int, ...]) -> None:
    array = np.full(shape, 1.5).astype(ml_dtypes.bfloat16)
    datatype, sent = to_wire("x", array)
    assert (datatype, sent.dtype, sent.shape) == ("BF16", np.dtype("<u2"), shape)
    back = from_wire(datatype, sent)
    assert back.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        pytest.param(np.zeros(2, ">f4"), ">f4", id="big-endian"),
        pytest.param(np.zeros(2, ">i8"), ">i8", id="big-endian integers"),
        pytest.param(np.zeros(2, object), "row 0 is int", id="object"),
        pytest.param(np.zeros(2, "c8"), "complex64", id="complex"),
        pytest.param(np.zeros(2, [("a", "f4")]), "[('a', '<f4')]", id="structured"),
        pytest.param(np.zeros(2, "M8[s]"), "datetime64[s]", id="datetime"),
        pytest.param(np.zeros(2, "V2"), "|V2", id="void"),
        pytest.param(np.zeros(2, np.longdouble), str(np.dtype(np.longdouble)), id="long double"),
        pytest.param(np.zeros(2, ml_dtypes.float8_e5m2), "float8_e5m2", id="float8"),
        pytest.param(np.zeros(2, np.dtype(ml_dtypes.bfloat16).newbyteorder(">")), ">V2", id="big-endian BF16"),
    ],
)
def test_refuses_a_dtype_by_name(value: Any, named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        to_wire("pixels", value)
    assert "'pixels'" in caught.value.message
    assert named in caught.value.message


def test_big_endian_says_what_to_do() -> None:
    with pytest.raises(InvalidArgument, match=r"astype\('<f4'\)"):
        to_wire("x", np.zeros(2, ">f4"))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([1.0, 2.0], "list"),
        ((1.0,), "tuple"),
        (1.0, "float"),
        (None, "NoneType"),
        (Broken(), "it is on the moon"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "masked"),
    ],
)
def test_refuses_what_is_no_array(value: Any, named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        to_wire("pixels", value)
    assert "'pixels'" in caught.value.message
    assert named in caught.value.message


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


def test_tensors_share_memory(torch: Any) -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    datatype, sent = to_wire("x", tensor)
    assert datatype == "FP32"
    assert sent.ctypes.data == tensor.data_ptr()


def test_tensors_that_need_gradients_are_detached(torch: Any) -> None:
    np.testing.assert_array_equal(to_wire("x", torch.ones(2, requires_grad=True))[1], [1.0, 1.0])


@pytest.mark.parametrize("shape", [(), (0, 2), (2, 3)])
def test_bfloat16_tensors(torch: Any, shape: tuple[int, ...]) -> None:
    tensor = torch.full(shape, 1.5, dtype=torch.bfloat16)
    datatype, sent = to_wire("x", tensor)
    assert (datatype, sent.shape) == ("BF16", shape)
    assert sent.size == 0 or sent.ctypes.data == tensor.data_ptr()
    np.testing.assert_array_equal(from_wire(datatype, sent).astype("f4"), tensor.float().numpy())


def test_transposed_bfloat16_tensors(torch: Any) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(torch.bfloat16).T
    np.testing.assert_array_equal(from_wire(*to_wire("x", tensor)).astype("f4"), tensor.float().numpy())


@pytest.mark.parametrize("dtype", ["complex64", "float8_e5m2"])
def test_tensors_of_other_dtypes_are_refused(torch: Any, dtype: str) -> None:
    with pytest.raises(InvalidArgument, match="'x'"):
        to_wire("x", torch.zeros(2, dtype=getattr(torch, dtype)))


def test_sparse_tensors_are_refused(torch: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"'x'.*torch"):
        to_wire("x", torch.zeros(2, 2).to_sparse())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_tensors_are_copied_to_the_host(torch: Any, dtype: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tensor = torch.full((2, 3), 1.5, dtype=getattr(torch, dtype), device="cuda")
    np.testing.assert_array_equal(from_wire(*to_wire("x", tensor)).astype("f4"), np.full((2, 3), 1.5, "f4"))
