"""Refusals that hold for requests like those refused."""

from __future__ import annotations

import pytest

from headers import pack, predict_header
from tnxctl.protocol import wire
from tnxd.scheduling.refusals import Refusals, TooLate


def predict(deadline_us: float = 1e3, **changes: object) -> wire.Predict:
    header = predict_header(deadline_us=deadline_us, **changes)
    decoded = wire.decode_request(pack(header), wire.Limits())
    assert isinstance(decoded, wire.Predict)
    return decoded


def test_refusal_holds_for_the_next_request_like_it() -> None:
    refusals = Refusals()
    refusal = TooLate("it cannot", 1000)
    refusals.add(b"peer", predict(), refusal)
    assert refusals.find(b"peer", predict(id=99, deadline_us=7.0, sent_us=5.0), 999) is refusal
    assert refusals.find(b"peer", predict(), 1000) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": [["input", "FP32", [2, 256]]]},
        {"model": "other"},
        {"priority": 0},
        {"device": "auto"},
        {"prefer_gpu": False},
        {"min_gpu_memory_mb": 5.0},
        {"route_key": "k"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_refusal_does_not_hold_for_requests_that_may_fare_differently(changes: dict[str, object]) -> None:
    refusals = Refusals()
    refusals.add(b"peer", predict(), TooLate("it cannot", 1000))
    assert refusals.find(b"peer", predict(**changes), 0) is None
    assert refusals.find(b"other", predict(), 0) is None


def test_refusals_hold_until_batches_are_formed_and_are_bounded() -> None:
    refusals = Refusals()
    peers = [b"%d" % number for number in range(10_000)]
    for peer in peers:
        refusals.add(peer, predict(), TooLate("it cannot", 1000))
    assert 0 < sum(refusals.find(peer, predict(), 0) is not None for peer in peers) <= 256
    refusals.clear()
    assert not refusals
