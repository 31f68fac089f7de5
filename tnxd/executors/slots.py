"""Slots: memory and events of the batches of a lane that are under way on an accelerator."""

from __future__ import annotations

from typing import Any

import torch

from tnxctl.protocol.wire import MIB
from tnxd.executors import arena
from tnxd.executors.accelerator import Accelerator
from tnxd.executors.arena import Layout, PinnedBlock

_MOST_KEPT = 256 * MIB
"""Memory of the device that a slot keeps for inputs. A larger batch has its own."""

_MOST_LAYOUTS = 64
"""Layouts that a slot keeps: sequence models bring a new one with every length."""


class Slot:
    """Memory and events of one batch that is under way. A batch has a slot from its beginning to its end.

    Attributes:
        inbound, answers: pinned memory for inputs and answers. room: for inputs, on the device.
        copying, in_ready: when the (last) copy to the device began, and was done. begun, computed: of the forward.
        packed: when answers can be copied. out_ready: when they have been.
        pieces: when the pieces of a large batch were copied.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.inbound = PinnedBlock(accelerator.pinned, arena.grown(0))
        self.answers = PinnedBlock(accelerator.pinned, arena.grown(0))
        self.room = self._new_room(arena.grown(0))
        self.copying, self.in_ready, self.begun, self.computed, self.packed, self.out_ready = (
            accelerator.event() for _ in range(6)
        )
        self.pieces = [accelerator.event() for _ in range(arena.PIECES)]
        self._layouts: dict[tuple[Any, ...], Layout] = {}

    def _new_room(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._accelerator.torch_device)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of its memory: for inputs on the host and on the device, and for answers."""
        return self.inbound.nbytes, len(self.room), self.answers.nbytes

    def grow(self, inbound: int, room: int, answers: int) -> bool:
        """Have memory for so many bytes, where it has less and may have more.

        Returns:
            Whether that on the device is new: what comes first on another stream than this thread's has to wait.
        """
        pinned = self._accelerator.pinned
        inbound, answers = min(inbound, arena.MOST_PINNED), min(answers, arena.MOST_PINNED)
        if self.inbound.nbytes < inbound:
            self._layouts.clear()
            self.inbound = PinnedBlock(pinned, arena.grown(inbound))
        if self.answers.nbytes < answers:
            self.answers = PinnedBlock(pinned, arena.grown(answers))
        if not len(self.room) < room <= _MOST_KEPT:
            return False
        self._layouts.clear()
        self.room = self._new_room(arena.grown(room))
        return True

    def layout(self, tensors: tuple[tuple[arena.Shape, str] | None, ...]) -> tuple[Layout, bool]:
        """The layout for tensors of these shapes and datatypes, and whether its memory on the device is new."""
        known = self._layouts.get(tensors)
        if known is not None:
            return known, False
        places, nbytes = arena.lay_out(tensors)
        fresh = self.grow(nbytes, nbytes, 0)
        room, kept = self.room, nbytes <= len(self.room)
        if not kept:
            room, fresh = self._new_room(nbytes), True
        whole = nbytes <= self.inbound.nbytes
        layout = Layout(
            places,
            nbytes,
            [arena.array_at(self.inbound.array, place) if whole and place else None for place in places],
            [arena.tensor_at(room, place) if place else None for place in places],
            self.inbound.tensor[:nbytes] if whole else None,
            room[:nbytes],
        )
        if kept:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[tensors] = layout
        return layout, fresh
