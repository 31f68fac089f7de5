"""`tnxctl bridge`: HTTP, and gRPC, in front of a daemon."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from typing import TYPE_CHECKING

import click

from tnxctl.busypoll import DEFAULT_BUSY_POLL_S, MAX_S
from tnxctl.cli import options
from tnxctl.cli.options import DEFAULT_TIMEOUT_S, host
from tnxctl.durations import spell
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from tnxctl.bridge.settings import Settings


@click.command("bridge", short_help="Serve HTTP and gRPC in front of a daemon.")
@click.option("--listen", default="127.0.0.1:8000", show_default=True, metavar="ADDRESS", help="Where to serve HTTP.")
@click.option("--grpc", metavar="ADDRESS", help="Where to serve gRPC.  [default: nowhere]")
@host(several=True, envvar="TNX_HOST", show_envvar=True, default="127.0.0.1", show_default=True)
@options.duration(
    "--timeout", default=f"{DEFAULT_TIMEOUT_S:g}s", help="Longest wait for the daemon's answer to a request."
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Processes that share the address.",
)
@options.duration(
    "--busy-poll",
    default=spell(DEFAULT_BUSY_POLL_S),
    most=MAX_S,
    zero=True,
    help="Longest time that a worker looks for the answer to a short request without sleeping, while it is the only "
    "one. It comes sooner so, at the cost of CPU time; 0 has the worker sleep.",
)
@click.option("--certfile", type=click.Path(), metavar="FILE", help="TLS: the certificate, and those above it, in PEM.")
@click.option("--keyfile", type=click.Path(), metavar="FILE", help="TLS: its private key, in PEM.")
@click.option("--insecure", is_flag=True, help="Serve addresses that others reach without TLS.")
@click.option(
    "--tokens",
    type=click.Path(),
    metavar="FILE",
    help="Ask for bearer tokens: the file of tnxctl keys token.",
)
@click.option("--triton-names", is_flag=True, help="Add Triton's metrics, nv_inference_..., to /metrics.")
@click.option(
    "--shared-memory",
    metavar="PREFIX",
    help="Let clients on this host put tensors into files of /dev/shm whose names begin so, as the Open Inference "
    "Protocol's system shared memory.",
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=NUMBER",
    help="Another limit of HTTP, such as body_bytes=1048576: docs/http.md has all. May be given several times.",
)
@click.pass_context
def command(
    ctx: click.Context,
    listen: str,
    grpc: str | None,
    endpoints: list[str],
    timeout: float,
    workers: int,
    busy_poll: float,
    certfile: str | None,
    keyfile: str | None,
    insecure: bool,
    tokens: str | None,
    triton_names: bool,
    shared_memory: str | None,
    limits: tuple[str, ...],
) -> None:
    """Serve HTTP and gRPC in front of a daemon: for curl, browsers and clients of the Open Inference Protocol.

    It needs more packages than other commands: pip install 'tensornext[http]', for gRPC 'tensornext[http,grpc]'.

    Whoever reaches the address may do what this command itself may: it is one client of the daemon. Addresses that
    other hosts reach need TLS, or --insecure; --tokens says who may do what. SIGHUP reads tokens and certificate
    again. SIGTERM ends it once the requests under way are answered.

    \b
    Examples:
      tnxctl bridge
      tnxctl bridge --listen 0.0.0.0:8443 --certfile chain.pem --keyfile key.pem
      tnxctl bridge --tokens /etc/tensornext/tokens.toml
      tnxctl bridge --host gpu-1,gpu-2 --workers 4
      tnxctl bridge --grpc 127.0.0.1:8001
      curl http://127.0.0.1:8000/health
    """
    from tnxctl.bridge import addresses
    from tnxctl.bridge.settings import Settings, limits_of

    settings = Settings(
        endpoints=tuple(endpoints),
        timeout=timeout,
        listen=addresses.parse(listen, 8000),
        grpc=None if grpc is None else addresses.parse(grpc, 8001),
        workers=workers,
        busy_poll_s=busy_poll,
        certfile=certfile,
        keyfile=keyfile,
        insecure=insecure,
        tokens=tokens,
        triton_names=triton_names,
        shared_memory=shared_memory,
        limits=limits_of(limits),
    )
    _check(settings)
    ctx.exit(_serve(settings))


def _check(settings: Settings) -> None:
    """Check what can be before anything listens. Raises InvalidArgument."""
    from tnxctl.bridge import addresses

    if settings.workers > 1 and sys.platform == "win32":
        raise InvalidArgument("--workers above 1 needs Linux or macOS")
    if (settings.certfile is None) != (settings.keyfile is None):
        raise InvalidArgument("--certfile and --keyfile go together: one of them is missing")
    if settings.shared_memory is not None:
        _check_shared_memory(settings)
    for address in (settings.listen, settings.grpc):
        if address is None or settings.certfile is not None or settings.insecure or addresses.is_loopback(address[0]):
            continue
        raise InvalidArgument(
            f"{addresses.spell(address)} can be reached by others, who could read and change what is sent: "
            "give --certfile and --keyfile for TLS, or --insecure if the network keeps them out"
        )


def _check_shared_memory(settings: Settings) -> None:
    """Check that clients may register shared memory with this bridge. Raises InvalidArgument."""
    from tnxctl.bridge import addresses

    if sys.platform != "linux":
        raise InvalidArgument(f"--shared-memory needs Linux, and this is {sys.platform}")
    if not settings.shared_memory or "/" in settings.shared_memory:
        raise InvalidArgument(
            f"--shared-memory {settings.shared_memory!r}: expected what names of files begin with, such as tnx-"
        )
    if settings.workers > 1:
        raise InvalidArgument("--shared-memory goes with one worker: a region is registered with the one that is asked")
    for address in (settings.listen, settings.grpc):
        if address is not None and not addresses.is_loopback(address[0]):
            raise InvalidArgument(
                f"--shared-memory is for clients on this host, and {addresses.spell(address)} can be reached by others"
            )


def _serve(settings: Settings) -> int:
    """Serve until a signal comes. Returns the exit code.

    Raises:
        InvalidArgument: a file with tokens, keys or a certificate has a mistake.
        FailedPrecondition: a package is missing, or the address cannot be had.
    """
    try:
        from tnxctl.bridge import bridge, listening, logs, server, tls, workers
    except ModuleNotFoundError as error:
        if error.name not in ("httptools", "uvicorn"):
            raise
        raise FailedPrecondition(
            f"the bridge needs {error.name}, which is not installed: pip install 'tensornext[http]'"
        ) from None
    import msgspec

    from tnxctl.bridge.notifying import notify

    if settings.grpc is not None:
        _check_grpc()
    logs.install()
    bridge.access_of(settings)
    if settings.certfile is not None and settings.keyfile is not None:
        tls.context(settings.certfile, settings.keyfile)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(each) for each in listening.listen(settings.listen, settings.workers)]
        if settings.grpc is not None:
            address, keeper = listening.reserve(settings.grpc)
            stack.enter_context(keeper or contextlib.nullcontext())
            settings = msgspec.structs.replace(settings, grpc=address)

        def on_ready() -> None:
            with contextlib.suppress(OSError):
                click.echo(_ready_line(settings, sockets[0].getsockname()[:2]))
            notify("READY=1")

        if settings.workers > 1:
            return workers.run(settings, sockets, on_ready)
        server.run(settings, sockets, on_ready)
        return 0


def _check_grpc() -> None:
    """Check that what gRPC needs is there, without its import, which takes long. Raises FailedPrecondition."""
    for module, package in (("grpc", "grpcio"), ("google.protobuf", "protobuf")):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # not even google
            found = None
        if found is None:
            raise FailedPrecondition(
                f"--grpc needs {package}, which is not installed: pip install 'tensornext[http,grpc]'"
            )


def _ready_line(settings: Settings, address: tuple[str, int]) -> str:
    from tnxctl.bridge import addresses

    scheme = "http" if settings.certfile is None else "https"
    served = [f"{scheme}://{addresses.spell(address)}"]
    if settings.grpc is not None:
        served.append(f"gRPC on {addresses.spell(settings.grpc)}")
    return f"tnxctl bridge ready on {', '.join(served)}; daemon: {', '.join(settings.endpoints)}"
