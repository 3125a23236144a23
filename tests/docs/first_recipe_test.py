"""The guide to a recipe of one's own runs from top to bottom, and prints what it says."""

import pathlib

from tests.docs.console_guide import REPLACEMENTS, difference_text, run_guide, updated

_GUIDE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "first_recipe.md"


def test_each_command_of_the_guide_prints_what_stands_below_it(tmp_path, request):
    text = _GUIDE.read_text(encoding="utf-8")
    differences = run_guide(text, folder=tmp_path, replacements=REPLACEMENTS)
    if request.config.getoption("--update-golden"):
        _GUIDE.write_text(updated(text, differences), encoding="utf-8")
        return
    assert not differences, "\n\n".join(map(difference_text, differences))
