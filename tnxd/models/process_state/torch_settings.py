"""Settings of torch, in the order in which they are restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.modules import module as module_hooks

from tnxd.device_kinds import CHOSEN
from tnxd.models.process_state.setter_calls import DTYPE
from tnxd.models.process_state.setting import Setting, attribute


def _optional(library: str, owner: Any, attribute: str) -> Setting:
    """Setting that cannot always be read, and is restored only where it could be."""

    def read() -> Any:
        try:
            return getattr(owner, attribute)
        except RuntimeError:
            return None

    def write(value: Any) -> None:
        if value is not None:
            setattr(owner, attribute, value)

    return Setting(f"{library}'s use of TF32", read, write)


def _modes() -> tuple[torch.device, int]:
    """Default device, and the number of function modes that are entered: one of them may have set it."""
    return torch.get_default_device(), torch._C._len_torch_function_stack()


def _set_modes(kept: tuple[torch.device, int]) -> None:
    device, depth = kept
    torch.set_default_device(None)
    while torch._C._len_torch_function_stack() > depth:
        torch._C._pop_torch_function_stack()
    if torch.get_default_device() != device:
        torch.set_default_device(device)


_inference_guards: list[Any] = []  # a guard that is freed ends its effect


def _set_inference_mode(enabled: bool) -> None:
    guard = torch.inference_mode(enabled)
    guard.__enter__()
    _inference_guards.append(guard)


_AUTOCAST_KINDS = tuple(kind.name for kind in CHOSEN)


def _set_autocast(states: tuple[tuple[bool, torch.dtype], ...]) -> None:
    for kind, (enabled, dtype) in zip(_AUTOCAST_KINDS, states, strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


_ATTENTION = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")


def _attention() -> list[bool]:
    return [getattr(torch.backends.cuda, f"{kind}_enabled")() for kind in _ATTENTION]


def _set_attention(kept: list[bool]) -> None:
    for kind, enabled in zip(_ATTENTION, kept, strict=True):
        getattr(torch.backends.cuda, f"enable_{kind}")(enabled)


def _hooks() -> dict[str, Any]:
    """Hooks of all modules, which torch keeps in dictionaries of that module."""
    kept = {name: value for name, value in vars(module_hooks).items() if name.startswith("_global_")}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def _set_hooks(kept: dict[str, Any]) -> None:
    for name, value in kept.items():
        current = getattr(module_hooks, name)
        if isinstance(current, dict):
            current.clear()
            current.update(value)
        else:
            setattr(module_hooks, name, value)


def _flushes_denormals() -> bool:
    smallest = 5e-324
    return smallest * 1.0 == 0.0  # so does Python's arithmetic then


def _cuda_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


def _set_cuda_device(index: int | None) -> None:
    if index is not None:
        torch.cuda.set_device(index)


def _precisions() -> list[Setting]:
    """Precisions of FP32 products. A precision of "none" stands for the one above it."""
    backends = torch.backends
    owners = {
        "torch.backends": backends,
        "torch.backends.cuda.matmul": backends.cuda.matmul,
        "torch.backends.cudnn": backends.cudnn,
        "torch.backends.cudnn.conv": getattr(backends.cudnn, "conv", None),
        "torch.backends.cudnn.rnn": getattr(backends.cudnn, "rnn", None),
        "torch.backends.mkldnn": backends.mkldnn,
        "torch.backends.mkldnn.matmul": getattr(backends.mkldnn, "matmul", None),
        "torch.backends.mkldnn.conv": getattr(backends.mkldnn, "conv", None),
        "torch.backends.mkldnn.rnn": getattr(backends.mkldnn, "rnn", None),
    }
    return [attribute(f"{path}.fp32_precision", owner, "fp32_precision") for path, owner in owners.items()]


_MATMUL = torch.backends.cuda.matmul

TORCH_SETTINGS = [
    Setting(DTYPE, torch.get_default_dtype, torch.set_default_dtype),
    Setting("torch's default device or function modes", _modes, _set_modes),
    Setting("torch's grad mode", torch.is_grad_enabled, torch.set_grad_enabled, harmless=True),
    Setting("torch's inference mode", torch.is_inference_mode_enabled, _set_inference_mode),
    Setting(
        "torch's autocast",
        lambda: tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _AUTOCAST_KINDS),
        _set_autocast,
    ),
    Setting("torch's autocast cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    # A thread has a number of its own, but to set it sets that of threads to come as well.
    Setting("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
    Setting("the flushing of denormals", _flushes_denormals, torch.set_flush_denormal),
    Setting("torch's deterministic algorithms", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    attribute("torch's filling of uninitialized memory", torch.utils.deterministic, "fill_uninitialized_memory"),
    Setting(
        "torch's anomaly detection",
        torch.is_anomaly_enabled,
        torch.set_anomaly_enabled,
    ),
    # First the precision of all products, since it sets some of those below.
    Setting(
        "torch's precision of FP32 products",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    *_precisions(),
    # Last, the attributes that stand for several of those: torch refuses to read them, as torch.export does, where the
    # several were set apart from each other.
    *[_optional(name, owner, "allow_tf32") for name, owner in (("cuDNN", torch.backends.cudnn), ("CUDA", _MATMUL))],
    attribute("cuDNN's use", torch.backends.cudnn, "enabled"),
    attribute("cuDNN's benchmarking", torch.backends.cudnn, "benchmark"),
    attribute("cuDNN's determinism", torch.backends.cudnn, "deterministic"),
    attribute(
        "CUDA's reduced precision of BF16 sums",
        torch.backends.cuda.matmul,
        "allow_bf16_reduced_precision_reduction",
    ),
    attribute(
        "CUDA's reduced precision of FP16 sums",
        torch.backends.cuda.matmul,
        "allow_fp16_reduced_precision_reduction",
    ),
    attribute("oneDNN's use", torch.backends.mkldnn, "enabled"),
    attribute("oneDNN's determinism", torch.backends.mkldnn, "deterministic"),
    Setting("the choice of attention kernels", _attention, _set_attention),
    attribute("torch's engine of quantized operators", torch.backends.quantized, "engine"),
    Setting("the current CUDA device", _cuda_device, _set_cuda_device),
    Setting("the hooks of all modules", _hooks, _set_hooks),
    Setting(
        "torch's way of sharing memory",
        torch.multiprocessing.get_sharing_strategy,
        torch.multiprocessing.set_sharing_strategy,
    ),
]
