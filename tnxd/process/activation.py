"""Socket activation: listening sockets that a service manager holds, so that they outlive the daemon.

Protocol: https://www.freedesktop.org/software/systemd/man/latest/sd_listen_fds.html
"""

from __future__ import annotations

import os

NAME = "tnxd"
"""FileDescriptorName= in tensornext.socket."""

_FIRST = 3


def take_descriptors() -> list[int]:
    """The descriptors that the service manager has passed to this process under our name, if any.

    They are the caller's from then on, and no child process inherits one or takes them for its own. What has another
    name is somebody else's. A service manager that names none, such as inetd's heirs, means all of them.
    """
    pid, count, names = (os.environ.pop(f"LISTEN_{each}", "") for each in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or not count.isdigit():  # they may be a parent's
        return []
    descriptors = range(_FIRST, _FIRST + int(count))
    named = names.split(":") if names else []
    return [each for each in descriptors if not named or named[each - _FIRST : each - _FIRST + 1] == [NAME]]
