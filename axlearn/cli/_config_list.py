"""`axlearn config list`: the recipes there are."""

import argparse
import fnmatch
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from axlearn.cli._config_source import Options, known_recipes
from axlearn.cli._config_terminal import Styled, print_json, print_lines
from axlearn.common.config import (
    ConfigBase,
    PathError,
    TrainerConfigFn,
    error_message,
    make_trainer_config,
    nearest_names,
    public_name,
    value_at,
)
from axlearn.common.trainer_config_modifier import ChainConfigModifier
from axlearn.common.user_errors import error_text, is_for_users

# Where trainer configs usually say what they are, by the name of the column.
_FACTS = {
    "layers": ("model.decoder.transformer.num_layers",),
    "dim": ("model.decoder.dim",),
    "vocab": ("model.decoder.vocab_size",),
    "steps": ("max_step",),
}
# Marks of a regular expression that globs do not have.
_REGEX_MARKS = re.compile(r"[\^$()|+\\]|\.[*?]")


class Row(NamedTuple):
    """A recipe.

    Attributes:
        name: Its name.
        aliases: Its other names.
        facts: What its config says, by the names of columns.
        mesh_rules: The patterns of its mesh rules with what they do, in words.
        problem: Why its config cannot be made here; None: it can.
    """

    name: str
    aliases: tuple[str, ...]
    facts: Mapping[str, Any]
    mesh_rules: Sequence[tuple[str, str]]
    problem: Optional[str]


def run(args: argparse.Namespace, options: Options) -> int:
    """Prints the recipes; returns the exit status.

    Raises:
        ValueError: If none matches.
    """
    recipes, aliases = known_recipes(options.module)
    names = [name for name in recipes if _matches(name, aliases, args.match)]
    if not recipes:
        raise ValueError(
            error_message(
                where=options.module or "",
                what="its named_trainer_configs() is empty",
                expected="a dict from names to functions that make trainer configs",
            )
        )
    if not names:
        raise ValueError(
            error_message(
                where="--match",
                what=f"no recipe is called like {args.match!r}",
                nearest=nearest_names(args.match or "", recipes),
                expected="a part of a name, a glob such as 'fuji-7B*', or a regular expression",
            )
        )
    rows = [_row(name, recipes[name], aliases) for name in names]
    if args.json:
        print_json({"configs": [_json_row(row) for row in rows]})
    else:
        print_lines(_lines(rows, with_rules=args.rules))
    return 0


def _matches(name: str, aliases: Mapping[str, str], pattern: Optional[str]) -> bool:
    if pattern is None:
        return True
    names = [name, *(alias for alias, meant in aliases.items() if meant == name)]
    if any(mark in pattern for mark in "*?[") and not _REGEX_MARKS.search(pattern):
        return any(fnmatch.fnmatchcase(each, pattern) for each in names)
    try:
        return any(re.search(pattern, each) for each in names)
    except re.error as e:
        raise ValueError(
            error_message(
                where="--match", what=f"{pattern!r} is no regular expression ({e})", expected="one, or a glob"
            )
        ) from e


def _row(name: str, recipe: TrainerConfigFn, aliases: Mapping[str, str]) -> Row:
    others = tuple(alias for alias, meant in aliases.items() if meant == name)
    try:
        cfg: Any = make_trainer_config(recipe)
    except Exception as e:
        # One that fails, be it by a slip of its author, hides none of the others.
        return Row(name, others, {}, (), _problem(e))
    facts = {column: _fact(cfg, paths) for column, paths in _FACTS.items()}
    rules = [(pattern, _words(rule)) for pattern, rule in cfg.mesh_rules or ()]
    return Row(name, others, facts, rules, None)


def _problem(e: Exception) -> str:
    """An error in one line; of a slip, its type and the line of the code that made it."""
    if is_for_users(e):
        return error_text(e, with_traceback=False).partition("\n")[0]
    frame = traceback.extract_tb(e.__traceback__)[-1]
    return f"{type(e).__name__}: {e} ({frame.filename}:{frame.lineno})"


def _fact(cfg: ConfigBase, paths: Sequence[str]) -> Any:
    for path in paths:
        try:
            value = value_at(cfg, path)
        except PathError:
            continue
        if isinstance(value, int | float | str):
            return value
    return None


def _words(rule: Any) -> str:
    """What a rule does."""
    if isinstance(rule, ChainConfigModifier.Config):
        return ", ".join(_words(modifier) for modifier in rule.config_modifiers)
    if isinstance(rule, ConfigBase):
        return public_name(getattr(rule, "klass", type(rule))).rpartition(".")[2]
    return "no mesh" if rule is None else f"mesh_shape={rule}"


def _lines(rows: Sequence[Row], *, with_rules: bool) -> Iterator[Styled]:
    header = ["name", *_FACTS, "mesh rules", "also called"]
    cells = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    for i, line in enumerate(cells):
        padded = [line[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)]
        yield Styled("  ".join([*padded, line[-1]]).rstrip(), "bold" if i == 0 else "")
        if i and rows[i - 1].problem:
            yield Styled(f"    {rows[i - 1].problem}", "red")
        if i and with_rules:
            width = max((len(pattern) for pattern, _ in rows[i - 1].mesh_rules), default=0)
            for pattern, words in rows[i - 1].mesh_rules:
                yield Styled(f"    {pattern:<{width}}  {words}", "dim")


def _cells(row: Row) -> list[str]:
    facts = [row.facts.get(column) for column in _FACTS]
    texts = ["-" if fact is None else f"{fact:,}" if isinstance(fact, int) else str(fact) for fact in facts]
    return [row.name, *texts, str(len(row.mesh_rules)), ", ".join(row.aliases)]


def _json_row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "aliases": list(row.aliases),
        **{column: row.facts.get(column) for column in _FACTS},
        "mesh_rules": [{"pattern": pattern, "does": words} for pattern, words in row.mesh_rules],
        "problem": row.problem,
    }
