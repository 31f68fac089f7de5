"""A daemon on a pretended machine: `python daemon.py PLAN OPTION...`, options as for tnxd.

PLAN is a JSON object, made by `pretended.program`: what `pretended.pretended` takes, and `control`, the path of a
socket at which the daemon takes orders about its devices meanwhile; see `pretended.control`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    sys.path[0] = str(Path(__file__).parents[1])
    plan = json.loads(sys.argv.pop(1))
    control = plan.pop("control", "")
    from pretended.control import serve
    from pretended.installation import Installation

    installation = Installation(**plan)
    if control:
        serve(control, installation.machine)
    from tnxd.__main__ import main as daemon

    daemon()


if __name__ == "__main__":
    main()
