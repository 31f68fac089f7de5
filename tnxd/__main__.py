"""Command `tnxd`, and `python -m tnxd`: settles signals and memory before it imports anything that takes long."""

from tnxctl import malloc
from tnxd.process import signals


def main() -> None:
    """Run the daemon."""
    signals.prepare()
    malloc.keep_freed()
    from tnxd.cli import main as command

    command(prog_name="tnxd")


if __name__ == "__main__":
    main()
