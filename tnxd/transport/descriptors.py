"""Kernel state of connections, by file descriptor: ZeroMQ owns the descriptors, and does not tell of it.

Its I/O thread may close one at any time, and another connection, of another kind, may have the same number at once.
What is asked of that one then counts for nothing, since the first has ended.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct

from tnxctl.descriptors import borrowed

_TCP_INFO_BYTES_RECEIVED = 128  # of Linux's struct tcp_info, since 4.1
_SO_PEERGROUPS = 59  # of Linux, since 4.13
_MOST_GROUPS = 256  # 1,024 bytes are the most that Python takes of an option
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger


def peer_address(descriptor: int) -> str:
    """Address of the peer of a connection, as ZeroMQ writes it; "" if the connection has ended.

    On ipc:// that is `localhost:UID:GID:PID`.
    """
    try:
        with borrowed(descriptor) as connection:
            if connection.family == socket.AF_UNIX:
                credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                pid, user, group = struct.unpack("3i", credentials)
                return f"localhost:{user}:{group}:{pid}"
            return str(connection.getpeername()[0])
    except (OSError, AttributeError):
        return ""


def peer_groups(descriptor: int) -> tuple[int, ...]:
    """Groups of the process at the other end of an ipc:// connection, beside its main one.

    () if they are unknown, or more than 256.
    """
    try:
        with borrowed(descriptor) as connection:
            groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
    except (OSError, AttributeError):
        return ()
    return struct.unpack(f"{len(groups) // 4}I", groups)


def is_open_to_all(descriptor: int) -> bool:
    """Whether everybody may connect to the path that an ipc:// connection came by. One without permissions is open."""
    try:
        with borrowed(descriptor) as connection:
            path = connection.getsockname() if connection.family == socket.AF_UNIX else ""
        return bool(os.stat(path).st_mode & stat.S_IWOTH)
    except (OSError, ValueError):
        return True


def bytes_received(descriptor: int) -> int:
    """Bytes that came over a TCP connection since it was accepted; -1 if the kernel does not say."""
    try:
        with borrowed(descriptor) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    except (OSError, AttributeError):
        return -1
    if len(info) < _TCP_INFO_BYTES_RECEIVED + 8:
        return -1
    return int(struct.unpack_from("=Q", info, _TCP_INFO_BYTES_RECEIVED)[0])


def reset(connection: socket.socket) -> None:
    """End a connection at once: what it has not sent is dropped."""
    with contextlib.suppress(OSError):
        # Else it would wait for its peer to take or send the rest.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        connection.shutdown(socket.SHUT_RDWR)
