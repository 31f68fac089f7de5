"""One daemon with all exhibits of a file that are to be looked at."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from zoo import keeper
from zoo.keeper import Built, Keeper

sys.path.append(str(keeper.LIBRARIES))


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """The zoo takes its time to be built, within the first test."""
    for item in items:
        if "serving" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """All exhibits of a file that are to be looked at."""
    chosen = {
        item.callspec.params["exhibit"].name: item.callspec.params["exhibit"]
        for item in request.session.items
        if item.path == request.path and "exhibit" in getattr(getattr(item, "callspec", None), "params", ())  # type: ignore[attr-defined]
    }
    return keeper.build(tmp_path_factory.mktemp("zoo"), list(chosen.values()))


@pytest.fixture(scope="module", params=["lanes", pytest.param("inline", marks=pytest.mark.zoo)])
def serving(request: pytest.FixtureRequest, built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    """A daemon whose batches run on three lanes, or on its serving thread."""
    config = keeper.settings(inline=request.param == "inline")
    with keeper.keep(tmp_path_factory.mktemp("zoo"), built, config) as one:
        yield one
