"""Machines on which devices can be pretended."""

from __future__ import annotations

import torch


def skip_where_impossible() -> None:
    """Skip the test where torch was built with CUDA: it has kernels of its own, and they go before pretended ones."""
    if torch.backends.cuda.is_built():
        import pytest  # here, since daemons import this module, too

        pytest.skip("a torch that was built with CUDA cannot pretend to have it")
