"""1 MiB in and 1 MiB out through a model that does next to nothing: what the daemon's copies cost.

Run as a program, this is a tnxd with one model more, `pass`, which gives back what it gets.
"""

from __future__ import annotations

import torch

from floors import Answer
from tnxctl import wire
from tnxd.cli import main
from tnxd.models.builtin import BUILTIN
from tnxd.models.model import Model
from workload import FIRST_ID, Array, Workload, torch_forward

MODEL = "pass"

_COLUMNS = 1 << 18
_SHAPE = (1, _COLUMNS)


class Mebibyte(Workload):
    """Requests of 1 MiB for the model `pass`: float32 [1, 262144], each with its own output as the answer."""

    def __init__(self) -> None:
        super().__init__(1, False, torch_forward())
        array = self._array = torch.arange(_COLUMNS, dtype=torch.float32).reshape(_SHAPE).numpy()
        self._bytes = array.tobytes()
        header = wire.encode(
            wire.Predict(v=wire.VERSION, id=FIRST_ID, model=MODEL, inputs=(wire.TensorSpec("x", "FP32", _SHAPE),))
        )
        self._before, self._after = header.split(FIRST_ID.to_bytes(8, "big"))

    def request(self, number: int) -> tuple[bytes, bytes]:
        return self._before + (FIRST_ID + number).to_bytes(8, "big") + self._after, self._bytes

    def input(self, number: int) -> Array:
        return self._array

    def is_right(self, number: int, shape: tuple[int, ...], tensor: bytes) -> bool:
        return shape == _SHAPE and tensor == self._bytes

    def answer(self, header: bytes, tensor: bytes) -> Answer:
        before, after = header.split(FIRST_ID.to_bytes(8, "big"))
        return Answer(len(self._bytes), len(self._before), before, after, tensor)


def _register() -> None:
    BUILTIN[MODEL] = Model(
        name=MODEL,
        version="1",
        inputs=(wire.TensorSpec("x", "FP32", (-1, -1)),),
        outputs=(wire.TensorSpec("y", "FP32", (-1, -1)),),
        max_batch_size=0,  # no batch axis: nothing is gathered, every request is run as it came
        factory=torch.nn.Identity,
    )


if __name__ == "__main__":
    _register()
    main(prog_name="tnxd")
