"""Header frames of replies that are no results: errors, and reports about the daemon."""

from __future__ import annotations

from typing import Any

import msgspec

from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.wire import VERSION, ErrorReply, Reply, encode


def error_header(id_: int | None, error: TensorNextError) -> bytes:
    """The header frame of an error. Args: id_: of the request; None: its header was too broken to show one."""
    retry_after_us = None if error.retry_after_s is None else error.retry_after_s * 1e6
    return report_header(
        ErrorReply(v=VERSION, id=id_, code=error.code, message=error.message, retry_after_us=retry_after_us)
    )


def report_header(reply: Reply) -> bytes:
    """The header frame of a reply that may quote what is no UTF-8: a file's name, an exception's text."""
    return _encoded(reply)


def encoded(part: object) -> msgspec.Raw:
    """A part of a reply as it will be sent, to be put into several of them."""
    return msgspec.Raw(_encoded(part))


def _encoded(value: Any) -> bytes:
    try:
        return encode(value)
    except UnicodeEncodeError:
        return msgspec.msgpack.encode(_printable(msgspec.to_builtins(value)))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, (list, tuple)) else value
