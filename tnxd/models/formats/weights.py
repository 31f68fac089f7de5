"""model.safetensors, in one file or several: weights alone, for a network that a factory makes."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from io import BufferedReader
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch.nn.parameter import is_lazy

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.error_text import first_line
from tnxd.events import event
from tnxd.models.file_formats import SAFETENSORS
from tnxd.models.formats import optional, shards
from tnxd.models.formats.calling import arranged, check_names, defaults
from tnxd.models.formats.factories import Factory
from tnxd.models.formats.precision import Precision
from tnxd.models.formats.signature import Opened, check_for_torch, declared
from tnxd.models.repository import RepositorySource
from tnxd.models.settings import Weights
from tnxd.models.trust import TrustedFiles
from tnxd.models.variants import EXPORTED

log = logging.getLogger(__name__)

_MOST_HEAD = 100_000_000  # bytes, as the library has it


def read(source: RepositorySource, files: TrustedFiles) -> Opened:
    """See `tnxd.models.formats.opening.read`."""
    settings = source.settings
    label = files.label(
        SAFETENSORS.file if files.directory / SAFETENSORS.file in files.identities else SAFETENSORS.index
    )
    signature = declared(settings, source.settings_label, label)
    check_names(signature, source.settings_label)
    check_for_torch(signature, source.settings_label)
    try:
        factory = Factory(files, settings.factory, f"{source.name}@{source.version}")
    except FailedPrecondition as error:
        raise FailedPrecondition(f"{source.settings_label}: {error.message}") from None

    first = [factory()]  # for the first build, and held no longer
    exported = settings.optimize in EXPORTED  # for all inputs that there are
    packed = settings.ragged is not None and settings.ragged.packed
    signature = optional.resolve(
        signature,
        settings,
        source.settings_label,
        f"optimize: {settings.optimize}" if exported else label,
        None if exported or packed else defaults(first[0]),
    )

    def build() -> torch.nn.Module:
        network = first.pop() if first else factory()
        with stored(files, label) as weights:
            fill(network, renamed(weights, settings.weights), label, factory.label, settings.weights.ignore)
        if not packed:  # what that is called with are no longer the inputs
            network = arranged(network, [spec.name for spec in signature.inputs], signature.optional)
        if settings.dtype:
            network = Precision(network, getattr(torch, settings.dtype), signature.outputs)
        return network.requires_grad_(False).eval()

    return Opened(signature, build)


class Stored(NamedTuple):
    """One weight. Attributes: file: what to call its file."""

    tensor: torch.Tensor
    file: str


@contextmanager
def stored(files: TrustedFiles, label: str) -> Iterator[dict[str, Stored]]:
    """The weights of a version, from one file or several.

    A file that nobody may write is used as it lies in the page cache, mapped: nothing is copied. Others are read,
    because whoever writes over a mapped file changes the weights of a model that serves, and one that shortens it ends
    the process.

    Raises:
        FailedPrecondition: a file is damaged, or the index and the files disagree: the sentence names file and key.
    """
    index = files.directory / SAFETENSORS.index
    found: dict[str, Stored] = {}
    with ExitStack() as stack:
        if index not in files.identities:
            yield of_file(stack.enter_context(files.open(files.directory / SAFETENSORS.file)), label)
            return
        with files.open(index) as file:
            places = shards.read(file.read(), files, label)
        for shard in dict.fromkeys(places.values()):
            name = files.guard.label(shard)
            weights = of_file(stack.enter_context(files.open(shard)), name)
            shards.check(weights, shard, places, files, label)
            found |= weights
        yield found


def of_file(file: BufferedReader, label: str) -> dict[str, Stored]:
    """The weights of one open file. Raises FailedPrecondition: it is damaged, or changed meanwhile."""
    mapped = not os.fstat(file.fileno()).st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    try:
        # The path of the open file, so that what is mapped is what was checked.
        weights = safetensors.torch.load_file(f"/proc/self/fd/{file.fileno()}") if mapped else _read(file, label)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FailedPrecondition(f"{label}: damaged or incomplete: {first_line(error)}") from None
    return {name: Stored(tensor, label) for name, tensor in weights.items()}


def renamed(weights: Mapping[str, Stored], settings: Weights) -> dict[str, Stored]:
    """The weights with the keys that model.toml makes of them. Raises FailedPrecondition: two become the same."""
    found: dict[str, Stored] = {}
    for key, weight in weights.items():
        name = settings.add_prefix + key.removeprefix(settings.strip_prefix)
        if name in found:
            raise FailedPrecondition(f"{weight.file}: weights.strip_prefix makes {name!r} of two keys")
        found[name] = weight
    return found


def fill(
    network: torch.nn.Module, weights: dict[str, Stored], label: str, made_by: str, ignore: Sequence[str] = ()
) -> None:
    """Put weights in place of those of a network.

    Args:
        weights: consumed.
        label, made_by: what to call the weights and the network in errors.
        ignore: patterns of keys that need not be on both sides.

    Raises:
        FailedPrecondition: they are not the network's: the sentence names them.
    """
    expected = network.state_dict(keep_vars=True)
    _tie(weights, expected)
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    missing, unexpected = _without(missing, ignore), _without(unexpected, ignore)
    if missing or unexpected:
        raise FailedPrecondition(f"{label}: {_difference(missing, unexpected, made_by)}")
    copies: dict[int, torch.Tensor] = {}  # tensors that share memory go on sharing it
    converted = 0
    used: dict[str, torch.Tensor] = {}
    for name, own in expected.items():
        if name not in weights:
            if is_lazy(own):
                raise FailedPrecondition(
                    f"{made_by}: {name!r} has no shape yet, and is not among the weights of {label}"
                )
            used[name] = own
            continue
        weight, file = weights[name]
        if not is_lazy(own) and weight.shape != own.shape:
            raise FailedPrecondition(
                f"{file}: {name!r} is {list(weight.shape)}, in the network of {made_by} it is {list(own.shape)}"
            )
        if weight.dtype is not own.dtype:
            converted += 1
            key = weight.data_ptr()
            if key not in copies or not weight.numel():
                copies[key] = weight.to(own.dtype, copy=True)
            weight = copies[key]
        used[name] = weight
    if converted:
        log.warning(
            "%s: %d tensors have another datatype than in the network, and are converted",
            *(label, converted),
            extra=event("weights_converted", file=label, count=converted),
        )
    _write_over(expected, used)
    network.load_state_dict(used, assign=True)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_meta:
            raise FailedPrecondition(f"{made_by}: {name!r} is on the meta device, and not among the weights of {label}")


def _write_over(expected: Mapping[str, torch.Tensor], used: Mapping[str, torch.Tensor]) -> None:
    """Write weights into the tensors that a network has made, too, though others take their places.

    A network may hold them, or views of them, where no state_dict tells: in a list, a partial, a function.
    """
    with torch.no_grad():
        for name, own in expected.items():
            if not is_lazy(own) and not own.is_meta and own is not used[name]:
                with contextlib.suppress(RuntimeError):  # one that is expanded has no place for all of its values
                    own.copy_(used[name])


def _without(names: set[str], patterns: Sequence[str]) -> set[str]:
    return {name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)}


def _difference(missing: set[str], unexpected: set[str], made_by: str) -> str:
    """Names that are on one side alone, and what to do about it if it is a prefix."""
    parts = []
    if missing:
        parts.append(f"{_some(missing)} missing, which the network of {made_by} has")
    if unexpected:
        parts.append(f"{_some(unexpected)} not in the network of {made_by}")
    more = _prefix(missing, unexpected)
    if more:
        parts.append(f'its keys begin with {more!r}: strip_prefix = "{more}" under [weights] in model.toml')
    less = _prefix(unexpected, missing)
    if less:
        parts.append(f'those of the network begin with {less!r}: add_prefix = "{less}" under [weights] in model.toml')
    return "; ".join(parts)


def _prefix(short: set[str], long: set[str]) -> str:
    """The prefix of the names of one set in the other; "" if that is not so for most: some may be missing."""
    for first in sorted(short)[:5]:
        for name in sorted(long):
            prefix = name.removesuffix(first)
            if (
                prefix != name
                and prefix.endswith(".")
                and 2 * sum(prefix + each in long for each in short) >= len(short)
            ):
                return prefix
    return ""


def _read(file: BufferedReader, label: str) -> dict[str, torch.Tensor]:
    """The tensors of a file that somebody may write to, in memory of their own; the file is never mapped.

    The library maps what it reads the names and shapes from, however it reads the rest: it gets a copy of the head,
    with nothing behind it.

    Raises:
        FailedPrecondition: it was shortened meanwhile.
        safetensors.SafetensorError: it is damaged.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    head += file.read(min(int.from_bytes(head, "little"), _MOST_HEAD))
    weights: dict[str, torch.Tensor] = {}
    with os.fdopen(os.memfd_create("head"), "wb") as copy:
        copy.write(head)
        copy.truncate(max(size, len(head)))
        copy.flush()
        with safetensors.safe_open(f"/proc/self/fd/{copy.fileno()}", framework="pt", backend="pread") as plan:
            for name in plan.offset_keys():  # as they lie in the file, without gaps
                weights[name] = plan.get_tensor(name)
                if weights[name].numel():
                    content = weights[name].reshape(-1).view(torch.uint8).numpy().data
                    if file.readinto(content) != len(content):
                        raise FailedPrecondition(f"{label} changed while it was loaded: load it again")
    return weights


def _tie(weights: dict[str, Stored], expected: Mapping[str, torch.Tensor]) -> None:
    """Give weights that are stored under one name to the other names by which a network uses them."""
    groups: dict[object, list[str]] = {}
    for name, own in expected.items():
        nowhere = is_lazy(own) or own.is_meta or not own.numel()
        place = id(own) if nowhere else (own.untyped_storage().data_ptr(), own.storage_offset(), own.shape)
        groups.setdefault(place, []).append(name)
    for names in groups.values():
        stored = next((name for name in names if name in weights), None)
        if stored is not None:
            for name in names:
                weights.setdefault(name, weights[stored])


def _some(names: set[str]) -> str:
    """The first of some names, as the subject of a sentence."""
    first = sorted(names)[:3]
    more = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
    return f"{', '.join(map(repr, first))}{more} {'is' if len(names) == 1 else 'are'}"
