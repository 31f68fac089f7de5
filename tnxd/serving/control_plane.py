"""Control plane: answers to requests about the daemon and its models, and the admin commands among them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from tnxctl.protocol.errors import PermissionDenied, TensorNextError
from tnxctl.protocol.wire import Compare, Health, Metadata, Models, Reply
from tnxd.deployment.reconciler import Changes, Reconciler
from tnxd.deployment.shadow import Shadows
from tnxd.deployment.version import READY
from tnxd.scheduling.scheduler import Scheduler
from tnxd.serving import reports
from tnxd.serving.admin_commands import AdminCommand, AdminCommands, CommandDone
from tnxd.serving.reports import Inventory
from tnxd.serving.telemetry import Telemetry
from tnxd.transport.client_limits import Admission
from tnxd.transport.router import Message, Router

ControlRequest = Health | Metadata | Models | Compare | AdminCommand
"""A request about the daemon and its models."""


class ControlPlane:
    """Answers to requests about the daemon and its models.

    Args:
        remote_control: which clients may change what is served: "local", "any" or "off".
        message_bytes: most bytes of the tensors of a message, as health tells it.

    Attributes:
        commands_done: admin commands that wait to be answered, see `answers`.
    """

    def __init__(
        self,
        inventory: Inventory,
        scheduler: Scheduler,
        reconciler: Reconciler,
        shadows: Shadows,
        telemetry: Telemetry,
        router: Router,
        admission: Admission,
        *,
        remote_control: str,
        message_bytes: int,
    ) -> None:
        self._inventory = inventory
        self._scheduler = scheduler
        self._shadows = shadows
        self._telemetry = telemetry
        self._router = router
        self._admission = admission
        self._remote_control = remote_control
        self._message_bytes = message_bytes
        self._commands = AdminCommands(reconciler, admission)
        self.commands_done: deque[CommandDone] = self._commands.done

    def answer(self, message: Message, request: ControlRequest, state: str) -> Reply | None:
        """The answer to a request, in that state of the daemon; None if it comes later, among `answers`.

        Raises:
            PermissionDenied: this client may not change what is served.
            Unavailable: the daemon is not ready.
            TensorNextError: whatever is wrong with the request.
        """
        inventory, scheduler = self._inventory, self._scheduler
        if isinstance(request, Health):
            return reports.health(
                request,
                state,
                inventory,
                scheduler,
                self._telemetry,
                self._router.undeliverable,
                self._message_bytes,
                self._admission,
            )
        if isinstance(request, Metadata):
            return reports.metadata(request, state, inventory, scheduler)
        if isinstance(request, Models):
            return reports.models(request.id, "", inventory, scheduler)
        if isinstance(request, Compare):
            return reports.comparison(request, state, inventory, self._shadows)
        self._check_permission(message)
        if state != READY:
            raise reports.unavailable(state)
        self._commands.take(message, request)
        return None

    def _check_permission(self, message: Message) -> None:
        if self._remote_control == "off":
            raise PermissionDenied('this daemon takes no orders about its models: remote_control is "off"')
        client = message.connection.client
        if self._remote_control == "local" and not client.local:
            raise PermissionDenied(
                f"this daemon takes orders about its models from its own host alone, not from {client.name}: "
                'remote_control is "local"'
            )

    def answers(self) -> Iterator[tuple[Message, int, Reply | TensorNextError]]:
        """The answers to admin commands that are done: the message that each came in, its id, and what came of it."""
        while self.commands_done:
            command = self.commands_done.popleft()
            outcome = command.outcome
            if isinstance(outcome, TensorNextError):
                yield command.message, command.id, outcome
            elif isinstance(outcome, Changes):
                yield command.message, command.id, reports.reload_report(command.id, outcome)
            else:
                yield command.message, command.id, reports.models(command.id, outcome, self._inventory, self._scheduler)

    def abandon(self) -> None:
        """Fail the admin commands that will not be carried out any more."""
        self._commands.abandon()
