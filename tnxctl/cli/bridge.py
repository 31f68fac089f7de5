"""`tnxctl bridge`: HTTP, and gRPC, in front of a daemon."""

from __future__ import annotations

import socket

import click

from tnxctl.cli.options import DEFAULT_TIMEOUT_S, Duration, host
from tnxctl.protocol.errors import InvalidArgument


@click.command("bridge", short_help="Serve HTTP and gRPC in front of a daemon.")
@click.option("--listen", default="127.0.0.1:8000", show_default=True, metavar="ADDRESS", help="Where to serve HTTP.")
@click.option("--grpc", metavar="ADDRESS", help="Where to serve gRPC.  [default: nowhere]")
@host(several=True, envvar="TNX_HOST", show_envvar=True, default="127.0.0.1", show_default=True)
@click.option(
    "--timeout",
    type=Duration(),
    default=f"{DEFAULT_TIMEOUT_S:g}s",
    show_default=True,
    metavar="DURATION",
    help="Longest wait for the daemon's answer to a request.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Processes that share the addresses.",
)
@click.option("--certfile", type=click.Path(dir_okay=False), metavar="FILE", help="Certificate chain for TLS, PEM.")
@click.option("--keyfile", type=click.Path(dir_okay=False), metavar="FILE", help="Its private key, PEM.")
@click.option("--insecure", is_flag=True, help="Listen on other addresses than loopback without TLS.")
@click.option("--tokens", type=click.Path(dir_okay=False), metavar="FILE", help="Bearer tokens, and what each may do.")
@click.option("--triton-names", is_flag=True, help="Have /metrics tell the names of Triton's metrics as well.")
def command(
    listen: str,
    grpc: str | None,
    endpoints: list[str],
    timeout: float,
    workers: int,
    certfile: str | None,
    keyfile: str | None,
    insecure: bool,
    tokens: str | None,
    triton_names: bool,
) -> None:
    """Serve HTTP in front of a daemon, for whoever has curl or a client of the Open Inference Protocol.

    \b
    Examples:
      tnxctl bridge
      tnxctl bridge --listen 127.0.0.1:8000 --grpc 127.0.0.1:8001 --host gpu-1,gpu-2
      curl http://127.0.0.1:8000/health
    """
    from tnxctl.bridge import addresses
    from tnxctl.bridge.settings import Settings

    try:
        from tnxctl.bridge import server
    except ModuleNotFoundError as error:
        raise InvalidArgument(
            f"the bridge needs {error.name}, which is not installed: pip install 'tensornext[http]'"
        ) from None

    settings = Settings(
        endpoints=tuple(endpoints),
        timeout=timeout,
        listen=addresses.parse(listen, 8000),
        grpc=None if grpc is None else addresses.parse(grpc, 8001),
        workers=workers,
        certfile=certfile,
        keyfile=keyfile,
        insecure=insecure,
        tokens=tokens,
        triton_names=triton_names,
    )
    server.run(settings, [socket.create_server(settings.listen)])
