"""model.toml: how one model is served, as a frozen Struct. Every key is optional."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from tnxctl.files import tomlfile
from tnxctl.protocol.datatypes import STORAGE
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import DEFAULT_PRIORITY, LOWEST_PRIORITY, MAX_DEADLINE_US, MAX_DIM, MAX_WEIGHT, TensorSpec
from tnxd.device_kinds import DEVICE, DEVICES

MAX_NAME = 256
"""Characters in the name of an input or output."""

_Axis = Annotated[int, msgspec.Meta(ge=-1, le=MAX_DIM)]
_Length = Annotated[int, msgspec.Meta(ge=0, le=MAX_DIM)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
_Number = Annotated[int, msgspec.Meta(ge=1)]
_Weight = Annotated[float, msgspec.Meta(ge=0, le=MAX_WEIGHT)]


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Random numbers from `low` to `high`, both included: whole ones for a datatype that has no others."""

    low: int | float
    high: int | float


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output.

    Attributes:
        datatype: a name of the Open Inference Protocol v2. shape: -1 is an axis of any length.
        example: of an input, a shape that fits, to warm up with; (): the lengths of the export, else 1.
        values: of an input, what to warm up with: one number everywhere, nested lists of them, or random ones; of BYTES
            one string, or nested lists of strings.
        optional: of an input, whether a request may leave it out; None: if the network's `forward` has a default there.
        default: of an input, the number or string that fills it then, which makes it optional; None: the network gets
            None, or the default of its `forward`.
    """

    name: _Name
    datatype: str
    shape: tuple[_Axis, ...]
    example: tuple[_Length, ...] = ()
    values: bool | int | float | str | tuple[Any, ...] | Range | None = None
    optional: bool | None = None
    default: bool | int | float | str | None = None

    @property
    def spec(self) -> TensorSpec:
        """The same as the wire says it."""
        return TensorSpec(self.name, self.datatype, self.shape)


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rules by which the keys of model.safetensors become those of the network.

    Attributes:
        strip_prefix, add_prefix: taken from the keys of the file that have it, then put before all of them.
        ignore: keys, after that, that need not be on both sides, as patterns of `fnmatch`: what only the file has is
            not used, what only the network has stays as its factory made it.
    """

    strip_prefix: str = ""
    add_prefix: str = ""
    ignore: tuple[str, ...] = ()


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The split of requests that name no version, see `tnxctl.protocol.wire.Route`."""

    weights: dict[str, _Weight] = {}
    shadow: str = ""


class RaggedInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input with a ragged axis. Attributes: axis: which one. pad: the number that fills a shorter row up."""

    axis: Annotated[int, msgspec.Meta(ge=0)] = 1
    pad: bool | int | float = 0


class Ragged(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Axes whose lengths differ from request to request, see `tnxd.models.ragged.Ragged`.

    Attributes:
        max_length: longest of them that is taken.
        inputs: those with such an axis. outputs: those that are as long, and along which axis.
        mask: the one of these inputs that is 0 where there is padding; "": there is none.
        max_tokens: most tokens of one batch; 0: as many as its rows may have.
        packed: whether the model takes all tokens in one row, with their offsets.
    """

    max_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_DIM)]
    inputs: dict[str, RaggedInput] = {}
    outputs: dict[str, Annotated[int, msgspec.Meta(ge=0)]] = {}
    mask: str = ""
    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    packed: bool = False


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of model.toml.

    Attributes:
        versions: those to load: the newest, all of them, or these.
        max_batch_size: most rows in one batch; 0: no axis counts rows; None: derived from the signature.
        max_delay_us: how long a smaller batch waits for company, in microseconds; None: as the daemon is configured.
        devices: where it may run; (): everywhere. replicas: batches at a time per device; 0: one on every lane.
        threads: that work on each batch on a CPU; 0: chosen for each batch.
        dtype: to run in; "": that of the weights.
        optimize: the variant of the network to run, where it gives the same answers; "auto": the fastest one, "none":
            the network as it is.
        graphs: whether a GPU may capture its forwards, see `tnxd.executors.graphs`.
        warm_up: batch sizes to run before it serves; None: powers of two up to the limit.
        time_limit_s: a batch that runs longer is given up; None: as the daemon is configured.
        deadline_us, priority: of requests that say nothing about it.
        imports: modules to import before the model file is read.
        state: "shared": what the module keeps from one request to the next is meant for all of them. "random": its
            answers are drawn at random.
        audit: share of the batches that are computed again in idle time, 0 to 1; None: 0.001.
        factory: "module:function" that makes the network for model.safetensors.
        isolation: what a batch that hangs or crashes takes with it: "none", the daemon, since it may run on the serving
            thread; "thread": a lane's thread, or, where it crashes, the daemon; "process": one of the processes that
            run the model. "": "thread" for model.py, else "none".
        memory_limit_mb: memory that such a process may take, in MiB; 0: any.
        config: for model.py to read.
        weights: how the keys of model.safetensors are those of the network.
        inputs, outputs: the signature; (): the model file says it.
        ragged: axes of different lengths, and how requests share a batch all the same; None: by equal lengths alone.
    """

    versions: Literal["latest", "all"] | Annotated[tuple[_Number, ...], msgspec.Meta(min_length=1)] = "latest"
    max_batch_size: Annotated[int, msgspec.Meta(ge=0, le=2**20)] | None = None
    max_delay_us: Annotated[float, msgspec.Meta(ge=0, le=10_000_000)] | None = None
    devices: tuple[str, ...] = ()
    replicas: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    optimize: Literal["auto", "none", "channels_last", "inductor", "onnxruntime"] = "auto"
    graphs: bool = True
    warm_up: tuple[_Number, ...] | None = None
    time_limit_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    deadline_us: Annotated[float, msgspec.Meta(gt=0, le=MAX_DEADLINE_US)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=0, le=LOWEST_PRIORITY)] = DEFAULT_PRIORITY
    imports: tuple[str, ...] = ()
    state: Literal["", "shared", "random"] = ""
    audit: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    factory: str = ""
    isolation: Literal["", "none", "thread", "process"] = ""
    memory_limit_mb: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    config: dict[str, Any] = {}
    weights: Weights = Weights()
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    ragged: Ragged | None = None
    traffic: Traffic = Traffic()

    @property
    def served(self) -> bytes:
        """Settings that a loaded version depends on, as bytes; those that only share out requests are left out."""
        return msgspec.json.encode(msgspec.structs.replace(self, versions="latest", traffic=Traffic()))


_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_FACTORY = re.compile(r"[A-Za-z_]\w*:[A-Za-z_]\w*", re.ASCII)


def load(path: Path, label: str) -> Settings:
    """Read a model.toml.

    Args:
        label: what to call the file in errors.

    Raises:
        InvalidArgument: it cannot be read, a key is unknown, a value is out of range. The sentence names file and key.
    """
    settings = tomlfile.convert(tomlfile.read(path, label), Settings, label)
    for device in settings.devices:
        if not DEVICE.fullmatch(device):
            raise InvalidArgument(f"{label}: devices: {device!r} is none of {DEVICES}")
    if settings.factory and not _FACTORY.fullmatch(settings.factory):
        raise InvalidArgument(f'{label}: factory: {settings.factory!r} is not "module:function"')
    for index, name in enumerate(settings.imports):
        if not _MODULE.fullmatch(name):
            raise InvalidArgument(f"{label}: imports[{index}]: {name!r} is no name of a module")
    for kind, tensors in (("inputs", settings.inputs), ("outputs", settings.outputs)):
        names = [tensor.name for tensor in tensors]
        for index, tensor in enumerate(tensors):
            key = f"{label}: {kind}[{index}]"
            if names.index(tensor.name) < index:
                raise InvalidArgument(f"{key}.name: {tensor.name!r} stands there twice")
            if tensor.datatype not in STORAGE:
                raise InvalidArgument(f"{key}.datatype: expected one of {', '.join(STORAGE)}, not {tensor.datatype!r}")
            if kind == "outputs":
                for name, given in (
                    ("example", tensor.example),
                    ("values", tensor.values is not None),
                    ("optional", tensor.optional is not None),
                    ("default", tensor.default is not None),
                ):
                    if given:
                        raise InvalidArgument(f"{key}.{name}: only an input has one")
            if tensor.example and not fits(tensor.example, tensor.shape):
                raise InvalidArgument(f"{key}.example: {list(tensor.example)} does not fit {list(tensor.shape)}")
            if isinstance(tensor.values, Range) and not tensor.values.low <= tensor.values.high:
                raise InvalidArgument(f"{key}.values: low is {tensor.values.low}, above high, {tensor.values.high}")
    if settings.state == "shared" and settings.max_batch_size:
        raise InvalidArgument(
            f'{label}: max_batch_size: {settings.max_batch_size}, but with state = "shared" requests run one at a time'
        )
    return settings


def fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a shape, in which -1 is any length, is one of those that `wanted` allows."""
    return len(shape) == len(wanted) and all(want in (-1, have) for have, want in zip(shape, wanted, strict=True))
