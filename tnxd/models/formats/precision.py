"""Running a network in another datatype than the one that its signature shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tnxctl.protocol.errors import Internal
from tnxctl.protocol.wire import TensorSpec
from tnxd.models.tensors import TORCH_DTYPES, pick


class Precision(torch.nn.Module):
    """Network in another datatype: inputs are converted to it, outputs back from it. Integers and booleans stay.

    Args:
        network: converted in place.
        dtype: to run in.
        outputs: the signature that its results are converted to.
    """

    def __init__(self, network: torch.nn.Module, dtype: torch.dtype, outputs: Sequence[TensorSpec]) -> None:
        super().__init__()
        self.network = network.to(dtype)
        self._dtype = dtype
        self._names = [spec.name for spec in outputs]
        self._dtypes = [TORCH_DTYPES[spec.datatype] for spec in outputs]

    def forward(self, *inputs: torch.Tensor | None) -> Any:
        raw = self.network(
            *[
                tensor.to(self._dtype) if tensor is not None and tensor.is_floating_point() else tensor
                for tensor in inputs
            ]
        )
        if isinstance(raw, torch.Tensor):
            return self._back(raw, self._dtypes[0])
        try:
            found = pick(raw, self._names, "")
        except Internal:
            return raw  # whatever it is, it does not fit the signature, and who checks that says so
        return tuple([self._back(value, dtype) for value, dtype in zip(found, self._dtypes, strict=True)])

    def _back(self, value: Any, dtype: torch.dtype) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point() and dtype.is_floating_point
        return value.to(dtype) if floating else value
