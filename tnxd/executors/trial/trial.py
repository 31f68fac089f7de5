"""Trial of one version on one device: the module is run on examples until a verdict is found."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from tnxctl.protocol.datatypes import Array, as_float
from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxd.device_kinds import KINDS
from tnxd.error_text import sentence
from tnxd.executors.execution import SCRATCH, SHARED
from tnxd.executors.trial.asking import Asking
from tnxd.executors.trial.examples import Item, Make, examples, telling_examples
from tnxd.executors.trial.held import Held, Place
from tnxd.executors.trial.rows import lengths_apart, pair_of_requests, rows_apart
from tnxd.executors.trial.state import (
    State,
    blame,
    check_graph,
    find_state,
    same_chance,
    seeded,
    stateful,
)
from tnxd.executors.trial.suspects import suspects
from tnxd.executors.trial.undo import Beside
from tnxd.executors.trial.verdict import Verdict, about, whole, without_rows
from tnxd.models.file_formats import PT2, has_signature
from tnxd.models.model import Model
from tnxd.models.rounding import difference, tolerance
from tnxd.models.tensors import DATATYPES

_SHARE = 0.01
"""Share of the numbers that a module holds: a datatype with fewer numbers is not one that it computes in."""

_MOST_KINDS = 3
"""Kinds of values that requests are compared with."""

_OF_A_SHAPE = re.compile(r"\b(shapes?|sizes?|dimensions?|channels?)\b")
"""Words of torch's errors about tensors that do not fit together."""

_OF_AUTOGRAD = re.compile(r"(?i)\bgrad|\binference (mode|tensor)")
"""Words of torch's errors where inference mode does not let a forward differentiate."""

_OF_THE_CODE = (NotImplementedError, AttributeError, NameError, ImportError, TypeError, SyntaxError)
"""Errors of the code, whatever the input is."""


def try_out(
    module: torch.nn.Module, model: Model, device: torch.device, build: Callable[[], torch.nn.Module]
) -> Verdict:
    """Try a module that was just built: the trial of a model on a device.

    Args:
        module: on the device. build: makes another one there.

    Raises:
        FailedPrecondition: it cannot be served: requests would depend on each other, though model.toml denies that.
        Exception: whatever the module raised, where no other input would help.
    """
    asking = Asking(module, model, device)
    verdict = _verdict(asking, build)
    if asking.witness.complaint():
        raise FailedPrecondition(asking.witness.complaint())
    return replace(verdict, written_inputs=frozenset(asking.written_inputs))


def _verdict(asking: Asking, build: Callable[[], torch.nn.Module]) -> Verdict:
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
        if model.ragged is not None and model.ragged.packed:
            raise FailedPrecondition(f"a packed model has to take an example: {complaint}")
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
    verdict = replace(verdict, notes=(*verdict.notes, *about(verdict.state)))
    if state.random:
        return verdict
    served = asking.as_another(verdict.model)
    with same_chance():
        answered = [(item, seeded(served, item)[1]) for item in (first, second)]
    return replace(verdict.writing(()), known=tuple(answered))


def _written_since(begun: Held, module: torch.nn.Module, model: Model) -> list[Place]:
    """Places that were written since a picture was taken."""
    return begun.changed(Held(module, model.writes))


def _as_it_was(as_built: Held, beside: Beside) -> None:
    """Put the code beside the weights back as it was imported, and empty the caches of its functions."""
    as_built.forget_caches()
    beside.put_back()


def _check_openings(
    asking: Asking,
    build: Callable[[], torch.nn.Module],
    as_it_was: Callable[[], None],
    item: Item,
    known: Sequence[Array],
    openings: Sequence[Item],
    made: Sequence[str],
    allowed: float,
) -> None:
    """Check that the parts that a module makes at its first call do not depend on the inputs of that call.

    Args:
        build: makes another module, which was never called. as_it_was: puts its code back as it was imported.
        item, known: a request, and the answer of a module that was first called with other inputs.
        openings: inputs for the first calls of others. made: names of the parts.

    Raises:
        FailedPrecondition: they do.
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


def _begun(asking: Asking) -> tuple[Asking, Make | None, str, tuple[str, ...]]:
    """A way to run a module, an example that it takes, the complaint if it takes none, and notes.

    A module that takes no example at first may take one outside of inference mode, or with another number of rows.

    Raises:
        FailedPrecondition: it takes none, and it cannot be served without a trial.
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


def _first_that_runs(ask: Asking, model: Model, rows: int = 1) -> tuple[Make | None, str]:
    """The first example that a model takes, or None and the complaint.

    Raises:
        FailedPrecondition: the code or the shapes are wrong, whatever the values are.
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
        where = f"{model.name}: the file" if has_signature(model.format) else f"{model.name}/model.toml: inputs"
        raise FailedPrecondition(f"{where} says {said}: {told}")
    return None, told


def _other_rows(asking: Asking) -> tuple[Asking, Make | None, str] | None:
    """A way to run a model without a batch axis, an example that it takes, and the complaint if it takes none.

    For a model that takes no single row, or returns other numbers of rows. None: there is no such way.
    """
    if not asking.model.max_batch_size:
        return None
    for rows in (1, 2, 4, 8):
        again = asking.as_another(asking.model.unbatched().with_rows(rows))
        with contextlib.suppress(TensorNextError):
            return again, *_first_that_runs(again, again.model)
    return None


def _telling(ask: Asking, model: Model) -> list[Make]:
    """Makers of examples that the model takes, and whose values and answers differ; [] if there is none.

    Examples with finite answers alone go before others, which tell less. Made-up ones stand in for an author's own
    where those have no such answers.
    """
    fine: list[Make] = []
    others: list[Make] = []
    exported = model.format == PT2.name
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


def _told(ask: Asking, model: Model, make: Make) -> int:
    """Use of a maker's examples. _ALL: answers differ and are finite; _SOME: some are finite; 0: none, or an error."""
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


def _with_rows(verdict: Verdict, ask: Asking, telling: Sequence[Make]) -> Verdict:
    """The verdict with a batch axis only where axis 0 counts rows.

    Raises:
        FailedPrecondition: model.toml asks for batches, and rows depend on each other.
    """
    model = verdict.model
    if not telling and model.batching_asked and verdict.make is not None:
        try:
            ask(verdict.make(2, 0))
        except TensorNextError as error:  # the outputs do not fit
            return without_rows(verdict, error.message)
        except Exception as error:
            blame(error)
    if not telling:
        return whole(verdict, "no batches: no example with values that differ was taken; put some into example.npz")
    if not model.batching_asked and not has_signature(model.format) and len(model.inputs) > 1:
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
        return whole(verdict, f"no batches: answers are drawn at random, and rows cannot be compared: {apart}")
    return without_rows(verdict, f"alone and beside another request, {apart}")


def _datatypes(module: torch.nn.Module, model: Model) -> list[str]:
    """Datatypes that a model computes in, as far as they show: of its inputs, its outputs and most of its weights."""
    held: Counter[str] = Counter()
    for tensor in (*module.parameters(), *module.buffers()):
        held[DATATYPES.get(tensor.dtype, "")] += tensor.numel()
    large = [name for name, count in held.items() if count >= _SHARE * held.total()]
    return [*large, *(spec.datatype for spec in (*model.inputs, *model.outputs))]
