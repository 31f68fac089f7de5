"""One daemon with all exhibits of a file that are to be looked at."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from zoo import keeper
from zoo.keeper import Keeper

sys.path.append(str(keeper.LIBRARIES))


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """The zoo takes its time to be built, within the first test."""
    for item in items:
        if "serving" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="module", params=["lanes", pytest.param("inline", marks=pytest.mark.zoo)])
def serving(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    """A daemon whose batches run on three lanes, or on its serving thread with every batch audited."""
    parameters = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")  # type: ignore[attr-defined]
    ]
    chosen = {
        each["exhibit"].name: each["exhibit"]
        for each in parameters
        if "exhibit" in each and each["serving"] == request.param
    }
    inline = request.param == "inline"
    config = keeper.settings(inline=inline)
    with keeper.keep(tmp_path_factory.mktemp("zoo"), list(chosen.values()), config) as one:
        yield one
