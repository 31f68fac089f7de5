"""Orders about the models, from clients: carried out by the loader one after the other, answered when done."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tnxctl.protocol.errors import TensorNextError, Unavailable
from tnxctl.protocol.wire import Load, ModelsReport, Reload, Reply, Route, Unload
from tnxd.deployment.loader import Changes, Loader
from tnxd.serving import reports as control
from tnxd.transport.admission import Admission
from tnxd.transport.router import Message

Order = Load | Unload | Route | Reload


class Orders:
    """Orders of all clients, until they are answered.

    Args:
        admission: says whose orders may wait.
        report: makes the answer with a request's id about the models of one name.
        answer: sends an answer, or an error, to the sender of a message, with the id of its request.
    """

    def __init__(
        self,
        loader: Loader,
        admission: Admission,
        report: Callable[[int, str], ModelsReport],
        answer: Callable[[Message, int, Reply | TensorNextError], None],
    ) -> None:
        self._loader = loader
        self._admission = admission
        self._report = report
        self._answer = answer
        self._waiting: dict[int, tuple[Message, int]] = {}
        self._serial = 0

    def take(self, message: Message, order: Order) -> None:
        """Have an order carried out; it is answered now or later.

        Raises:
            ResourceExhausted: too many orders of this client wait.
            TensorNextError: it cannot be carried out.
        """
        if isinstance(order, Route):
            self._loader.route(order.model, order.weights, order.shadow)
            self._answer(message, order.id, self._report(order.id, order.model))
            return
        self._admission.take_order(message.connection)
        self._serial += 1
        self._waiting[self._serial] = message, order.id
        done = partial(self._carried_out, self._serial)
        if isinstance(order, Reload):
            self._loader.reload(done)
        elif isinstance(order, Load):
            self._loader.load(order.model, done)
        else:
            self._loader.unload(order.model, done)

    def _carried_out(self, serial: int, outcome: Changes | str | TensorNextError) -> None:
        message, id_ = self._waiting.pop(serial)
        self._admission.release_order(message.connection)
        if isinstance(outcome, TensorNextError):
            self._answer(message, id_, outcome)
        elif isinstance(outcome, Changes):
            self._answer(message, id_, control.reload_report(id_, outcome))
        else:
            self._answer(message, id_, self._report(id_, outcome))

    def abandon(self) -> None:
        """Answer what will not be carried out any more."""
        for message, id_ in self._waiting.values():
            self._answer(message, id_, Unavailable("the daemon stopped before this was done"))
        self._waiting.clear()
