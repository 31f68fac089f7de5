"""Model repositories: directories of models, scanned for versions that may be served. Quick, and without torch.

REPOSITORY/NAME/model.toml          see tnxd.models.settings; optional where the model file says everything
REPOSITORY/NAME/VERSION/            a positive number; in it exactly one of
    model.pt2                       an exported program (torch.export)
    model.safetensors               weights, for the network that a factory makes; or, in several files,
    model.safetensors.index.json
    model.pt                        TorchScript
    model.onnx
    pipeline.toml                   steps that are models themselves, see tnxd.models.pipeline_file
    model.py                        a class in Python; beside one of the others, it is that one's code
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tnxctl.protocol.errors import InvalidArgument, TensorNextError
from tnxctl.protocol.wire import MODEL_NAME, MODEL_VERSION
from tnxd.device_kinds import PROCESS, kind_of
from tnxd.models import onnxfile, pipeline_file
from tnxd.models import settings as model_toml
from tnxd.models.catalog import Catalog, Entry, Source
from tnxd.models.file_formats import FILES, FORMATS, ONNX, PIPELINE, PYTHON, SAFETENSORS, FileFormat
from tnxd.models.model import Model
from tnxd.models.settings import Settings, Weights
from tnxd.models.time_limits import TimeLimits
from tnxd.models.trust import Guard, contents, hidden, identity
from tnxd.models.variants import AUTO, NONE

_OF_A_PIPELINE = ("versions", "deadline_us", "priority", "traffic")
"""Keys of model.toml that say something about a pipeline; the others are about what runs a forward."""

SETTINGS = "model.toml"

CODE = PYTHON.file
"""The model, if there is none beside it. Else it is code that belongs to that one, which its factory may name."""

_SHARD = ".safetensors"
_GONE = "a link that leads nowhere, or a file that went away: reload"


@dataclass(frozen=True)
class RepositorySource:
    """One version in a repository: implements `tnxd.models.catalog.Source`.

    Attributes:
        directory: of the version. settings: of the model. guard: whom the repository trusts.
        steps: NAME or NAME@VERSION of each step of a pipeline.
        require_manifest: whether a version without SHA256SUMS is refused.
        opener: reads it for `open`; None: nothing of this repository is to be opened.
        limits: of the daemon.
    """

    name: str
    version: str
    format: str
    stamp: str
    nbytes: int
    directory: Path = field(repr=False)
    settings: Settings = field(repr=False)
    guard: Guard = field(repr=False)
    require_manifest: bool = field(repr=False)
    opener: Opener | None = field(repr=False, compare=False)
    limits: TimeLimits = field(default=TimeLimits(), repr=False, compare=False)
    steps: tuple[str, ...] = ()

    def open(self, generation: int) -> Model:
        assert self.opener is not None
        return self.opener(self, generation)

    @property
    def settings_label(self) -> str:
        """The name of the model's settings in errors."""
        return f"{self.name}/{SETTINGS}"


Opener = Callable[[RepositorySource, int], Model]
"""Reads a version, to be a model of that generation, as `tnxd.models.catalog.Source.open` promises.

It knows the formats, and with them torch, which a repository does without. A module-level function: sources are pickled
for the processes that compile them.
"""


def scan(
    root: Path,
    opener: Opener | None = None,
    *,
    require_manifest: bool = False,
    limits: TimeLimits = TimeLimits(),  # noqa: B008 - it is frozen
) -> Catalog:
    """Scan a repository. Mistakes in one model are reported and do not hide the others.

    Args:
        opener: opens the sources; None: they cannot be opened.
        require_manifest: refuse versions without SHA256SUMS.
        limits: of the daemon.

    Raises:
        InvalidArgument: there is no such directory.
        PermissionDenied: somebody else may write to it.
    """
    guard = Guard.of(root)
    try:
        directories = sorted(path for path in guard.root.iterdir() if not hidden(path.name))
    except OSError as error:
        raise InvalidArgument(f"model repository {root}: {error.strerror}") from None
    entries: dict[str, Entry] = {}
    failures: dict[str, str] = {}
    for directory in directories:
        try:
            entry, problems = _inspect(directory, _Scan(guard, opener, require_manifest, limits))
            entries[entry.name] = entry
            failures.update(problems)
        except _Unservable as error:
            failures.update(error.failures)
        except TensorNextError as error:
            failures[directory.name] = error.message
        except FileNotFoundError:
            if os.path.lexists(directory):  # else it went away while it was inspected
                failures[directory.name] = f"{directory.name}: {_GONE}"
        except OSError as error:
            failures[directory.name] = f"{guard.label(Path(error.filename or directory))}: {error.strerror}"
    return Catalog(entries, failures)


class _Unservable(Exception):
    """No version of a model can be served. Attributes: failures: as in `Catalog`."""

    def __init__(self, failures: Mapping[str, str]) -> None:
        super().__init__(str(failures))
        self.failures = failures


@dataclass(frozen=True)
class _Scan:
    """Parts that all sources of a repository have in common. Attributes: as in `RepositorySource`."""

    guard: Guard
    opener: Opener | None
    require_manifest: bool
    limits: TimeLimits


def _inspect(directory: Path, scan: _Scan) -> tuple[Entry, dict[str, str]]:
    """The entry of one model, and the mistakes in some of its versions."""
    guard = scan.guard
    name = directory.name
    if not MODEL_NAME.fullmatch(name):
        raise InvalidArgument(
            f"{name!r} is no name for a model: up to 64 letters, digits, '.', '_' and '-', a letter or digit first"
        )
    if not guard.resolve(directory).is_dir():
        raise InvalidArgument(f"{name} is a file; a model is a directory: {name}/VERSION/, with the model in it")
    label = f"{name}/{SETTINGS}"
    path = directory / SETTINGS
    settings = Settings()
    if path.exists() or path.is_symlink():
        settings = model_toml.load(guard.resolve(path), label)
    failures: dict[str, str] = {}
    sources: dict[str, Source] = {}
    for number, place in _versions(directory, failures):
        title = f"{name}@{number}"
        try:
            sources[number] = _source(name, number, place, settings, scan)
        except TensorNextError as error:
            failures[title] = error.message
        except FileNotFoundError:
            if os.path.lexists(place):
                failures[title] = f"{guard.label(place)}: {_GONE}"
        except OSError as error:
            failures[title] = f"{guard.label(Path(error.filename or place))}: {error.strerror}"
    entry = _entry(name, sources, settings, label, failures)
    if not sources:
        raise _Unservable(failures or {name: f"{name} has no version: {name}/1/, with the model in it, would be one"})
    return entry, failures


def _versions(directory: Path, failures: dict[str, str]) -> list[tuple[str, Path]]:
    """Numbers and directories of the versions, the oldest first."""
    versions = []
    for place in sorted(directory.iterdir()):
        nowhere = place.is_symlink() and not place.exists()
        if hidden(place.name) or not (place.is_dir() or nowhere):
            continue
        if MODEL_VERSION.fullmatch(place.name):
            versions.append((place.name, place))
        elif nowhere:
            failures[f"{directory.name}/{place.name}"] = f"{directory.name}/{place.name}: {_GONE}"
        elif not (place / "__init__.py").is_file():  # a Python package that the versions share
            label = f"{directory.name}/{place.name}"
            failures[label] = f"{label}: {place.name!r} is no version: those are 1, 2, 3, ..."
    return sorted(versions, key=lambda version: int(version[0]))


def _source(name: str, number: str, place: Path, settings: Settings, scan: _Scan) -> RepositorySource:
    guard, require_manifest = scan.guard, scan.require_manifest
    label = guard.label(place)
    inside = guard.resolve(place)
    present = [file for file in FILES if os.path.lexists(inside / file)]
    if len(present) > 1 and present[-1] == CODE:
        present.pop()  # that of the other one
    if len(present) != 1:
        found = " and ".join(present) if present else "none"
        raise InvalidArgument(f"{label}: exactly one of {', '.join(FILES)} has to be there, and {found} is")
    file, kind = present[0], FILES[present[0]]
    _, _, files = contents(guard, place, require_manifest=require_manifest, modules=kind.has_modules)
    if inside / file not in files:
        raise InvalidArgument(f"{label}/{file} is not a file")
    _check_combination(kind, f"{label}/{file}", settings, f"{name}/{SETTINGS}")
    steps: tuple[str, ...] = ()
    nbytes = onnxfile.size(inside / file) if kind is ONNX else files[inside / file].st_size
    if kind is PIPELINE:
        steps = pipeline_file.load(guard.resolve(inside / file), f"{label}/{file}").models
        nbytes = 0  # it has no weights
    if kind is PYTHON:
        nbytes = sum(info.st_size for path, info in files.items() if path.is_relative_to(inside))
    if file == kind.index:
        nbytes += sum(info.st_size for path, info in files.items() if path.suffix == _SHARD)
    state = [(str(path), *identity(info)) for path, info in sorted(files.items())]
    stamp = hashlib.sha256(settings.served + repr((state, require_manifest)).encode()).hexdigest()
    return RepositorySource(
        *(name, number, kind.name, stamp, nbytes, place, settings, guard, require_manifest),
        *(scan.opener, scan.limits, steps),
    )


def _check_combination(kind: FileFormat, file: str, settings: Settings, label: str) -> None:
    """Refuse settings that a format cannot follow, and a lack of those that it needs."""
    if kind is PIPELINE:
        for key, value in msgspec.structs.asdict(settings).items():
            if key not in _OF_A_PIPELINE and value != getattr(Settings(), key):
                raise InvalidArgument(f"{label}: {key}: {file} has models for its steps, and theirs is what says that")
        if settings.traffic.shadow:
            raise InvalidArgument(f"{label}: traffic.shadow: {file} runs no batches to be copied; its steps' models do")
        return

    def files(*kinds: FileFormat) -> str:
        return " and ".join([kind.file for kind in kinds])

    formats = FORMATS.values()
    if settings.dtype and kind.fixes_dtype:
        raise InvalidArgument(
            f"{label}: dtype: {file} was saved to run in its own datatypes; {settings.dtype!r} is for "
            f"{files(*[each for each in formats if not each.fixes_dtype])}"
        )
    if settings.optimize not in (AUTO, NONE) and not kind.compiles:
        others = files(*[each for each in formats if each.compiles])
        raise InvalidArgument(f"{label}: optimize: {file} has no variant {settings.optimize!r}; {others} have")
    if not kind.needs_factory and settings.weights != Weights():
        others = files(*[each for each in formats if each.needs_factory])
        raise InvalidArgument(f"{label}: weights: {file} has a network of its own; they are for {others}")
    if kind.needs_factory and not settings.factory:
        raise InvalidArgument(
            f'{label}: factory: "module:function" has to name what makes the network for {file}; for a {CODE} that '
            f"reads the weights itself, call them otherwise"
        )
    if not kind.has_signature:
        for key, tensors in (("inputs", settings.inputs), ("outputs", settings.outputs)):
            if not tensors:
                raise InvalidArgument(f"{label}: {key}: have to stand here, since {file} does not say them")
    packed = kind is SAFETENSORS and settings.ragged is not None and settings.ragged.packed
    if packed and settings.optimize not in (AUTO, NONE):
        raise InvalidArgument(
            f"{label}: optimize: {settings.optimize!r}, but a packed model runs as it is (ragged.packed)"
        )
    if kind.kinds and settings.devices and not any(kind_of(device) in kind.kinds for device in settings.devices):
        alone = " and ".join([name.upper() for name in kind.kinds])
        raise InvalidArgument(f"{label}: devices: {file} runs on the {alone} alone")
    _check_isolation(kind, file, settings, label)


def _check_isolation(kind: FileFormat, file: str, settings: Settings, label: str) -> None:
    """The same for settings about where plain Python runs."""
    if kind is PYTHON and settings.state == "shared" and settings.replicas > 1:
        raise InvalidArgument(f'{label}: replicas: state = "shared" is kept in one object')
    if settings.isolation == PROCESS.name:
        if kind is not PYTHON:
            raise InvalidArgument(f'{label}: isolation: "process" is for {CODE}, and the model is {file}')
        for key, given in (("devices", settings.devices), ("imports", settings.imports)):
            if given:
                raise InvalidArgument(f'{label}: {key}: isolation = "process" has {file} run in a process of its own')
    elif settings.memory_limit_mb:
        raise InvalidArgument(f'{label}: memory_limit_mb: it is for isolation = "process"')


def _entry(name: str, sources: Mapping[str, Source], settings: Settings, label: str, failures: dict[str, str]) -> Entry:
    """The versions that are wanted, and their traffic. A version that is there and broken has been reported already."""

    def known(number: str) -> bool:
        return number in sources or f"{name}@{number}" in failures

    if settings.versions == "latest":
        wanted = tuple(sources)[-1:]
    elif settings.versions == "all":
        wanted = tuple(sources)
    else:
        listed = {str(number) for number in settings.versions}
        wanted = tuple(number for number in sources if number in listed)
        for number in sorted(listed, key=int):
            if not known(number):
                failures[f"{name}@{number}"] = f"{label}: versions: there is no {name}/{number}"
        if sources and not wanted:
            raise _Unservable(failures)
    weights = settings.traffic.weights
    shares = [(f"traffic.weights.{number}", number) for number in weights]
    if settings.traffic.shadow:
        shares.append(("traffic.shadow", settings.traffic.shadow))
    for key, number in shares:
        if not known(number):
            raise InvalidArgument(f"{label}: {key}: there is no {name}/{number}")
        if number in sources and number not in wanted:
            raise InvalidArgument(
                f"{label}: {key}: version {number} is not loaded: versions = {_toml(settings.versions)}"
            )
    if weights and not any(weights.values()):
        raise InvalidArgument(f"{label}: traffic.weights: at least one has to be more than 0")
    kept = {number: weight for number, weight in weights.items() if number in sources}
    shadow = settings.traffic.shadow if settings.traffic.shadow in sources else ""
    return Entry(name, sources, wanted, kept if any(kept.values()) else {}, shadow)


def _toml(versions: str | tuple[int, ...]) -> str:
    return f'"{versions}"' if isinstance(versions, str) else str(list(versions))
