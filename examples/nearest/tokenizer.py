"""Texts to token ids, in the daemon: the first step of `nearest`. `build_nearest.py` makes it a model.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tnxctl.protocol.errors import InvalidArgument


class Model:
    def load(self, context: Any) -> None:
        self.tokenizer = Tokenizer.from_file(str(context.directory / "tokenizer.json"))
        self.tokenizer.enable_truncation(context.config["max_tokens"])
        self.tokenizer.enable_padding()

    def predict(self, text: Any) -> dict[str, Any]:
        try:
            encodings = self.tokenizer.encode_batch([element.decode() for element in text])
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"a text is not UTF-8: {error}") from None  # the client's mistake
        shape = (len(encodings), len(encodings[0]) if encodings else 0)
        return {
            "ids": np.array([encoding.ids for encoding in encodings], np.int64).reshape(shape),
            "mask": np.array([encoding.attention_mask for encoding in encodings], np.int64).reshape(shape),
        }
