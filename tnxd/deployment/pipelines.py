"""Pipelines among the deployments: the versions that their steps get, and whether a pipeline can be served.

A step that names no version follows the traffic of its model: what is swapped or split there is so for pipelines, too.
One that names a version has that one, which the catalog then wants and which a reload does not take from it. What an
operator unloads is unloaded: the pipeline cannot be served until it is back, and says so. No torch, no I/O.
"""

from __future__ import annotations

from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxd.deployment.registry import Registry
from tnxd.deployment.version import READY, Version
from tnxd.models.model import Model
from tnxd.models.pipelines import Pipeline


def step_versions(registry: Registry, pipeline: Pipeline) -> list[tuple[Version, Model]]:
    """The version of each step, and its model: of several that share the traffic, the one with the largest share.

    Raises:
        FailedPrecondition: there is none that can be served. The sentence names file and key.
    """
    versions = []
    for index, title in enumerate(pipeline.description.models):
        if title not in registry:
            raise FailedPrecondition(f"{pipeline.label}: steps[{index}].model: {registry.why_not(title).message}")
        version = registry.describe(title)[1]
        assert version.model is not None  # it has been loaded
        versions.append((version, version.model))
    return versions


def assembled(registry: Registry, pipeline: Pipeline) -> Pipeline:
    """The pipeline with the signature that the models of its steps give it now.

    Raises:
        FailedPrecondition: one of them cannot be served, or they do not fit together.
    """
    return pipeline.assembled([model for _, model in step_versions(registry, pipeline)])


def refresh(registry: Registry) -> None:
    """Look at all pipelines again, after a change: what they take and give, and what keeps them from being served."""
    for _, version in registry:
        pipeline = version.model
        if version.state != READY or not isinstance(pipeline, Pipeline):
            continue
        try:
            now = assembled(registry, pipeline)
        except TensorNextError as error:
            version.unserved = error.message
            continue
        version.unserved = ""
        version.model = now


def held(registry: Registry, name: str) -> frozenset[str]:
    """Versions of a name that pipelines which serve have named: they stay, whatever the catalog wants."""
    found = set()
    for _, version in registry:
        if version.servable and isinstance(version.model, Pipeline):
            titles = [title.partition("@") for title in version.model.description.models]
            found |= {number for step, _, number in titles if step == name and number}
    return frozenset(found)
