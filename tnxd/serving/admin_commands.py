"""Admin commands: what clients ask to be done. The reconciler changes the models, the recorder records."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial

from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.wire import Load, Record, RecordingReport, Reload, Route, StopRecording, Unload
from tnxd.deployment.reconciler import Changes, Reconciler
from tnxd.recording.recorder import Recorder
from tnxd.serving.reports import stopped
from tnxd.transport.client_limits import Admission
from tnxd.transport.router import Message

AdminCommand = Load | Unload | Route | Reload | Record | StopRecording

Outcome = Changes | RecordingReport | str | TensorNextError
"""The changes by a reload; a recording; the name of the model that any other command was about; or why it failed."""


@dataclass(frozen=True)
class CommandDone:
    """A command that has been carried out, or has failed.

    Attributes:
        message: brought it. id: of its request.
    """

    message: Message
    id: int
    outcome: Outcome


class AdminCommands:
    """Commands of all clients, until they are done.

    Args:
        admission: limits how many commands of a client may wait.

    Attributes:
        done: commands that are to be answered, the first done first. The caller takes them out.
    """

    def __init__(self, reconciler: Reconciler, recorder: Recorder, admission: Admission) -> None:
        self.done: deque[CommandDone] = deque()
        self._reconciler = reconciler
        self._recorder = recorder
        self._admission = admission
        self._waiting: dict[int, tuple[Message, int]] = {}
        self._serial = 0

    def take(self, message: Message, command: AdminCommand) -> None:
        """Have a command carried out. It is in `done` now or later.

        Raises:
            ResourceExhausted: too many commands of this client wait.
            TensorNextError: traffic cannot be split so, see `check_weights`; or nothing can be recorded so.
        """
        if isinstance(command, Route):
            self._reconciler.route(command.model, command.weights, command.shadow)
            self.done.append(CommandDone(message, command.id, command.model))
            return
        self._admission.take_command(message.connection)
        self._serial += 1
        self._waiting[self._serial] = message, command.id
        done = partial(self._carried_out, self._serial)
        if isinstance(command, (Record, StopRecording)):
            try:
                if isinstance(command, Record):
                    self._recorder.start(command, done)
                else:
                    self._recorder.stop(done)
            except TensorNextError as error:
                done(error)
        elif isinstance(command, Reload):
            self._reconciler.reload(done)
        elif isinstance(command, Load):
            self._reconciler.load(command.model, done)
        else:
            self._reconciler.unload(command.model, done)

    def _carried_out(self, serial: int, outcome: Outcome) -> None:
        if serial not in self._waiting:  # abandoned, and answered
            return
        message, id_ = self._waiting.pop(serial)
        self._admission.release_command(message.connection)
        self.done.append(CommandDone(message, id_, outcome))

    def abandon(self) -> None:
        """Fail what will not be carried out any more."""
        for message, id_ in self._waiting.values():
            self.done.append(CommandDone(message, id_, stopped("this")))
        self._waiting.clear()
