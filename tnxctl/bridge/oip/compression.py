"""Bodies that come and go compressed, as gzip or deflate.

Floats hardly shrink, and compressing them costs some 30 ms for each MiB. HTTP libraries offer every coding that they
know by themselves; so an answer is compressed only for whoever names one coding and no other, as a user of tritonclient
does with `response_compression_algorithm`.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence

from tnxctl.bridge.http import Buffer, Headers, HttpError, Request
from tnxctl.protocol.limits import MIB, excerpt

_GZIP = 16 + zlib.MAX_WBITS
_FORMATS = {"gzip": _GZIP, "x-gzip": _GZIP, "deflate": zlib.MAX_WBITS}
"""Coding -> the format, as zlib numbers it. HTTP's deflate is the format of zlib (RFC 9110, section 8.4.1.2)."""

_LEVEL = 1  # from the second on, floats take several times as long and shrink no more

_INPUT = 64 * 1024
_OUTPUT = 4 * MIB
"""Bytes that are taken and given at a time: a body can unpack to a thousand times its length."""

_SHORT = 4096
"""Bytes up to which the event loop does the work itself. What takes longer gets a thread, where zlib frees the GIL."""


async def unpacked(request: Request, most: int) -> Buffer:
    """The body of a request as it was before it was compressed, counted as held by the request.

    Args:
        most: bytes that it may have.

    Raises:
        HttpError: the coding is unknown (415), the body is damaged (400) or too large (413).
        Unavailable: all bodies together are.
    """
    coding = request.headers.get(b"content-encoding", "").strip().lower()
    if coding in ("", "identity"):
        return request.body
    if coding not in _FORMATS:
        raise HttpError(415, f"Content-Encoding {excerpt(coding)}: known are gzip and deflate")
    body = memoryview(request.body)
    unpacker = zlib.decompressobj(_FORMATS[coding])
    plain = bytearray()
    for at in range(0, len(body), _INPUT):
        if unpacker.eof:  # from here on, zlib would copy all that follows with each part
            raise HttpError(400, f"the body goes on behind the end of its {coding}")
        data: Buffer = body[at : at + _INPUT]
        while data:
            try:
                if len(body) <= _SHORT:
                    piece = unpacker.decompress(data, _OUTPUT)
                else:
                    piece = await asyncio.to_thread(unpacker.decompress, data, _OUTPUT)
            except zlib.error as error:
                raise HttpError(400, f"the body is not {coding}: {error}") from None
            if len(plain) + len(piece) > most:
                raise HttpError(413, f"unpacked, the body has more than the {most} bytes that it may have")
            request.hold(len(piece))
            plain += piece
            data = unpacker.unconsumed_tail
    if not unpacker.eof:
        raise HttpError(400, f"the body ends before its {coding} does")
    if unpacker.unused_data:
        raise HttpError(400, f"the body goes on behind the end of its {coding}")
    return plain


async def packed(chunks: Sequence[Buffer], accepted: str | None) -> tuple[Sequence[Buffer], Headers]:
    """The chunks of a body for whoever sent this Accept-Encoding, and the headers that say how they are coded."""
    coding = (accepted or "").strip().lower()
    if coding not in ("gzip", "deflate"):
        return chunks, ()
    if sum(map(len, chunks)) <= _SHORT:
        body = _pack(chunks, coding)
    else:
        body = await asyncio.to_thread(_pack, chunks, coding)
    return (body,), ((b"content-encoding", coding.encode()), (b"vary", b"accept-encoding"))


def _pack(chunks: Sequence[Buffer], coding: str) -> bytes:
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _FORMATS[coding])
    parts = [packer.compress(chunk) for chunk in chunks]
    return b"".join((*parts, packer.flush()))
