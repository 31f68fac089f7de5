"""The quick part of what is served with care, or refused; `make zoo` looks at the rest."""

from __future__ import annotations

import pytest

from zoo.case import Exhibit, exhibits
from zoo.cases import ROWS, SCRATCH, STATE
from zoo.keeper import Keeper


@pytest.mark.parametrize("exhibit", exhibits([*STATE, *SCRATCH, *ROWS], quick=True))
def test_each_is_served_as_it_has_to_be(serving: Keeper, exhibit: Exhibit) -> None:
    assert serving.examine(exhibit) == []
