"""Operations on tensors of pretended devices: torch's dispatcher brings them here, on every thread.

An operation finds the shapes of its results with torch's meta kernels, allocates them, and puts the work itself, done
by the kernels of the CPU, into the queue of the current stream. Operations whose results decide about the program (a
number, a shape that depends on values) wait for the stream, as on CUDA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pretended.capture import refuse_in_capture
from pretended.devices import Device, Machine
from pretended.errors import Unpretended
from pretended.streams import Stream, active
from pretended.tensors import Place, is_pretended, new, place, resize, view, whole
from pretended.work import Work

aten = torch.ops.aten

_BELOW = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

# Of operations that take a tensor of the CPU beside those of the device.
_TAKES_HOST = ("aten::index", "aten::_index_put_impl_", "aten::index_put_", "aten::index_put")


class _Nature:
    """Facts of an operation, as its schema has them.

    Attributes:
        views: its result is a view. waits: its result is a number, or has a shape that depends on values. draws: it
            draws random numbers. takes_host: it takes tensors of the host beside those of the device. written: by the
            mark of the schema, position and name of each argument that it writes to. returns: for each result the mark
            of the argument that it is; None: it is new. grows: it gives the results that it is given their size.
    """

    def __init__(self, op: Any) -> None:
        schema = op._schema
        marks = [None if each.alias_info is None else each.alias_info for each in schema.returns]
        self.views = any(mark is not None and not mark.is_write for mark in marks)
        self.waits = any(tag in op.tags for tag in _BELOW) or any("Tensor" not in str(r.type) for r in schema.returns)
        self.draws = torch.Tag.nondeterministic_seeded in op.tags
        self.takes_generator = any(argument.name == "generator" for argument in schema.arguments)
        self.takes_host = schema.name in _TAKES_HOST
        self.written = {
            mark: (position, argument.name)
            for position, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for mark in argument.alias_info.before_set
        }
        self.returns = [None if mark is None else next(iter(mark.before_set)) for mark in marks]
        self.grows = any(argument.is_out for argument in schema.arguments)


_nature = functools.cache(_Nature)


def dispatch(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Do an operation on tensors of a device."""
    special = _SPECIAL.get(op)
    if special is not None:
        return special(*args, **kwargs)
    values, spec = tree_flatten((args, kwargs))
    nature = _nature(op)
    machine = active.machine
    device = _common_device(machine, op, nature, values)
    if nature.views:
        base = next(value for value in values if is_pretended(value))
        return _each(op(*tree_map(_opened, args), **tree_map(_opened, kwargs)), lambda part: view(base, part))
    if nature.waits:
        compute = _computation(op, nature, device, values, spec)
        return _each(now(machine, machine.current_stream(device.index), compute), lambda part: _uploaded(device, part))
    return _issued(op, nature, device, values, spec)


def _common_device(machine: Machine, op: Any, nature: _Nature, values: list[Any]) -> Device:
    """The device that all tensors are on. Raises RuntimeError: they are on several."""
    found: torch.device | None = None
    host: torch.device | None = None
    for value in values:
        if isinstance(value, torch.Tensor):
            if not value.is_cuda:
                if value.dim() and not nature.takes_host:
                    host = value.device
            elif found is None:
                found = value.device
            elif value.device != found:
                host = value.device
    if found is None:
        raise Unpretended(f"{op} without a tensor of the device")
    if host is not None:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {found} and {host}!"
        )
    return machine.devices[found.index]


def _issued(op: Any, nature: _Nature, device: Device, values: list[Any], spec: Any) -> Any:
    """Issue an operation, and return its results, to which it has not written yet."""
    machine = device.machine
    results = _allocated(op, nature, device, values, spec)
    compute = _computation(op, nature, device, values, spec)
    fresh = [
        place(result) if mark is None and isinstance(result, torch.Tensor) else None
        for result, mark in zip(results, nature.returns, strict=True)
    ]

    def run() -> None:
        computed = compute()
        for target, part in zip(fresh, computed if isinstance(computed, (tuple, list)) else [computed], strict=True):
            if target is None:
                continue
            if target.size == part.shape:
                target.open().copy_(part)
            elif part.numel() and 0 not in target.size:  # else one of them leaves out what only training needs
                raise Unpretended(f"{op}: {list(part.shape)} on the CPU, {list(target.size)} by its meta kernel")

    stream = machine.current_stream(device.index)
    machine.issue(stream, Work(stream, run if any(fresh) else lambda: _ignore(compute())))
    return results[0] if len(results) == 1 else tuple(results)


def _computation(op: Any, nature: _Nature, device: Device, values: list[Any], spec: Any) -> Callable[[], Any]:
    """Work of an operation when it is run, with the arguments that it has now."""
    device.machine.counts["kernels"] += 1
    frozen = [_frozen(value) for value in values]
    seed = _seed(device) if nature.draws else None

    def compute() -> Any:
        args, kwargs = tree_unflatten([value.open() if isinstance(value, Place) else value for value in frozen], spec)
        if seed is None:
            return op(*args, **kwargs)
        return _drawn(op, nature, seed, args, kwargs)

    return compute


def now(machine: Machine, stream: Stream, compute: Callable[[], Any]) -> Any:
    """Compute once all work of a stream is done, while the caller waits, and return the result."""
    refuse_in_capture(machine, stream)
    machine.counts["waits_for_values"] += 1
    result: list[Any] = []
    machine.wait(machine.issue(stream, Work(stream, lambda: result.append(compute()))))
    return result[0]


def _ignore(_: Any) -> None: ...


def _opened(value: Any) -> Any:
    return place(value).open() if is_pretended(value) else value


def _frozen(value: Any) -> Any:
    """A value as late work takes it: tensors of the host with the content that they have now."""
    if is_pretended(value):
        return place(value)
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value


def _each(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_each(part, change) for part in value)
    return value


def _uploaded(device: Device, value: torch.Tensor) -> torch.Tensor:
    made = new(device, value.size(), value.stride(), value.dtype)
    place(made).open().copy_(value)
    return made


def _meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.is_cuda:
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
        return value if not value.dim() else value.to("meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    return value


def _allocated(op: Any, nature: _Nature, device: Device, values: list[Any], spec: Any) -> list[Any]:
    """The results of an operation before it is done: arguments that it writes to, and new tensors."""
    args, kwargs = tree_unflatten(values, spec)

    def given(mark: str) -> Any:
        position, name = nature.written[mark]
        return args[position] if position < len(args) else kwargs.get(name)

    grows = nature.grows and not all(given(mark).numel() for mark in nature.written)
    if None not in nature.returns and not grows:
        return [given(mark) for mark in nature.returns]
    metas = [_meta(value) for value in values]
    meta_args, meta_kwargs = tree_unflatten(metas, spec)
    found = op(*meta_args, **meta_kwargs)
    if grows:
        for value, meta in zip(values, metas, strict=True):
            if is_pretended(value) and value.shape != meta.shape:
                resize(value, meta.shape)
    return [
        given(mark)
        if mark is not None
        else new(device, part.size(), part.stride(), part.dtype)
        if isinstance(part, torch.Tensor)
        else part
        for part, mark in zip(found if isinstance(found, (tuple, list)) else [found], nature.returns, strict=True)
    ]


def _seed(device: Device) -> int:
    """A seed for one operation that draws random numbers, drawn from those of its device."""
    with torch.inference_mode(False):
        return int(torch.randint(2**62, (), generator=device.generator, device="cpu"))


def _drawn(op: Any, nature: _Nature, seed: int, args: Any, kwargs: Any) -> Any:
    """The result of an operation with random numbers of a seed."""
    if nature.takes_generator:
        return op(*args, **{**kwargs, "generator": torch.Generator(device="cpu").manual_seed(seed)})
    kept = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        return op(*args, **kwargs)
    finally:
        torch.default_generator.set_state(kept)


# --- operations of their own -------------------------------------------------------------------------------------


def _device_of(device: Any) -> Device:
    return active.machine.device("cuda" if device is None else device)


def _empty(size: Any, *, dtype: Any = None, device: Any = None, memory_format: Any = None, **_: Any) -> torch.Tensor:
    like = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format or torch.contiguous_format)
    return new(_device_of(device), like.size(), like.stride(), like.dtype)


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    return new(_device_of(device), size, stride, dtype or torch.get_default_dtype())


def _resize(tensor: torch.Tensor, size: Any, *, memory_format: Any = None) -> torch.Tensor:
    return resize(tensor, size)


def _item(tensor: torch.Tensor) -> Any:
    machine = active.machine
    stream = machine.current_stream(tensor.device)
    where = place(tensor)
    return now(machine, stream, lambda: where.open().item())


def _set(tensor: torch.Tensor, source: Any, offset: int = 0, size: Any = None, stride: Any = ()) -> torch.Tensor:
    made = whole(active.machine.blocks[source.data_ptr()], tensor.dtype)
    if size is not None:
        aten.as_strided_(made, size, stride or torch.empty(size, device="meta").stride(), offset)
    tensor.data = made
    return tensor


def _set_like(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    tensor.data = aten.alias(source)
    return tensor


def storage_clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy of a storage, as copies of tensors have it."""
    block = active.machine.blocks[storage.data_ptr()]
    return aten.clone(whole(block, torch.uint8)).untyped_storage()


def to_copy(
    tensor: torch.Tensor,
    *,
    dtype: Any = None,
    device: Any = None,
    non_blocking: bool = False,
    memory_format: Any = None,
    **_: Any,
) -> torch.Tensor:
    target = tensor.device if device is None else torch.device(device)
    like = aten._to_copy(_meta(tensor), dtype=dtype, memory_format=memory_format)
    if target.type == "cuda":
        made = new(_device_of(target), like.size(), like.stride(), like.dtype)
    elif non_blocking:
        made = pinned(like.size(), like.stride(), like.dtype)
    else:
        made = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=target)
    return made.copy_(tensor, non_blocking)


def pinned(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in pinned memory."""
    extent = 0 if 0 in size else 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    bytes_ = active.machine.host.allocate(max(extent, 1) * dtype.itemsize)
    return bytes_.view(dtype).as_strided(size, stride)


def is_pinned(tensor: torch.Tensor) -> bool:
    return not tensor.is_cuda and active.machine.host.is_pinned(tensor.untyped_storage().data_ptr())


def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy between a device and the host, or within a device, or between two.

    Only copies from and to pinned memory are left to the stream. Memory of the host is read, or written, when the work
    is done; until then the copy keeps it alive, as torch does by events.
    """
    machine = active.machine
    if target.is_cuda and source.is_cuda:
        _copy_on_devices(machine, target, source)
        return target
    device = machine.devices[(target if target.is_cuda else source).device.index]
    stream = machine.current_stream(device.index)
    direction = "host_to_device" if target.is_cuda else "device_to_host"
    machine.counts[direction] += 1
    host = source if target.is_cuda else target
    waits = not (non_blocking and is_pinned(host))
    if waits:
        refuse_in_capture(machine, stream)
        machine.counts["waiting_copies"] += 1
    to, from_ = _frozen_place(target), _frozen_place(source)
    work = machine.issue(stream, Work(stream, lambda: _copy(to, from_)))
    if waits:
        machine.wait(work)
    return target


def _frozen_place(tensor: torch.Tensor) -> Any:
    return place(tensor) if tensor.is_cuda else tensor.detach()


def _copy(target: Any, source: Any) -> None:
    target = target.open() if isinstance(target, Place) else target
    source = source.open() if isinstance(source, Place) else source
    with torch.inference_mode(target.is_inference()):  # elsewhere nobody may write to what was made in that mode
        target.copy_(source)


def _copy_on_devices(machine: Machine, target: torch.Tensor, source: torch.Tensor) -> None:
    stream = machine.current_stream(source.device)
    other = machine.current_stream(target.device)
    to, from_ = place(target), place(source)
    machine.counts["kernels"] += 1
    if stream.owner is not other.owner:  # torch copies on the stream of the source, and lets the other wait
        stream.wait_stream(other)
    work = machine.issue(stream, Work(stream, lambda: _copy(to, from_)))
    if stream.owner is not other.owner:
        machine.issue(other, Work(other, lambda: None, (work,)))


def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
    """Let the memory of a tensor be taken again only once a stream is done with it."""
    block = place(tensor).block
    if block is not None:
        block.users.add(stream)


def index(tensor: torch.Tensor, indices: Any) -> torch.Tensor:
    """Advanced indexing. Only masks wait for the device."""
    plain: list[torch.Tensor | None] = []
    for each in indices:
        if each is not None and each.dtype in (torch.bool, torch.uint8):
            plain.extend(each.to(tensor.device).nonzero().unbind(1))
        else:
            plain.append(each)
    op = aten.index.Tensor
    values, spec = tree_flatten(((tensor, plain), {}))
    nature = _nature(op)
    result: torch.Tensor = _issued(op, nature, _common_device(active.machine, op, nature, values), values, spec)
    return result


def convolution(*args: Any, **kwargs: Any) -> torch.Tensor:
    result: torch.Tensor = dispatch(aten.convolution.default, *args, **kwargs)
    return result


def _lstm_cell(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    cx: torch.Tensor,
    input_bias: Any = None,
    hidden_bias: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cell of an LSTM, for which only CUDA has a kernel."""
    gates = input_gates + hidden_gates
    if input_bias is not None:
        gates = gates + input_bias + hidden_bias
    enter, forget, cell, leave = gates.chunk(4, 1)
    cy = forget.sigmoid() * cx + enter.sigmoid() * cell.tanh()
    return leave.sigmoid() * cy.tanh(), cy, gates


def _gru_cell(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    hx: torch.Tensor,
    input_bias: Any = None,
    hidden_bias: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cell of a GRU, for which only CUDA has a kernel."""
    if input_bias is not None:
        input_gates, hidden_gates = input_gates + input_bias, hidden_gates + hidden_bias
    reset, update, new_gate = input_gates.chunk(3, 1)
    hidden_reset, hidden_update, hidden_new = hidden_gates.chunk(3, 1)
    update = (update + hidden_update).sigmoid()
    candidate = (new_gate + (reset + hidden_reset).sigmoid() * hidden_new).tanh()
    return candidate + update * (hx - candidate), input_gates


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten.empty.memory_format: _empty,
    aten.empty_strided.default: _empty_strided,
    aten.resize_.default: _resize,
    aten._local_scalar_dense.default: _item,
    aten.set_.source_Storage: _set,
    aten.set_.source_Storage_storage_offset: _set,
    aten.set_.source_Tensor: _set_like,
    aten.copy_.default: copy_,
    aten._thnn_fused_lstm_cell.default: _lstm_cell,
    aten._thnn_fused_gru_cell.default: _gru_cell,
}
