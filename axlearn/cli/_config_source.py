"""What stands on the command line of `axlearn config`: a recipe's name, a file, or a run, and the config of it.

    NAME              a recipe or an alias of one
    NAME@SELECTOR     the recipe under the mesh rule for that machine
    PATH              the directory of a run, its trainer_config.json, or a dump as text

A PATH has a separator in it, or exists and no recipe is called so.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

from axlearn.common.config import (
    InstantiableConfig,
    Override,
    TrainerConfigFn,
    UnknownConfigNameError,
    apply_overrides,
    config_from_json,
    config_from_text,
    error_message,
    make_trainer_config,
)
from axlearn.common.data_dir import set_data_dir
from axlearn.common.launch_trainer import WITHOUT_EFFECT, import_prefixes
from axlearn.common.run_dir import CONFIG_FILE, read_run_config
from axlearn.common.run_record import applied_mesh_rule
from axlearn.common.trainer import find_mesh_rule, select_mesh_config
from axlearn.experiments.registry import (
    find_trainer_config,
    import_recipe,
    listed_aliases,
    listed_trainer_configs,
    trainer_config_aliases,
)


class Options(NamedTuple):
    """What is done to a config after it was found.

    Attributes:
        mesh_selector: The machine whose mesh rule applies; None: no rule does.
        overrides: "path=value" texts, applied last.
        module: A module with recipes besides those of this package, or with the classes that a file names. None: none.
        data_dir: Where data lies, for the recipe; None for its default.
    """

    mesh_selector: Optional[str] = None
    overrides: Sequence[str] = ()
    module: Optional[str] = None
    data_dir: Optional[str] = None


class Source(NamedTuple):
    """Where a config is to be had.

    Attributes:
        text: What was typed.
        name: The recipe; None for a file or a run.
        path: The file or the run's directory; None for a recipe.
        mesh_selector: The machine behind an `@`, or that of the options; None: none.
    """

    text: str
    name: Optional[str]
    path: Optional[str]
    mesh_selector: Optional[str]

    @property
    def label(self) -> str:
        """The name or path, with the machine if there is one."""
        return f"{self.base}@{self.mesh_selector}" if self.mesh_selector else self.base

    @property
    def base(self) -> str:
        """The name or path alone."""
        return self.name or self.path or ""


class Subject(NamedTuple):
    """A config, and how it came about.

    Attributes:
        source: Where it was found.
        cfg: The config, after mesh rule and overrides.
        recipe: The function that made it; None for a file or a run.
        overrides: What the overrides did.
    """

    source: Source
    cfg: Any
    recipe: Optional[TrainerConfigFn]
    overrides: list[Override]


def known_recipes(module: Optional[str]) -> tuple[dict[str, TrainerConfigFn], dict[str, str]]:
    """Returns recipes by name, and the name behind each alias.

    Args:
        module: Their module; None: all that come with this package.
    """
    if module is None:
        return dict(listed_trainer_configs()), dict(listed_aliases())
    recipe = import_recipe(module)
    return dict(recipe.named_trainer_configs()), trainer_config_aliases(recipe)


def parse_source(text: str, options: Options) -> Source:
    """Finds out what a text on the command line stands for; loads a recipe's module if it may be one.

    Raises:
        UnknownConfigNameError: If it is no recipe, and there is no such file.
        ValueError: If it names a machine and `options` another one, or none behind its @.
        FileNotFoundError: If it can only be a file, and there is none.
    """
    if os.sep in text or text in (os.curdir, os.pardir):
        if not os.path.exists(text):
            raise FileNotFoundError(
                error_message(where=text, what="there is no such file", expected="a file, a run or a recipe")
            )
        return Source(text, None, text, options.mesh_selector)
    name, at, selector = text.partition("@")
    try:
        _find_recipe(name, options)
    except UnknownConfigNameError:
        if os.path.exists(text):
            return Source(text, None, text, options.mesh_selector)
        raise
    if at and not selector:
        raise ValueError(
            error_message(where=text, what="there is no machine behind the @", expected="one, or no @")
        )
    if at and options.mesh_selector and options.mesh_selector != selector:
        raise ValueError(
            error_message(
                where=text,
                what=f"it names a machine, and --mesh_selector={options.mesh_selector} another one",
                expected="one of the two",
            )
        )
    return Source(text, name, None, selector or options.mesh_selector)


def find(source: Source, options: Options) -> tuple[Any, Optional[TrainerConfigFn]]:
    """Returns the config as the recipe or the file has it, and the recipe's function.

    Raises:
        ValueError: If a file is not that of a config.
        OSError: If it cannot be read.
    """
    if source.name is not None:
        recipe = _find_recipe(source.name, options)
        return _call(recipe, options.data_dir), recipe
    if options.data_dir is not None:
        raise ValueError(
            error_message(
                where="--data_dir", what=f"is for recipes, and {source.path} is a file", expected="none"
            )
        )
    if options.module is not None:
        import_recipe(options.module)
    return read_config_file(source.path or "", import_prefixes=import_prefixes(options.module)), None


def load(source: Source, options: Options) -> Subject:
    """Finds a config, applies the mesh rule and then the overrides.

    Args:
        source: Where it is.
        options: What to do to it, but for the mesh selector, which is the source's.

    Raises:
        ValueError: If something in `options` does not fit it.
        UnknownConfigNameError: If there is no such recipe.
        OSError: If there is no such file.
    """
    cfg, recipe = find(source, options)
    select_mesh_config(cfg, mesh_selector=open_mesh_selector(source, cfg))
    return Subject(source, cfg, recipe, apply_options(cfg, options.overrides, options))


def open_mesh_selector(source: Source, cfg: InstantiableConfig) -> Optional[str]:
    """Returns the machine whose mesh rule is still to be applied; None where there is none.

    The config of a run has been through the rule that its record names, and what was set on top of that stays.

    Raises:
        ValueError: If it has been through another rule, which nothing takes back.
    """
    if source.mesh_selector is None or source.path is None:
        return source.mesh_selector
    is_config_file = os.path.basename(source.path) == CONFIG_FILE
    applied = applied_mesh_rule(os.path.dirname(source.path) if is_config_file else source.path)
    if applied is None:
        return source.mesh_selector
    chosen = str(find_mesh_rule(cfg, mesh_selector=source.mesh_selector))
    if chosen != applied:
        raise ValueError(
            error_message(
                where="--mesh_selector",
                what=f"{source.mesh_selector!r} chooses {chosen}, and this run has been changed by {applied}",
                expected="the same rule, none, or the recipe in the place of the run",
            )
        )
    return None


def apply_options(cfg: Any, overrides: Sequence[str], options: Options) -> list[Override]:
    """Applies overrides in place as a start does."""
    prefixes = import_prefixes(options.module)
    return apply_overrides(cfg, list(overrides), import_prefixes=prefixes, without_effect=WITHOUT_EFFECT)


def _find_recipe(name: str, options: Options) -> TrainerConfigFn:
    """Finds a recipe of the module or, as people compare theirs with ours, one that comes with this package.

    Raises:
        UnknownConfigNameError: If neither has it.
    """
    try:
        return find_trainer_config(name, module=options.module, where="CONFIG")
    except UnknownConfigNameError:
        if options.module is not None:
            with contextlib.suppress(UnknownConfigNameError):
                return find_trainer_config(name)
        raise


def _call(recipe: TrainerConfigFn, data_dir: Optional[str]) -> InstantiableConfig:
    if data_dir is None:
        return make_trainer_config(recipe)
    with set_data_dir(data_dir):
        return make_trainer_config(recipe, data_dir=data_dir)


def read_config_file(path: str, *, import_prefixes: Sequence[str]) -> Any:
    """Reads the config of a run, a JSON file or a dump.

    Args:
        path: The directory of a run, or the file.
        import_prefixes: The packages whose classes it may name.

    Raises:
        ValueError: If it is none.
        OSError: If it cannot be read.
    """
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, CONFIG_FILE)):
            raise ValueError(
                error_message(
                    where=path,
                    what=f"there is no {CONFIG_FILE}",
                    expected="the directory of a run, a file, or the name of a recipe",
                )
            )
        return read_run_config(path, import_prefixes=import_prefixes)
    content = read_text(path)
    try:
        if content.lstrip().startswith("{"):
            return config_from_json(content, import_prefixes=import_prefixes)
        return config_from_text(content, import_prefixes=import_prefixes)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def read_text(path: str) -> str:
    """Returns a file's text.

    Raises:
        ValueError: If it is no text.
        OSError: If it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except UnicodeDecodeError as e:
        raise ValueError(error_message(where=path, what=f"is not text ({e.reason})")) from e
