"""An object of the class `Model` of a model.py: what it has to be, and how it is called. No torch."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tnxctl.protocol.datatypes import STORAGE
from tnxctl.protocol.errors import FailedPrecondition, Internal, TensorNextError
from tnxctl.protocol.strings import array_of
from tnxctl.protocol.wire import TensorSpec
from tnxd.error_text import sentence
from tnxd.models import structures
from tnxd.models.formats.modules import Modules
from tnxd.models.python.methods import method_of, parameters_of
from tnxd.models.python.workers import Workers
from tnxd.models.trust import Guard, TrustedFiles

MODULE = "model"
"""The Python module of a version that has the class."""

CLASS = "Model"

FRAMEWORKS = ("numpy", "torch")
"""Whose arrays `predict` takes: the attribute `framework` of the class; the first one without it."""

Values = Sequence[Any]
"""An array or tensor for each input or output of the signature; None for an input that did not come."""


class Plan(msgspec.Struct, frozen=True):
    """All that is needed to make an object of the class, as plain data: it is sent to processes.

    Attributes:
        name, version, config: as in `Context`.
        inputs, outputs: the signature. batches: whether axis 0 counts rows.
        workers: threads that `preprocess` and `postprocess` of a batch run on.
        root, owners, directory, shared, code, identities: of the files, see `tnxd.models.trust`.
        memory_limit_mb: memory that a process may take, in MiB; 0: any.
    """

    name: str
    version: str
    config: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batches: bool
    workers: int
    root: str
    owners: tuple[int, ...]
    directory: str
    shared: str
    code: tuple[str, ...]
    identities: dict[str, tuple[int, ...]]
    memory_limit_mb: float = 0.0

    @property
    def title(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"

    @property
    def files(self) -> TrustedFiles:
        """The files of the version, as they were when they were checked."""
        return TrustedFiles(
            Guard(Path(self.root), frozenset(self.owners)),
            Path(self.directory),
            Path(self.shared),
            tuple(map(Path, self.code)),
            {Path(path): identity for path, identity in self.identities.items()},
        )


@dataclass(frozen=True)
class Context:
    """Surroundings that a model is told when it is loaded.

    Attributes:
        directory: of the version, with model.py and what lies beside it.
        device: where its tensors are: "cpu" or "cuda:0".
        config: the table [config] of model.toml.
        name, version: of the model.
    """

    directory: Path
    device: str
    config: Mapping[str, Any]
    name: str
    version: str


class Code:
    """The class of a model.py, imported.

    Raises:
        FailedPrecondition: it cannot be imported, or there is no such class; the sentence names the file.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.files = plan.files
        self.label = self.files.label(f"{MODULE}.py")
        self._modules = Modules(self.files, plan.title)
        try:
            module = run(f"{self.label}: importing it", lambda: self._modules.load(MODULE))
        except FailedPrecondition as error:
            missing = getattr(error.__cause__, "name", None)
            if missing and any(directory / f"{missing}.py" in self.files.identities for directory in self.files.code):
                hint = f"{missing}.py lies beside it: from . import {missing}"
                raise FailedPrecondition(f"{error.message}: {hint}") from None
            raise
        kind = getattr(module, CLASS, None)
        if not isinstance(kind, type):
            what = f"{CLASS} is no class" if kind is not None else f"there is no class {CLASS} in it"
            raise FailedPrecondition(f"{self.label}: {what}: it is what has predict, and load if that is needed")
        self.kind = kind
        self.framework = str(getattr(kind, "framework", FRAMEWORKS[0]))
        if self.framework not in FRAMEWORKS:
            raise FailedPrecondition(
                f"{self.label}: {CLASS}.framework is {self.framework!r}, and neither {' nor '.join(FRAMEWORKS)}"
            )


class Instance:
    """An object of the class. One thread at a time calls it.

    Attributes:
        optional: arguments of the function that gets the inputs -> their defaults; `Parameter.empty`: none.

    Raises:
        FailedPrecondition: it cannot be made, or its methods are not what they have to be; the sentence names the file.
    """

    def __init__(self, code: Code) -> None:
        self._code = code
        plan = code.plan
        self._inputs = [spec.name for spec in plan.inputs]
        self._outputs = plan.outputs
        self._batches = plan.batches
        self._object = run(f"{code.label}: {CLASS}()", code.kind)
        predict = self._method("predict", needed=True)
        assert predict is not None
        self._predict = predict
        self._preprocess = self._method("preprocess")
        self._postprocess = self._method("postprocess")
        self._load = self._method("load")
        first = "preprocess" if self._preprocess else "predict"
        self.optional = parameters_of(self._preprocess or predict, self._inputs, self._called(first))
        self._workers: Workers | None = None
        if (self._preprocess or self._postprocess) and plan.workers > 1 and plan.batches:
            self._workers = Workers(plan.workers, plan.title)

    def _called(self, name: str) -> str:
        return f"{self._code.label}: {CLASS}.{name}"

    def _method(self, name: str, *, needed: bool = False) -> Callable[..., Any] | None:
        return method_of(self._object, name, self._called(name), needed=needed)

    def load(self, device: str) -> None:
        """Call `load` of the model, if it has one.

        Raises:
            FailedPrecondition: it raises, or files of the version have changed meanwhile; the sentence names the file.
        """
        plan, load = self._code.plan, self._load
        if load is not None:
            context = Context(Path(plan.directory), device, plan.config, plan.name, plan.version)
            run(f"{self._code.label}: {CLASS}.load()", lambda: load(context))
        self._code.files.check_unchanged()

    def __call__(self, inputs: Values) -> list[Any]:
        """Outputs for inputs, each in the order of the signature.

        An output is an array or tensor, of its datatype if it is of numpy; its shape is not looked at.

        Raises:
            Internal: they are not what the signature promises.
            BaseException: whatever the code raised.
        """
        named = {
            name: value
            for name, value in zip(self._inputs, inputs, strict=True)
            if value is not None or self.optional.get(name) is inspect.Parameter.empty
        }
        rows = next(len(value) for value in inputs if value is not None) if self._batches else 0
        if self._preprocess is not None:
            named = self._prepared(self._preprocess, named, rows)
        raw = self._predict(**named)
        if self._postprocess is not None:
            raw = self._finished(self._postprocess, raw, rows)
        found = arranged(raw, [spec.name for spec in self._outputs], f"{self._code.label}: {self._last}")
        return [self._checked(value, spec) for value, spec in zip(found, self._outputs, strict=True)]

    @property
    def _last(self) -> str:
        return "postprocess" if self._postprocess else "predict"

    def _prepared(self, preprocess: Callable[..., Any], named: Mapping[str, Any], rows: int) -> dict[str, Any]:
        """The arguments of `predict`: what `preprocess` makes of each row, below each other."""
        if not self._batches:
            return dict(self._mapping(preprocess(**named)))
        made = self._each(lambda row: self._mapping(preprocess(**_row(named, row))), rows)
        return {name: self._stacked(name, [part[name] for part in made]) for name in self._names(made)}

    def _finished(self, postprocess: Callable[..., Any], raw: Any, rows: int) -> Any:
        """Outputs that `postprocess` makes of each row that `predict` returned."""
        in_order = type(raw) in (tuple, list)
        named = {} if in_order else dict(structures.children(raw) or ())
        values = raw if in_order else () if named else (raw,)
        if not self._batches:
            return postprocess(*values, **named)
        for value in (*values, *named.values()):
            if len(value) != rows:
                raise Internal(f"{self._code.label}: predict returned {len(value)} rows for {rows}")
        wanted = [spec.name for spec in self._outputs]
        made = self._each(
            lambda row: arranged(
                postprocess(*[value[row] for value in values], **_row(named, row)),
                wanted,
                f"{self._code.label}: postprocess",
            ),
            rows,
        )
        return {name: self._stacked(name, [part[at] for part in made]) for at, name in enumerate(wanted)}

    def _each(self, function: Callable[[int], Any], rows: int) -> list[Any]:
        if self._workers is None or rows < 2:
            return [function(row) for row in range(rows)]
        return self._workers.map(function, rows)

    def _mapping(self, made: Any) -> Mapping[str, Any]:
        if not isinstance(made, Mapping):
            raise Internal(
                f"{self._code.label}: preprocess returned {type(made).__name__}, not a dict of what predict takes"
            )
        return made

    def _names(self, made: Sequence[Mapping[str, Any]]) -> list[str]:
        for part in made:
            if part.keys() != made[0].keys():
                raise Internal(f"{self._code.label}: preprocess made {[*part]} of one row, and {[*made[0]]} of another")
        return [*made[0]] if made else []

    def _stacked(self, name: str, parts: Sequence[Any]) -> Any:
        """One array or tensor of a part for each row."""
        shapes = list(dict.fromkeys(np.shape(part) for part in parts))
        if len(shapes) > 1:
            raise Internal(
                f"{self._code.label}: {name!r} is {list(shapes[0])} for one row and {list(shapes[1])} for another: "
                f"what shares a batch has one shape"
            )
        if hasattr(parts[0], "detach"):
            import torch

            return torch.stack(list(parts))
        if isinstance(parts[0], (bytes, str)):
            return array_of(parts, (len(parts),))  # numpy by itself would cut off zeros at the end
        return np.stack(parts)

    def _checked(self, value: Any, spec: TensorSpec) -> Any:
        if hasattr(value, "detach"):
            return value
        whose = f"{self._code.label}: {self._last}: output {spec.name!r}"
        if not isinstance(value, (np.ndarray, np.generic)):
            raise Internal(f"{whose} is {type(value).__name__}, not an array")
        wanted = STORAGE[spec.datatype]
        if value.dtype != wanted:
            how = f".astype(np.{wanted.name}) converts it"
            if wanted.hasobject:
                how = "np.array([text.encode() for text in texts], object) makes it of a list of str"
            raise Internal(f"{whose} is {value.dtype}, its signature says {spec.datatype}: {how}")
        return np.asarray(value)


def _row(named: Mapping[str, Any], row: int) -> dict[str, Any]:
    return {name: None if value is None else value[row] for name, value in named.items()}


def arranged(raw: Any, names: Sequence[str], whose: str) -> list[Any]:
    """Values for outputs of those names: a dict's by name, a tuple's or list's in order; one alone need not be in any.

    Raises:
        Internal: they are not there; the sentence says what is.
    """
    if isinstance(raw, Mapping) and all(name in raw for name in names):
        return [raw[name] for name in names]
    if type(raw) in (tuple, list):
        if len(raw) != len(names):
            raise Internal(f"{whose} returned a {type(raw).__name__} of {len(raw)}, its signature has {list(names)}")
        return list(raw)
    if structures.children(raw) is not None:
        found = structures.leaves(raw)
        for name in names:
            if name not in found:
                raise Internal(f"{whose} did not return the output {name!r}, only {[*found]}")
        return [found[name] for name in names]
    if len(names) != 1:
        raise Internal(f"{whose} returned {type(raw).__name__}, not a dict of {list(names)}")
    return [raw]


def run(what: str, function: Callable[[], Any]) -> Any:
    """Call code of a model. Raises FailedPrecondition: whatever it raised."""
    try:
        return function()
    except TensorNextError:
        raise
    except BaseException as error:
        raise FailedPrecondition(f"{what} raised {sentence(error)}") from error


def default_workers() -> int:
    """Threads for `preprocess` and `postprocess`: as many as there are cores that the process may use, up to 8."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
