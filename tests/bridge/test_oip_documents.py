"""Documents about a daemon and its models: metadata, configuration, statistics, index of the repository."""

import pytest

from tnxctl.bridge.oip import documents
from tnxctl.protocol.errors import NotFound
from tnxctl.protocol.histograms import Histogram
from tnxctl.protocol.statistics import StatsReport, VersionStats
from tnxctl.protocol.wire import ModelInfo, TensorSpec

BATCHING = ModelInfo(
    name="digits",
    version="2",
    status="ready",
    inputs=(TensorSpec("x", "FP32", (-1, 64)), TensorSpec("text", "BYTES", (-1, 1))),
    outputs=(TensorSpec("y", "BF16", (-1, 10)),),
    max_batch_size=64,
    devices=("cpu", "cuda:1"),
    format="pt2",
)

FIXED = ModelInfo(
    name="fixed", version="1", status="ready", inputs=(TensorSpec("x", "INT8", (-1, 2)),), format="python"
)


def model(version: str, status: str, error: str = "") -> ModelInfo:
    return ModelInfo(name="digits", version=version, status=status, error=error)


def test_server_metadata_names_what_perf_analyzer_asks_for() -> None:
    metadata = documents.server_metadata("0.1.0")
    assert metadata["name"] == "tensornext"
    assert metadata["version"] == "0.1.0"
    assert {"statistics", "binary_tensor_data", "model_configuration"} <= {*metadata["extensions"]}


def test_metadata_has_the_batch_axis_and_the_versions_that_serve() -> None:
    others = [model("1", "unloaded"), BATCHING, model("3", "evicted"), model("", "failed"), FIXED]
    assert documents.model_metadata(BATCHING, others) == {
        "name": "digits",
        "versions": ["2", "3"],
        "platform": "tensornext_pt2",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [-1, 64]},
            {"name": "text", "datatype": "BYTES", "shape": [-1, 1]},
        ],
        "outputs": [{"name": "y", "datatype": "BF16", "shape": [-1, 10]}],
    }


def test_config_of_a_model_that_batches_leaves_the_batch_axis_out() -> None:
    config = documents.model_config(BATCHING)
    assert config["max_batch_size"] == 64
    assert config["input"] == [
        {"name": "x", "data_type": "TYPE_FP32", "dims": [64]},
        {"name": "text", "data_type": "TYPE_STRING", "dims": [1]},
    ]
    assert config["output"] == [{"name": "y", "data_type": "TYPE_BF16", "dims": [10]}]
    assert config["instance_group"] == [
        {"name": "digits_cpu", "kind": "KIND_CPU", "count": 1},
        {"name": "digits_cuda_1", "kind": "KIND_GPU", "count": 1, "gpus": [1]},
    ]
    assert config["dynamic_batching"] == {"priority_levels": 4}


def test_config_of_a_model_without_a_batch_axis_keeps_every_axis() -> None:
    config = documents.model_config(FIXED)
    assert config["max_batch_size"] == 0
    assert "dynamic_batching" not in config
    assert config["input"] == [{"name": "x", "data_type": "TYPE_INT8", "dims": [-1, 2]}]


def stats(name: str = "digits", version: str = "1") -> VersionStats:
    return VersionStats(
        name=name,
        version=version,
        requests=12,
        replies=10,
        errors={"INTERNAL": 1, "UNAVAILABLE": 1},
        rows=40,
        batches=4,
        stages={
            stage: Histogram(1, (10,), microseconds)
            for stage, microseconds in (
                ("receive", 1.0),
                ("queue", 20.0),
                ("gather", 30.0),
                ("h2d", 5.5),
                ("compute", 400.0),
                ("d2h", 2.0),
                ("reply", 3.0),
                ("total", 461.5),
            )
        },
    )


def report(*models: VersionStats) -> StatsReport:
    return StatsReport(v=1, id=1, status="ready", version="0.1.0", started_s=0.0, uptime_us=1.0, models=models)


def test_statistics_have_every_number_that_perf_analyzer_reads() -> None:
    (entry,) = documents.model_statistics(report(stats()))["model_stats"]
    assert (entry["name"], entry["version"]) == ("digits", "1")
    assert (entry["inference_count"], entry["execution_count"]) == (40, 4)
    assert entry["inference_stats"] == {
        "success": {"count": 10, "ns": 461_500},
        "fail": {"count": 2, "ns": 0},
        "queue": {"count": 10, "ns": 20_000},
        "compute_input": {"count": 10, "ns": 35_500},
        "compute_infer": {"count": 10, "ns": 400_000},
        "compute_output": {"count": 10, "ns": 5_000},
        "cache_hit": {"count": 0, "ns": 0},
        "cache_miss": {"count": 0, "ns": 0},
    }


def test_statistics_of_one_model_or_version() -> None:
    counts = report(stats(), stats(version="2"), stats("other"))
    assert len(documents.model_statistics(counts)["model_stats"]) == 3
    assert [entry["version"] for entry in documents.model_statistics(counts, "digits")["model_stats"]] == ["1", "2"]
    assert len(documents.model_statistics(counts, "digits", "2")["model_stats"]) == 1
    with pytest.raises(NotFound, match="digits@3"):
        documents.model_statistics(counts, "digits", "3")


def test_index_has_the_states_of_triton_and_says_why() -> None:
    models = [
        BATCHING,
        model("1", "unloaded"),
        model("3", "starting"),
        model("4", "draining"),
        model("5", "evicted"),
        model("6", "failed", "no such file"),
        model("", "failed", "no model.toml"),
    ]
    index = documents.repository_index(models)
    assert [entry["state"] for entry in index] == [
        "READY",
        "UNAVAILABLE",
        "LOADING",
        "UNLOADING",
        "READY",
        "UNAVAILABLE",
        "UNAVAILABLE",
    ]
    assert index[0] == {"name": "digits", "version": "2", "state": "READY", "reason": ""}
    assert index[5]["reason"] == "no such file"
    assert "version" not in index[6]
    assert [entry["version"] for entry in documents.repository_index(models, ready=True)] == ["2", "5"]


def test_a_name_serves_if_any_version_does() -> None:
    models = [BATCHING, model("1", "unloaded")]
    assert documents.serves(models, "digits")
    assert documents.serves(models, "digits", "2")
    assert not documents.serves(models, "digits", "1")
    with pytest.raises(NotFound, match="digits@9"):
        documents.serves(models, "digits", "9")
