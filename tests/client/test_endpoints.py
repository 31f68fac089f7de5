"""Which of several daemons a request goes to, and which are passed over."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from tnxctl import backoff
from tnxctl.endpoints import FIRST_PASS_S, LAST_PASS_S, Endpoints

MODEL = "m"


@pytest.fixture(autouse=True)
def without_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "random", lambda: 0.0)


def chosen(
    endpoints: Endpoints, outstanding: list[int], now: float = 0.0, model: str = MODEL, times: int = 60
) -> set[int]:
    """All that are chosen, in so many tries of the same choice."""
    found = [endpoints.choose(model, list(enumerate(outstanding)), now) for _ in range(times)]
    return {index for index in found if index is not None}


def test_the_fewest_outstanding_are_chosen() -> None:
    assert chosen(Endpoints(3), [2, 1, 5]) == {1}


def test_equals_are_chosen_by_chance() -> None:
    endpoints = Endpoints(3)
    counts = Counter(endpoints.choose(MODEL, [(0, 0), (1, 0), (2, 1)], 0.0) for _ in range(200))
    assert set(counts) == {0, 1}
    assert min(counts.values()) > 50


def test_the_number_outstanding_is_weighed_by_the_predicted_time() -> None:
    endpoints = Endpoints(2)
    endpoints.served(0, MODEL, 0.010, 0.0)
    endpoints.served(1, MODEL, 0.050, 0.0)
    assert chosen(endpoints, [3, 0]) == {0}
    assert chosen(endpoints, [5, 0]) == {1}


def test_a_daemon_of_which_nothing_is_known_counts_as_the_fastest() -> None:
    endpoints = Endpoints(3)
    endpoints.served(0, MODEL, 0.010, 0.0)
    endpoints.served(1, MODEL, 0.002, 0.0)
    assert chosen(endpoints, [0, 0, 0]) == {1, 2}
    endpoints.served(2, MODEL, 0.0, 0.0)  # it makes no predictions
    assert chosen(endpoints, [0, 0, 0]) == {1, 2}


def test_models_are_known_apart() -> None:
    endpoints = Endpoints(2)
    endpoints.served(0, "slow", 1.0, 0.0)
    endpoints.served(1, "slow", 0.5, 0.0)
    assert chosen(endpoints, [0, 1], model="slow") == {0, 1}
    assert chosen(endpoints, [0, 1], model="fast") == {0}


def test_a_worse_prediction_counts_at_once_and_a_better_one_in_part() -> None:
    endpoints = Endpoints(2)
    for index in (0, 1):
        endpoints.served(index, MODEL, 0.010, 0.0)
    endpoints.served(0, MODEL, 0.100, 0.0)
    assert chosen(endpoints, [0, 8]) == {1}
    endpoints.served(0, MODEL, 0.010, 0.0)  # 73 ms now
    assert chosen(endpoints, [0, 6]) == {1}
    assert chosen(endpoints, [0, 7]) == {0}


def test_a_prediction_fades() -> None:
    endpoints = Endpoints(2)
    endpoints.served(0, MODEL, 2.0, 0.0)
    endpoints.served(1, MODEL, 0.001, 0.0)
    for second in range(1, 10):
        endpoints.served(1, MODEL, 0.001, float(second))
    assert chosen(endpoints, [0, 0], 9.0) == {1}
    endpoints.served(1, MODEL, 0.001, 16.0)
    assert chosen(endpoints, [0, 0], 16.0) == {0}


@pytest.mark.parametrize("shut", [True, False])
def test_a_daemon_that_refuses_is_passed_over_for_a_while(shut: bool) -> None:
    endpoints = Endpoints(2)
    endpoints.refused(0, MODEL, 0.5, 10.0, shut=shut)
    assert chosen(endpoints, [0, 7], 10.49) == {1}
    assert chosen(endpoints, [0, 7], 10.49, model="other") == {0}
    assert endpoints.choose(MODEL, [(0, 0), (1, 7)], 10.51) == 0


def test_without_a_time_of_its_own_it_is_passed_over_for_longer_each_time() -> None:
    endpoints = Endpoints(1)
    now, passes = 0.0, []
    for _ in range(8):
        endpoints.refused(0, MODEL, None, now, shut=True)
        passes.append(endpoints.back_at(MODEL, [0]) - now)
        now += 100.0
    assert passes == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0])
    assert (passes[0], passes[-1]) == (FIRST_PASS_S, LAST_PASS_S)
    endpoints.served(0, MODEL, 0.0, now)
    endpoints.refused(0, MODEL, None, now, shut=True)
    assert endpoints.back_at(MODEL, [0]) - now == pytest.approx(FIRST_PASS_S)


def test_the_time_has_a_random_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "random", lambda: 0.5)
    endpoints = Endpoints(1)
    endpoints.refused(0, MODEL, 1.0, 0.0, shut=True)
    assert endpoints.back_at(MODEL, [0]) == 1.25


def test_one_that_cannot_serve_is_not_asked_and_one_without_room_is_the_last_choice() -> None:
    endpoints = Endpoints(3)
    endpoints.refused(0, MODEL, 1.0, 0.0, shut=True)
    endpoints.refused(1, MODEL, 1.0, 0.0, shut=False)
    assert chosen(endpoints, [0, 0, 50]) == {2}
    assert chosen(endpoints, [0, 0]) == {1}
    assert chosen(endpoints, [0]) == set()


def test_one_request_tries_whether_a_daemon_serves_again() -> None:
    endpoints = Endpoints(2)
    endpoints.refused(0, MODEL, 1.0, 0.0, shut=True)
    both = [(0, 0), (1, 7)]
    assert endpoints.choose(MODEL, both, 1.5) == 0
    assert chosen(endpoints, [0, 7], 1.5) == {1}
    assert endpoints.back_at(MODEL, [0]) == pytest.approx(1.55)
    assert endpoints.served(0, MODEL, 0.0, 1.51)
    assert not endpoints.served(0, MODEL, 0.0, 1.51)
    assert chosen(endpoints, [0, 7], 1.51) == {0}


def test_a_trial_that_never_ends_is_followed_by_another() -> None:
    endpoints = Endpoints(1)
    endpoints.refused(0, MODEL, None, 0.0, shut=True)
    assert endpoints.choose(MODEL, [(0, 0)], 1.0) == 0
    assert endpoints.choose(MODEL, [(0, 0)], 1.01) is None
    assert endpoints.choose(MODEL, [(0, 0)], 2.0) == 0


def test_it_is_told_when_the_first_of_those_away_is_asked_again() -> None:
    endpoints = Endpoints(3)
    endpoints.refused(0, MODEL, 2.0, 0.0, shut=True)
    endpoints.refused(1, MODEL, 1.0, 0.0, shut=True)
    assert endpoints.back_at(MODEL, [0, 1]) == 1.0
    assert endpoints.back_at(MODEL, [0]) == 2.0
    assert endpoints.back_at(MODEL, []) == math.inf


def test_many_models_are_not_remembered_for_ever() -> None:
    endpoints = Endpoints(1)
    for number in range(10_000):
        endpoints.served(0, f"model-{number}", 0.1, 0.0)
    assert len(endpoints._standings[0]) <= 256
