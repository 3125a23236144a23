"""Prints what makes a shell complete recipes, machines and paths of configs."""

import argparse
from collections.abc import Sequence

from axlearn.cli._completion_scripts import SCRIPTS, how_to
from axlearn.cli._completion_words import candidates

_DESCRIPTION = f"""{__doc__}

Once and for all:

{how_to()}

What recipes there are is found out at the first press of TAB, which takes a second or two, and again whenever a file
of the package or of the recipe's module has changed; the answers are kept in $AXLEARN_CACHE_DIR."""


def main(argv: Sequence[str]) -> int:
    """Runs the verb.

    Args:
        argv: The arguments behind the verb.

    Returns:
        The exit status, 0.
    """
    parser = argparse.ArgumentParser(
        prog="axlearn completion",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=[*SCRIPTS, "words"], metavar="SHELL", help="bash, zsh or fish")
    parser.add_argument("line", nargs="?", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.shell == "words":
        # What the scripts ask, each time that somebody presses TAB.
        print("\n".join(candidates(args.line)))
    else:
        print(SCRIPTS[args.shell], end="")
    return 0
