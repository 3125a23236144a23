"""The `axlearn` command: finds the verb's file and runs it; `axlearn --help` loads no jax and no numpy.

A verb is a public module in this folder with a function `main(argv: Sequence[str]) -> int` that returns the
exit status. The first line of its docstring is its line in the help. An error that a user can act on (see
`axlearn.common.user_errors`) becomes a short message: status 1 for a RuntimeError, which is what went wrong while
running, and 2 for all others, which are mistakes in what was given. Anything else keeps its traceback.
"""

import ast
import difflib
import importlib
import os
import pathlib
import sys
from collections.abc import Sequence

from axlearn.common.user_errors import TRACEBACK_VARIABLE, error_text, is_for_users

# What the shell's own conventions and argparse use for a command line that makes no sense.
BAD_INPUT_STATUS = 2
FAILED_STATUS = 1
# The shell's status of a process ended by SIGINT: 128 + 2.
INTERRUPTED_STATUS = 130
# Likewise by SIGPIPE: 128 + 13.
BROKEN_PIPE_STATUS = 141


def verb_summaries() -> dict[str, str]:
    """Returns the verbs in alphabetical order with the first line of their docstrings; imports none."""
    summaries = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        if path.stem == "main" or path.stem.startswith("_"):
            continue
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        summaries[path.stem] = docstring.partition("\n")[0]
    return summaries


def usage() -> str:
    """Returns the text of `axlearn --help`."""
    verbs = verb_summaries()
    width = max(map(len, verbs), default=0)
    lines = [f"  {verb:<{width}}  {summary}" for verb, summary in verbs.items()]
    return "\n".join(
        [
            "usage: axlearn VERB [ARGUMENTS]",
            "",
            *lines,
            "",
            "`axlearn VERB --help` says more about a verb. Training is started by",
            "`python -m axlearn.common.launch_trainer_main --config=NAME`.",
            f"{TRACEBACK_VARIABLE}=1 in the environment shows where an error was raised.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Args:
        argv: The arguments after `axlearn`; None: those of this process.

    Returns:
        The exit status: what the verb says, 2 for bad input, 1 for a failure, 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else BAD_INPUT_STATUS
    verb = arguments[0]
    verbs = verb_summaries()
    if verb not in verbs:
        nearest = difflib.get_close_matches(verb, verbs, n=1)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        print(f"axlearn: unknown verb '{verb}'.{hint} Verbs: {', '.join(verbs)}.", file=sys.stderr)
        return BAD_INPUT_STATUS
    try:
        return int(importlib.import_module(f"axlearn.cli.{verb}").main(arguments[1:]))
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS
    except BrokenPipeError:
        # Whoever read the output has had enough of it, as `head` has. Nothing may be flushed into it any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE_STATUS
    except Exception as e:
        if not is_for_users(e):
            raise
        print(f"axlearn {verb}: {error_text(e)}", file=sys.stderr)
        return FAILED_STATUS if isinstance(e, RuntimeError) else BAD_INPUT_STATUS


if __name__ == "__main__":
    sys.exit(main())
