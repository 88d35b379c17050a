"""The command line ``egrsd``, also ``python -m egrsd_kernels``; each subcommand is a module here."""

import argparse
import sys
from collections.abc import Sequence

from egrsd_kernels import __version__

from . import inspect, sweep, train
from .command import CommandError

COMMANDS = (train, sweep, inspect)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; parsed arguments carry the one to call as ``run``."""
    parser = argparse.ArgumentParser(prog="egrsd", description="Entropy-guided reinforced self-distillation.")
    parser.add_argument("--version", action="version", version=f"egrsd {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 after one line on stderr about bad input."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and "overrides" not in args:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = rest
    try:
        args.run(args)
    except CommandError as error:
        print("egrsd: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0
