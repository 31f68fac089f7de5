"""Documents of the Open Inference Protocol about a daemon and its models, as plain dicts.

HTTP sends them as JSON; gRPC makes messages of the same names of them. Field names are those of the protocol
(https://github.com/kserve/open-inference-protocol) and of Triton's extensions
(https://github.com/triton-inference-server/server/tree/main/docs/protocol).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tnxctl.protocol.errors import NotFound
from tnxctl.protocol.fields import BYTES
from tnxctl.protocol.histograms import Histogram
from tnxctl.protocol.limits import LOWEST_PRIORITY, excerpt
from tnxctl.protocol.statistics import StatsReport, VersionStats
from tnxctl.protocol.wire import ModelInfo, TensorSpec

Document = dict[str, Any]

SERVER_NAME = "tensornext"

EXTENSIONS = (
    "classification",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
"""Extensions of Triton that are answered as it does. `priority` and `timeout` are its schedule_policy."""

PRIORITY_LEVELS = LOWEST_PRIORITY + 1
"""Priorities as Triton counts them: 1 (first) to this many (last)."""

SERVING = ("ready", "evicted")
"""States of a version that answers requests, an evicted one once it is loaded again."""

_INDEX_STATES = {
    "ready": "READY",
    "evicted": "READY",
    "starting": "LOADING",
    "draining": "UNLOADING",
    "unloaded": "UNAVAILABLE",
    "failed": "UNAVAILABLE",
}

_REASONS = {
    "evicted": "unloaded to make room for another model, and loaded again by the next request",
    "unloaded": "unloaded",
}

_CONFIG_DATATYPES = {BYTES: "TYPE_STRING"}


def model_title(name: str, version: str = "") -> str:
    """The title of a model, as `Client.predict` takes it: NAME, or NAME@VERSION if a version is named."""
    return f"{name}@{version}" if version else name


def server_metadata(version: str, *, shares_memory: bool = False) -> Document:
    """Server metadata.

    Args:
        version: of the daemon. shares_memory: whether regions of shared memory may be registered.
    """
    extensions = [*EXTENSIONS, "system_shared_memory"] if shares_memory else [*EXTENSIONS]
    return {"name": SERVER_NAME, "version": version, "extensions": extensions}


def model_metadata(model: ModelInfo, all_models: Iterable[ModelInfo]) -> Document:
    """Metadata of one version. A -1 is an axis of any length; axis 0 of a model that batches is one.

    Args:
        model: the version that is described.
        all_models: versions of all models, of which the versions that serve are listed.
    """
    return {
        "name": model.name,
        "versions": [other.version for other in all_models if other.name == model.name and other.status in SERVING],
        "platform": _platform(model),
        "inputs": [_tensor_metadata(spec) for spec in model.inputs],
        "outputs": [_tensor_metadata(spec) for spec in model.outputs],
    }


def model_config(model: ModelInfo) -> Document:
    """Configuration of one version, as Triton's ModelConfig has it.

    `max_batch_size` is 0 for a model without a batch axis; otherwise `dims` lack that axis, which comes before them.
    """
    batches = model.max_batch_size > 0
    config: Document = {
        "name": model.name,
        "platform": _platform(model),
        "backend": SERVER_NAME,
        "max_batch_size": model.max_batch_size,
        "input": [_tensor_config(spec, batches) for spec in model.inputs],
        "output": [_tensor_config(spec, batches) for spec in model.outputs],
        "instance_group": [_instance_group(model.name, device) for device in model.devices],
    }
    if batches:
        config["dynamic_batching"] = {"priority_levels": PRIORITY_LEVELS}
    return config


def model_statistics(report: StatsReport, name: str = "", version: str = "") -> Document:
    """Statistics of versions since the daemon started. Times are in nanoseconds.

    `inference_count` counts rows and `execution_count` batches, as Triton does. `compute_input` is gathering and the
    copy to the device, `compute_output` the copy back and the reply. There is no cache of answers.

    Args:
        name: of the model; "": all. version: "": all of that name.

    Raises:
        NotFound: the daemon has no counts of such a model.
    """
    found = [
        stats
        for stats in report.models
        if (not name or stats.name == name) and (not version or stats.version == version)
    ]
    if name and not found:
        raise NotFound(f"no statistics of model {excerpt(model_title(name, version))}")
    return {"model_stats": [_version_statistics(stats) for stats in found]}


def repository_index(models: Iterable[ModelInfo], *, ready: bool = False) -> list[Document]:
    """Index of the model repository. Args: ready: list only versions that answer requests."""
    return [_index_entry(model) for model in models if not ready or model.status in SERVING]


def live() -> Document:
    """Body of the answer to the health check of a server that is there, as KServe's client reads it."""
    return {"live": True}


def ready(is_ready: bool) -> Document:
    """Body of the answer to a readiness check of the server."""
    return {"ready": is_ready}


def model_ready(name: str, is_ready: bool) -> Document:
    """Body of the answer to a readiness check of a model."""
    return {"name": name, "ready": is_ready}


def serves(models: Iterable[ModelInfo], name: str, version: str = "") -> bool:
    """Whether a version, or without one any version of that name, answers requests.

    Raises:
        NotFound: there is none, in whatever state.
    """
    found = [model for model in models if model.name == name and version in ("", model.version)]
    if not found:
        raise NotFound(f"no model {excerpt(model_title(name, version))}")
    return any(model.status in SERVING for model in found)


def _platform(model: ModelInfo) -> str:
    return f"{SERVER_NAME}_{model.format}" if model.format else SERVER_NAME


def _tensor_metadata(spec: TensorSpec) -> Document:
    return {"name": spec.name, "datatype": spec.datatype, "shape": [*spec.shape]}


def _tensor_config(spec: TensorSpec, batches: bool) -> Document:
    datatype = _CONFIG_DATATYPES.get(spec.datatype, f"TYPE_{spec.datatype}")
    return {"name": spec.name, "data_type": datatype, "dims": [*(spec.shape[1:] if batches else spec.shape)]}


def _instance_group(name: str, device: str) -> Document:
    """A device as Triton describes it. GPUs alone have numbers."""
    _, _, number = device.partition(":")
    kind: Document = {"kind": "KIND_GPU", "gpus": [int(number)]} if number else {"kind": "KIND_CPU"}
    return {"name": f"{name}_{device.replace(':', '_')}", "count": 1, **kind}


def _version_statistics(stats: VersionStats) -> Document:
    stages = stats.stages
    return {
        "name": stats.name,
        "version": stats.version,
        "inference_count": stats.rows,
        "execution_count": stats.batches,
        "inference_stats": {
            "success": _duration(stats.replies, stages, "total"),
            "fail": {"count": sum(stats.errors.values()), "ns": 0},
            "queue": _duration(stats.replies, stages, "queue"),
            "compute_input": _duration(stats.replies, stages, "gather", "h2d"),
            "compute_infer": _duration(stats.replies, stages, "compute"),
            "compute_output": _duration(stats.replies, stages, "d2h", "reply"),
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "batch_stats": [],
        "memory_usage": [],
    }


def _duration(count: int, stages: Mapping[str, Histogram], *names: str) -> Document:
    microseconds = sum(stages[name].sum for name in names if name in stages)
    return {"count": count, "ns": round(microseconds * 1000)}


def _index_entry(model: ModelInfo) -> Document:
    entry: Document = {"name": model.name}
    if model.version:
        entry["version"] = model.version
    entry["state"] = _INDEX_STATES.get(model.status, "UNKNOWN")
    entry["reason"] = model.error or _REASONS.get(model.status, "")
    return entry
