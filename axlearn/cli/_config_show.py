"""`axlearn config show`: a config, or a part of it, as the dump has it."""

import argparse
import sys

from axlearn.cli._config_source import Options, load, parse_source
from axlearn.cli._config_terminal import json_value, print_dump, print_json
from axlearn.common.config import dump_lines, override_lines


def run(args: argparse.Namespace, options: Options) -> int:
    """Prints the config that `args.source` names; returns the exit status."""
    subject = load(parse_source(args.source, options), options)
    for line in override_lines(subject.overrides):
        print(line, file=sys.stderr)
    lines = dump_lines(subject.cfg, args.path or "")
    if args.json:
        print_json(
            {
                "config": subject.source.label,
                "path": args.path or "",
                "overrides": list(options.overrides),
                "values": {path: json_value(text) for path, text in lines.items()},
            }
        )
    elif args.path:
        print("\n".join(f"{path}: {text}" for path, text in lines.items()))
    else:
        print_dump(subject.cfg.debug_string())
    return 0
