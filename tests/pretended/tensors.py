"""Tensors of pretended devices: plain torch tensors of a CUDA device, over memory of this process.

Programs cannot touch that memory: torch has no kernels for such tensors here but those of `pretended.operations`, which
look at it through tensors of the CPU when the work is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pretended import dlpack
from pretended.devices import Device
from pretended.errors import Unpretended
from pretended.memory import Block
from pretended.streams import active

aten = torch.ops.aten


class Place(NamedTuple):
    """Where a tensor lies: as much of it as late work needs, which must not keep the tensor itself alive."""

    block: Block | None
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def open(self) -> torch.Tensor:
        """A tensor of the CPU over the same memory."""
        if self.block is None:
            return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="cpu")
        made = torch.empty(0, dtype=self.dtype, device="cpu")
        return made.set_(self.block.bytes.untyped_storage(), self.offset, self.size, self.stride)


def is_pretended(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def place(tensor: torch.Tensor) -> Place:
    """Where a tensor of a pretended device lies."""
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        raise Unpretended(f"a tensor of layout {tensor.layout}, or a conjugate or negative view")
    block = None
    if tensor.numel():
        block = active.machine.blocks.get(tensor.untyped_storage().data_ptr())
        if block is None:
            raise Unpretended("a tensor whose memory comes from elsewhere")
    return Place(block, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())


def new(device: Device, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A new tensor on a device, in the memory of its current stream. Nobody has written to it.

    Raises:
        torch.OutOfMemoryError: there is no memory left.
    """
    machine = device.machine
    extent = 0 if 0 in size else 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    with machine.lock:
        block = device.memory.allocate(extent * dtype.itemsize, machine.current_stream(device.index))
        machine.blocks[block.address] = block
    return _over(block, device, size, stride, dtype)


def whole(block: Block, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over all of a block, with a storage of its own."""
    return _over(block, block.stream.owner, (block.nbytes // dtype.itemsize,), (1,), dtype)


def _over(block: Block, device: Device, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    machine = device.machine
    block.storages += 1

    def free() -> None:
        block.storages -= 1
        if not block.storages:
            del machine.blocks[block.address]
            device.memory.free(block)

    return dlpack.tensor(block.address, size, stride, dtype, device.index, on_free=lambda: machine.freed.append(free))


def view(base: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A view of a tensor. Args: like: a tensor of the same type, size, strides and offset."""
    if like.dtype is not base.dtype:
        raise Unpretended(f"a view of {base.dtype} as {like.dtype}")
    made = aten.alias(base)
    aten.as_strided_(made, like.size(), like.stride(), like.storage_offset())
    return made


def resize(tensor: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Give a tensor another size, and memory where it has too little."""
    like = torch.empty(size, dtype=tensor.dtype, device="meta")
    if tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + like.numel()) * tensor.dtype.itemsize:
        aten.as_strided_(tensor, like.size(), like.stride(), tensor.storage_offset())
    else:
        tensor.data = new(active.machine.device(tensor.device), like.size(), like.stride(), tensor.dtype)
    return tensor
