"""Output of `tnxd --check`: the settings in effect, where each came from, and the models to be served.

It is TOML that the daemon accepts as a configuration file; all else stands in comments.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import click
import msgspec
from click.core import ParameterSource

from tnxctl.files import tomlfile
from tnxd.config import Config
from tnxd.error_text import named
from tnxd.models.catalog import Catalog, missing_steps

_WIDTH = 60


def origins(ctx: click.Context, path: Path | None) -> dict[str, str]:
    """Origins of settings: KEY or TABLE.KEY -> file, flag or environment. A key that is not in it has its default.

    Args:
        ctx: of the command, whose parameters are called like the keys.
        path: of the configuration file, if any.
    """
    found: dict[str, str] = {}
    for key, value in (tomlfile.read(path) if path is not None else {}).items():
        names = [f"{key}.{name}" for name in value] if isinstance(value, Mapping) else [key]
        found.update(dict.fromkeys(names, f"file {path}"))
    for parameter in ctx.command.params:
        key = str(parameter.name).replace("cpu_", "cpu.").replace("traces_", "traces.")
        source = ctx.get_parameter_source(str(parameter.name))
        if source is ParameterSource.COMMANDLINE:
            found[key] = f"flag {parameter.opts[0]}"
        elif source is ParameterSource.ENVIRONMENT:
            found[key] = f"environment {parameter.envvar}"
    return found


def settings(config: Config, came: Mapping[str, str]) -> Iterator[str]:
    """Lines of the settings: first those of no table, as TOML requires it."""
    values = {name: getattr(config, name) for name in config.__struct_fields__}
    tables = {name: value for name, value in values.items() if isinstance(value, msgspec.Struct)}
    yield from (_line(name, values[name], came.get(name)) for name in values if name not in tables)
    for name, table in tables.items():
        yield f"\n[{name}]"
        for key in table.__struct_fields__:
            yield _line(key, getattr(table, key), came.get(f"{name}.{key}"))


def models(catalog: Catalog) -> Iterator[str]:
    """Lines of the models: their versions, and those to be loaded."""
    for name, entry in catalog.entries.items():
        formats = ", ".join(sorted({source.format for source in entry.sources.values()}))
        wanted = ", ".join(entry.wanted) or "none"
        yield f"# model {name}: versions {', '.join(entry.sources)} ({formats}), of which {wanted} would be loaded"


def problems(catalog: Catalog) -> Iterator[str]:
    """Sentences about models and versions that would not be served."""
    yield from named({**catalog.failures, **missing_steps(catalog)})
    if catalog.failures and not any(entry.wanted for entry in catalog.entries.values()):
        yield "there is no model to serve"


def finish(catalog: Catalog, remarks: Iterable[str]) -> int:
    """Print the models, then remarks and problems on standard error. Returns the exit code."""
    click.echo("\n".join(("", *models(catalog))))
    wrong = [*problems(catalog)]
    empty = () if catalog.entries or wrong else ("there is no model yet: publish one, then tnxctl reload",)
    for sentence in (*remarks, *empty, *wrong):
        click.echo(f"tnxd: {sentence}", err=True)
    return 1 if wrong else 0


def _line(key: str, value: object, origin: str | None) -> str:
    return f"{f'{key} = {json.dumps(value, ensure_ascii=False)}':{_WIDTH}}  # {origin or 'default'}"
