"""Worker of the bridge: an event loop with uvicorn in it, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import uvicorn

from tnxctl import malloc
from tnxctl.bridge import tls
from tnxctl.bridge.app import App
from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.connections import Config, connection
from tnxctl.bridge.interfaces import routes_of
from tnxctl.bridge.listening import BACKLOG
from tnxctl.bridge.notifying import notify
from tnxctl.bridge.settings import Settings
from tnxctl.protocol.errors import InvalidArgument

if TYPE_CHECKING:
    from tnxctl.bridge.grpc.server import GrpcServer

_log = logging.getLogger("tnxctl.bridge")


def run(settings: Settings, sockets: Sequence[socket.socket], on_ready: Callable[[], None], ending: int = -1) -> None:
    """Serve on listening sockets until SIGTERM or SIGINT; a second one waits for no request any more.

    Args:
        on_ready: called once it serves.
        ending: descriptor at whose end of file it stops, too; negative: none.

    Raises:
        InvalidArgument: a file with tokens, keys, or a certificate has a mistake.
    """
    malloc.keep_freed()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(settings, sockets, on_ready, ending))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The loop of uvloop, if that is installed: it moves large bodies faster."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


class _Server(uvicorn.Server):
    """Server of uvicorn that leaves signals to its worker, which does not end by one.

    Args:
        beside: server of gRPC that begins and ends with it, if any.
    """

    def __init__(self, config: Config, on_ready: Callable[[], None], beside: GrpcServer | None) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._beside = beside
        self._hurrying: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._beside is not None:
            await self._beside.start()
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._beside is None:
            await super().shutdown(sockets)
        else:
            await asyncio.gather(super().shutdown(sockets), self._beside.stop())

    def stop(self) -> None:
        """Take no connections any more, and end once those that are open have their responses."""
        notify("STOPPING=1")
        if self.should_exit:
            self.force_exit = True
            for task in self.server_state.tasks:
                task.cancel()
        self.should_exit = True
        if self.force_exit and self._beside is not None:
            self._hurrying = asyncio.ensure_future(self._beside.stop(0.0))


async def _serve(
    settings: Settings, sockets: Sequence[socket.socket], on_ready: Callable[[], None], ending: int
) -> None:
    bridge = Bridge(settings, routes_of(settings))
    limits = settings.limits
    config = Config(
        App(bridge),
        http=connection,  # type: ignore[arg-type]  # all that it does is to call it
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=limits.idle_timeout_s,  # type: ignore[arg-type]  # it need not be whole
        timeout_graceful_shutdown=limits.drain_timeout_s,  # type: ignore[arg-type]
    )
    config.http_limits = limits
    config.load()
    if settings.certfile is not None and settings.keyfile is not None:
        config.ssl = tls.context(settings.certfile, settings.keyfile)
    beside = None if settings.grpc is None else _grpc_server(bridge)
    server = _Server(config, on_ready, beside)
    _react(server, partial(_reload, bridge, config.ssl, beside), ending)
    try:
        await server.serve([*sockets])
    finally:
        await bridge.close()


def _grpc_server(bridge: Bridge) -> GrpcServer:
    from tnxctl.bridge.grpc.server import GrpcServer  # late: not everybody has gRPC

    return GrpcServer(bridge)


def _react(server: _Server, reload: Callable[[], None], ending: int) -> None:
    """React to signals, and to the end of the process that has started this one."""
    if sys.platform == "win32":  # its loop takes no handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK):
            signal.signal(number, lambda *_: server.stop())
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop)
    loop.add_signal_handler(signal.SIGHUP, reload)
    if ending >= 0:

        def stop_once() -> None:
            loop.remove_reader(ending)
            server.stop()

        loop.add_reader(ending, stop_once)


def _reload(bridge: Bridge, context: ssl.SSLContext | None, beside: GrpcServer | None) -> None:
    """Read again what may have changed, tokens and the certificate: all of it, or nothing."""
    certfile, keyfile = bridge.settings.certfile, bridge.settings.keyfile
    try:
        if certfile is not None and keyfile is not None:
            tls.context(certfile, keyfile)  # so that nothing is changed if they have a mistake
        bridge.access.reload()
        if context is not None and certfile is not None and keyfile is not None:
            tls.load(context, certfile, keyfile)
            if beside is not None:
                beside.reload()
    except InvalidArgument as error:
        _log.error("all stays as it was: %s", error.message)
    else:
        _log.info("read tokens and certificate again")
