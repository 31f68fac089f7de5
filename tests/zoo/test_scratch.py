"""Models that write before they read, or fill a cache, are served, and answer each with its own."""

from __future__ import annotations

import pytest

from zoo.case import Exhibit, exhibits
from zoo.cases import SCRATCH
from zoo.keeper import Keeper


@pytest.mark.parametrize("exhibit", exhibits(SCRATCH))
def test_each_is_served_as_it_has_to_be(serving: Keeper, exhibit: Exhibit) -> None:
    assert serving.examine(exhibit) == []
