"""Words for the log about errors: how many, with which code, of which model."""

from __future__ import annotations

import pytest

from tnxd.serving.telemetry import TOLD_EVERY_S, Telemetry


def test_errors_are_told_by_code_and_model_once_in_an_interval() -> None:
    telemetry = Telemetry()
    assert telemetry.tell_errors(100.0) == ""
    for title in ("net@1", "net@2#3", "net", "other@1"):
        telemetry.count_error("RESOURCE_EXHAUSTED", title)
    telemetry.count_error("INVALID_ARGUMENT", "")
    told = "errors sent within 2.0 s: INVALID_ARGUMENT 1; RESOURCE_EXHAUSTED 4 (net 3, other 1)"
    assert telemetry.tell_errors(102.0) == told
    telemetry.count_error("NOT_FOUND", "a name\nwith a second line")
    assert telemetry.tell_errors(102.0 + TOLD_EVERY_S / 2) == ""
    telemetry.count_error("NOT_FOUND", "a name\nwith a second line")
    told = f"errors sent within {TOLD_EVERY_S:.1f} s: NOT_FOUND 2 ('a name\\nwith a second line' 2)"
    assert telemetry.tell_errors(102.0 + TOLD_EVERY_S) == told
    assert telemetry.tell_errors(200.0) == ""
    assert telemetry.errors == {"RESOURCE_EXHAUSTED": 4, "INVALID_ARGUMENT": 1, "NOT_FOUND": 2}


@pytest.mark.parametrize("count", [7, 5000])
def test_the_names_that_clients_make_up_are_bounded(count: int) -> None:
    telemetry = Telemetry()
    for number in range(count):
        telemetry.count_error("NOT_FOUND", f"made-up-{number}")
    assert len(telemetry.untold) <= 1001
    told = telemetry.tell_errors(telemetry.uptime_s(), at_once=True)
    assert f"NOT_FOUND {count} (made-up-0 1, " in told
    assert len(told) < 300
