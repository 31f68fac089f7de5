"""The two ways out: one JSON document on standard output, or one sentence on standard error."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import click

from tnxctl.cli import exits, text
from tnxctl.protocol.errors import TensorNextError

if TYPE_CHECKING:
    from msgspec import Struct

    from tnxctl.protocol.wire import ModelInfo, TensorSpec

_AS_JSON = "tnxctl.json"  # key in click's context

# Errors of a write to a stream. Errors of a file with a name are a FileProblem long before.
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def choose_json(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    """Callback of the flag --json, given here or before the name of this command: errors become documents as well."""
    ctx.meta[_AS_JSON] = chosen = value or ctx.meta.get(_AS_JSON, False)
    return chosen


def write_json(document: Any) -> None:
    """The one document of a command. NaN and infinities become null, which is all that JSON has for them."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2))


def model_document(model: ModelInfo) -> dict[str, Any]:
    """A model for --json: its tensors by the names of their fields, not as the arrays that save bytes on the wire."""
    import msgspec

    return {
        **msgspec.to_builtins(model),
        "inputs": [_spec_document(spec) for spec in model.inputs],
        "outputs": [_spec_document(spec) for spec in model.outputs],
    }


def plain(struct: Struct) -> dict[str, Any]:
    """A struct for --json."""
    import msgspec

    document: dict[str, Any] = msgspec.to_builtins(struct)
    return document


def report_document(report: Struct) -> dict[str, Any]:
    """A report for --json, without what only the protocol needs."""
    document = plain(report)
    for frame_field in ("type", "v", "id"):
        del document[frame_field]
    return document


def _spec_document(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}


@contextmanager
def interruptible(ctx: click.Context) -> Iterator[None]:
    """Wait inside until a daemon has changed what it serves: Ctrl-C ends the waiting, and nothing else."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        click.echo(err=True)  # below the terminal's "^C"
        complain("interrupted; the daemon finishes what it has begun: tnxctl models shows how far it is")
        ctx.exit(exits.of_interrupt(interrupt))


def complain(sentence: str) -> None:
    """One sentence on standard error, if that takes it: the exit code says the rest."""
    try:
        click.echo(f"{click.style('Error:', fg='red')} {text.clean(sentence)}", err=True)
    except OSError:
        _silence(sys.stderr)


def check_writable() -> None:
    """Check that standard output takes anything, before any work is done for it.

    A write of no bytes tells of a full device and of a descriptor that is not open for writing. A disk that fills up
    later shows when it has.

    Raises:
        FileProblem: it does not.
    """
    try:
        os.write(sys.stdout.fileno(), b"")
    except (AttributeError, ValueError):  # none, closed or no file: no output is wanted
        pass
    except BrokenPipeError:
        raise  # the reader has enough: no problem of a file
    except OSError as error:
        raise _unwritable(error) from None


def lose(error: OSError) -> exits.Exit | None:
    """Report that standard output takes no more, if that is what the error is about. Returns the exit code then."""
    if error.errno not in _WRITE_ERRORS or error.filename is not None:
        return None
    _silence(sys.stdout)
    complain(str(_unwritable(error)))
    _silence(sys.stderr)
    return exits.Exit.FILE


def _unwritable(error: OSError) -> exits.FileProblem:
    return exits.FileProblem(f"cannot write standard output: {error.strerror or error}")


def _silence(stream: IO[str] | None) -> None:
    """Discard the rest of a stream's buffer: else Python tries to write it once more at its end, and complains."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]  # AttributeError: there is none
        os.close(nowhere)


def fail(ctx: click.Context, error: TensorNextError | exits.FileProblem) -> None:
    """Report the error that ends the command, and leave with its exit code."""
    code = exits.of_error(error)
    complain(str(error))
    if ctx.meta.get(_AS_JSON):
        kind = error.code if isinstance(error, TensorNextError) else "FILE"
        write_json({"error": {"code": kind, "message": str(error), "exit_code": code}})
    ctx.exit(code)
