"""Graphs: forwards that were captured once on a lane, and are started as a whole from then on.

A forward of a small batch takes a device less time than Python takes to start its kernels one by one, and lanes contend
for Python. A graph is started by one call. It reads its inputs where it read them when it was captured, and writes its
outputs where it wrote them then. So there is one for each size of a batch, a *bucket*, and for each slot of the lane:
it reads the slot's own memory, and what it has written stays until the slot's batch is over. A smaller batch is filled
up to its bucket, and what the filling answers is cut off again.

All graphs of a slot compute in one memory, where one may have its outputs where another computes: they run on one
stream, one after the other, and the next one in a slot when the outputs of the last one have been copied. Graphs of
different slots must not share it: what one has written is still being copied when the other runs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from tnxctl.protocol.errors import FailedPrecondition, Unavailable
from tnxd.executors.accelerator import Accelerator, capturing
from tnxd.executors.accelerator_runner import AcceleratorRunner
from tnxd.executors.arena import Shape, leak
from tnxd.executors.execution import Execution
from tnxd.executors.slots import Slot
from tnxd.executors.trial.copies import Call
from tnxd.executors.trial.examples import Item
from tnxd.executors.trial.warmup import run_example
from tnxd.models.model import Model
from tnxd.models.tensors import Value, check_outputs

T = TypeVar("T")

_CAPTURE_S = 5.0
"""So long a capture waits for another one to end."""

_MOST_KNOWN = 1024
"""Shapes of batches that a model's graphs remember."""


class DeviceGraph(Protocol):
    """A graph of a device, as torch has it: `torch.cuda.CUDAGraph`, for one."""

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        """Have the current stream record, instead of run, what it is given from now on."""

    def capture_end(self) -> None:
        """Have the current stream run again what it is given."""

    def replay(self) -> None:
        """Start what was recorded, on the current stream."""

    def reset(self) -> None:
        """Free it."""


class GraphApi(NamedTuple):
    """Graphs of a kind of device.

    Attributes:
        new_graph: makes an empty graph. new_pool: makes a handle of memory that graphs compute in.
        end_allocation: ends what a capture began in a pool, where its own end did not. Never raises.
    """

    new_graph: Callable[[], DeviceGraph]
    new_pool: Callable[[], Any]
    end_allocation: Callable[[Any], None]


class Bucket(NamedTuple):
    """Size of a batch, also of the largest one that a graph takes.

    Attributes:
        rows: of the batch; 0: the model has no batch axis.
        length: of the ragged axes that are padded; 0: there are none.
    """

    rows: int
    length: int = 0

    @property
    def units(self) -> int:
        """Rows, or tokens if there is a length."""
        return max(self.rows, 1) * max(self.length, 1)

    def __str__(self) -> str:
        return f"{self.rows}x{self.length}" if self.length else f"{max(self.rows, 1)}"


class Graph:
    """A captured forward of batches of one bucket, in one slot.

    Args:
        inputs, outputs: where the graph reads and writes.
    """

    def __init__(self, graph: DeviceGraph, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        self._graph = graph
        self._inputs = inputs
        self._outputs = outputs

    def run(self, inputs: Sequence[Value | None]) -> Sequence[torch.Tensor]:
        """Outputs for inputs of the bucket's shapes, as long as the next run has not begun. On the lane's stream."""
        for own, given in zip(self._inputs, inputs, strict=True):
            assert isinstance(given, torch.Tensor)
            if own.data_ptr() != given.data_ptr():  # the slot has grown since
                own.copy_(given)
        self._graph.replay()
        return self._outputs

    def free(self) -> None:
        """Free the graph, and its memory for others of the slot."""
        self._graph.reset()
        self._inputs = self._outputs = ()


class Filled(NamedTuple):
    """A batch that is filled up. Attributes: size: of the batch. bucket: that it is filled up to. shapes: then."""

    size: Bucket
    bucket: Bucket
    shapes: Sequence[Shape]


class ModelGraphs:
    """Graphs of one model on one lane.

    Args:
        call: of the model, which they are captured from.
        shapes: of the inputs of any batch that they take, but for rows and padded lengths.

    Attributes:
        in_use: whether batches run as graphs.
    """

    def __init__(self, model: Model, call: Call, shapes: Sequence[Shape]) -> None:
        self.call = call
        self.in_use = False
        self._least: dict[Bucket, float] = {}
        self._graphs: dict[tuple[Slot, Bucket], Graph] = {}
        self._batches = bool(model.max_batch_size)
        ragged = model.ragged if model.pads else None
        self._axes = [0] * len(model.inputs) if ragged is None else ragged.axes
        self._cuts = [0] * len(model.outputs) if ragged is None else ragged.cuts
        self._pads = ragged is not None
        self._forms = [self._form(shape, axis) for shape, axis in zip(shapes, self._axes, strict=True)]
        self._rows: list[int] = []
        self._lengths: list[int] = []
        self._known: dict[tuple[Shape | None, ...], Filled | None] = {}

    def _form(self, shape: Shape, axis: int) -> Shape:
        """The part that all shapes of an input have in common."""
        if axis:
            return (*shape[1:axis], *shape[axis + 1 :])
        return shape[1:] if self._batches else shape

    def filled(self, shapes: tuple[Shape | None, ...]) -> Filled | None:
        """A batch with inputs of these shapes, filled up; None: it is faster as it is, or has no graph."""
        try:
            return self._known[shapes]
        except KeyError:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            found = self._known[shapes] = self._filled(shapes)
            return found

    def _filled(self, shapes: Sequence[Shape | None]) -> Filled | None:
        size = self._size(shapes)
        if size is None:
            return None
        row, column = bisect_left(self._rows, size.rows), bisect_left(self._lengths, size.length)
        if row == len(self._rows) or column == len(self._lengths):
            return None
        bucket = Bucket(self._rows[row], self._lengths[column])
        least = self._least.get(bucket)
        return None if least is None or size.units < least else Filled(size, bucket, self._shapes_in(bucket, shapes))

    def whole(self, bucket: Bucket, shapes: Sequence[Shape | None]) -> Filled | None:
        """The same for a bucket that has no graph yet; None: the batch has no graph."""
        size = self._size(shapes)
        return None if size is None else Filled(size, bucket, self._shapes_in(bucket, shapes))

    def _size(self, shapes: Sequence[Shape | None]) -> Bucket | None:
        """Size of a batch; None: it has inputs of another form, or nothing in it."""
        length = 0
        for shape, form, axis in zip(shapes, self._forms, self._axes, strict=True):
            if shape is None or self._form(shape, axis) != form:
                return None
            if axis:
                length = shape[axis]
        first = shapes[0]
        assert first is not None
        rows = first[0] if self._batches else 0
        return Bucket(rows, length) if (rows or not self._batches) and (length or not self._pads) else None

    def _shapes_in(self, bucket: Bucket, shapes: Sequence[Shape | None]) -> list[Shape]:
        filled = []
        for shape, axis in zip(shapes, self._axes, strict=True):
            assert shape is not None
            own = [bucket.rows, *shape[1:]] if self._batches else list(shape)
            if axis:
                own[axis] = bucket.length
            filled.append(tuple(own))
        return filled

    def cut(self, outputs: Sequence[torch.Tensor], size: Bucket) -> list[torch.Tensor]:
        """Outputs of a graph without what answers the filling."""
        if not size.rows:
            return [*outputs]
        return [
            output[: size.rows].narrow(axis, 0, size.length) if axis else output[: size.rows]
            for output, axis in zip(outputs, self._cuts, strict=True)
        ]

    def graph(self, slot: Slot, bucket: Bucket) -> Graph | None:
        """The graph of a bucket in a slot, if there is one."""
        return self._graphs.get((slot, bucket))

    def uses(self, slot: Slot) -> bool:
        """Whether there is a graph in a slot."""
        return any(own is slot for own, _ in self._graphs)

    @property
    def buckets(self) -> list[Bucket]:
        """Buckets that have graphs."""
        return [*self._least]

    def add(self, slot: Slot, bucket: Bucket, graph: Graph) -> None:
        """Add the graph of a bucket in a slot."""
        self._graphs[slot, bucket] = graph
        self._least.setdefault(bucket, 0.0)
        self._changed()

    def use_from(self, bucket: Bucket, least: float) -> None:
        """Use the graphs of a bucket for batches of so many rows, or tokens, and more."""
        self._least[bucket] = least
        self._changed()

    def drop(self, bucket: Bucket) -> None:
        """Free the graphs of a bucket, in all slots."""
        for key in [key for key in self._graphs if key[1] == bucket]:
            self._graphs.pop(key).free()
        self._least.pop(bucket, None)
        self._changed()

    def _changed(self) -> None:
        self._rows = sorted({bucket.rows for bucket in self._least})
        self._lengths = sorted({bucket.length for bucket in self._least})
        self._known.clear()

    def free(self) -> None:
        """Free all graphs."""
        for bucket in self.buckets:
            self.drop(bucket)


class GraphRunner(AcceleratorRunner):
    """Runner of a lane that starts forwards as graphs, where there are some. Used by the lane's thread.

    Args:
        accelerator, depth: as of `AcceleratorRunner`. api: graphs of the kind of device.
    """

    def __init__(self, accelerator: Accelerator, depth: int, api: GraphApi) -> None:
        super().__init__(accelerator, depth)
        self.graphs: dict[str, ModelGraphs] = {}
        self._api = api
        self._pools: dict[Slot, Any] = {}
        self._failed: dict[Slot, list[DeviceGraph]] = {}
        self._chosen: tuple[ModelGraphs, Filled] | None = None
        self._wanted: Bucket | None = None
        self._refusal: BaseException | None = None

    # --- batches -------------------------------------------------------------------------------------------------

    def shapes_on_device(
        self, execution: Execution, shapes: Sequence[Shape | None], rows: int
    ) -> Sequence[Shape | None]:
        self._chosen = None
        key = execution.model.key
        graphs = self.graphs.get(key)
        # A variant that was given up leaves its graphs, which are freed with the model.
        if graphs is None or execution.plain or self.calls.get(key) is not graphs.call:
            return shapes
        if self._wanted is not None:
            filled = graphs.whole(self._wanted, shapes)
        else:
            filled = graphs.filled(tuple(shapes)) if graphs.in_use else None
        if filled is None:
            return shapes
        self._chosen = graphs, filled
        return filled.shapes

    def forward_on_device(self, execution: Execution, inputs: Sequence[Value | None], rows: int) -> object:
        if self._chosen is None:
            return super().forward_on_device(execution, inputs, rows)
        graphs, (size, bucket, _) = self._chosen
        if self._wanted is not None:
            self._try_to_capture(execution.model, graphs, inputs)
        graph = graphs.graph(self._slot, bucket)
        if graph is not None:
            return graphs.cut(graph.run(inputs), size)
        # It could not be captured, just now.
        outputs = check_outputs(execution.model, graphs.call(*inputs), bucket.rows)
        return graphs.cut(outputs, size)  # type: ignore[arg-type]

    # --- captures ------------------------------------------------------------------------------------------------

    def open_graphs(self, model: Model, shapes: Sequence[Shape]) -> ModelGraphs:
        """Graphs of a model that the runner has a call for: none yet. Args: shapes: see `ModelGraphs`."""
        self.forget_graphs(model.key)
        graphs = self.graphs[model.key] = ModelGraphs(model, self.calls[model.key], shapes)
        return graphs

    def capture(self, model: Model, item: Item, bucket: Bucket) -> None:
        """Capture the forward of a batch that fills a bucket, once for each slot, while nothing is under way.

        The runner must have run such a batch before, so that nothing is set up for the first time.

        Raises:
            BaseException: whatever the model raised meanwhile, or what the device refused.
        """
        for _ in range(self.depth):  # slots take turns
            self._wanted, self._refusal = bucket, None
            try:
                run_example(self, model, item)
                if self._refusal is not None:
                    self.graphs[model.key].drop(bucket)
                    raise self._refusal
            finally:
                self._wanted = self._refusal = None

    def _try_to_capture(self, model: Model, graphs: ModelGraphs, inputs: Sequence[Value | None]) -> None:
        """Capture a graph for the slot. Why it cannot be is told by `capture`: the batch itself goes on."""
        bucket, self._wanted = self._wanted, None
        assert bucket is not None
        tensors = [each for each in inputs if isinstance(each, torch.Tensor)]
        slot, pool, graph = self._slot, self._pool(self._slot), self._api.new_graph()

        def work() -> list[Value]:
            return check_outputs(model, graphs.call(*tensors), bucket.rows)

        try:
            outputs = _record(graph, self._api, pool, work)
            if not all(isinstance(each, torch.Tensor) and each.device == tensors[0].device for each in outputs):
                raise FailedPrecondition("an output is not on the device")
        except BaseException as error:  # a model's code may raise anything
            # torch still refers to it, and counts it among those that use the pool (pytorch/pytorch#180395, #190308).
            self._failed.setdefault(slot, []).append(graph)
            self._refusal = error.with_traceback(None)
            return
        graphs.add(slot, bucket, Graph(graph, tensors, outputs))  # type: ignore[arg-type]

    def forget(self, key: str) -> None:
        super().forget(key)
        self.forget_graphs(key)

    def forget_graphs(self, key: str) -> None:
        """Free the graphs of a model. None of its batches may be under way. Args: key: of the model."""
        graphs = self.graphs.pop(key, None)
        if graphs is not None:
            graphs.free()

    def _pool(self, slot: Slot) -> Any:
        """The memory that graphs of a slot compute in."""
        used = slot in self._failed or any(graphs.uses(slot) for graphs in self.graphs.values())
        if not used:  # a pool that no graph uses any more cannot be used again (pytorch/pytorch#198794)
            self._pools[slot] = self._api.new_pool()
        return self._pools[slot]

    def is_lost(self) -> bool:
        if not super().is_lost():
            return False
        leak(self.graphs, self._failed)
        self.graphs, self._failed = {}, {}
        return True


def _record(graph: DeviceGraph, api: GraphApi, pool: Any, work: Callable[[], T]) -> T:
    """Capture what a function starts. Raises what it raises, or what the device says about it at the end."""
    if not capturing.acquire(timeout=_CAPTURE_S):
        raise Unavailable(f"another capture has not ended for {_CAPTURE_S:g} s")
    try:
        # Only what this thread itself does may end the capture: others go on allocating and waiting meanwhile. The
        # context managers of torch wait for the device and free what it keeps, which stalls all lanes.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            made = work()
        except BaseException:
            with suppress(RuntimeError):  # which only says that something happened before
                graph.capture_end()
            raise
        graph.capture_end()
        return made
    except BaseException:
        api.end_allocation(pool)
        raise
    finally:
        capturing.release()
