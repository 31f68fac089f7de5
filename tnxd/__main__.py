"""`python -m tnxd`."""

from tnxd.cli import main

main(prog_name="tnxd")
