"""Inputs of requests that lie in shared memory: copied out of it before anything looks at them.

From then on they are as frames that came: their client cannot change them any more, and may use the memory again. What
reads them later or longer than the batch, as an audit, a shadow or a recording does, need not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument
from tnxctl.protocol.wire import Predict, PredictShared
from tnxd.transport.client_limits import Admission
from tnxd.transport.clients import Connection

if TYPE_CHECKING:
    from typing_extensions import Buffer


def take(
    connection: Connection, request: PredictShared, frames: Sequence[Buffer], admission: Admission, most_bytes: int
) -> Sequence[Buffer]:
    """The inputs of a request as frames.

    Args:
        frames: that came with it. most_bytes: that all its inputs may have.

    Raises:
        FailedPrecondition: its connection shares no memory.
        InvalidArgument: a span does not lie within the memory, or inputs came both ways, or are too many or too large.
        ResourceExhausted: the client has too much in flight already, or the system has no memory left.
    """
    segment, spans = connection.segment, request.shared
    if segment is None:
        raise FailedPrecondition("this connection shares no memory with the daemon")
    if request.space is not None:
        segment.check(request.space)
    if spans is None:
        return frames
    if frames:
        raise InvalidArgument(f"{len(frames)} tensor frames came with inputs in shared memory")
    if len(spans) != len(request.inputs):
        raise InvalidArgument(f"the header announces {len(request.inputs)} tensors, {len(spans)} are in shared memory")
    nbytes = sum([span.nbytes for span in spans])
    if nbytes > most_bytes:
        raise InvalidArgument(f"the inputs have {nbytes} bytes, more than the limit of {most_bytes}")
    admission.check_bytes(connection, nbytes)  # before the copy, which takes the loop's time
    copies: list[Any] = [segment.read(span) for span in spans]
    return copies


def plain(request: PredictShared) -> Predict:
    """The request with its inputs as frames."""
    return Predict(**{field: getattr(request, field) for field in Predict.__struct_fields__})
