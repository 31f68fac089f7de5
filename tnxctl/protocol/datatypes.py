"""Datatypes of tensors: their names on the wire, and the numpy dtypes of their values.

A new datatype is an entry in `STORAGE`; one that numpy lacks, in `ML_DTYPES`, too. `tnxd.models.tensors` has those of
torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnxctl.protocol.fields import BYTES
from tnxctl.protocol.strings import OBJECT

Array = NDArray[Any]

STORAGE: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("bool"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
    BYTES: OBJECT,
}
"""Datatype name of the Open Inference Protocol v2 -> the numpy dtype that holds its values.

BYTES is the one datatype whose elements have no fixed size: `tnxctl.protocol.strings` says how it is kept and travels.
"""

ML_DTYPES: dict[str, str] = {"BF16": "bfloat16"}
"""Datatype that numpy lacks -> its name in ml_dtypes and torch. `STORAGE` has the dtype of its bit patterns."""

DATATYPES: dict[np.dtype[Any], str] = {
    dtype: name for name, dtype in STORAGE.items() if name not in (*ML_DTYPES, BYTES)
}
"""numpy dtype -> datatype name, for every dtype that numpy itself has and that tells what an array holds."""

_NAMES = {name: datatype for datatype, name in ML_DTYPES.items()} | {OBJECT.name: BYTES}


def dtype_of(datatype: str) -> np.dtype[Any]:
    """The dtype of a datatype's values: that of numpy, or the one that ml_dtypes adds. Raises KeyError: unknown."""
    if datatype not in ML_DTYPES:
        return STORAGE[datatype]
    import ml_dtypes  # late: few models have such tensors

    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, ML_DTYPES[datatype]))
    return dtype


def as_float(array: Array, datatype: str) -> Array:
    """The values of an array as on the wire, as FP64; strings, which are equal or not, are all 0."""
    if datatype == BYTES:
        return np.zeros(array.shape)
    floats: Array = array.view(dtype_of(datatype)).astype(np.float64)
    return floats


def datatype_of(dtype: np.dtype[Any]) -> str | None:
    """The datatype whose values have a dtype; None: there is none, or only in another byte order."""
    return DATATYPES.get(dtype) or (_NAMES.get(dtype.name) if dtype.isnative else None)


def python_name(datatype: str) -> str:
    """The dtype of a datatype's values as a program names it: "np.float32", "ml_dtypes.bfloat16"."""
    if datatype in ML_DTYPES:
        return f"ml_dtypes.{ML_DTYPES[datatype]}"
    return "np.bool_" if datatype == "BOOL" else f"np.{STORAGE[datatype].name}"  # numpy 1 has no np.bool
