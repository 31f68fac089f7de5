"""Vectors to the nearest of some sentences: the last step of `nearest`. `build_nearest.py` makes it a model.py."""

from __future__ import annotations

from typing import Any

import numpy as np


class Model:
    def load(self, context: Any) -> None:
        lines = (context.directory / "sentences.txt").read_bytes().splitlines()
        self.sentences = np.array(lines, object)
        self.vectors = np.load(context.directory / "vectors.npy")

    def predict(self, embeddings: Any) -> dict[str, Any]:
        cosines = embeddings @ self.vectors.T
        return {"sentence": self.sentences[cosines.argmax(axis=1)], "score": cosines.max(axis=1)}
