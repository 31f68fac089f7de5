"""Models in plain Python for tests: a model.py in a repository, and what stands before it."""

from __future__ import annotations

import os
import textwrap
import time
from pathlib import Path

import numpy as np

from tnxctl.protocol.datatypes import Array
from tnxd.models import repository
from tnxd.models.model import Model
from tnxd.models.time_limits import TimeLimits

SIGNATURE = """
inputs = [{ name = "x", datatype = "FP32", shape = [-1, 2] }]
outputs = [{ name = "y", datatype = "FP32", shape = [-1, 2] }]
"""

DOUBLES = """
class Model:
    def predict(self, x):
        return {"y": x * 2}
"""


def put(root: Path, text: str, *, name: str = "odd", settings: str = "", signature: str = SIGNATURE) -> Path:
    """Write a model.py, as version 1 of a model, and its model.toml. Returns the directory of the version."""
    place = root / name / "1"
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.py").write_text(textwrap.dedent(text))
    (root / name / "model.toml").write_text(settings + "\n" + signature)
    return place


def source(root: Path, name: str = "odd", limits: TimeLimits | None = None) -> repository.RepositorySource:
    """Version 1 of a model, as a scan finds it."""
    from tnxd.models.formats.opening import open_model

    catalog = repository.scan(root, open_model, limits=limits or TimeLimits(load_s=60.0, batch_s=60.0))
    assert not catalog.failures, catalog.failures
    found = catalog.entries[name].sources["1"]
    assert isinstance(found, repository.RepositorySource)
    return found


def opened(root: Path, text: str, *, settings: str = "", signature: str = SIGNATURE, batch_s: float = 60.0) -> Model:
    """A model.py, opened."""
    put(root, text, settings=settings, signature=signature)
    return source(root, limits=TimeLimits(load_s=60.0, batch_s=batch_s)).open(0)


def rows(*values: float) -> Array:
    """An input of `SIGNATURE`, a row of equal numbers for each value."""
    return np.repeat(np.array(values, np.float32)[:, None], 2, axis=1)


def await_end(pid: int) -> None:
    """Wait until there is no such process."""
    while os.path.exists(f"/proc/{pid}"):
        time.sleep(0.02)
