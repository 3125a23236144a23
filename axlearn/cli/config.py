"""Lists, shows, compares, explains and checks trainer configs."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from axlearn.common.user_errors import error_text, is_for_users

_DESCRIPTION = """Lists, shows, compares, explains and checks trainer configs; runs and writes nothing.

A CONFIG is the name of a recipe, such as fuji-7B-v2, a name with a machine, fuji-7B-v2@tpu-v4-1024, the directory of a
run, its trainer_config.json, or a dump in a text file."""
_EPILOG = "`axlearn config COMMAND --help` says more about a command."
# As diff(1) has it: 1 is a difference.
_DIFF_TROUBLE_STATUS = 2


def main(argv: Sequence[str]) -> int:
    """Runs the verb.

    Args:
        argv: The arguments behind the verb.

    Returns:
        The exit status: 1 where `diff` found differences or `check` an error.

    Raises:
        Exception: What is wrong with the config or the command line, for the user; see `axlearn.cli.main`.
    """
    args = make_parser().parse_args(argv)
    library = importlib.import_module("axlearn.cli._config_source")
    command = importlib.import_module(f"axlearn.cli._config_{args.command}")
    options = library.Options(
        mesh_selector=getattr(args, "mesh_selector", None),
        overrides=tuple(getattr(args, "set", ())),
        module=args.module,
        data_dir=getattr(args, "data_dir", None),
    )
    try:
        return int(command.run(args, options))
    except BrokenPipeError:
        raise
    except Exception as e:
        # A recipe's own slip has its traceback, and is no difference either.
        if args.command != "diff" or (is_for_users(e) and not isinstance(e, RuntimeError)):
            raise
        print(f"axlearn config: {error_text(e)}", file=sys.stderr)
        return _DIFF_TROUBLE_STATUS


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; what it completes is looked up here, too."""
    parser = argparse.ArgumentParser(
        prog="axlearn config",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _command(commands, "list", "the recipes there are, a line for each")
    command.add_argument(
        "--match", metavar="PATTERN", help="only names like this, such as 'fuji-7B*'; also a regex"
    )
    command.add_argument("--rules", action="store_true", help="list the mesh rules of each, too")

    command = _command(commands, "show", "a config, or a part of it, as text", has_config=True)
    command.add_argument("--path", metavar="PATH", help="only this part, such as model.decoder.emb")

    command = _command(commands, "diff", "what differs between two configs, by path", has_config=True)
    command.add_argument(
        "other",
        metavar="CONFIG",
        nargs="?",
        help="the other config; without one, what --mesh_selector and --set change is shown",
    )

    command = _command(commands, "explain", "who set a value, and what changed it since", has_config=True)
    command.add_argument("path", metavar="PATH", help="a path of the config, such as max_step")

    command = _command(
        commands, "check", "builds the model as shapes alone and looks for mistakes", has_config=True
    )
    command.add_argument(
        "--all_rules", action="store_true", help="check it for a machine of each of its mesh rules"
    )
    return parser


def _command(commands: "argparse._SubParsersAction", name: str, summary: str, *, has_config: bool = False):
    """Adds a command with the options that all have."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"Prints {summary}." if name != "check" else None, allow_abbrev=False
    )
    if has_config:
        parser.add_argument("source", metavar="CONFIG", help="a recipe, NAME@MACHINE, a run or a file")
        parser.add_argument(
            "--mesh_selector", metavar="MACHINE", help="apply the mesh rule for this, such as tpu-v5p-128"
        )
        parser.add_argument(
            "--set", metavar="PATH=VALUE", action="append", default=[], help="change a value; repeatable"
        )
        parser.add_argument("--data_dir", metavar="DIR", help="where data lies, for the recipe; or FAKE")
    parser.add_argument(
        "--module", metavar="MODULE", help="the module with the recipe, such as my_project.recipes"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser
