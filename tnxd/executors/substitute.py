"""Substitute: a variant in the place of a network, which answers itself what the variant may answer otherwise.

The trial compares answers to a few inputs. A variant was made of a program, and that of lengths which were tried: of
others the network may think otherwise. So whatever a variant does not take is the network's to answer or to refuse, and
so are values that programs treat each in a way of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tnxctl.protocol.errors import InvalidArgument
from tnxd.device_kinds import KINDS
from tnxd.executors.trial.copies import Call

_MOST_WHOLE = 1 << 24
"""Most that FP32 holds, with all whole numbers below."""

_SMALL = frozenset({torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16})
"""Datatypes that are usual whatever is in them."""


class Substitute(torch.nn.Module):
    """A variant in the place of a network.

    Args:
        variant: answers first. network: the network as it is, for inputs that are empty or of lengths that the variant
            does not take; on a CPU also for unusual values, and where the variant raises.
        device: of both.
    """

    def __init__(self, variant: torch.nn.Module, network: Call, device: torch.device) -> None:
        super().__init__()
        self.variant = variant
        self.network = network
        # Elsewhere an error may be the end of the device, and to look at values is to wait for them.
        self._careful = KINDS[device.type].survives_bad_index

    def forward(self, *inputs: torch.Tensor | None) -> Any:
        if all(tensor is None or (tensor.numel() and self._is_usual(tensor)) for tensor in inputs):
            try:
                return self.variant(*inputs)
            except InvalidArgument:  # lengths that it was not made for
                pass
            except MemoryError:
                raise
            except Exception:
                if not self._careful:
                    raise
        return self.network(*inputs)

    def _is_usual(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has values that programs treat alike.

        There is neither infinity nor NaN in it, nor such large values that their sum is no number, nor a whole number
        that FP32 cannot hold: onnxruntime divides and sums up integers by way of it.
        """
        if not self._careful or tensor.dtype in _SMALL:
            return True
        if tensor.is_floating_point():
            wide = tensor.dtype if tensor.dtype is torch.float64 else torch.float32
            return math.isfinite(tensor.sum(dtype=wide).item())
        least, most = (tensor if tensor.dtype.is_signed else tensor.to(torch.int64)).aminmax()  # which torch lacks
        return least.item() >= -_MOST_WHOLE and most.item() <= _MOST_WHOLE
