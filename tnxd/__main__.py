"""The command `tnxd`, and `python -m tnxd`: signals have their meaning before anything that takes long to import."""

from tnxd.process import signals


def main() -> None:
    """Run the daemon."""
    signals.prepare()
    from tnxd.cli import main as command

    command(prog_name="tnxd")


if __name__ == "__main__":
    main()
