"""Scores to a label and its probability: the last step of `digit`. `build_jpeg.py` makes it a model.py."""

from __future__ import annotations

from typing import Any

import numpy as np


class Model:
    def load(self, context: Any) -> None:
        self.labels = np.array([label.encode() for label in context.config["labels"]], object)

    def predict(self, scores: Any) -> dict[str, Any]:
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return {"label": self.labels[scores.argmax(axis=1)], "probability": weights.max(axis=1) / weights.sum(axis=1)}
