"""Completion of words with what the daemon knows: models, versions, devices.

The daemon is the one that --host or TNX_HOST names, as far as the line is typed. If it does not answer at once, there
are no suggestions, and no error: a shell waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from tnxctl.client import Client
    from tnxctl.protocol.wire import ModelInfo

T = TypeVar("T")

_TIMEOUT_S = 1.0


def models(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of models, and as soon as one is there, its versions as NAME@VERSION."""
    infos = _ask(ctx, lambda client: client.models())
    names = _starting(incomplete, (info.name for info in infos))
    if "@" in incomplete or names == [incomplete]:
        return _starting(incomplete, (f"{info.name}@{info.version}" for info in infos if info.version))
    return names


def names(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of models, without versions."""
    return _starting(incomplete, (info.name for info in _ask(ctx, lambda client: client.models())))


def versions(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Versions of the model whose name stands before."""
    return _starting(incomplete, (info.version for info in _versions(ctx)))


def weights(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """VERSION= for each version of the model whose name stands before, and the word for all traffic."""
    return _starting(incomplete, (*(f"{info.version}=" for info in _versions(ctx)), "latest"))


def devices(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of devices, and "auto"."""
    report = _ask(ctx, lambda client: (client.health(),))
    return _starting(incomplete, ("auto", *(device.name for found in report for device in found.devices)))


def _versions(ctx: click.Context) -> list[ModelInfo]:
    # Where the word to complete is the value of an option, arguments before it are not told apart yet.
    name = ctx.params.get("name") or next(iter(ctx.args), "")
    return [info for info in _ask(ctx, lambda client: client.models()) if info.name == name and info.version]


def _starting(incomplete: str, words: Iterable[str]) -> list[str]:
    """The words that begin so, each once, in their order; none that could steer a terminal."""
    return [word for word in dict.fromkeys(words) if word.startswith(incomplete) and word.isprintable()]


def _ask(ctx: click.Context, question: Callable[[Client], tuple[T, ...]]) -> tuple[T, ...]:
    from tnxctl.client import Client
    from tnxctl.endpoint import DEFAULT_ENDPOINT
    from tnxctl.protocol.errors import TensorNextError

    several: list[str] = ctx.params.get("endpoints") or ctx.meta.get("tnxctl.--host", "").split(",")
    endpoint: str = ctx.params.get("endpoint") or several[0] or DEFAULT_ENDPOINT
    try:
        with Client(endpoint, timeout=_TIMEOUT_S) as client:
            return question(client)
    except TensorNextError:
        return ()
