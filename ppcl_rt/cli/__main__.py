"""``python -m ppcl_rt.cli``: the program, for launchers that start modules."""

from ppcl_rt.cli.main import main

main()
