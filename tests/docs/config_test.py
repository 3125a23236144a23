"""The guides with snippets print what they say."""

import contextlib
import io
import pathlib
import re
import sys
import types

import pytest

_DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
_BLOCK = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", re.DOTALL)


def _run(source: str, namespace: dict) -> str:
    """What a snippet prints, with the last lines of the traceback it may end with."""
    output = io.StringIO()
    code = compile(source, "example.py", "exec")
    with contextlib.redirect_stdout(output):
        try:
            exec(code, namespace)
        except Exception as e:
            print(f"{type(e).__name__}: {e}")
    return output.getvalue()


@pytest.mark.parametrize(("guide", "min_blocks"), [("config.md", 9), ("attention.md", 4), ("layers.md", 2)])
def test_each_snippet_of_a_guide_prints_what_stands_below_it(guide, min_blocks, monkeypatch):
    example = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", example)
    blocks = _BLOCK.findall((_DOCS / guide).read_text(encoding="utf-8"))
    assert len(blocks) >= min_blocks
    for source, expected in blocks:
        assert _run(source, vars(example)) == expected
