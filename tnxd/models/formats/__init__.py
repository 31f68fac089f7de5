"""Files with models in them, one module for each format; `opening` is the way in. torch is imported here."""

from __future__ import annotations

import warnings


def ignore_warnings_about_torch_itself() -> None:
    """Ignore warnings of torch about itself: nobody who reads the log of a daemon can do anything about them.

    They are set for good, and not by `warnings.catch_warnings`: that sets back what other threads change meanwhile.
    """
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.")
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    warnings.filterwarnings("ignore", message=".*LeafSpec")
