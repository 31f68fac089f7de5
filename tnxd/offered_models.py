"""Catalog of a configuration: the built-in models, and those of its repository."""

from __future__ import annotations

from pathlib import Path

from tnxctl.protocol.errors import InvalidArgument
from tnxd.config import Config
from tnxd.models import repository
from tnxd.models.builtin import STANDARD, builtin_entries
from tnxd.models.catalog import Catalog, with_steps
from tnxd.models.model import Model
from tnxd.models.repository import RepositorySource
from tnxd.models.time_limits import TimeLimits


def catalog(config: Config) -> Catalog:
    """Catalog of the models to serve.

    Raises:
        TensorNextError: the configuration names a model or a repository that does not exist.
    """
    entries = builtin_entries(config.models or (() if config.model_repository else STANDARD))
    if not config.model_repository:
        return Catalog(entries)
    found = repository.scan(
        Path(config.model_repository),
        _open,
        require_manifest=config.require_manifest,
        limits=TimeLimits(config.load_timeout_s, config.stall_timeout_s),
    )
    failures = dict(found.failures)
    for name in found.entries.keys() & entries.keys():
        failures[f"{config.model_repository}/{name}"] = f"two models are called {name!r}: the built-in one is served"
    return with_steps(Catalog({**entries, **found.entries, **entries}, failures))


def _open(source: RepositorySource, generation: int) -> Model:
    from tnxd.models.formats.opening import open_model  # imports torch

    return open_model(source, generation)


def check_default(config: Config, catalog: Catalog) -> None:
    """Check that the default model is in the catalog, unless that is empty.

    Raises:
        InvalidArgument: it is not.
    """
    if not catalog.entries and not catalog.failures:
        return
    default = config.default_model
    if default and default not in catalog.entries and default not in catalog.failures:
        served = ", ".join(catalog.entries) or "none"
        raise InvalidArgument(f"default_model: {default!r} is not among the models {served}")
