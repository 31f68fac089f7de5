"""Routing: which device a request goes to, and when it is predicted to be done there."""

from __future__ import annotations

from collections.abc import Iterable

from tnxctl.protocol.errors import InvalidArgument, Unavailable
from tnxd.device_kinds import PROCESS
from tnxd.scheduling.cost_surface import CostSurfaces
from tnxd.scheduling.costs import BatchCosts, CostModel
from tnxd.scheduling.device import Device
from tnxd.scheduling.lane_choice import next_curve
from tnxd.scheduling.placement import ModelLoad, Placement
from tnxd.scheduling.ragged import RaggedQueue
from tnxd.scheduling.request import NEVER, Request
from tnxd.scheduling.request_queue import RequestQueue
from tnxd.scheduling.times import milliseconds
from tnxd.scheduling.width import Width

# Queues that are kept though nothing waits in them: sequence models bring a new shape group with every length.
_MAX_IDLE_QUEUES = 256

Prediction = tuple[float, float, float, float]
"""Prediction for a request, in microseconds: until its batch starts; that batch; what the request adds to the work of
the device; and the part of the first for requests of the same model and group, which other devices could steal."""

_Candidate = tuple[float, int, Device, Prediction]
"""Microseconds until a device would be done, its place in the order of preference, the device, its prediction."""


class Routing:
    """Router of requests: the devices, and the choice between them.

    Args:
        devices: in order of preference among equals. costs: predicts how long a batch takes.

    Attributes:
        devices: by name. gpus: those that work. loads: of the models, by key.
        surfaces: of the models whose batches are padded.
    """

    def __init__(self, devices: Iterable[Device], costs: CostModel) -> None:
        self.devices = {device.name: device for device in devices}
        self.loads: dict[str, ModelLoad] = {}
        self.surfaces = CostSurfaces()
        self._costs = costs
        self.refresh()

    def refresh(self) -> None:
        """Sort the devices into those that work and those that failed, after a change."""
        ready = [device for device in self.devices.values() if not device.error]
        self.gpus = [device for device in ready if device.is_gpu]
        self._cpus = [device for device in ready if not device.is_gpu]
        failed = [f"{device.name} failed" for device in self.devices.values() if device.error]
        self._no_gpu = "no GPU is ready" + (f": {', '.join(failed)}" if failed else "")
        self._no_cpu = "" if self._cpus else "this daemon runs without the CPU"

    def load(self, model: str) -> ModelLoad:
        """Load of a model, an empty one at first."""
        load = self.loads.get(model)
        if load is None:
            load = self.loads[model] = ModelLoad()
        return load

    def placement(self, device: Device, model: str) -> Placement:
        """Placement of a model on a device, an empty one at first."""
        placement = device.placements.get(model)
        if placement is None:
            width = Width() if device.teams.lanes else None
            placement = device.placements[model] = Placement(self.load(model), width)
        return placement

    def queue(self, device: Device, model: str, group: tuple[int, ...], alone: int = 0) -> RequestQueue:
        """Queue of the requests of a model and group on a device. Empty queues are kept, up to a number."""
        key = (model, group, alone)
        queue = device.queues.get(key)
        if queue is None:
            if len(device.queues) >= device.sweep_at:
                device.queues = {known: other for known, other in device.queues.items() if other.count}
                device.sweep_at = max(_MAX_IDLE_QUEUES, 2 * len(device.queues))
            placement = self.placement(device, model)
            asks_for_team = placement.width is not None and placement.width.threads > 1
            costs = BatchCosts(
                *[self._costs.curve(device.name, model, group, inline=inline) for inline in (False, True)],
                inline_limit_us=0.0 if asks_for_team or not placement.load.inline else device.inline_limit_us,
            )
            surface = self.surfaces.find(device.name, model, group)
            if surface is None:
                queue = RequestQueue(key, costs, placement)
            else:
                queue = RaggedQueue(key, costs, placement, surface)
            device.queues[key] = queue
        return queue

    def choose(self, request: Request, now_ns: int) -> tuple[Device, RequestQueue, str, Prediction]:
        """Choose the device where a request is to run.

        Returns:
            The device, the queue there, the reason in words, and the prediction.

        Raises:
            InvalidArgument: the request names a device that does not exist.
            Unavailable: no device that the request may use has the model.
        """
        if request.wanted == "auto":
            device, reason, prediction = self._earliest_finish(request, now_ns)
            queue = self.queue(device, request.model, request.group, request.alone)
            queue.stealable = True
        else:
            device, reason, predicted = self._as_wanted(request, now_ns)
            queue = self.queue(device, request.model, request.group, request.alone)
            prediction = predicted or self._predict(device, request, queue, now_ns)
        return device, queue, reason, prediction

    def route(self, request: Request, now_ns: int) -> tuple[Device, str]:
        """Device where a request would run now, and the reason in words. Raises as `choose` does."""
        if request.wanted == "auto":
            return self._earliest_finish(request, now_ns)[:2]
        return self._as_wanted(request, now_ns)[:2]

    def _as_wanted(self, request: Request, now_ns: int) -> tuple[Device, str, Prediction | None]:
        """Device of a request that wants one, or prefers a kind, the reason, and the prediction if that decided."""
        wanted, model = request.wanted, request.model
        if wanted:
            return *self._named(wanted, model), None
        if not request.prefer_gpu:
            return self._cpu_for(model), "the request did not prefer a GPU", None
        if not self.gpus:
            return self._cpu_for(model), self._no_gpu, None
        minimum, gpus = request.min_gpu_memory_mb, self.gpus
        if request.excluded:
            gpus = [gpu for gpu in gpus if gpu.name not in request.excluded]
            if not gpus:
                return self._cpu_for(model), "no other GPU is ready", None
        eligible = [gpu for gpu in gpus if gpu.is_eligible(request)]
        if eligible:
            gpu, prediction = eligible[0], None
            if len(eligible) > 1:
                gpu, prediction = self._first_done(eligible, request, now_ns)
            return gpu, f"{gpu.name} has {gpu.memory_free_mb:.0f} MiB free", prediction
        free = ", ".join(
            f"{gpu.name} has {gpu.memory_free_mb:.0f}"
            if model in gpu.models
            else f"{gpu.name} has not loaded {model!r}"
            for gpu in gpus
        )
        return self._cpu_for(model), f"no GPU has {minimum:g} MiB free: {free}", None

    def _first_done(self, gpus: list[Device], request: Request, now_ns: int) -> tuple[Device, Prediction]:
        """The GPU with the earliest predicted finish, of equal ones that with the fewest rows, and the prediction."""
        found = []
        for place, gpu in enumerate(gpus):
            queue = self.queue(gpu, request.model, request.group, request.alone)
            prediction = self._predict(gpu, request, queue, now_ns)
            found.append((prediction[0] + prediction[1], gpu.outstanding_rows, place, prediction))
        _, _, place, prediction = min(found)
        return gpus[place], prediction

    def _earliest_finish(self, request: Request, now_ns: int) -> tuple[Device, str, Prediction]:
        """Device with the earliest predicted finish, the reason in words, and the prediction.

        If all are busy, a request with a deadline goes to the fastest one if that is in time: those that are idle
        sooner steal it from there (`stealing`). In the queue of a slow device it might stand behind a long batch.
        """
        candidates: list[_Candidate] = []
        for device in self.devices.values():
            if device.is_eligible(request):
                prediction = self._predict(
                    device, request, self.queue(device, request.model, request.group, request.alone), now_ns
                )
                candidates.append((prediction[0] + prediction[1], len(candidates), device, prediction))
        if not candidates:
            raise Unavailable(f"no device serves {request.model!r} now")
        candidates.sort()  # the first among equals stays first
        _, _, best, prediction = candidates[0]
        how = "done first there"
        if prediction[0] > 0.0 and len(candidates) > 1 and request.deadline_ns != NEVER:
            shared = self._fastest_in_time(request, candidates, now_ns)
            if shared is not None:
                how = "all are busy, and this is the fastest"
                best, prediction = shared
        times = ", ".join([f"{device.name} {milliseconds(micros)}" for micros, _, device, _ in candidates])
        return best, f"{how}: {times}", prediction

    def _fastest_in_time(
        self, request: Request, candidates: list[_Candidate], now_ns: int
    ) -> tuple[Device, Prediction] | None:
        """Fastest device, if the request is in time there while all others steal from its queue, or if that is full.

        A queue is full with as many requests as fit into a batch: a slow device does more for all with a large batch
        that it steals than with a small one for the last request. Models without batches gain nothing by that.
        """
        rates = [device.at_once / share_us if share_us else 0.0 for _, _, device, (_, _, share_us, _) in candidates]
        if not all(rates):
            return None  # of one of them nothing is known yet, or the request has no rows
        most = max(rates)
        _, _, fastest, (wait_us, run_us, share_us, own_us) = candidates[rates.index(most)]
        wait_us -= own_us * (1.0 - most / sum(rates)) / fastest.at_once
        queue = self.queue(fastest, request.model, request.group, request.alone)
        limit = request.most_rows if request.length else queue.placement.row_limit(request.max_batch_size)
        if not limit or queue.count < limit:
            margin_us = next_curve(fastest, queue, request.rows).spread(request.rows)
            if now_ns + (wait_us + run_us + margin_us) * 1e3 > request.deadline_ns:
                return None
        return fastest, (wait_us, run_us, share_us, own_us)

    def _named(self, name: str, model: str) -> tuple[Device, str]:
        device = self.devices.get(name)
        if device is None:
            raise InvalidArgument(f"device {name[:60]!r}: there are {', '.join(self.devices)}, and auto")
        if device.error:
            raise Unavailable(f"device {name} failed: {device.error}")
        if model not in device.models:
            processes = self.devices.get(PROCESS.name)
            if processes is not None and model in processes.models and not device.is_gpu:
                return processes, f"the request asked for {name}, and the model has a process of its own there"
            raise Unavailable(f"device {name} has not loaded {model!r}")
        return device, f"the request asked for {name}"

    def _predict(self, device: Device, request: Request, queue: RequestQueue, now_ns: int) -> Prediction:
        """Predict when a request would be done on a device.

        The wait counts lanes that run and what waits before the request, without models that wait for lanes of their
        own, and is corrected by `Forecast.factor`. Where nothing runs and nothing waits, the batch may run wide. What
        the request adds to the work is its share of a full batch.
        """
        placement = queue.placement
        mean = queue.costs.mean if device.inline_limit_us else queue.costs.lane.mean
        rows, limit = request.rows, request.max_batch_size
        if placement.max_rows:
            limit = placement.row_limit(limit)
        full_us = mean(limit or 1)
        share_us = full_us * rows / limit if limit else full_us
        wait_us = own_us = queue_us = 0.0
        if device.queued:
            level = request.priority
            wait_us = sum(device.backlog_us[: level + 1])
            if device.held:
                held_us = sum([sum(held.backlog_us[: level + 1]) for held in device.held if held is not placement])
                wait_us = max(wait_us - held_us, 0.0)
            if queue.count:
                queued, ahead = queue.rows_ahead(request)
                batches, rest = divmod(ahead, limit) if limit else (ahead, 0)
                own_us = queue_us = batches * full_us
                others_us = wait_us - queued * full_us / (limit or 1)
                wait_us = others_us + own_us if others_us > 0.0 else own_us
                if rest + rows <= limit:
                    rows += rest
        run_us, width, max_lanes = mean(rows), placement.width, placement.load.max_lanes
        if device.busy_until_ns and not device.free_lanes and not max_lanes and queue.costs.fits_inline(rows):
            # The caller's own thread is not taken by what keeps the lanes, and passes over what waits for them.
            return own_us * placement.forecast.factor, run_us, share_us, queue_us
        if device.chip is not None:
            wait_us = device.chip.delay_us(wait_us, run_us, now_ns)
        else:
            if device.busy_until_ns:
                # Where a core is free, too, a batch begins at once; next to a wide one it would not get a whole core.
                if device.queued or device.wide or width is None or not device.free_lanes:
                    wait_us += device.running_us(now_ns)
            elif width is not None and not device.queued:
                run_us = next_curve(device, queue, rows).mean(rows)
            wait_us /= device.lanes
        if width is not None and width.threads > 1:
            max_lanes = min(max_lanes or device.teams.lanes, device.teams.lanes)
        if max_lanes:
            for lane in placement.lanes:
                own_us += max(device.busy_until_ns.get(lane, 0) - now_ns, 0) / 1e3
            wait_us = max(wait_us, own_us / max_lanes)
        return wait_us * placement.forecast.factor, run_us, share_us, queue_us

    def _cpu_for(self, model: str) -> Device:
        for cpu in self._cpus:
            if model in cpu.models:
                return cpu
        raise Unavailable(f"no CPU lane serves {model!r}: " + (self._no_cpu or "it is not loaded on the CPU"))
