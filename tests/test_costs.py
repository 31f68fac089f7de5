from __future__ import annotations

from tnxd.costs import CostModel


def test_unknown_until_observed() -> None:
    costs = CostModel()
    assert costs.predict("cpu", "mlp", 1) is None
    costs.observe("cpu", "mlp", 4, 100.0)
    assert costs.predict("cpu", "other", 4) is None
    assert costs.predict("cuda:0", "mlp", 4) is None
    assert costs.predict("cpu", "mlp", 64) is None


def test_smaller_batches_are_bounded_by_larger_ones() -> None:
    costs = CostModel()
    costs.observe("cpu", "mlp", 64, 500.0)
    costs.observe("cpu", "mlp", 8, 100.0)
    assert costs.predict("cpu", "mlp", 1) == 100.0
    assert costs.predict("cpu", "mlp", 17) == 500.0


def test_the_average_follows_a_change() -> None:
    costs = CostModel()
    costs.observe("cpu", "mlp", 1, 100.0)
    for _ in range(100):
        costs.observe("cpu", "mlp", 1, 1000.0)
    predicted = costs.predict("cpu", "mlp", 1)
    assert predicted is not None
    assert 990.0 < predicted <= 1000.0
