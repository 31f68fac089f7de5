"""Models that remember are refused, by name, or served in order where model.toml says that they may remember."""

from __future__ import annotations

import pytest

from zoo.case import Exhibit, exhibits
from zoo.cases import STATE
from zoo.keeper import Keeper


@pytest.mark.parametrize("exhibit", exhibits(STATE))
def test_each_is_served_as_it_has_to_be(serving: Keeper, exhibit: Exhibit) -> None:
    assert serving.examine(exhibit) == []
