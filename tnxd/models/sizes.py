"""Sizes of the messages for a model, as far as its signature says, and whether the limits let them through."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument
from tnxctl.protocol.wire import BYTES, MAX_ID, VERSION, Limits, Predict, TensorSpec, encode
from tnxd.models.model import Model, row_nbytes


def check_message_sizes(model: Model, limits: Limits) -> None:
    """Check that one can ask for this model, and be answered. How many tensors it has raises the limit for that.

    Raises:
        FailedPrecondition: the smallest request or answer, or an example, is larger than a message may be; the sentence
            has both sizes.
    """
    ones = tuple(
        TensorSpec(spec.name, spec.datatype, tuple(max(length, 1) for length in spec.shape)) for spec in model.inputs
    )
    header = len(encode(Predict(v=VERSION, id=MAX_ID, inputs=ones, model=f"{model.name}@{model.version}")))
    if header > limits.header_bytes:
        raise FailedPrecondition(
            f"a request for its {len(ones)} inputs needs a header of {header} bytes, and limits.header_bytes is "
            f"{limits.header_bytes}: raise it, in the clients too"
        )
    batches = bool(model.max_batch_size)
    one = "one row" if batches else "a request"
    for what, specs in ((f"the inputs of {one}", model.inputs), (f"the answer to {one}", model.outputs)):
        nbytes = row_nbytes(specs, batches)
        if nbytes > limits.message_bytes:
            raise FailedPrecondition(
                f"{what} would take {nbytes} bytes, and limits.message_bytes is {limits.message_bytes}: raise it, "
                f"in the clients too"
            )
        strings = sum(
            math.prod(max(length, 1) for length in (spec.shape[1:] if batches else spec.shape))
            for spec in specs
            if spec.datatype == BYTES
        )
        if strings > limits.strings:
            raise FailedPrecondition(
                f"{what} would take {strings} strings, and limits.strings is {limits.strings}: raise it, in the "
                f"clients too"
            )
    for spec, shape in zip(model.inputs, model.examples, strict=False):
        nbytes = row_nbytes((TensorSpec(spec.name, spec.datatype, shape),), batches)
        if nbytes > limits.message_bytes:
            raise FailedPrecondition(
                f"the example of input {spec.name!r}, {list(shape)}, takes {nbytes} bytes, and limits.message_bytes is "
                f"{limits.message_bytes}: no request could have that"
            )


def count_strings(outputs: Sequence[Array]) -> int:
    """Elements of the BYTES tensors among these."""
    return sum([array.size for array in outputs if array.dtype.hasobject])


def too_many_strings(count: int, limits: Limits) -> InvalidArgument:
    """The refusal of an answer with so many strings."""
    return InvalidArgument(
        f"the answer has {count} strings, more than the limit of {limits.strings} in a message: ask for less at a time"
    )


def reply_too_large(nbytes: int, client_limit: int, daemon_limit: int) -> InvalidArgument:
    """The refusal of an answer, which would be as large another time.

    Args:
        nbytes: what its tensors take. client_limit, daemon_limit: most that either may have in a message.
    """
    limit, whose = (client_limit, "the client") if client_limit < daemon_limit else (daemon_limit, "the daemon")
    return InvalidArgument(
        f"the answer takes {nbytes} bytes, more than the {limit} that {whose} may have in a message: ask for less at a "
        f"time"
    )
