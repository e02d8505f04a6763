"""``python -m reparam_fused check`` and ``bench``: see the packages of these names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from . import bench, check

COMMANDS = {"check": check, "bench": bench}


def main(argv: list[str] | None = None) -> int:
    """Run the command that argv names, and give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m reparam_fused")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.SUMMARY, description=command.SUMMARY)
        command.add_arguments(added)
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = COMMANDS[arguments.command].run
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
