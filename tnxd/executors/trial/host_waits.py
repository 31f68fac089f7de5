"""Operators that the host waits for, which no graph can hold: looked for while a forward runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tnxd.device_kinds import CPU

_MASKED = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})
"""Operators that wait where an index is a mask, and do not where it is numbers."""


class HostWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Search for operators that the host waits for. Attributes: found: name of the first; "": none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.found and _waits(func, args, kwargs):
            self.found = str(func)
        return func(*args, **kwargs)


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    tensors = [each for each in args if isinstance(each, torch.Tensor)]
    if func._schema.name in _MASKED:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if func._schema.name == "aten::copy_":
        return _on_host(tensors[0].device) != _on_host(tensors[1].device)
    to = kwargs.get("device")
    if to is not None and tensors and _on_host(torch.device(to)) != _on_host(tensors[0].device):
        return True
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _on_host(device: torch.device) -> bool:
    return device.type == CPU.name
