"""Command `tnxd`, and `python -m tnxd`: installs signal handlers before it imports anything that takes long."""

from tnxd.process import signals


def main() -> None:
    """Run the daemon."""
    signals.prepare()
    from tnxd.cli import main as command

    command(prog_name="tnxd")


if __name__ == "__main__":
    main()
