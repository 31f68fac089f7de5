"""Files with models in them, one module for each format; `opening` is the way in. torch is imported here."""

from __future__ import annotations

import warnings


def ignore_warnings_about_torch_itself() -> None:
    """Nobody who reads the daemon's log can do anything about these. The notes of a model say what matters.

    They are set for good, and not by `warnings.catch_warnings`: that sets back what other threads change meanwhile.
    """
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.")
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    warnings.filterwarnings("ignore", message=".*LeafSpec")
