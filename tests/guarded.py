"""A ROUTER that asks for keys, with a ZAP handler that answers as a test says: it stands for a daemon's door."""

from __future__ import annotations

import socket
import threading
from typing import Self

import zmq

from peers import Request as PeerRequest
from peers import endpoint_of, held_port, reply_to
from tnxctl.keys.pairs import Pair
from tnxctl.protocol import wire

DOMAIN = b"guarded"


class GuardedDaemon:
    """A daemon with a door. It echoes predictions and answers health, until the `with` block ends.

    Attributes:
        endpoint: where it is, the same after `restart`.
        asked: what its handler was asked about: the mechanism and the 32 bytes of the key, if any.
        statuses: what the handler answers, one after the other, and the last one from then on; "" is no answer.
    """

    def __init__(self, pair: Pair | None, *statuses: str, handler: bool = True) -> None:
        self._port = held_port()
        self.endpoint = endpoint_of(self._port)
        self.asked: list[tuple[bytes, ...]] = []
        self._start(pair, *statuses, handler=handler)

    def restart(self, pair: Pair | None, *statuses: str, handler: bool = True) -> None:
        """End all connections, and be there again, with another key or other answers."""
        self._stop()
        self._start(pair, *statuses, handler=handler)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._port.close()
        self._stop()

    def _start(self, pair: Pair | None, *statuses: str, handler: bool) -> None:
        self.statuses = list(statuses) or ["200"]
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        sockets = [self._router(pair)]
        if handler:
            sockets.append(self._context.socket(zmq.ROUTER))
            sockets[1].bind("inproc://zeromq.zap.01")
        self._stop_reader, self._stop_writer = socket.socketpair()
        self._thread = threading.Thread(target=self._run, args=(sockets,), name="guarded daemon")
        self._thread.start()

    def _router(self, pair: Pair | None) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        router.set(zmq.LINGER, 0)
        router.set(zmq.ZAP_DOMAIN, DOMAIN)
        router.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        if pair is not None:
            router.set(zmq.CURVE_SERVER, 1)
            router.set(zmq.CURVE_SECRETKEY, pair.secret.encode())
        router.bind(self.endpoint)
        return router

    def _stop(self) -> None:
        self._stop_writer.send(b"\0")
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._stop_reader.close()
        self._stop_writer.close()

    def _run(self, sockets: list[zmq.Socket[bytes]]) -> None:
        poller = zmq.Poller()
        poller.register(self._stop_reader.fileno(), zmq.POLLIN)
        for each in sockets:
            poller.register(each, zmq.POLLIN)
        while True:
            ready = [source for source, _ in poller.poll()]
            if self._stop_reader.fileno() in ready:
                break
            for source in ready:
                (self._serve if source is sockets[0] else self._decide)(source)
        for each in sockets:
            each.close(0)
        self._context.term()

    def _decide(self, handler: zmq.Socket[bytes]) -> None:
        envelope, _, version, request, domain, _, _, mechanism, *credentials = handler.recv_multipart()
        assert domain == DOMAIN
        self.asked.append((mechanism, *credentials))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if status:
            handler.send_multipart([envelope, b"", version, request, status.encode(), b"", b"", b""])

    @staticmethod
    def _serve(router: zmq.Socket[bytes]) -> None:
        identity, header, *tensors = router.recv_multipart()
        request = wire.decode_request(header, wire.Limits())
        if not isinstance(request, wire.Cancel):
            router.send_multipart([identity, *reply_to(PeerRequest(identity, request, tensors))])
