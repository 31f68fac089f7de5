"""Checks of traffic: which versions of a name can answer the same requests."""

from __future__ import annotations

from collections.abc import Mapping

from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument
from tnxd.deployment.registry import Deployment
from tnxd.models.model import Model
from tnxd.models.pipelines import Pipeline


def check_weights(deployment: Deployment, weights: Mapping[str, float], shadow: str) -> None:
    """Check that traffic can be split so.

    Raises:
        NotFound: a version that is not there.
        FailedPrecondition: one that is not loaded, or versions whose signatures differ.
        InvalidArgument: no weight is above 0, or the shadow takes part in the split.
    """
    if weights and not any(weight > 0 for weight in weights.values()):
        raise InvalidArgument(f"no version of {deployment.name!r} has a weight above 0")
    if shadow and weights.get(shadow, 0.0) > 0:
        raise InvalidArgument(f"version {shadow} cannot both answer and be the shadow")
    numbers = [number for number, weight in weights.items() if weight > 0]
    versions = [deployment.version(number) for number in [*numbers, *([shadow] if shadow else [])]]
    if not numbers:
        answering = [version for version in deployment.versions.values() if version.servable]
        versions += [version for version in answering if version.number != shadow][-1:]
    for version in versions:
        if not version.servable:
            raise FailedPrecondition(f"model {version.title!r} is {version.state}: load it first")
    if shadow and isinstance(deployment.version(shadow).model, Pipeline):
        raise FailedPrecondition(
            f"version {shadow} of {deployment.name!r} is a pipeline and runs no batches to be copied: "
            "the models of its steps can have shadows"
        )
    models = [version.model for version in versions if version.model is not None]
    for model in models[1:]:
        difference = signature_difference(models[0], model)
        if difference:
            raise FailedPrecondition(
                f"versions {models[0].version} and {model.version} of {deployment.name!r} differ: {difference}"
            )


def signature_difference(old: Model, new: Model) -> str:
    """The reason why requests made for the one may fail with the other, in words; "" if they do not."""
    for side in ("inputs", "outputs"):
        before = {spec.name: spec for spec in getattr(old, side)}
        after = {spec.name: spec for spec in getattr(new, side)}
        if list(before) != list(after):
            return f"the {side} are {list(after)} instead of {list(before)}"
        for name, spec in before.items():
            other = after[name]
            if other.datatype != spec.datatype:
                return f"{side[:-1]} {name!r} is {other.datatype} instead of {spec.datatype}"
            if len(other.shape) != len(spec.shape) or any(
                now != was and not (now == -1 and side == "inputs")
                for was, now in zip(spec.shape, other.shape, strict=True)
            ):
                return f"{side[:-1]} {name!r} has shape {list(other.shape)} instead of {list(spec.shape)}"
            if side == "inputs" and name in old.optional and name not in new.optional:
                return f"input {name!r} may not be left out any more"
    return ""
