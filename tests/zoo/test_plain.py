"""Models that do nothing odd are served in batches, exactly."""

from __future__ import annotations

import pytest

from zoo.case import Exhibit, exhibits
from zoo.cases import PLAIN
from zoo.keeper import Keeper


@pytest.mark.parametrize("exhibit", exhibits(PLAIN))
def test_each_is_served_as_it_has_to_be(serving: Keeper, exhibit: Exhibit) -> None:
    assert serving.examine(exhibit) == []
