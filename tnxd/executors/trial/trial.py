"""The trial of one version on one device: what it is like, and what lanes call for it."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxctl.protocol.frames import Array
from tnxd.device_kinds import KINDS
from tnxd.error_text import sentence
from tnxd.executors.execution import PURE, SCRATCH, SHARED
from tnxd.executors.trial.copies import Call, Differentiating, Own, Serial, Sparing, duplicate
from tnxd.executors.trial.examples import Item, Make, examples, telling_examples
from tnxd.executors.trial.held import Held, Place, submodule
from tnxd.executors.trial.rows import lengths_apart, pair_of_requests, rows_apart
from tnxd.executors.trial.state import (
    REMEDY,
    Answer,
    State,
    blame,
    check_graph,
    find_state,
    same_chance,
    seeded,
    stateful,
)
from tnxd.executors.trial.suspects import suspects
from tnxd.executors.trial.undo import Beside, Undo, held_by
from tnxd.models.model import Model
from tnxd.models.noise import as_float, difference, tolerance
from tnxd.models.process_state.side_effects import SideEffectDetector
from tnxd.models.tensors import TORCH_DTYPES, check_outputs, to_array, to_tensor

log = logging.getLogger(__name__)

_DATATYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_KNOWN = ("pt2", "onnx")
"""Formats whose files say which axes have one length."""

_SHARE = 0.01
"""Share of the numbers that a module holds: a datatype of fewer does not say what it computes in."""

_MOST_KINDS = 3
"""Kinds of values that requests are compared with."""

_OF_A_SHAPE = re.compile(r"\b(shapes?|sizes?|dimensions?|channels?)\b")
"""In what torch says of tensors that do not fit together."""

_WITNESSED = 6
"""Calls that are looked at for what they change in the process: each costs some milliseconds."""

_OF_AUTOGRAD = re.compile(r"(?i)\bgrad|\binference (mode|tensor)")
"""In what torch says where inference mode does not let a forward differentiate."""

_OF_THE_CODE = (NotImplementedError, AttributeError, NameError, ImportError, TypeError, SyntaxError)
"""What is wrong with the code whatever the input is."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a trial.

    Attributes:
        model: as it may be served: without a batch axis where that does not count rows.
        state: of the module.
        serial: whether one lane may call it at a time.
        make: makes inputs that it takes; None: no example was one.
        tolerance: difference that rounding makes, relative to the largest value of an output.
        written_inputs: positions of inputs that a forward writes to.
        known: inputs of two requests and their answers; (): these cannot be repeated.
        differentiates: whether it runs outside of inference mode.
        beside: the code beside the weights, as it was imported. telling: examples whose values and answers differ.
        opening: what to ask a module first, if that makes it what it is from then on.
        notes: what an operator should know.
    """

    model: Model
    state: State
    serial: bool
    make: Make | None
    tolerance: float
    notes: tuple[str, ...] = ()
    written_inputs: frozenset[int] = frozenset()
    known: tuple[tuple[Item, Sequence[Array]], ...] = ()
    differentiates: bool = False
    beside: Beside | None = None
    telling: tuple[Make, ...] = ()
    opening: Item | None = None

    def writing(self, places: Sequence[Place]) -> Verdict:
        """The verdict for a module that was seen to write these places, too: nothing of that is to be left behind."""
        places = [place for place in places if not _is_cache(place)]
        state = self.state.with_written(places)
        if self.beside is not None and state.kind != PURE:
            self.beside.put_back()
        return replace(self, state=state, serial=self.serial or state.outside)

    @property
    def kind(self) -> str:
        """PURE, SCRATCH or SHARED."""
        return SHARED if self.model.state == SHARED else self.state.kind

    def one_at_a_time(self, why: str) -> Verdict:
        """The verdict for a module that lanes cannot call at the same time."""
        note = f"one lane at a time calls it: with a lane each, two requests had other answers than alone: {why}"
        return replace(self, serial=True, notes=(*self.notes, note))

    @property
    def pristine(self) -> bool:
        """Whether the module is after the trial as it was built."""
        return self.kind == PURE and not self.serial


def try_out(
    module: torch.nn.Module, model: Model, device: torch.device, build: Callable[[], torch.nn.Module]
) -> Verdict:
    """Run a module that was just built, and find out what can be promised about it.

    Args:
        module: on the device. build: makes another one there.

    Raises:
        FailedPrecondition: it cannot be served: requests would depend on each other, against what model.toml says.
        Exception: what it raised, where no other input would help.
    """
    asking = _Asking(module, model, device)
    verdict = _verdict(asking, build)
    if asking.witness.complaint():
        raise FailedPrecondition(asking.witness.complaint())
    return replace(verdict, written_inputs=frozenset(asking.written_inputs))


def _verdict(asking: _Asking, build: Callable[[], torch.nn.Module]) -> Verdict:
    module, model, device = asking.module, asking.model, asking.device
    allowed = tolerance(_datatypes(module, model), KINDS[device.type])
    as_built = Held(module, model.writes, contents=False)
    beside = Beside(module)
    with same_chance():
        asking, make, complaint, notes = _begun(asking)
    model = asking.model
    if model.state == SHARED:
        note = "requests share its state: they run one at a time"
        return Verdict(
            *(model.unbatched(), State(SCRATCH), True, None, allowed, (*notes, note)),
            differentiates=asking.differentiates,
        )
    if make is None:
        note = (
            f"not warmed up, and served without batches, one request at a time: {complaint.rstrip('.')}. "
            f"Put values that it takes into example.npz beside the model"
        )
        check_graph(model, ())
        beside.put_back()
        state = State(SCRATCH, suspected=tuple(suspects(module)), beside=tuple(beside.attributes))
        return Verdict(
            *(model.unbatched(), state, not state.suspected or bool(state.beside), None, allowed, (*notes, note))
        )
    made_at_first = [place.name for place in as_built.changed(Held(module, model.writes, contents=False))]
    begun = Held(module, model.writes)
    with same_chance():
        telling = _telling(asking, model)
    varied = telling[0] if telling else make
    first, second = varied(1, 0), varied(1, 1)
    state = find_state(module, model, asking, first, second, allowed)
    with same_chance():
        known = seeded(asking, first)[1]
    if made_at_first:
        openings = [second, *(make(1, 1) for make in telling[1:][-1:])]  # a range may be what it makes of the first one
        as_it_was = partial(_as_it_was, as_built, beside)
        _check_openings(asking, build, as_it_was, first, known, openings, made_at_first, allowed)
    verdict = Verdict(
        *(model, state, state.outside, varied, allowed, notes),
        differentiates=asking.differentiates,
        beside=beside,
        telling=tuple(telling),
        opening=make(1, 0) if made_at_first else None,
    )
    failure = None
    if model.max_batch_size > 1:  # one row has no company
        try:
            with same_chance():
                verdict = _with_rows(verdict, asking, telling)
        except FailedPrecondition as error:
            failure = error
    written = _written_since(begun, module, model)
    with same_chance():
        apart = difference(model.outputs, known, seeded(asking, first)[1], allowed)
    if apart is not None and written and not state.random:
        raise stateful([place.name for place in written], apart.text)
    if failure is not None:
        raise failure
    verdict = verdict.writing(written)
    verdict = replace(verdict, notes=(*verdict.notes, *_about(verdict.state)))
    if state.random:
        return verdict
    served = asking.as_another(verdict.model)
    with same_chance():
        answered = [(item, seeded(served, item)[1]) for item in (first, second)]
    return replace(verdict.writing(()), known=tuple(answered))


def _written_since(begun: Held, module: torch.nn.Module, model: Model) -> list[Place]:
    """Places that hold something else than when a picture was taken."""
    return begun.changed(Held(module, model.writes))


class _Asking:
    """Runs a module: an `Ask`.

    Attributes:
        written_inputs: positions of the inputs that it has written to. witness: of what it changes in the process.
        module, model, device: what is run, as what, where.
        differentiates: whether it runs outside of inference mode, see `Differentiating`.
    """

    def __init__(self, module: torch.nn.Module, model: Model, device: torch.device) -> None:
        self.model = model
        self.written_inputs: set[int] = set()
        self.witness = SideEffectDetector()
        self._calls = 0
        self.module = module
        self.device = device
        self.differentiates = False

    def as_another(self, model: Model) -> _Asking:
        """The same as another model, seen together with this."""
        other = copy.copy(self)
        other.model = model
        return other

    def differentiating(self) -> _Asking:
        """The same outside of inference mode, seen together with this."""
        other = copy.copy(self)
        other.differentiates = True
        return other

    def of_another(self, module: torch.nn.Module) -> _Asking:
        """The same of another module, seen by itself."""
        other = _Asking(module, self.model, self.device)
        other.differentiates = self.differentiates
        return other

    def __call__(self, item: Item) -> Answer:
        model = self.model
        tensors = [
            to_tensor(array.copy(), spec.datatype).to(self.device)
            for array, spec in zip(item, model.inputs, strict=True)
        ]
        rows = len(item[0]) if model.max_batch_size else 1
        self._calls += 1
        call: Call = Differentiating(self.module) if self.differentiates else self.module
        with self.witness if self._calls <= _WITNESSED else contextlib.nullcontext():
            raw = call(*tensors)
        outputs = check_outputs(model, raw, rows)
        answer = [to_array(output.cpu()).copy() for output in outputs]
        for position, (tensor, array) in enumerate(zip(tensors, item, strict=True)):
            if to_array(tensor.cpu()).tobytes() != array.tobytes():
                self.written_inputs.add(position)
        return outputs, answer


def _as_it_was(as_built: Held, beside: Beside) -> None:
    """Have the code beside the weights as it was imported, and the caches of its functions empty."""
    as_built.forget_caches()
    beside.put_back()


def _check_openings(
    asking: _Asking,
    build: Callable[[], torch.nn.Module],
    as_it_was: Callable[[], None],
    item: Item,
    known: Sequence[Array],
    openings: Sequence[Item],
    made: Sequence[str],
    allowed: float,
) -> None:
    """Check that what a module makes at its first call does not depend on what is asked then.

    Args:
        build: makes another one, that was never asked. as_it_was: has the code so, too.
        item, known: a request, and what the module answered that had first been asked something else.
        openings: what others are asked first. made: names of what it makes then.

    Raises:
        FailedPrecondition: it does.
    """
    for opening in openings:
        as_it_was()
        with same_chance(), torch.inference_mode(False):
            again = asking.of_another(build())
        with same_chance():
            seeded(again, opening)
            apart = difference(again.model.outputs, known, seeded(again, item)[1], allowed)
        if apart is not None:
            raise stateful(made, apart.text)
    as_it_was()


def open_with(module: torch.nn.Module, verdict: Verdict, device: torch.device) -> None:
    """Have a module that was just built make what it makes only when it is first called, before lanes share or copy it.

    What each forward writes is left as it was built.

    Raises:
        FailedPrecondition: that cannot be put back.
    """
    if verdict.opening is None:
        return
    undo = _undo(module, replace(verdict.state, suspected=(), suspected_beside=()))
    asking = _Asking(module, verdict.model, device)
    asking.differentiates = verdict.differentiates
    with same_chance():
        asking(verdict.opening)
    undo.put_back()
    if verdict.beside is not None:
        verdict.beside.put_back()


def lane_calls(module: torch.nn.Module, verdict: Verdict) -> Callable[[], Call]:
    """Makes what one more lane calls for a module.

    Args:
        module: as it was built, not the one of the trial unless that is `pristine`.

    Raises:
        FailedPrecondition: requests cannot be kept apart.
    """
    apart = _kept_apart(module, verdict)
    made = (lambda: Differentiating(apart())) if verdict.differentiates else apart
    written = verdict.written_inputs
    return (lambda: Sparing(made(), written)) if written else made


def _kept_apart(module: torch.nn.Module, verdict: Verdict) -> Callable[[], Call]:
    written, suspected = verdict.state.written, verdict.state.suspected
    if verdict.serial:
        one = Serial(module, None if verdict.kind == SHARED else _undo(module, verdict.state))
        return lambda: one
    if verdict.pristine:
        return lambda: module

    def own() -> Own:
        copied = duplicate(module, _tensors(module, (*written, *suspected)))
        return Own(copied, _undo(copied, verdict.state))

    try:
        own()
    except Exception as error:  # whatever a part of it has against being copied
        if suspected:
            raise FailedPrecondition(
                f"its code may write to {_joined(*suspected[0])!r}, and it cannot be copied for each lane: "
                f"{sentence(error)}. {REMEDY}"
            ) from None
        log.info("%s is called by one lane at a time: %s", verdict.model.key, sentence(error))
        one = Serial(module, _undo(module, verdict.state))
        return lambda: one
    return own


def _undo(module: torch.nn.Module, state: State) -> Undo:
    """The writes of a module's forwards, to be undone.

    Raises:
        FailedPrecondition: it cannot be: the sentence names it.
    """
    inside = [[(submodule(module, path), name) for path, name in each] for each in (state.written, state.suspected)]
    try:
        return Undo([*inside[0], *state.beside], [*inside[1], *state.suspected_beside])
    except Exception as error:  # whatever a part of it has against being copied
        told = ", ".join(map(repr, state.names[:3]))
        raise FailedPrecondition(
            f"a forward writes, or may write, to {told}, which cannot be put back: {sentence(error)}. {REMEDY}"
        ) from None


def _begun(asking: _Asking) -> tuple[_Asking, Make | None, str, tuple[str, ...]]:
    """A way to run a module, an example that it takes, why it takes none, and notes.

    What does not fit may be inference mode alone, or the number of rows.

    Raises:
        FailedPrecondition: there is none.
    """
    model = asking.model
    make, failure = None, None
    try:
        make, complaint = _first_that_runs(asking, model)
    except TensorNextError as error:
        failure, complaint = error, error.message
    if make is None and _OF_AUTOGRAD.search(complaint):
        again = asking.differentiating()
        with contextlib.suppress(TensorNextError):
            taken, _ = _first_that_runs(again, model)
            if taken is not None:
                note = "a forward differentiates: it runs outside of inference mode, which takes longer"
                return again, taken, "", (note,)
    if failure is None:
        return asking, make, complaint, ()
    found = None if model.batching_asked else _other_rows(asking)
    if found is None:
        raise failure
    return *found, (f"no batches: axis 0 does not count rows: {complaint}",)


def _first_that_runs(ask: _Asking, model: Model, rows: int = 1) -> tuple[Make | None, str]:
    """The first example that a model takes, or why it takes none.

    Raises:
        FailedPrecondition: what is wrong is so whatever the values are: with the code, or with the shapes.
    """
    complaints = []
    of_the_code = True
    for what, make in examples(model, KINDS[ask.device.type]):
        try:
            ask(make(rows, 0))
            return make, ""
        except Exception as error:
            blame(error)
            if isinstance(error, TensorNextError) and error.code == "INTERNAL":  # the outputs do not fit
                raise FailedPrecondition(error.message) from None
            of_the_code = of_the_code and isinstance(error, _OF_THE_CODE)
            complaints.append((what, sentence(error)))
    what, complaint = complaints[-1]
    told = f"a forward of {what} raised {complaint}"
    if of_the_code:
        raise FailedPrecondition(told)
    if len({text for _, text in complaints}) == 1 and _OF_A_SHAPE.search(complaint):
        said = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in model.inputs)
        where = f"{model.name}: the file" if model.format in _KNOWN else f"{model.name}/model.toml: inputs"
        raise FailedPrecondition(f"{where} says {said}: {told}")
    return None, told


def _other_rows(asking: _Asking) -> tuple[_Asking, Make | None, str] | None:
    """A model that takes no single row, or returns other numbers of rows, asked without a batch axis; None: nor so."""
    if not asking.model.max_batch_size:
        return None
    for rows in (1, 2, 4, 8):
        again = asking.as_another(asking.model.unbatched().with_rows(rows))
        with contextlib.suppress(TensorNextError):
            return again, *_first_that_runs(again, again.model)
    return None


def _telling(ask: _Asking, model: Model) -> list[Make]:
    """Kinds of examples whose values and answers differ, and that the model takes; [] if there is none.

    Those with finite answers alone go before others, which tell less. Made-up ones stand in for an author's own where
    those have no such answers.
    """
    fine: list[Make] = []
    others: list[Make] = []
    exported = model.format == "pt2"
    for own in (True, False) if model.example_values else (True,):
        for make in telling_examples(model, KINDS[ask.device.type], own=own):
            told = _told(ask, model, make)
            if told == _ALL:
                fine.append(make)
            elif told:
                others.append(make)
            if len(fine) == _MOST_KINDS:
                return fine
            if own and exported and fine:  # whoever exported it gave a shape, and may not have thought of values
                break
        if fine and not exported:
            return fine
    return fine or others[:1]


_SOME, _ALL = 1, 2


def _told(ask: _Asking, model: Model, make: Make) -> int:
    """_ALL: answers to such examples differ, and are finite; _SOME: some are finite; 0: it takes none, or none is."""
    try:
        answers = [ask(item)[1] for item in (make(1, 0), make(1, 1), *pair_of_requests(model, make, make, 0))]
    except torch.AcceleratorError:
        raise
    except Exception:  # it takes no such values, which may ask for memory, too: the next ones
        return 0
    finite = [
        np.isfinite(as_float(array, spec.datatype))
        for answer in answers
        for array, spec in zip(answer, model.outputs, strict=True)
    ]
    if difference(model.outputs, answers[0], answers[1], 0.0) is not None and all(each.all() for each in finite):
        return _ALL
    return _SOME if any(each.any() for each in finite) else 0


def _with_rows(verdict: Verdict, ask: _Asking, telling: Sequence[Make]) -> Verdict:
    """The verdict, with a batch axis only where that counts rows.

    Raises:
        FailedPrecondition: model.toml asks for batches, and they would mix requests up.
    """
    model = verdict.model
    if not telling:
        return _whole(verdict, "no batches: no example with values that differ was taken; put some into example.npz")
    if not model.batching_asked and model.format not in _KNOWN and len(model.inputs) > 1:
        lengths = lengths_apart(model, ask.as_another(model.unbatched()), telling[0])
        if lengths:
            return without_rows(verdict, lengths)
    try:
        apart = rows_apart(model, ask, telling, verdict.tolerance)
    except Exception as error:
        blame(error)
        apart = f"together, the forward raises {sentence(error)}"
    if not apart:
        return verdict
    if verdict.state.random:
        return _whole(verdict, f"no batches: answers are drawn at random, and rows cannot be compared: {apart}")
    return without_rows(verdict, f"alone and beside another request, {apart}")


def without_rows(verdict: Verdict, why: str) -> Verdict:
    """The verdict for a model whose rows are found to depend on each other.

    Raises:
        FailedPrecondition: model.toml asks for batches.
    """
    what = f"axis 0 does not count rows: {why}"
    if verdict.model.batching_asked:
        raise FailedPrecondition(f"max_batch_size: {verdict.model.max_batch_size}, but {what}")
    return _whole(verdict, f"no batches: {what}")


def _whole(verdict: Verdict, note: str) -> Verdict:
    """The verdict for a model whose requests are never batched and never cut."""
    make = verdict.make
    rows = verdict.model.example_rows
    assert make is not None
    return replace(
        verdict,
        model=verdict.model.unbatched(),
        make=lambda _, variant: make(rows, variant),
        notes=(*verdict.notes, note),
    )


def _about(state: State) -> tuple[str, ...]:
    """Notes about a state that is not pure."""
    if state.kind == PURE:
        return ()
    told = ", ".join(map(repr, state.names[:3])) + (" and more" if len(state.names) > 3 else "") or "what nobody sees"
    how = "one lane at a time calls it" if state.outside else "each lane has a copy of its own"
    return (f"a forward writes, or may write, to {told}: {how}",)


def _is_cache(place: Place) -> bool:
    """Whether a place is the cache of a function: it gives the same answer to the same arguments."""
    return isinstance(getattr(place.holder, place.attribute, None), functools._lru_cache_wrapper)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _tensors(module: torch.nn.Module, places: Sequence[tuple[str, str]]) -> list[torch.Tensor]:
    values = [getattr(submodule(module, path), name, None) for path, name in places]
    return [each for value in values for each in ((value,) if isinstance(value, torch.Tensor) else held_by(value))]


def _datatypes(module: torch.nn.Module, model: Model) -> list[str]:
    """Datatypes that a model computes in, as far as they show: those of much of what it holds, and of its tensors."""
    held: Counter[str] = Counter()
    for tensor in (*module.parameters(), *module.buffers()):
        held[_DATATYPES.get(tensor.dtype, "")] += tensor.numel()
    large = [name for name, count in held.items() if count >= _SHARE * held.total()]
    return [*large, *(spec.datatype for spec in (*model.inputs, *model.outputs))]
