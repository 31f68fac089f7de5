"""Triton Inference Server by way of nvidia-pytriton: HTTP and gRPC in C++, the model in Python.

plain    one request per forward
batched  Triton's dynamic batcher, up to 64 requests per forward, without waiting for company
"""
# mypy: disable-error-code="import-not-found,import-untyped,misc,untyped-decorator"

from __future__ import annotations

import os
import signal
import sys
import sysconfig

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

import serving

run = serving.forward()


@batch
def infer_batch(input: serving.Array) -> dict[str, serving.Array]:
    """Named after the tensors of the model: pytriton maps them to arguments."""
    return {"output": run(input)}


def main() -> None:
    _, port, grpc_port = serving.arguments()
    serving.end_with_stdin()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # by way of the end of `with`, which cleans up
    # Triton's Python backend loads libpython: it must be this interpreter's, not one of the system.
    os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=port,
        grpc_address="127.0.0.1",
        grpc_port=grpc_port,
        allow_metrics=False,
        log_verbose=0,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="mlp",
            infer_func=infer_batch,
            inputs=[Tensor(name="input", dtype=np.float32, shape=(256,))],
            outputs=[Tensor(name="output", dtype=np.float32, shape=(128,))],
            config=ModelConfig(
                max_batch_size=serving.BATCH_ROWS,
                batcher=DynamicBatcher(max_queue_delay_microseconds=0),
            ),
            strict=False,
        )
        triton.serve()


if __name__ == "__main__":
    main()
