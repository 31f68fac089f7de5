"""Compressed bodies: unpacked within limits, whatever they claim, and packed for whoever asks for it."""

from __future__ import annotations

import asyncio
import gzip
import os
import zlib

import pytest

from tnxctl.bridge.bodies import Budget
from tnxctl.bridge.http import HttpError, Request
from tnxctl.bridge.oip import compression
from tnxctl.protocol.errors import Unavailable

MIB = 1 << 20


ENDS_WITH_A_PART = next(
    body for body in (gzip.compress(os.urandom(size), 0) for size in range(65_536, 0, -1)) if len(body) == 65_536
)
"""Body that ends where the bridge has unpacked a first part of it."""


def unpacked(body: bytes, coding: str, most: int = 10 * MIB, budget: Budget | None = None) -> bytes:
    hold = (budget or Budget(20 * MIB)).hold
    request = Request("POST", "/", headers={b"content-encoding": coding}, body=body, hold=hold)
    return bytes(asyncio.run(compression.unpacked(request, most)))


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("plain", [b"", b"short", os.urandom(200_000), bytes(9 * MIB), bytes(8 * MIB)])
def test_bodies_come_and_go(coding: str, plain: bytes) -> None:
    chunks, headers = asyncio.run(compression.packed([plain[:7], memoryview(plain)[7:]], coding))
    assert dict(headers)[b"content-encoding"] == coding.encode()
    packed = b"".join(chunks)
    assert (gzip.decompress if coding == "gzip" else zlib.decompress)(packed) == plain
    assert unpacked(packed, coding) == plain


@pytest.mark.parametrize("coding", ["", "identity", " Identity "])
def test_bodies_that_are_not_compressed(coding: str) -> None:
    assert unpacked(b"plain", coding) == b"plain"


@pytest.mark.parametrize("accepted", [None, "", "identity", "br", "gzip, deflate", "gzip;q=0", "*"])
def test_answers_that_are_not_compressed(accepted: str | None) -> None:
    assert asyncio.run(compression.packed([b"plain"], accepted)) == ([b"plain"], ())


@pytest.mark.parametrize(
    ("body", "coding", "status", "says"),
    [
        (b"plain", "br", 415, "'br': known are gzip and deflate"),
        (b"plain", "gzip, gzip", 415, "known are"),
        (b"plain", "gzip", 400, "not gzip"),
        (b"", "gzip", 400, "ends before its gzip does"),
        (gzip.compress(b"plain")[:-1], "gzip", 400, "ends before its gzip does"),
        (gzip.compress(b"plain") + b"x", "gzip", 400, "goes on behind the end of its gzip"),
        (gzip.compress(os.urandom(65_000)) + bytes(100_000), "gzip", 400, "goes on behind the end"),
        (ENDS_WITH_A_PART + b"x", "gzip", 400, "goes on behind the end"),
        (gzip.compress(b"plain"), "deflate", 400, "not deflate"),
        (gzip.compress(bytes(10 * MIB + 1), 1), "gzip", 413, "more than the 10485760 bytes"),
    ],
)
def test_bodies_that_cannot_be_unpacked(body: bytes, coding: str, status: int, says: str) -> None:
    with pytest.raises(HttpError, match=says) as caught:
        unpacked(body, coding)
    assert caught.value.status == status


def test_what_is_unpacked_counts_with_all_other_bodies() -> None:
    budget = Budget(10 * MIB)
    body = gzip.compress(bytes(6 * MIB), 1)
    assert len(unpacked(body, "gzip", budget=budget)) == 6 * MIB
    with pytest.raises(Unavailable, match="fill the 10485760 bytes"):
        unpacked(body, "gzip", budget=budget)
