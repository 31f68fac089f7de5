"""Models, and where they come from."""

from tnxd.models.model import Model

__all__ = ["Model"]
