"""`tnxctl keys`: pairs of keys, whom a daemon lets in, and which daemon this user believes. No daemon is asked."""

from __future__ import annotations

import contextlib
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from tnxctl.cli import exits, output, text
from tnxctl.cli.groups import Group
from tnxctl.cli.options import DEFAULT_TIMEOUT_S, as_json, host
from tnxctl.protocol.errors import InvalidArgument, TensorNextError

_Command = TypeVar("_Command", bound=Callable[..., Any])

# As in tnxctl.protocol.roles and tnxctl.keys.places, whose import would make `tnxctl --help` slow; a test compares.
ROLES = ("observe", "predict", "admin")
SERVICE_DIRECTORY = "/etc/tensornext"


@click.group("keys", cls=Group, short_help="Make keys, let clients in by them, and trust daemons.")
def command() -> None:
    """Make keys and hand them over. A daemon that listens on more than its own host asks each client for one.

    \b
    Once, on the client's host:
      tnxctl keys new alice                        prints a line for the daemon's host
    On the daemon's host, with the line:
      sudo tnxctl keys allow 'tnx-client alice KEY' --role predict
      sudo tnxctl keys server                      prints a line for clients
    On the client's host, with that one:
      tnxctl keys trust gpu-box 'tnx-server gpu-box KEY'
      tnxctl predict --host gpu-box

    The lines are no secrets, but see that they arrive unchanged: who could put a key of his own into one would be let
    in, or believed. In a shell they need single quotes; - in place of a line reads it from standard input. From then
    on every command and every tnxctl.Client finds both keys by the host, spelt as it was trusted, and takes nothing
    else for it: neither another key nor none.
    """


def _directory(command: _Command) -> _Command:
    return click.option(
        "--directory",
        type=click.Path(file_okay=False, path_type=Path),
        default=SERVICE_DIRECTORY,
        show_default=True,
        help="Where the files are: tnxd.key, authorized_keys.toml, and tokens.toml of the bridge.",
    )(command)


@command.command("new", short_help="Make a pair of keys for this user.")
@click.argument("name")
@as_json
def new(name: str, as_json: bool) -> None:
    """Make a pair of keys called NAME, and print its public line for tnxctl keys allow.

    NAME is what the daemon will know the client by: a letter, then up to 63 letters, digits and . _ @ -. The secret
    goes into a file that this user alone can read.

    \b
    Examples:
      tnxctl keys new alice
      tnxctl keys new ci@build-7 | ssh gpu-box sudo tnxctl keys allow - --role predict
    """
    from tnxctl.keys import pairs, places

    pair = pairs.new(name)
    path = places.pair_file(name)
    with _writing(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        pairs.write(path, pair)
    line = pairs.client_line(pair)
    if as_json:
        output.write_json({"name": name, "public_key": pair.public, "line": line, "path": str(path)})
        return
    _hint(f"The secret is in {path}. On the daemon's host:", f"  sudo tnxctl keys allow '{line}' --role predict")
    click.echo(line)


@command.command("allow", short_help="Let a client in, on the daemon's host.")
@click.argument("line", nargs=-1, required=True)
@click.option(
    "--role",
    type=click.Choice(ROLES),
    default="predict",
    show_default=True,
    help="observe: health, models and metadata; predict: also predictions; admin: also all that changes the daemon.",
)
@_directory
@as_json
def allow(line: tuple[str, ...], role: Any, directory: Path, as_json: bool) -> None:
    """Let the client in whose public LINE this is, as tnxctl keys new printed it.

    It is added to authorized_keys.toml, where its limits can be set as well. A daemon that runs reads the file again at
    systemctl reload tensornext, or tnxctl reload.

    \b
    Examples:
      sudo tnxctl keys allow 'tnx-client alice rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7'
      sudo tnxctl keys allow - --role admin < line
    """
    from tnxctl.keys import authorized, places

    path = directory / places.AUTHORIZED_KEYS
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        added = authorized.allow(path, _line(line), role)
    if as_json:
        output.write_json({"path": str(path), **_authorized_document(added)})
        return
    click.echo(f"{added.name} has the role {added.role}, by {path}")
    _hint("A daemon that runs takes it at: systemctl reload tensornext, or tnxctl reload")


@command.command("revoke", short_help="Let a client in no more, on the daemon's host.")
@click.argument("name")
@_directory
@as_json
def revoke(name: str, directory: Path, as_json: bool) -> None:
    """Take the client NAME off authorized_keys.toml.

    At systemctl reload tensornext, or tnxctl reload, a daemon that runs ends its connections and lets it in no more.

    \b
    Example:
      sudo tnxctl keys revoke alice && sudo systemctl reload tensornext
    """
    from tnxctl.keys import authorized, places

    path = directory / places.AUTHORIZED_KEYS
    if not path.exists():
        raise InvalidArgument(f"{path}: there is no such file, so nobody is let in by a key")
    with _writing(path):
        gone = authorized.revoke(path, name)
    if as_json:
        output.write_json({"path": str(path), **_authorized_document(gone)})
        return
    click.echo(f"{gone.name} is gone from {path}")
    _hint("A daemon that runs cuts it off at: systemctl reload tensornext, or tnxctl reload")


@command.command("token", short_help="Make a bearer token for a client of the bridge, on its host.")
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(ROLES),
    default="predict",
    show_default=True,
    help="What it lets do, as of a key.",
)
@_directory
@as_json
def token(name: str, role: Any, directory: Path, as_json: bool) -> None:
    """Make a token for the client NAME of tnxctl bridge, and print it.

    Whoever has it is taken for NAME. It is shown this once: tokens.toml has its hash alone. A bridge that runs with
    --tokens reads the file again at SIGHUP, or systemctl reload tensornext-http.

    \b
    Examples:
      sudo tnxctl keys token alice
      curl -H "Authorization: Bearer $TOKEN" https://gpu-box:8443/health
    """
    from tnxctl.keys import places, tokens

    path = directory / places.TOKENS
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = tokens.add(path, name, role)
    if as_json:
        output.write_json({"name": name, "role": role, "token": made, "path": str(path)})
        return
    _hint(f"{name} has the role {role} at tnxctl bridge --tokens {path}, with this token:")
    click.echo(made)


@command.command("untoken", short_help="Let a token do nothing more, on the bridge's host.")
@click.argument("name")
@_directory
@as_json
def untoken(name: str, directory: Path, as_json: bool) -> None:
    """Take the token of the client NAME off tokens.toml.

    A bridge that runs takes it no more after SIGHUP, or systemctl reload tensornext-http.

    \b
    Example:
      sudo tnxctl keys untoken alice && sudo systemctl reload tensornext-http
    """
    from tnxctl.keys import places, tokens

    path = directory / places.TOKENS
    if not path.exists():
        raise InvalidArgument(f"{path}: there is no such file, so nobody has a token")
    with _writing(path):
        gone = tokens.remove(path, name)
    if as_json:
        output.write_json({"path": str(path), "name": gone.name, "role": gone.role})
        return
    click.echo(f"{gone.name} is gone from {path}")
    _hint("A bridge that runs takes the token no more after: systemctl reload tensornext-http")


@command.command("server", short_help="Show the daemon's own key, on its host; make one if there is none.")
@_directory
@as_json
def server(directory: Path, as_json: bool) -> None:
    """Print the public line of the daemon on this host, for tnxctl keys trust; make its pair of keys if there is none.

    The secret is in tnxd.key, which its owner alone can read. To give the daemon a new key, remove that file first:
    every client has to trust the new one then.

    \b
    Example:
      sudo tnxctl keys server
    """
    from tnxctl.keys import pairs, places

    path = directory / places.SERVER_KEY
    with _writing(path):
        is_new = not path.exists()
        if is_new:
            path.parent.mkdir(parents=True, exist_ok=True)
            pairs.write(path, pairs.new(_host_name()))
    pair = pairs.read(path)
    line = pairs.server_line(pair)
    if as_json:
        output.write_json({"name": pair.name, "public_key": pair.public, "line": line, "path": str(path)})
        return
    if is_new:
        _hint(f"A new pair is in {path}.")
    _hint("On a client's host:", f"  tnxctl keys trust HOST '{line}'")
    click.echo(line)


@command.command("trust", short_help="Believe a daemon by its key, on the client's host.")
@click.argument("host")
@click.argument("line", nargs=-1, required=True)
@click.option("--pair", metavar="NAME", help="Pair of this user's to show to it.  [default: the only one]")
@click.option("--replace", is_flag=True, help="Take the place of another key that is known for HOST.")
@as_json
def trust(host: str, line: tuple[str, ...], pair: str | None, replace: bool, as_json: bool) -> None:
    """Believe the daemon at HOST by the public LINE that tnxctl keys server printed there.

    HOST is what --host takes, and is to be spelt so from then on: a host is known by one name at a time, and by its
    port.

    \b
    Examples:
      tnxctl keys trust gpu-box 'tnx-server gpu-box Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID'
      ssh gpu-box sudo tnxctl keys server | tnxctl keys trust 192.168.1.100:5555 -
    """
    from tnxctl.endpoint import parse_endpoint
    from tnxctl.keys import known_hosts, pairs, places

    endpoint = parse_endpoint(host)
    path = places.known_hosts()
    shown = pairs.read(places.pair_file(places.only_pair() if pair is None else pair))
    with _writing(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = known_hosts.trust(path, endpoint, _line(line), shown.name, replace=replace)
    if as_json:
        output.write_json({"path": str(path), "endpoint": endpoint, **known._asdict()})
        return
    click.echo(f"{endpoint} is known by its key, and is shown that of {known.pair}, by {path}")


@command.command("forget", short_help="Forget the key of a daemon, on the client's host.")
@click.argument("host")
@as_json
def forget(host: str, as_json: bool) -> None:
    """Forget the key of the daemon at HOST. From then on no keys are used with it.

    \b
    Example:
      tnxctl keys forget gpu-box
    """
    from tnxctl.endpoint import parse_endpoint
    from tnxctl.keys import known_hosts, places

    endpoint = parse_endpoint(host)
    path = places.known_hosts()
    with _writing(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        known_hosts.forget(path, endpoint)
    if as_json:
        output.write_json({"path": str(path), "endpoint": endpoint})
        return
    click.echo(f"{endpoint} is gone from {path}")


@command.command("list", short_help="List pairs, daemons that are known, and whom the daemon here lets in.")
@host()
@_directory
@as_json
@click.pass_context
def list_(ctx: click.Context, endpoint: str | None, directory: Path, as_json: bool) -> None:
    """List this user's pairs, the daemons that this user knows, and whom the daemon on this host lets in.

    A file with a mistake is told of, and the others are listed; the exit code is 5 then. With --host: ask the daemon
    there whom it lets in, and who of them is connected. For the role admin.

    \b
    Examples:
      tnxctl keys list
      tnxctl keys list --host gpu-box
      tnxctl keys list --json | jq -r '.authorized[] | select(.role == "admin").name'
    """
    if endpoint is not None:
        _list_remote(endpoint, as_json)
        return
    from tnxctl.keys import authorized, known_hosts, pairs, places, tokens

    mistakes: list[TensorNextError] = []
    own = [pair for name in places.pair_names() for pair in _tried(mistakes, pairs.read, places.pair_file(name))]
    hosts = {
        endpoint: host
        for known in _tried(mistakes, known_hosts.read, places.known_hosts())
        for endpoint, host in known.items()
    }
    path = directory / places.AUTHORIZED_KEYS
    found = _tried(mistakes, authorized.read, path) if path.exists() else ()
    listed = [each for keys in found for each in keys.values()]
    at_bridge = directory / places.TOKENS
    known_tokens = _tried(mistakes, tokens.read, at_bridge) if at_bridge.exists() else ()
    bearers = [each for several in known_tokens for each in several.values()]
    if as_json:
        output.write_json(
            {
                "pairs": [{"name": pair.name, "public_key": pair.public} for pair in own],
                "known_hosts": [{"endpoint": endpoint, **host._asdict()} for endpoint, host in hosts.items()],
                "authorized": [_authorized_document(each) for each in listed],
                "tokens": [{"name": each.name, "role": each.role} for each in bearers],
            }
        )
    else:
        rows: list[tuple[str, ...]] = [(pair.name, pair.public) for pair in own]
        _section(f"Pairs of this user, in {places.user_directory() / 'keys'}", ("NAME", "PUBLIC KEY"), rows)
        rows = [(endpoint, host.pair, host.server_key) for endpoint, host in hosts.items()]
        _section(f"Daemons known, in {places.known_hosts()}", ("ENDPOINT", "PAIR", "KEY OF THE DAEMON"), rows)
        rows = [(each.name, each.role, each.key) for each in listed]
        _section(f"Let in by the daemon here, in {path}", ("NAME", "ROLE", "PUBLIC KEY"), rows)
        rows = [(each.name, each.role) for each in bearers]
        _section(f"Tokens of tnxctl bridge, in {at_bridge}", ("NAME", "ROLE"), rows)
        if not (own or hosts or listed or bearers or mistakes):
            click.echo("There are no keys.")
    for mistake in mistakes:
        output.complain(str(mistake))
    ctx.exit(exits.of_error(mistakes[0]) if mistakes else exits.Exit.OK)


def _list_remote(endpoint: str, as_json: bool) -> None:
    """List whom the daemon at an endpoint lets in."""
    from tnxctl.client import Client

    with Client(endpoint, timeout=DEFAULT_TIMEOUT_S) as client:
        report = client.keys()
    if as_json:
        output.write_json({"endpoint": endpoint, **output.report_document(report)})
        return
    rows = [(info.name, info.role, str(info.connections), info.key) for info in report.keys]
    _section(f"Let in by {endpoint}", ("NAME", "ROLE", "CONNECTIONS", "PUBLIC KEY"), rows)
    if report.total > len(rows):
        click.echo(f"and {report.total - len(rows)} more")
    elif not rows:
        click.echo("It lets nobody in by a key.")


_Found = TypeVar("_Found")


def _tried(mistakes: list[TensorNextError], read: Callable[[Path], _Found], path: Path) -> tuple[_Found, ...]:
    """Contents of a file, if it can be read; else its mistake is noted."""
    try:
        return (read(path),)
    except TensorNextError as error:
        mistakes.append(error)
        return ()


def _section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, if it has rows."""
    if rows:
        click.echo("\n".join((text.clean(title), *text.table(header, rows, "<" * len(header), None), "")))


def _authorized_document(key: Any) -> dict[str, Any]:
    """An authorized key for --json."""
    document: dict[str, Any] = key._asdict()
    return document


def _line(words: Sequence[str]) -> str:
    """A line of a key from the words of the command line, or from standard input."""
    return sys.stdin.readline(4096) if list(words) == ["-"] else " ".join(words)


def _hint(*sentences: str) -> None:
    """Say what to do next, on standard error: standard output has the line alone."""
    with contextlib.suppress(OSError):
        for sentence in sentences:
            click.echo(sentence, err=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the system says about a file into a sentence that names it."""
    try:
        yield
    except FileExistsError as error:
        raise exits.FileProblem(
            f"{error.filename} is there already, and a secret is never replaced: take another name, or remove it"
        ) from None
    except OSError as error:
        raise exits.FileProblem(f"cannot write {path}: {error.strerror or error}") from None


def _host_name() -> str:
    """Name of this host as one of a key."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", platform.node())[:63]
    return name if name[:1].isalpha() else f"h{name}"
