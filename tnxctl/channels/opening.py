"""Opening of the channel that suits an endpoint.

libzmq moves every message through a thread of its own. To call a daemon then takes four more wake-ups of a thread, two
on the daemon's side and two on this one, which is much of what a call costs where cores sleep meanwhile
(docs/performance.md, "Without libzmq in between"). So the caller's own thread speaks ZMTP over a plain socket, where
nothing asks for libzmq. Keys do: CURVE is not written anew here. Other systems than Linux do until somebody has tried.
"""

from __future__ import annotations

import sys

from tnxctl.channels.channel import Channel, Target, Watcher
from tnxctl.channels.libzmq import LibzmqChannel
from tnxctl.channels.stream import StreamChannel

HAS_STREAMS = sys.platform == "linux"
"""Whether `StreamChannel` is taken where it can be."""


def open_channel(target: Target, watcher: Watcher | None) -> Channel:
    """A channel that attempts to connect.

    Raises:
        OSError, zmq.ZMQError: no file descriptor is left, or the system refuses the path.
    """
    if HAS_STREAMS and target.credentials is None:
        return StreamChannel(target, watcher)
    return LibzmqChannel(target, watcher)
