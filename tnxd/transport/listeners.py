"""Endpoints that the ROUTER socket listens on, and the lock files beside the paths of ipc:// endpoints."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from typing import IO

import zmq

from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument
from tnxd.transport import zap
from tnxd.transport.inherited import Listener


class Listeners:
    """Endpoints of one socket. A listener keeps the options that the socket has when it begins to listen.

    Args:
        secret: secret key of the daemon, in Z85: then every tcp:// endpoint asks its peers for a key; "": none does.

    Attributes:
        endpoints: the bound ones, wildcards resolved.
    """

    def __init__(self, socket: zmq.Socket[bytes], secret: str = "") -> None:
        self.endpoints: list[str] = []
        self._secret = secret
        self._socket = socket
        self._locks: list[IO[str]] = []
        self._paths: list[str] = []

    def bind(self, endpoint: str, inherited: Listener | None = None) -> None:
        """Listen on a tcp:// or ipc:// endpoint.

        Args:
            inherited: the socket that listens there already; ZeroMQ closes it, and leaves it to others that have it.

        Raises:
            FailedPrecondition: it is in use.
            InvalidArgument: it is no address of this machine.
        """
        if endpoint.startswith("ipc://") and inherited is None:
            self._lock_path(endpoint)
        self._socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        self._ask_for_key(bool(self._secret) and not endpoint.startswith("ipc://"))
        # ZeroMQ's own from here on: it ends the process over a descriptor that is closed twice, or used for two binds.
        self._socket.setsockopt(zmq.USE_FD, -1 if inherited is None else inherited.detach())
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            if error.errno == zmq.EADDRINUSE:
                raise FailedPrecondition(f"{endpoint} is in use by another process") from None
            raise InvalidArgument(f"cannot listen on {endpoint}: {os.strerror(error.errno or 0)}") from None
        self.endpoints.append(self._socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0"))
        if endpoint.startswith("ipc://") and inherited is None:
            self._paths.append(endpoint.removeprefix("ipc://"))

    def _ask_for_key(self, asks: bool) -> None:
        """Have the next endpoint ask its peers for a key (CURVE), or not; what asks here is in a domain of its own.

        Raises:
            FailedPrecondition: libzmq was built without CURVE.
        """
        if self._secret:  # else the options are not touched: not every build has them
            if not zmq.has("curve"):
                raise FailedPrecondition("keys need a libzmq that was built with CURVE, as the wheels of pyzmq have it")
            self._socket.setsockopt(zmq.CURVE_SERVER, int(asks))
            if asks:
                self._socket.setsockopt(zmq.CURVE_SECRETKEY, self._secret.encode())
        # Else libzmq lets in whom nobody has been asked about.
        self._socket.setsockopt(zmq.ZAP_DOMAIN, zap.KEYS_DOMAIN if asks else zap.LOCAL_DOMAIN)
        self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def _lock_path(self, endpoint: str) -> None:
        """Lock the path of an ipc:// endpoint: ZeroMQ's bind takes over that of a live daemon without an error."""
        socket_path = endpoint.removeprefix("ipc://")
        if os.path.lexists(socket_path) and not stat.S_ISSOCK(os.lstat(socket_path).st_mode):
            raise InvalidArgument(f"cannot listen on {endpoint}: there is something else than a socket at that path")
        path = socket_path + ".lock"
        try:
            # Not blocking, for a pipe at that path; and no link, which may lead to what is not ours.
            flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.fdopen(os.open(path, flags, 0o666), "w", encoding="ascii")  # held until close
        except OSError as error:
            raise InvalidArgument(f"cannot listen on {endpoint}: {path}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise FailedPrecondition(f"{endpoint} is in use by another process") from None
        self._locks.append(lock)

    def close(self) -> None:
        """Remove the sockets that were made for ipc:// endpoints and release their locks, once the socket is closed."""
        for path in self._paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        for lock in self._locks:
            lock.close()  # the file stays: to remove it would let two others lock two files of one name
