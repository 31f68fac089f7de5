"""What is asked of every server: requests for the model `mlp`, made beforehand, and the answers they must get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from floors import Answer
from tnxctl import wire

MODEL = "mlp"

FIRST_ID = 1 << 32
"""msgpack writes integers from here on in nine bytes: the headers of one workload differ in eight bytes alone."""

_COLUMNS = 256
_VARIANTS = 8  # inputs that take turns, so that an answer that belongs to another request shows

Array = NDArray[Any]


class Workload:
    """Requests of one size.

    Args:
        rows: of each request.
        prefer_gpu: as in `wire.Predict`.
        model: the forward, float32 [N, 256] -> float32 [N, 128].
    """

    def __init__(self, rows: int, prefer_gpu: bool, model: Callable[[Array], Array]) -> None:
        self.rows = rows
        self.prefer_gpu = prefer_gpu
        generator = np.random.default_rng(rows)
        self._inputs = [generator.standard_normal((rows, _COLUMNS), np.float32) for _ in range(_VARIANTS)]
        self._outputs = [model(array) for array in self._inputs]
        self._tensors = [array.tobytes() for array in self._inputs]
        header = wire.encode(
            wire.Predict(
                v=wire.VERSION,
                id=FIRST_ID,
                model=MODEL,
                inputs=(wire.TensorSpec("input", "FP32", (rows, _COLUMNS)),),
                prefer_gpu=prefer_gpu,
            )
        )
        self._before_id, self._after_id = _split_at_id(header)

    def request(self, number: int) -> tuple[bytes, bytes]:
        """The frames of request `number`, whose id is FIRST_ID + number."""
        id_ = (FIRST_ID + number).to_bytes(8, "big")
        return self._before_id + id_ + self._after_id, self._tensors[number % _VARIANTS]

    def input(self, number: int) -> Array:
        """The tensor of request `number`."""
        return self._inputs[number % _VARIANTS]

    def is_right(self, number: int, shape: tuple[int, ...], tensor: bytes) -> bool:
        """Whether this shape and these bytes are the model's output for request `number`, up to rounding."""
        expected = self._outputs[number % _VARIANTS]
        if shape != expected.shape or len(tensor) != expected.nbytes:
            return False
        return np.allclose(np.frombuffer(tensor, "<f4").reshape(shape), expected, rtol=1e-4, atol=1e-4)

    def answer(self, header: bytes, tensor: bytes) -> Answer:
        """What a floor answers in place of the server that gave this answer to request 0."""
        before, after = _split_at_id(header)
        return Answer(len(self._tensors[0]), len(self._before_id), before, after, tensor)


def _split_at_id(header: bytes) -> tuple[bytes, bytes]:
    before, after = header.split(FIRST_ID.to_bytes(8, "big"))
    return before, after


def torch_forward() -> Callable[[Array], Array]:
    """The forward of the model `mlp` on this thread."""
    import torch

    from tnxd.models.builtin import builtin

    torch.set_num_threads(1)
    net = builtin(MODEL).factory()

    def forward(array: Array) -> Array:
        with torch.inference_mode():
            output: Array = net(torch.from_numpy(array)).numpy()
        return output

    return forward
