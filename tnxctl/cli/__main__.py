from tnxctl.cli import main

main(prog_name="tnxctl")
