"""Description of the HTTP interface (https://spec.openapis.org/oas/v3.1.1.html), made from the routes themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from tnxctl import __version__
from tnxctl.bridge.routes import Route
from tnxctl.protocol.roles import LEAST_ROLES

_SCHEMAS = "#/components/schemas/{name}"
_JSON = "application/json"

_SECTIONS = re.compile(r"^(?:Args|Raises|Returns):$", re.MULTILINE)
"""Headings from which on a docstring is for programmers."""


class Error(msgspec.Struct, frozen=True):
    """The answer to what went wrong. Attributes: error: a sentence that says what."""

    error: str


def document(routes: Iterable[Route], *, tokens: bool) -> dict[str, Any]:
    """The OpenAPI document of routes. Args: tokens: whether a request has to show one."""
    told = list(routes)
    types = [Error, *(each for route in told for each in (route.takes, route.gives) if _is_type(each))]
    schemas, components = msgspec.json.schema_components(types, ref_template=_SCHEMAS)
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in told:
        paths.setdefault(route.pattern, {})[route.method.lower()] = _operation(route, schema_of, tokens)
    security = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}} if tokens else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "TensorNext bridge", "version": __version__},
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": components, **security},
    }


def _operation(route: Route, schema_of: dict[Any, Any], tokens: bool) -> dict[str, Any]:
    summary, _, description = _SECTIONS.split(inspect.getdoc(route.handler) or "")[0].partition("\n")
    found: dict[str, Any] = {"operationId": _operation_id(route), "summary": summary}
    if description.strip():
        found["description"] = description.strip()
    if route.names:
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in route.names
        ]
    if route.takes is not None:
        found["requestBody"] = {"required": _has_required(route.takes), "content": _content(route.takes, schema_of)}
    answer: dict[str, Any] = {"description": "Done."}
    if route.gives is not None:
        answer["content"] = _content(route.gives, schema_of)
    error = {"description": "An error, told in a sentence.", "content": _content(Error, schema_of)}
    found["responses"] = {"200": answer, "default": error}
    if route.verb is not None:
        found["x-role"] = LEAST_ROLES[route.verb].title
        if tokens:
            found["security"] = [{"token": []}]
    return found


def _operation_id(route: Route) -> str:
    words = [word.strip("{}") for word in route.pattern.split("/") if word]
    return "_".join([route.method.lower(), *(words or ["index"])])


def _content(told: Any, schema_of: dict[Any, Any]) -> dict[str, Any]:
    """The content of a body: a JSON document of a type, or something of a media type."""
    return {_JSON: {"schema": schema_of[told]}} if _is_type(told) else {told: {}}


def _has_required(told: Any) -> bool:
    return any(field.required for field in msgspec.structs.fields(told))


def _is_type(told: Any) -> bool:
    return told is not None and not isinstance(told, str)
