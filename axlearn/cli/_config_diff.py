"""`axlearn config diff`: the paths in which two configs differ, with the exit statuses of diff(1)."""

import argparse
import os
from typing import NamedTuple, Optional

from axlearn.cli._config_source import Options, Source, find, load, parse_source, read_text
from axlearn.cli._config_terminal import Styled, json_value, print_json, print_lines
from axlearn.common.config import error_message
from axlearn.common.golden_config import Change, diff_items

SAME, DIFFERENT = 0, 1
_STYLES = {"-": "red", "+": "green", "~": "yellow"}


class _Side(NamedTuple):
    """A dump, and what to call it."""

    label: str
    text: str


def run(args: argparse.Namespace, options: Options) -> int:
    """Prints what differs between `args.source` and `args.other`.

    The options apply to both. Without `args.other` the config is compared with what the options make of it.

    Returns:
        0 if nothing differs, 1 if something does.

    Raises:
        ValueError: If there is nothing to compare with, or a side is no config.
    """
    old, new = _sides(args.source, args.other, options)
    changes = diff_items(old.text, new.text)
    if args.json:
        print_json({"old": old.label, "new": new.label, "changes": [_json_change(c) for c in changes]})
    else:
        print_lines(Styled(str(change), _STYLES[change.mark]) for change in changes)
    return DIFFERENT if changes else SAME


def _sides(source: str, other: Optional[str], options: Options) -> tuple[_Side, _Side]:
    if other is None:
        return _with_and_without(source, options)
    plain = options._replace(mesh_selector=None)
    sources = [parse_source(text, plain) for text in (source, other)]
    if options.mesh_selector and all(side.mesh_selector for side in sources):
        raise ValueError(
            error_message(
                where="--mesh_selector",
                what="both sides name a machine of their own",
                expected="none, or a side without a machine to apply it to",
            )
        )
    is_of_files = all(side.name is None for side in sources)
    if is_of_files and (options.mesh_selector or options.overrides):
        raise ValueError(
            error_message(
                where="config diff",
                what="--mesh_selector and --set are for recipes, and there are only files",
                expected=f"the name of a recipe, or one file: axlearn config diff {source} --set ...",
            )
        )
    old, new = (side._replace(mesh_selector=side.mesh_selector or options.mesh_selector) for side in sources)
    return _side(old, options), _side(new, options)


def _with_and_without(text: str, options: Options) -> tuple[_Side, _Side]:
    source = parse_source(text, options)
    if source.mesh_selector is None and not options.overrides:
        raise ValueError(
            error_message(
                where="config diff",
                what=f"there is nothing to compare {text} with",
                expected="a second config, or --mesh_selector or --set to compare it with what they make of it",
            )
        )
    cfg, _ = find(source, options)
    changed = load(source, options)
    label = " ".join([source.label, *options.overrides])
    return _Side(source.base, cfg.debug_string()), _Side(label, changed.cfg.debug_string())


def _side(source: Source, options: Options) -> _Side:
    """A side of a comparison.

    A text file is compared as it is: it may name classes that are not here any more. What the options say is about
    recipes: the config of a run has been through a mesh rule already.
    """
    if source.name is not None:
        return _Side(source.label, load(source, options).cfg.debug_string())
    path = source.path or ""
    if os.path.isfile(path):
        text = read_text(path)
        if not text.lstrip().startswith("{"):
            return _Side(path, text)
    cfg, _ = find(source, options._replace(data_dir=None))
    return _Side(path, cfg.debug_string())


def _json_change(change: Change) -> dict[str, object]:
    content: dict[str, object] = {"change": {"+": "added", "-": "removed", "~": "changed"}[change.mark]}
    content["path"] = change.path
    if change.old is not None:
        content["old"] = json_value(change.old)
    if change.new is not None:
        content["new"] = json_value(change.new)
    return content
