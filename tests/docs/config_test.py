"""The guide to configs prints what it says."""

import contextlib
import io
import pathlib
import re
import sys
import types

_GUIDE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "config.md"
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


def test_each_snippet_of_the_guide_prints_what_stands_below_it(monkeypatch):
    example = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", example)
    blocks = _BLOCK.findall(_GUIDE.read_text(encoding="utf-8"))
    assert len(blocks) > 8
    for source, expected in blocks:
        assert _run(source, vars(example)) == expected
