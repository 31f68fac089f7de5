"""timm, where torchvision is not installed, too: it imports that, whatever is wanted of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parents[3] / "examples" / "resnet" / "export.py"
_spec = importlib.util.spec_from_file_location("zoo_export", _path)
assert _spec is not None
assert _spec.loader is not None
_export = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _export
_spec.loader.exec_module(_export)

with _export.stand_ins("torchvision", "yaml"):
    import timm

__all__ = ["timm"]
