"""Places of key files: a user's, for clients, and a daemon's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tnxctl.protocol.errors import InvalidArgument, NotFound

SERVICE_DIRECTORY = Path("/etc/tensornext")
"""Directory of the installed service, with the files below."""

SERVER_KEY = "tnxd.key"
AUTHORIZED_KEYS = "authorized_keys.toml"
TOKENS = "tokens.toml"

PAIR_SUFFIX = ".key"
"""End of the name of a file with a secret."""


def user_directory() -> Path:
    """Directory of a user's keys and known hosts, which need not exist.

    That is tensornext in $XDG_CONFIG_HOME if it is set; else in %APPDATA% on Windows, ~/Library/Application Support
    on macOS, and ~/.config elsewhere.
    """
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    if os.path.isabs(configured):  # by the specification, a relative one counts for nothing
        return Path(configured) / "tensornext"
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or os.path.join(home, "AppData", "Roaming")) / "tensornext"
    if sys.platform == "darwin":
        return Path(home, "Library", "Application Support", "tensornext")
    return Path(home, ".config", "tensornext")


def known_hosts() -> Path:
    """The user's file of known hosts."""
    return user_directory() / "known_hosts.toml"


def pair_file(name: str) -> Path:
    """The file of a pair of the user's."""
    return user_directory() / "keys" / f"{name}{PAIR_SUFFIX}"


def pair_names() -> list[str]:
    """Names of the user's pairs, sorted."""
    try:
        found = os.listdir(user_directory() / "keys")
    except OSError:
        return []
    return sorted(name.removesuffix(PAIR_SUFFIX) for name in found if name.endswith(PAIR_SUFFIX))


def only_pair() -> str:
    """Name of the user's pair, if there is one alone.

    Raises:
        NotFound: there is none.
        InvalidArgument: there are several.
    """
    names = pair_names()
    if not names:
        raise NotFound(f"there is no pair of keys in {user_directory() / 'keys'}: tnxctl keys new NAME makes one")
    if len(names) > 1:
        raise InvalidArgument(f"which pair of keys shall it be: {', '.join(names)}?")
    return names[0]
