"""model.safetensors.index.json: an index of the weights in several files, as the tools of Hugging Face write it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from tnxctl.protocol.errors import FailedPrecondition
from tnxctl.protocol.wire import excerpt
from tnxd.error_text import first_line
from tnxd.models.trust import TrustedFiles

_NAMED = re.compile(r"model-\d+-of-\d+\.safetensors")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read(content: bytes, files: TrustedFiles, label: str) -> dict[str, Path]:
    """Weight -> the file that has it.

    Args:
        label: what to call the index in errors.

    Raises:
        FailedPrecondition: it is no index, or the files that it names are not those that are there.
    """
    try:
        index = msgspec.json.decode(content, type=_Index)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise FailedPrecondition(f"{label}: not an index of safetensors: {first_line(error)}") from None
    if not index.weight_map:
        raise FailedPrecondition(f"{label}: weight_map: it lists no weights")
    places = {}
    for key, name in index.weight_map.items():
        path = Path(os.path.normpath(files.directory / name))
        if not path.is_relative_to(files.directory) or "\0" in name:
            raise FailedPrecondition(
                f"{label}: weight_map: {key!r} is in {excerpt(name)}, which leads out of the version"
            )
        if path not in files.identities:
            raise FailedPrecondition(f"{label}: weight_map: {key!r} is in {excerpt(name)}, which is missing")
        places[key] = path
    for path in files.identities:
        if path.parent == files.directory and _NAMED.fullmatch(path.name) and path not in places.values():
            raise FailedPrecondition(f"{label}: weight_map: nothing is in {path.name}, which is there")
    return places


def check(weights: Collection[str], shard: Path, places: Mapping[str, Path], files: TrustedFiles, label: str) -> None:
    """Hold the weights of one file against the index.

    Raises:
        FailedPrecondition: the two disagree; the sentence names file and key.
    """
    name = files.guard.label(shard)
    for key in sorted(weights):
        if key not in places:
            raise FailedPrecondition(f"{name}: {key!r} is in it, and {label} does not list it")
        if places[key] != shard:
            raise FailedPrecondition(f"{name}: {key!r} is in it, and {label} says that it is in {places[key].name}")
    for key, place in places.items():
        if place == shard and key not in weights:
            raise FailedPrecondition(f"{name}: {key!r} is not in it, and {label} says so")
