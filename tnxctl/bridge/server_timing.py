"""Server-Timing (https://www.w3.org/TR/server-timing/): the stages of a request, in a header of its answer.

Developer tools of browsers show it, `curl -i` prints it, and the bodies of the interfaces need no fields of ours.
"""

from __future__ import annotations

import re

import msgspec

from tnxctl.protocol.timings import Timing
from tnxctl.results import Result

_UNFIT = re.compile(r'[^ -~]|[\\"]')
"""Characters that a quoted string of HTTP cannot have, or not without being escaped."""

_STAGES = [field.removesuffix("_us") for field in Timing.__struct_fields__]

_VALUE = (
    ", ".join(f"{name};dur=%.3f" for name in (*_STAGES, "predicted", "actual"))
    + ', device;desc="%s", reason;desc="%s", batch;desc="%d"'
)


def header(result: Result) -> tuple[bytes, bytes]:
    """Header with the milliseconds of every stage, what was predicted, the device, why there, and the batch's rows.

    `predicted` is to be held against `actual`: both from the queueing of the request to the end of its batch.
    """
    times = (*msgspec.structs.astuple(result.timing), result.predicted_us, result.actual_us)
    texts = (_UNFIT.sub("?", result.device), _UNFIT.sub("?", result.reason))
    return b"server-timing", (_VALUE % (*[time / 1e3 for time in times], *texts, result.batch_size)).encode("ascii")
