"""Work of an accelerator's lane: one thread issues batches, another one waits for their answers."""

from __future__ import annotations

import threading
from collections import deque
from queue import SimpleQueue

from tnxd.executors.accelerator_runner import AcceleratorRunner, Ticket
from tnxd.executors.execution import Execution
from tnxd.executors.lane import Inbox, OnDone, answer_defect, prepare_thread

_Landings = SimpleQueue[Ticket | threading.Event]
"""Batches to wait for, and signals to give once all before them are over."""


def work(runner: AcceleratorRunner, inbox: Inbox, on_done: OnDone, yields: bool, idles: bool) -> None:
    """Work of the thread that issues. It is at most `runner.depth` batches ahead of the answers."""
    broken = prepare_thread(runner, yields=yields, idles=idles)
    landings: _Landings = SimpleQueue()
    failed: deque[Ticket] = deque()
    name = f"{threading.current_thread().name}/answers"
    threading.Thread(target=_finish, args=(runner, landings, failed, inbox, on_done), name=name, daemon=True).start()
    while True:
        task = inbox.get()
        if isinstance(task, Execution):
            task.fatal = broken
            _issue(runner, task, landings, on_done)
        elif isinstance(task, str):
            runner.forget(task)
        elif task is not None:  # a function: it finds the lane with nothing under way
            over = threading.Event()
            landings.put(over)
            over.wait()
            _recover(runner, failed, on_done)
            task.run(runner, broken)
        del task  # hold no request's memory while waiting for the next
        _recover(runner, failed, on_done)


def _issue(runner: AcceleratorRunner, execution: Execution, landings: _Landings, on_done: OnDone) -> None:
    try:
        ticket = runner.issue(execution)
    except BaseException as error:
        answer_defect(execution, error)
        on_done(execution)
        return
    if ticket.flight is None:
        on_done(execution)
    else:
        landings.put(ticket)


def _recover(runner: AcceleratorRunner, failed: deque[Ticket], on_done: OnDone) -> None:
    while failed:
        ticket = failed.popleft()
        try:
            runner.recover(ticket)
        except BaseException as error:
            answer_defect(ticket.execution, error)
        on_done(ticket.execution)


def _finish(
    runner: AcceleratorRunner, landings: _Landings, failed: deque[Ticket], inbox: Inbox, on_done: OnDone
) -> None:
    """Work of the thread that waits. What it cannot finish goes back to the one that issues."""
    while True:
        task = landings.get()
        if isinstance(task, threading.Event):
            task.set()
            continue
        try:
            over = runner.finish(task)
        except BaseException as error:
            answer_defect(task.execution, error)
            over = True
        if over:
            on_done(task.execution)
        else:
            failed.append(task)
            inbox.put(None)
        del task
