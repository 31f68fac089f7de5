"""Inbound: the way of a batch's inputs to an accelerator, by the arena of a slot and a stream of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.wire import BYTES
from tnxd.executors import arena
from tnxd.executors.accelerator import on_stream
from tnxd.executors.arena import Layout, Shape
from tnxd.executors.batching import Staging
from tnxd.executors.execution import Execution
from tnxd.executors.padding import pad, padded_shapes
from tnxd.executors.slots import Slot
from tnxd.models.model import Item
from tnxd.models.tensors import Value

Shapes = Sequence[Shape | None]
"""Shapes of the inputs of a batch; None for one that did not come."""


class Inbound:
    """Way of the inputs of a lane's batches to the device. Used by the lane's thread.

    Args:
        stream: that copies. compute: that the lane's thread computes on.
        staging: buffers for what is too large for an arena and has to be padded.
    """

    def __init__(self, stream: torch.Stream, compute: torch.Stream, staging: Staging) -> None:
        self.stream = stream
        self._compute = compute
        self._staging = staging

    def order(self) -> None:
        """Have copies wait for what the lane's stream does now: it may not be done with memory that was taken anew."""
        self.stream.wait_stream(self._compute)

    def send(
        self, slot: Slot, execution: Execution, items: Sequence[Item], rows: int, wanted: Callable[[Shapes], Shapes]
    ) -> Sequence[Value | None]:
        """Gather the inputs and enqueue their way to the device; `slot.in_ready` tells when they are there.

        Args:
            items: of which the batch is. rows: of all items.
            wanted: the shapes that the device is to have, given those of the batch; see
                `tnxd.executors.accelerator_runner.AcceleratorRunner.shapes_on_device`.

        Returns:
            The inputs as they will be there. BYTES stay on the host.
        """
        began = time.perf_counter_ns()
        model, ragged = execution.model, execution.model.ragged
        packed = model.joins and ragged is not None and ragged.packed
        padded = model.joins and not packed
        counted = model.max_batch_size and not packed  # whether axis 0 of what the model gets counts rows
        shapes: Shapes
        if padded:
            shapes = padded_shapes(model, items, rows)
        else:
            if packed:
                assert ragged is not None
                items = [tuple(ragged.pack(items, model.name))]
            shapes = [
                None if array is None else (rows, *array.shape[1:]) if counted else array.shape for array in items[0]
            ]
        shapes = wanted(shapes)
        layout, fresh = slot.layout(
            tuple(
                [
                    None if shape is None or spec.datatype == BYTES else (shape, spec.datatype)
                    for shape, spec in zip(shapes, model.arguments, strict=True)
                ]
            )
        )
        if fresh:
            self.order()
        if padded:

            def room(position: int, shape: Shape, dtype: np.dtype[Any]) -> Array:
                within = layout.arrays[position]
                if within is None:
                    return self._staging.room(model.key, execution.group, position, (rows, *shape[1:]), dtype)
                return within[:rows]

            items = [tuple(pad(room, model, items, shapes))]
        if layout.source is None:
            self._send_pieces(slot, layout, items, rows)
            execution.gather_us += (time.perf_counter_ns() - began) / 1e3
        else:
            for position, into in enumerate(layout.arrays):
                if into is None:
                    continue
                if not padded:
                    _put_below_each_other([item[position] for item in items], into)
                if counted and len(into) > rows:
                    into[rows:] = into[rows - 1]  # values that the model takes, whatever they are
            execution.gather_us += (time.perf_counter_ns() - began) / 1e3
            with on_stream(self.stream, self._compute):
                slot.copying.record(self.stream)
                if layout.nbytes:
                    layout.target.copy_(layout.source, non_blocking=True)
                slot.in_ready.record(self.stream)
        return [
            tensor if place is not None else _on_host([item[position] for item in items])
            for position, (place, tensor) in enumerate(zip(layout.places, layout.tensors, strict=True))
        ]

    def _send_pieces(self, slot: Slot, layout: Layout, items: Sequence[Item], rows: int) -> None:
        """Send a batch that is larger than the arena: while a piece is gathered, those before it are copied."""
        sources: list[tuple[int, Array]] = []
        for position, place in enumerate(layout.places):
            if place is None:
                continue
            at = place.offset
            parts: list[Array] = [item[position] for item in items]  # type: ignore[misc]
            flat = [np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts]
            missing = place.nbytes - sum(map(len, flat))
            if missing:  # rows beyond those of the batch
                flat += [np.ascontiguousarray(parts[-1][-1]).reshape(-1).view(np.uint8)] * (place.shape[0] - rows)
            for source in flat:
                sources.append((at, source))
                at += len(source)
        inbound = slot.inbound
        size = inbound.nbytes // arena.PIECES
        with on_stream(self.stream, self._compute):
            for number, start in enumerate(range(0, layout.nbytes, size)):
                turn = number % arena.PIECES
                copied = slot.pieces[turn]
                if number >= arena.PIECES:
                    copied.synchronize()
                count = min(size, layout.nbytes - start)
                at = turn * size
                arena.fill_piece(inbound.array[at : at + count], start, sources)
                slot.copying.record(self.stream)
                layout.target[start : start + count].copy_(inbound.tensor[at : at + count], non_blocking=True)
                copied.record(self.stream)
            slot.in_ready.record(self.stream)


def _put_below_each_other(parts: Sequence[Array | None], into: Array) -> None:
    if len(parts) == 1:
        part = parts[0]
        assert part is not None
        if part.shape:
            into[: len(part)] = part
        else:
            into[...] = part
    else:
        np.concatenate(parts, out=into[: sum(map(len, parts))])  # type: ignore[arg-type]


def _on_host(parts: Sequence[Array | None]) -> Array | None:
    """An input that does not go to the device."""
    return parts[0] if parts[0] is None or len(parts) == 1 else np.concatenate(parts)  # type: ignore[arg-type]
