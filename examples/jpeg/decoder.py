"""JPEG files to what the digits network takes: the first step of `digit`. `build_jpeg.py` makes it a model.py."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from tnxctl.protocol.errors import InvalidArgument

SIDE = 8
BRIGHTEST = 16.0
MOST_PIXELS = 16_000_000


class Model:
    def preprocess(self, jpeg: bytes) -> dict[str, Any]:
        """One row, on a thread of its own: Pillow lets go of the interpreter while it decodes."""
        try:
            picture = Image.open(io.BytesIO(jpeg), formats=["JPEG"])
            if picture.width * picture.height > MOST_PIXELS:  # which a small file can have
                raise InvalidArgument(f"a picture has {picture.width} x {picture.height} pixels, too many")
            grey = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
        except UnidentifiedImageError:
            raise InvalidArgument("this is no JPEG") from None  # the client's mistake
        except (OSError, Image.DecompressionBombError) as error:
            raise InvalidArgument(f"this JPEG cannot be read: {error}") from None
        return {"image": np.asarray(grey, np.float32).ravel() * (BRIGHTEST / 255)}

    def predict(self, image: Any) -> dict[str, Any]:
        return {"image": image}
