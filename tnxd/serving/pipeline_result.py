"""Result of a request for a pipeline, with the timing of the whole and of each step."""

from __future__ import annotations

import time

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.wire import VERSION, Result, StepTiming, Timing
from tnxd.executors.execution import Execution
from tnxd.serving.pending import StepRequest, described
from tnxd.serving.pipeline_run import Run, Stage
from tnxd.serving.step_errors import of_step


def stage_of(run: Run, request: StepRequest, execution: Execution, rows: int) -> Stage:
    """Report about a step that is done. Args: rows: of its batch."""
    timing = StepTiming(
        name=run.fitted.wiring.nodes[request.place].name,
        model=request.served.name,
        version=request.served.version,
        device=request.device,
        batch_size=rows,
        start_us=(request.queued_ns - run.whole.received_ns) / 1e3,
        queue_us=(execution.started_ns - request.queued_ns) / 1e3,
        gather_us=execution.gather_us,
        h2d_us=execution.h2d_us,
        compute_us=execution.compute_us,
        d2h_us=execution.d2h_us,
    )
    return Stage(timing, request.reason, execution.finished_ns, execution.latency_us)


def as_result(run: Run, last: int, memory_free_mb: float, outputs: tuple[Array, ...]) -> Result:
    """The result of the whole. Args: last: place of the step that ended last. memory_free_mb: then, of a GPU."""
    whole, nodes = run.whole, run.fitted.wiring.nodes
    stages = [stage for stage in run.stages if stage is not None]  # which all are done
    # Back from the end: each step began when the last one before it was done, so these follow one another.
    way, place = [stages[last]], last
    while nodes[place].before:
        place = max(nodes[place].before, key=lambda other: stages[other].finished_ns)
        way.append(stages[place])
    gather_us = sum([stage.timing.gather_us for stage in way])
    h2d_us = sum([stage.timing.h2d_us for stage in way])
    compute_us = sum([stage.timing.compute_us for stage in way])
    d2h_us = sum([stage.timing.d2h_us for stage in way])
    reason = stages[0].reason
    if any(stage.reason != reason for stage in stages):
        reason = "; ".join([of_step(stage.timing.name, stage.reason) for stage in stages])
    finished_ns = stages[last].finished_ns
    now = time.perf_counter_ns()
    return Result(
        v=VERSION,
        id=whole.id,
        model=whole.served.name,
        version=whole.served.version,
        outputs=described(whole.served.outputs, outputs),
        device=", ".join(dict.fromkeys([stage.timing.device for stage in stages])),
        reason=reason,
        batch_size=stages[last].timing.batch_size,
        latency_ms=sum([stage.latency_us for stage in way]) / 1e3,
        gpu_memory_mb=memory_free_mb,
        timing=Timing(
            receive_us=(whole.queued_ns - whole.received_ns) / 1e3,
            queue_us=(finished_ns - whole.queued_ns) / 1e3 - gather_us - h2d_us - compute_us - d2h_us,
            gather_us=gather_us,
            h2d_us=h2d_us,
            compute_us=compute_us,
            d2h_us=d2h_us,
            reply_us=(now - finished_ns) / 1e3,
            total_us=(now - whole.received_ns) / 1e3,
        ),
        predicted_us=whole.predicted_us,
        steps=tuple([stage.timing for stage in stages]),
    )
