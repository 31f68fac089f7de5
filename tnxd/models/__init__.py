"""What a model is, and where models come from."""

from tnxd.models.model import Model

__all__ = ["Model"]
