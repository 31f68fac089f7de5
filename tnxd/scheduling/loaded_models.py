"""Models that are loaded on devices, as scheduling knows them: where each runs, its limits, what it has to finish."""

from __future__ import annotations

from collections.abc import Iterable

from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.routing import Routing


class LoadedModels:
    """Models that requests are routed for, by key. They come and go.

    Args:
        routing: has the devices, and the loads of the models. costs: of batches of the models.
    """

    def __init__(self, routing: Routing, costs: CostModel) -> None:
        self._routing = routing
        self._devices = routing.devices
        self._costs = costs

    def add(
        self,
        device: str,
        model: str,
        *,
        group: tuple[int, ...] = (),
        costs: Iterable[tuple[int, float]] = (),
        padded: Iterable[tuple[int, int, float]] | None = None,
        safe_rows: int = 0,
        most_rows: int = 0,
        widths: Iterable[tuple[int, float, float]] = (),
        threads: int = 0,
    ) -> None:
        """Route requests for a model to a device too, on which it has been loaded.

        Args:
            group: shape group of the examples that it was warmed up with.
            costs: rows of a batch of those, and the microseconds that it took on a lane.
            padded: rows and length of batches, and the microseconds that they took on a lane, of a model whose batches
                are padded; None: they are not.
            safe_rows: see `limit_rows`. most_rows: see `bound_rows`. 0: no limit of that kind.
            widths: rows of a batch of those, and the microseconds that it took on one core and with a team.
            threads: of each batch; 0: chosen for each.
        """
        curve = self._costs.curve(device, model, group)
        width = self._routing.placement(self._devices[device], model).width
        for rows, micros in costs:
            curve.observe(rows, micros)
        if padded is not None:
            surfaces = self._routing.surfaces
            surfaces.add(device, model)
            surface = surfaces.find(device, model, group)
            assert surface is not None
            for rows, length, micros in padded:
                surface.observe(rows, length, micros)
        if width is not None:
            width.threads = threads
            for rows, narrow_us, wide_us in widths:
                width.seed(curve.mean(rows), narrow_us, wide_us)
        self._devices[device].models.add(model)
        if safe_rows:
            self.limit_rows(device, model, safe_rows)
        if most_rows:
            self.bound_rows(device, model, most_rows)

    def known_costs(self, model: str) -> dict[str, dict[int, float]]:
        """Costs of batches as learned so far: device -> rows -> microseconds on a lane of it."""
        return self._costs.points(model)

    def remove(self, model: str) -> None:
        """Route no more requests for a model to any device."""
        for device in self._devices.values():
            device.models.discard(model)

    def is_on(self, device: str, model: str) -> bool:
        """Whether requests for a model may be routed to a device."""
        return model in self._devices[device].models

    def outstanding(self, model: str) -> int:
        """Requests of a model that wait or run, on all devices, or are to come; a background batch of it counts as one.

        What is to come is what `hold` says.
        """
        load = self._routing.loads.get(model)
        return load.queued + load.running + load.held if load is not None else 0

    def hold(self, model: str) -> None:
        """Count a model as outstanding until it is released: requests for it will come, and are promised."""
        self._routing.load(model).held += 1

    def release(self, model: str) -> None:
        """Undo one `hold` of a model, which may have been forgotten meanwhile."""
        load = self._routing.loads.get(model)
        if load is not None and load.held:
            load.held -= 1

    def is_hung(self, model: str) -> bool:
        """Whether something of a model is outstanding, and all of that hangs."""
        load = self._routing.loads.get(model)
        return load is not None and 0 < load.hung == load.queued + load.running

    def forget(self, model: str) -> None:
        """Drop all that is kept about a model, its lane limit and its costs included, in case it comes back.

        To be called when the model is on no device and nothing of it is outstanding.
        """
        assert not self.outstanding(model)
        assert not any(model in device.models for device in self._devices.values())
        self._routing.loads.pop(model, None)
        for device in self._devices.values():
            device.placements.pop(model, None)
            device.queues = {key: queue for key, queue in device.queues.items() if key[0] != model}
        self._costs.forget(model)
        self._routing.surfaces.forget(model)

    def keep_off_caller(self, model: str) -> None:
        """Let no batch of a model run on the caller's thread. To be called before its first request."""
        self._routing.load(model).inline = False

    def set_lane_limit(self, model: str, lanes: int) -> None:
        """Limit the lanes of each device, the caller's thread included, that run a model at a time; 0: all may."""
        self._routing.load(model).max_lanes = lanes
        for device in self._devices.values():
            placement = device.placements.get(model)
            if placement is not None:
                device.release(placement)

    def limit_rows(self, device: str, model: str, rows: int) -> None:
        """Lower the row ceiling of a model on a device: a forward ran out of memory, and one of `rows` worked; 0: none.

        Requests with more rows are still taken, to be run in pieces (`Batch.max_rows`). The ceiling rises again as
        batches work, see `Placement.count_worked`.
        """
        self._routing.placement(self._devices[device], model).lower_ceiling(rows)

    def bound_rows(self, device: str, model: str, rows: int) -> None:
        """Set the row ceiling of a model on a device for good: a forward of more rows must never be tried there."""
        self._routing.placement(self._devices[device], model).bound_ceiling(rows)
