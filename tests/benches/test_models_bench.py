"""The benchmark of networks of real size, and the simulation of machines with many cores."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

import benchmarks  # noqa: F401 - puts bench/ on the path

# isort: split
import cores
import models_report
import real_networks
from models_report import BEST, DAEMON, PROCESS, Beside, Cell, Finding, Ratio
from tnxd.models import settings
from tnxd.models.builtin import builtin


@pytest.mark.parametrize("count", [2, 16, 64])
def test_choice_for_each_batch_is_as_good_as_the_better_way_of_all(count: int) -> None:
    idle = {way: cores.measure(count, 0.02, way, 150, 1) for way in (cores.NARROW, cores.FIXED, cores.CHOSEN)}
    busy = {way: cores.measure(count, 0.8, way, 600, 1) for way in (cores.NARROW, cores.CHOSEN)}
    assert idle[cores.CHOSEN].p50_ms <= 1.02 * min(idle[cores.NARROW].p50_ms, idle[cores.FIXED].p50_ms)
    assert idle[cores.CHOSEN].p50_ms < 0.7 * idle[cores.NARROW].p50_ms
    assert busy[cores.CHOSEN].p50_ms <= 1.4 * busy[cores.NARROW].p50_ms


def test_fixed_numbers_are_those_that_the_daemon_once_chose() -> None:
    assert [cores.fixed(count) for count in (1, 2, 4, 16, 64)] == [(1, 1), (1, 1), (3, 1), (3, 4), (15, 4)]


def test_networks_are_published_as_they_are_measured(tmp_path: Path) -> None:
    real_networks.publish(tmp_path, ["mlp", "lstm"], "none")
    for name, network in real_networks.NETWORKS.items():
        if name in ("mlp", "lstm"):
            read = settings.load(tmp_path / name / "model.toml", name)
            assert (read.max_batch_size, read.optimize) == (network.max_batch, "none")
            assert [tensor.name for tensor in read.inputs] == list(network.example())
            space: dict[str, object] = {}
            exec((tmp_path / name / "1" / "network.py").read_text(), space)
            inputs = [torch.from_numpy(array) for array in network.example().values()]
            assert torch.equal(space["build"]()(*inputs), network.build()(*inputs))  # type: ignore[operator]


def test_mlp_has_the_layers_of_the_built_in_one() -> None:
    nets = real_networks.Mlp(), builtin("mlp").factory()
    shapes = [[tuple(weight.shape) for weight in net.parameters()] for net in nets]
    assert shapes[0] == shapes[1]


def test_a_file_is_completed_with_other_networks(tmp_path: Path) -> None:
    def found(title: str, p50_ms: float) -> Finding:
        cell = Cell(p50_ms, p50_ms, 1.0, 0.0)
        ratios = [Ratio(1, 1, 1)] * 2
        return Finding(title, {DAEMON: cell, PROCESS: cell}, {DAEMON: cell, BEST: cell}, *ratios, None, None)

    beside = [Beside(DAEMON, 1, 1, 1, 1, Ratio(1, 1, 1))]
    path = tmp_path / "models.json"
    path.write_bytes(msgspec.json.encode(models_report.Report("", "", [found("LSTM", 1), found("MLP", 1)], beside)))
    report = models_report.completed(models_report.Report("", "", [found("MLP", 2), found("ResNet-50", 3)], []), path)
    told = [(each.network, each.one[DAEMON].p50_ms) for each in report.findings]
    assert told == [("ResNet-50", 3), ("LSTM", 1), ("MLP", 2)]
    assert report.beside == beside
