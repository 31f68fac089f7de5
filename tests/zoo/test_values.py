"""Models that do not take zeros are served all the same."""

from __future__ import annotations

import pytest

from zoo.case import Exhibit, exhibits
from zoo.cases import VALUES
from zoo.keeper import Keeper


@pytest.mark.parametrize("exhibit", exhibits(VALUES))
def test_each_is_served_as_it_has_to_be(serving: Keeper, exhibit: Exhibit) -> None:
    assert serving.examine(exhibit) == []
