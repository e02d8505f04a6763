"""``python -m reparam_fused check``: see check."""

from __future__ import annotations

import argparse
import sys

from . import check


def main(argv: list[str] | None = None) -> int:
    """Run the command that argv names, and give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m reparam_fused")
    commands = parser.add_subparsers(dest="command", required=True)
    check.add_arguments(commands.add_parser("check", help=check.SUMMARY, description=check.SUMMARY))
    return check.run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
