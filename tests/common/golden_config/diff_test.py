"""Differences of dumps, path by path."""

from axlearn.common.golden_config import diff_text, diff_texts

OLD = """\
model.dim: 4096
model.head['a: b']: 1
model.norm.eps: 1e-05
name: 'x'"""


def test_equal_texts_have_no_differences():
    assert diff_texts(OLD, OLD) == []
    assert diff_texts("", "") == []


def test_changed_new_and_lost_paths_are_told_apart():
    new = """\
model.dim: 8192
model.head['a: b']: 2
model.layer: 'y: z'
name: 'x'"""
    assert diff_texts(OLD, new) == [
        "~ model.dim: 4096 -> 8192",
        "~ model.head['a: b']: 1 -> 2",
        "- model.norm.eps: 1e-05",
        "+ model.layer: 'y: z'",
    ]


def test_what_is_lost_stands_where_it_stood():
    assert diff_texts("a: 1\nb: 2\nc: 3\nd: 4", "d: 5") == ["- a: 1", "- b: 2", "- c: 3", "~ d: 4 -> 5"]
    assert diff_texts("a: 1\nb: 2", "a: 1") == ["- b: 2"]


def test_lines_without_a_path_and_repeated_paths_are_compared_too():
    old = "==== decay ====\na/b: 1\n==== scale ====\na/b: 1"
    new = "==== decay ====\na/b: 1\n==== scale ====\na/b: 2"
    assert diff_texts(old, new) == ["~ a/b: 1 -> 2"]
    assert diff_texts(old, "a/b: 1") == ["- ==== decay ====: ", "- ==== scale ====: ", "- a/b: 1"]


def test_a_long_difference_is_cut_and_counted():
    old, new = ("\n".join(f"x{i}: {value}" for i in range(5)) for value in "ab")
    assert diff_text(old, new, limit=2) == "~ x0: a -> b\n~ x1: a -> b\n... (3 more)"
    assert diff_text(old, new, limit=5).count("\n") == 4
