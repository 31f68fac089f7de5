"""Models whose axis 0 is no batch: requests do not share forwards."""

from __future__ import annotations

import pytest

from zoo.case import Exhibit, exhibits
from zoo.cases import ROWS
from zoo.keeper import Keeper


@pytest.mark.parametrize("exhibit", exhibits(ROWS))
def test_each_is_served_as_it_has_to_be(serving: Keeper, exhibit: Exhibit) -> None:
    assert serving.examine(exhibit) == []
