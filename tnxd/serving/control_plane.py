"""Control plane: answers to requests about the daemon and its models, and the admin commands among them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator

import msgspec

from tnxctl.protocol.errors import InvalidArgument, TensorNextError
from tnxctl.protocol.wire import (
    VERSION,
    Clients,
    Compare,
    Explain,
    Health,
    Keys,
    Kick,
    Metadata,
    Models,
    Record,
    Recording,
    RecordingReport,
    Reload,
    Reply,
    Share,
    Shared,
    Stats,
    WhoAmI,
)
from tnxd.deployment.reconciler import Changes, Reconciler
from tnxd.deployment.shadow import Shadows
from tnxd.deployment.version import READY
from tnxd.events import event
from tnxd.recording.recorder import Recorder
from tnxd.scheduling.scheduler import Scheduler
from tnxd.serving import client_reports, permissions, reports
from tnxd.serving.admin_commands import AdminCommand, AdminCommands, CommandDone
from tnxd.serving.reports import Inventory
from tnxd.serving.statistics import Statistics
from tnxd.serving.telemetry import Telemetry
from tnxd.tracing.notes import Notes
from tnxd.transport.access import Access
from tnxd.transport.client_limits import Admission
from tnxd.transport.router import Message, Router

log = logging.getLogger(__name__)

ControlRequest = (
    Health
    | Metadata
    | Models
    | Compare
    | WhoAmI
    | Clients
    | Kick
    | Keys
    | Stats
    | Explain
    | Recording
    | Share
    | AdminCommand
)
"""A request about the daemon, its models or its clients, or for memory to share."""


class ControlPlane:
    """Answers to requests about the daemon and its models.

    Args:
        access: who may ask for what.
        message_bytes: most bytes of the tensors of a message, as health tells it.
        notes: of sampled requests, if there are any.

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
        recorder: Recorder,
        *,
        access: Access,
        message_bytes: int,
        notes: Notes | None = None,
    ) -> None:
        self._inventory = inventory
        self._scheduler = scheduler
        self._shadows = shadows
        self._telemetry = telemetry
        self._router = router
        self._admission = admission
        self._access = access
        self._key_failures: dict[str, str] = {}
        self._message_bytes = message_bytes
        self._recorder = recorder
        self._statistics = Statistics(inventory, scheduler, telemetry, admission, lambda: router.undeliverable, notes)
        self._commands = AdminCommands(reconciler, recorder, admission)
        self.commands_done: deque[CommandDone] = self._commands.done

    def answer(self, message: Message, request: ControlRequest, state: str) -> Reply | None:
        """The answer to a request, in that state of the daemon; None if it comes later, among `answers`.

        Raises:
            PermissionDenied: the role of this client is not enough.
            Unavailable: the daemon is not ready.
            TensorNextError: whatever is wrong with the request.
        """
        inventory, scheduler, connection = self._inventory, self._scheduler, message.connection
        permissions.check(connection, request, self._access)
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
        if isinstance(request, WhoAmI):
            return client_reports.identity(request, connection)
        if isinstance(request, Clients):
            return client_reports.clients(request, self._router, self._admission)
        if isinstance(request, Kick):
            return client_reports.kick(request, self._router, connection)
        if isinstance(request, Keys):
            return client_reports.keys(request, self._access, self._admission, self._router.connections())
        if isinstance(request, Stats):
            return self._statistics.stats(request, state, connection)
        if isinstance(request, Explain):
            return self._statistics.explain(request, connection)
        if isinstance(request, Share):
            nbytes = self._router.share(connection, request.address, request.token)
            return Shared(v=VERSION, id=request.id, nbytes=nbytes)
        if isinstance(request, Recording):
            return self._recorder.report(request.id)
        if state != READY:
            raise reports.unavailable(state)
        if isinstance(request, Record) and request.model:
            inventory.registry.describe(request.model)  # or else a misspelt name would be waited for
        if isinstance(request, Reload):
            self.reload_keys()
        self._commands.take(message, request)
        return None

    def reload_keys(self) -> None:
        """Read the authorized keys again. What has changed counts at once; a file with a mistake changes nothing."""
        ring = self._access.ring
        if ring is None:
            return
        try:
            ring.reload()
        except InvalidArgument as error:
            about = event("keys_rejected", file=str(ring.path), reason=error.message)
            log.error("the keys stay as they were: %s", error.message, extra=about)
            self._key_failures = {str(ring.path): error.message}
            return
        self._key_failures = {}
        self._router.reauthorize()

    def answers(self) -> Iterator[tuple[Message, int, Reply | TensorNextError]]:
        """The answers to admin commands that are done: the message that each came in, its id, and what came of it."""
        while self.commands_done:
            command = self.commands_done.popleft()
            outcome = command.outcome
            if isinstance(outcome, TensorNextError):
                yield command.message, command.id, outcome
            elif isinstance(outcome, RecordingReport):
                yield command.message, command.id, msgspec.structs.replace(outcome, id=command.id)
            elif isinstance(outcome, Changes):
                yield command.message, command.id, reports.reload_report(command.id, outcome, self._key_failures)
            else:
                yield command.message, command.id, reports.models(command.id, outcome, self._inventory, self._scheduler)

    def abandon(self) -> None:
        """Fail the admin commands that will not be carried out any more."""
        self._commands.abandon()
