"""Requests to a server, made beforehand, and the answers that they must get."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from floors import Answer
from tnxctl.protocol import wire

MODEL = "mlp"

STAMP = struct.pack(">d", 314159265.35897932)
"""The time at which a request is sent, until it is known."""

FIRST_ID = 1 << 32
"""msgpack writes integers from here on in nine bytes: the headers of one workload differ in eight bytes alone."""

VARIANTS = 8
"""Inputs that take turns, so that an answer that belongs to another request shows."""

_COLUMNS = 256

Array = NDArray[Any]


class Workload:
    """Requests for one model, of one size.

    Args:
        model: its name. name: of its input.
        inputs, outputs: all of one shape each; they take turns. Outputs are float32.
        tolerance: relative and absolute, of an output that is right.
        prefer_gpu, deadline_us, priority: as in `wire.Predict`.
        stamped: whether each says when it is sent, for which STAMP stands.
        datatype: of the inputs.
    """

    def __init__(
        self,
        model: str,
        name: str,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        *,
        tolerance: float,
        prefer_gpu: bool = False,
        deadline_us: float | None = None,
        priority: int | None = None,
        stamped: bool = False,
        datatype: str = "FP32",
    ) -> None:
        self.prefer_gpu = prefer_gpu
        self._tolerance = tolerance
        self._inputs, self._outputs = inputs, outputs
        self._tensors = [array.tobytes() for array in inputs]
        spec = wire.TensorSpec(name, datatype, inputs[0].shape)
        header = wire.encode(
            wire.Predict(
                v=wire.VERSION,
                id=FIRST_ID,
                model=model,
                inputs=(spec,),
                prefer_gpu=prefer_gpu,
                deadline_us=deadline_us,
                priority=priority,
                sent_us=struct.unpack(">d", STAMP)[0] if stamped else None,
            )
        )
        self._before_id, self._after_id = _split_at_id(header)

    @property
    def variants(self) -> int:
        """The number of inputs that take turns."""
        return len(self._tensors)

    def request(self, number: int) -> tuple[bytes, bytes]:
        """The frames of request `number`, whose id is FIRST_ID + number."""
        id_ = (FIRST_ID + number).to_bytes(8, "big")
        return self._before_id + id_ + self._after_id, self._tensors[number % len(self._tensors)]

    def input(self, number: int) -> Array:
        """The tensor of request `number`."""
        return self._inputs[number % len(self._inputs)]

    def is_right(self, number: int, shape: tuple[int, ...] | None, tensor: bytes) -> bool:
        """Whether this shape and these bytes are the model's output for request `number`.

        Args:
            shape: None where the answer tells none.
        """
        expected = self._outputs[number % len(self._outputs)]
        if shape not in (None, expected.shape) or len(tensor) != expected.nbytes:
            return False
        output = np.frombuffer(tensor, "<f4").reshape(expected.shape)
        return np.allclose(output, expected, rtol=self._tolerance, atol=self._tolerance)

    def answer(self, header: bytes, tensor: bytes) -> Answer:
        """The answer of a floor in place of the server that gave this answer to request 0."""
        before, after = _split_at_id(header)
        return Answer(len(self._tensors[0]), len(self._before_id), before, after, tensor)


def _split_at_id(header: bytes) -> tuple[bytes, bytes]:
    before, after = header.split(FIRST_ID.to_bytes(8, "big"))
    return before, after


def mlp(rows: int, prefer_gpu: bool, forward: Callable[[Array], Array]) -> Workload:
    """Requests of so many rows for the daemon's default model.

    Args:
        forward: of the model, float32 [N, 256] -> float32 [N, 128].
    """
    generator = np.random.default_rng(rows)
    inputs = [generator.standard_normal((rows, _COLUMNS), np.float32) for _ in range(VARIANTS)]
    outputs = [forward(array) for array in inputs]
    return Workload(MODEL, "input", inputs, outputs, tolerance=1e-4, prefer_gpu=prefer_gpu)


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
