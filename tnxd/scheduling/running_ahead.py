"""Running ahead: when a stream of a device takes its next batch, while one is under way there.

The next batch has to be on the device when the last one is over. Until then it may grow: a batch of one row takes a GPU
about as long as one of many. So a full batch is taken at once, a smaller one as late as its copy allows.
"""

from __future__ import annotations

from tnxd.scheduling.device import Device
from tnxd.scheduling.request_queue import RequestQueue

# A batch is taken so much earlier than it should have to be: the caller's clock counts milliseconds while it waits, and
# batches end before they are expected to.
_SLACK_US = 1_500.0
_MARGIN = 1.5


def runs_ahead(device: Device) -> bool:
    """Whether a batch that begins now is behind another one of its stream. The device has a free lane and a chip."""
    chip = device.chip
    assert chip is not None
    return chip.streams < device.lanes and min(map(chip.load, device.free_lanes)) > 0


def opens_ns(device: Device, queue: RequestQueue, rows: int, now_ns: int) -> int:
    """Time from which a batch of `rows` that is not full may begin on such a device."""
    if not runs_ahead(device):
        return now_ns
    chip = device.chip
    assert chip is not None
    lane = min(device.free_lanes, key=chip.load)
    left_us = chip.left_us(now_ns)[lane % chip.streams]
    early_us = left_us - _SLACK_US - _MARGIN * queue.placement.preparation.mean(rows)
    return now_ns + int(early_us * 1e3) + 1000 if early_us > 0 else now_ns
