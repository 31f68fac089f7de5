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


class Substitute(torch.nn.Module):
    """A variant in the place of a network.

    Args:
        variant: answers first. network: the network as it is, for inputs that are empty or of lengths that the variant
            does not take; on a CPU also for those that are not finite, and where the variant raises.
        device: of both.
    """

    def __init__(self, variant: torch.nn.Module, network: Call, device: torch.device) -> None:
        super().__init__()
        self.variant = variant
        self.network = network
        # Elsewhere an error may be the end of the device, and to look at values is to wait for them.
        self._careful = KINDS[device.type].survives_bad_index

    def forward(self, *inputs: torch.Tensor | None) -> Any:
        if all(tensor is None or (tensor.numel() and self._is_finite(tensor)) for tensor in inputs):
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

    def _is_finite(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has neither infinity nor NaN in it, nor such large values that their sum is no number."""
        if not self._careful or not tensor.is_floating_point():
            return True
        wide = tensor.dtype if tensor.dtype is torch.float64 else torch.float32
        return math.isfinite(tensor.sum(dtype=wide).item())
