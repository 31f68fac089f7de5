"""The HTTP interface as a page, from its OpenAPI document. It needs no script."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from typing import Any


def page(document: dict[str, Any]) -> str:
    """The page, in HTML."""
    return "\n".join(_page(document))


def _page(document: dict[str, Any]) -> Iterator[str]:
    yield (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>HTTP interface – TensorNext</title>'
        '<link rel="icon" href="page/icon.svg" type="image/svg+xml"><link rel="stylesheet" href="page/page.css"></head>'
    )
    info = document["info"]
    yield f"<body><header><h1>HTTP interface</h1><p class=quiet>{escape(info['title'])} {escape(info['version'])}</p>"
    yield '<p class=quiet><a href="./">Overview</a> · <a href="openapi.json">OpenAPI</a></p></header><main>'
    yield "<p>An error has a fitting status, and a sentence: <code>{&quot;error&quot;: &quot;…&quot;}</code>.</p>"
    yield "<section aria-labelledby=paths><h2 id=paths>Paths</h2><div class=operations>"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield from _operation(method, path, operation)
    yield "</div></section><section aria-labelledby=types><h2 id=types>Documents</h2><div class=operations>"
    for name, schema in document["components"]["schemas"].items():
        yield from _schema(name, schema)
    yield "</div></section></main></body></html>"


def _operation(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f'<article class=card id="{escape(operation["operationId"])}">'
    yield f"<h3><span class=method>{escape(method.upper())}</span> <code>{escape(path)}</code></h3>"
    yield f"<p>{_prose(operation['summary'])}</p>"
    for paragraph in operation.get("description", "").split("\n\n"):
        yield f"<p>{_prose(paragraph)}</p>" if paragraph else ""
    yield "<dl>"
    role = operation.get("x-role")
    if role:
        yield f"<dt>Role</dt><dd>{escape(role)}</dd>"
    if "requestBody" in operation:
        yield f"<dt>Takes</dt><dd>{_content(operation['requestBody']['content'])}</dd>"
    answer = operation["responses"]["200"]
    if "content" in answer:
        yield f"<dt>Gives</dt><dd>{_content(answer['content'])}</dd>"
    yield "</dl></article>"


def _schema(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f'<article class=card id="type-{escape(name)}"><h3>{escape(name)}</h3>'
    for paragraph in schema.get("description", "").split("\n\n"):
        yield f"<p class=prose>{_prose(paragraph)}</p>" if paragraph else ""
    required = schema.get("required", ())
    fields = schema.get("properties", {})
    if fields:
        yield "<dl>"
        for field, of in fields.items():
            optional = "" if field in required else " <span class=quiet>may be left out</span>"
            yield f"<dt><code>{escape(field)}</code></dt><dd>{_type(of)}{optional}</dd>"
        yield "</dl>"
    elif "prefixItems" in schema:
        yield f"<p>a list of {', '.join(map(_type, schema['prefixItems']))}</p>"
    yield "</article>"


def _content(content: dict[str, Any]) -> str:
    return ", ".join(
        f"{_type(of['schema'])} ({escape(media)})" if "schema" in of else escape(media) for media, of in content.items()
    )


def _type(schema: dict[str, Any]) -> str:
    """A type in a few words, with links to those that have a name."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#type-{escape(name)}">{escape(name)}</a>'
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return " or ".join(f"<code>{escape(repr(value))}</code>" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_type(schema['items'])}" if schema.get("items") else "list"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"object of {_type(values)}" if isinstance(values, dict) and values else "object"
    return escape(kind)


def _prose(text: str) -> str:
    """Text of a docstring, where `names` stand between backticks."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
