"""Golden files as pytest tests, for anybody's recipes."""

import dataclasses
import functools
import importlib
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Optional

from axlearn.common.config import TrainerConfigFn, error_message, nearest_names
from axlearn.common.golden_config._diff import diff_text
from axlearn.common.golden_config._files import SUMS_FILE, GoldenFolder, file_name, sha256
from axlearn.common.golden_config._texts import TEXTS, with_golden_data_dir
from axlearn.common.user_errors import error_text, is_for_users

# Set to 1, tests write the golden files instead of comparing with them.
UPDATE_VARIABLE = "UPDATE_GOLDEN"
# Does the same where the project's conftest.py defines it.
_UPDATE_OPTION = "--update-golden"
_ACCEPT = f"If that is what you want, {UPDATE_VARIABLE}=1 pytest writes it, to be reviewed like code"


def golden_tests(
    module: str,
    *,
    golden_dir: str | os.PathLike[str],
    match: Optional[str] = None,
    kinds: Sequence[str] = tuple(TEXTS),
    texts: Optional[str] = None,
) -> Callable[..., None]:
    """Returns a pytest test that compares each recipe of a module with its golden files.

    Assign it to a name that begins with `test_`. There is one case for each config and kind, and one that looks
    for golden files of configs that are no more. The files lie in `golden_dir/MODULE`.

    Args:
        module: The module whose `named_trainer_configs()` are tested, such as "my_project.recipes".
        golden_dir: A folder; a relative one is relative to pytest's rootdir.
        match: Only the configs whose whole name matches this regular expression. None: all.
        kinds: What to compare: "config", the config itself; "init", how parameters are initialized;
            "regularizer", which parameters decay.
        texts: With this, the SHA-256 sums of all texts are kept, in one file, and the texts only of the configs
            whose whole name matches this regular expression ("" for none): for many configs of large models.
            None: all texts are kept, and no sums.

    Raises:
        ValueError: If there is no such kind, no config matches, or the module's `named_trainer_configs()` is not
            a dict.
    """
    suite = _Suite(module=module, match=match, kinds=tuple(kinds), texts=texts)
    pytest = _pytest()

    @pytest.mark.parametrize("case", suite.cases(), ids=str)
    def test_goldens(case: _Case, request: Any, tmp_path: pathlib.Path) -> None:
        folder = GoldenFolder(path=request.config.rootpath / golden_dir / module, has_sums=texts is not None)
        is_update = request.config.getoption(_UPDATE_OPTION, default=False) or _is_update_asked_for()
        try:
            problem = (suite.update if is_update else suite.check)(case, folder=folder, scratch=tmp_path)
        except Exception as e:
            if not is_for_users(e):
                raise
            problem = f"{case}: {error_text(e)}"
        if problem is not None:
            pytest.fail(problem, pytrace=False)

    return test_goldens


def _is_update_asked_for() -> bool:
    """Whether the environment says so; a word that may mean the opposite does not."""
    return os.environ.get(UPDATE_VARIABLE, "").lower() in ("1", "true", "yes", "on")


def _pytest() -> Any:
    """pytest, which no program but a test run needs."""
    return importlib.import_module("pytest")


@dataclasses.dataclass(frozen=True)
class _Case:
    """A golden file; without a name, the question which files are no config's."""

    name: Optional[str]
    kind: str

    def __str__(self) -> str:
        return self.kind if self.name is None else f"{self.name}-{self.kind}"


_STALE = _Case(None, "no-stale-files")


@dataclasses.dataclass(frozen=True)
class _Suite:
    """The golden files of a module, and what is done with each."""

    module: str
    match: Optional[str]
    kinds: tuple[str, ...]
    texts: Optional[str]

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in TEXTS:
                raise ValueError(
                    error_message(
                        where="golden_tests.kinds",
                        what=f"unknown kind {kind!r}",
                        expected=f"some of {', '.join(TEXTS)}",
                        nearest=nearest_names(kind, list(TEXTS)),
                    )
                )

    @functools.cached_property
    def configs(self) -> dict[str, TrainerConfigFn]:
        configs: Any = getattr(_import(self.module), "named_trainer_configs", dict)()
        if not isinstance(configs, dict):
            raise ValueError(
                error_message(
                    where=f"{self.module}.named_trainer_configs()",
                    what=f"a {type(configs).__name__}",
                    expected="a dict from names to functions, so that it is known which names there are",
                )
            )
        return configs

    def cases(self) -> list[_Case]:
        if not self.configs:
            raise ValueError(
                error_message(
                    where="golden_tests",
                    what=f"{self.module} has no named_trainer_configs(), or there are none",
                    expected="a function that returns a dict from names to functions that make trainer configs",
                )
            )
        for name in self.configs:
            if "/" in name or os.sep in name:
                raise ValueError(
                    error_message(
                        where=f"{self.module}.named_trainer_configs()",
                        what=f"the name {name!r} cannot be that of a file",
                        expected="names without separators of paths",
                    )
                )
        names = [name for name in self.configs if self.match is None or re.fullmatch(self.match, name)]
        if not names:
            raise ValueError(
                error_message(
                    where="golden_tests.match",
                    what=f"no config of {self.module} matches {self.match!r}",
                    expected=f"a regular expression for whole names, such as {next(iter(self.configs), '')!r}",
                )
            )
        return [_STALE, *(_Case(name, kind) for name in names for kind in self.kinds)]

    def check(self, case: _Case, *, folder: GoldenFolder, scratch: pathlib.Path) -> Optional[str]:
        """Returns what is wrong; None: nothing."""
        if case.name is None:
            return self._check_stale(folder)
        file = file_name(case.name, case.kind)
        text = self._text(case)
        golden = folder.read(file) if self._has_text(case.name) else None
        golden_sum = folder.sums().get(file) if folder.has_sums else None
        if golden is None and (self._has_text(case.name) or golden_sum is None):
            place = folder.path / (file if self._has_text(case.name) else SUMS_FILE)
            return _problem(case, what=f"there is nothing about it in {_shown(place)}", now=_head(text))
        if golden is not None and golden != text:
            return _problem(
                case, what=f"differs from {_shown(folder.path / file)}", now=diff_text(golden, text)
            )
        if golden_sum is not None and golden_sum != sha256(text):
            (scratch / file).write_text(text, encoding="utf-8")
            now = f"Its text now: {scratch / file}"
            if case.kind == "config":
                now += f"\nIts text at any commit: axlearn config show {case.name} --module={self.module}"
            return _problem(case, what=f"has another sum than in {_shown(folder.path / SUMS_FILE)}", now=now)
        return None

    def update(self, case: _Case, *, folder: GoldenFolder, scratch: pathlib.Path) -> Optional[str]:
        """Writes what `check` would compare with."""
        del scratch
        if case.name is None:
            folder.remove(self._stale(folder))
            return None
        file, text = file_name(case.name, case.kind), self._text(case)
        if self._has_text(case.name):
            folder.write(file, text)
        if folder.has_sums:
            folder.write_sum(file, sha256(text))
        return None

    def _text(self, case: _Case) -> str:
        assert case.name is not None
        return TEXTS[case.kind](with_golden_data_dir(self.configs[case.name]))

    def _has_text(self, name: str) -> bool:
        return self.texts is None or re.fullmatch(self.texts, name) is not None

    def _stale(self, folder: GoldenFolder) -> set[str]:
        """The texts and sums that belong to no config, or whose config has a sum alone."""
        names = {file_name(name, kind): name for name in self.configs for kind in TEXTS}
        texts = {file for file in folder.files() if file not in names or not self._has_text(names[file])}
        return texts | (set(folder.sums()) - set(names))

    def _check_stale(self, folder: GoldenFolder) -> Optional[str]:
        stale = sorted(self._stale(folder))
        if not stale:
            return None
        return error_message(
            where=_shown(folder.path),
            what=f"golden files of configs that {self.module} does not have: {', '.join(stale)}",
            nearest=nearest_names(stale[0].removesuffix(".txt"), list(self.configs)),
            advice=f"{UPDATE_VARIABLE}=1 pytest removes them",
        )


def _import(module: str) -> Any:
    """Imports the module of recipes; pytest's own command does not look into the working directory."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if not e.name or not (module == e.name or module.startswith(f"{e.name}.")):
            raise
        advice = (
            'Its folder is not among those that pytest looks in: pythonpath = ["."] below [tool.pytest.ini_options] '
            "in pyproject.toml adds the project's own, or install the project"
        )
        raise ModuleNotFoundError(
            error_message(where="golden_tests", what=f"there is no module {e.name!r}", advice=advice),
            name=e.name,
        ) from e


def _shown(path: pathlib.Path) -> str:
    """The path as somebody in the working directory would write it."""
    here = pathlib.Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _head(text: str, *, num_lines: int = 10) -> str:
    lines = text.splitlines()
    rest = [f"... ({len(lines) - num_lines} more lines)"] if len(lines) > num_lines else []
    return "\n".join([*lines[:num_lines], *rest])


def _problem(case: _Case, *, what: str, now: str) -> str:
    kind = "" if case.kind == "config" else f" ({case.kind})"
    return f"{error_message(where=f'{case.name}{kind}', what=what, advice=_ACCEPT)}\n{now}"
