"""Image files as tensors, where Pillow is installed. They are decoded, and neither resized nor scaled nor turned."""

from __future__ import annotations

import io
import math
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tnxctl.cli.exits import FileProblem
from tnxctl.protocol.errors import InvalidArgument

if TYPE_CHECKING:
    from tnxctl.protocol.datatypes import Array
    from tnxctl.protocol.wire import ModelInfo, TensorSpec

_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by the number of channels
_DEEP = ("I", "F")  # what modes of more than 8 bits for each channel begin with; they have one channel


def is_image(content: bytes) -> bool:
    """Whether a file is an image, by its first bytes."""
    return content.startswith(_MAGIC) or (content.startswith(b"RIFF") and content[8:12] == b"WEBP")


def decode(name: str, content: bytes) -> Any:
    """The image of a file, as Pillow has it.

    Raises:
        FileProblem: Pillow is missing, or it cannot decode this, or there are several images in it.
    """
    try:
        from PIL import Image
    except ImportError:
        raise FileProblem(
            f"cannot read {name}: it is an image, and Pillow, which decodes them, is not installed: "
            + shlex.join([sys.executable or "python3", "-m", "pip", "install", "pillow"])
        ) from None
    try:
        with warnings.catch_warnings(action="error"):  # as about images that are implausibly large
            image = Image.open(io.BytesIO(content))
            frames = getattr(image, "n_frames", 1)
            image.load()
    except Exception as error:  # decoders fail in many ways
        raise FileProblem(f"cannot read {name}: {str(error) or type(error).__name__}") from None
    if frames > 1:
        raise FileProblem(f"cannot read {name}: it has {frames} images, and one is one input")
    return image


def to_array(name: str, image: Any, model: ModelInfo) -> Array:
    """The image in the layout of the model's only input, one row of it: channels first or last, or none for grey.

    Values are those of the file: 0 to 255, as a rule. Colours become those of the model: grey, RGB or RGBA.

    Raises:
        InvalidArgument: the model takes no image, or one of another size; or it would lose its transparency.
    """
    import numpy as np

    if len(model.inputs) != 1:
        raise InvalidArgument(f"{name} is one image, and model {model.name!r} takes {len(model.inputs)} inputs")
    spec = model.inputs[0]
    channels, channel_axis, height, width = _layout(name, spec, bool(model.max_batch_size))
    if any(wanted not in (-1, has) for wanted, has in ((width, image.width), (height, image.height))):
        raise InvalidArgument(
            f"{name} is {image.width} x {image.height} pixels, and input {spec.name!r} takes "
            f"{_length(width)} x {_length(height)}: resize it first, that is never done here"
        )
    if channels != 4 and "A" in image.getbands() and image.getchannel("A").getextrema()[0] < 255:
        raise InvalidArgument(f"{name} is transparent in parts, and input {spec.name!r} takes {channels} channels")
    if not image.mode.startswith(_DEEP):
        image = image.convert(_MODES[channels])
    elif channels != 1:
        raise InvalidArgument(f"{name} is grey of more than 8 bits, and input {spec.name!r} takes {channels} channels")
    array: Array = np.asarray(image)
    if channel_axis is not None:
        array = np.moveaxis(array.reshape(image.height, image.width, channels), -1, channel_axis)
    return array.reshape((1,) * (len(spec.shape) - array.ndim) + array.shape)


def _layout(name: str, spec: TensorSpec, batches: bool) -> tuple[int, int | None, int, int]:
    """The channels that an input has, on which axis of an image (None: on none), and its height and width."""
    body: Sequence[int] = spec.shape[1:] if batches else spec.shape
    while len(body) > 3 and body[0] in (1, -1):
        body = body[1:]
    if len(body) == 3 and body[0] in _MODES:
        return body[0], 0, body[1], body[2]
    if len(body) == 3 and body[2] in _MODES:
        return body[2], 2, body[0], body[1]
    if len(body) == 3 and body[0] == -1 and not batches:
        body = body[1:]
    if len(body) != 2 or math.prod(body) == 0:
        raise InvalidArgument(
            f"{name} is an image, and input {spec.name!r} takes {list(spec.shape)}, which is none: "
            f"[..., 3, height, width] is, [..., height, width, 3], and [..., height, width] for grey"
        )
    return 1, None, body[0], body[1]


def _length(axis: int) -> str:
    return "any" if axis < 0 else str(axis)
