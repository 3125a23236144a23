"""Which files are a corpus, which of them are held out, and what its digest depends on."""

import logging
import pathlib
import sysconfig

import pytest

from axlearn.common.text_corpus import Split, TextCorpus, is_heldout, python_standard_library, text_files


def write_files(root: pathlib.Path, **contents: str | bytes) -> pathlib.Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        (root / f"{name}.txt").write_bytes(data)
    return root


def test_the_standard_library_is_a_corpus_of_megabytes_without_tests_and_packages():
    corpus = python_standard_library()
    names = [d.name for d in corpus.documents]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert not [n for n in names if {"test", "site-packages", "encodings"} & set(n.split("/"))]
    assert sum(d.num_bytes for d in corpus.documents) > 5_000_000
    argparse = pathlib.Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")
    assert corpus.read(next(d for d in corpus.documents if d.name == "argparse.py")) == argparse


def test_no_text_of_the_standard_library_is_in_both_splits():
    corpus = python_standard_library(heldout_percent=5)
    train, heldout = set(corpus.texts(split=Split.TRAIN)), set(corpus.texts(split=Split.HELDOUT))
    assert train
    assert heldout
    assert not train & heldout
    assert len(train) + len(heldout) == len(corpus.documents)


def test_a_document_stays_in_its_split_whatever_else_there_is(tmp_path):
    some = {f"doc{i}": f"text {i}" for i in range(100)}
    more = {f"new{i}": f"more {i}" for i in range(100)}
    before = text_files(str(write_files(tmp_path / "a", **some)), heldout_percent=20)
    after = text_files(str(write_files(tmp_path / "b", **some, **more)), heldout_percent=20)
    splits_before = {d.name: before.split_of(d.name) for d in before.documents}
    assert splits_before.items() <= {d.name: after.split_of(d.name) for d in after.documents}.items()
    assert 5 < sum(split is Split.HELDOUT for split in splits_before.values()) < 40


@pytest.mark.parametrize("percent", [0, 0.5, 5, 50, 99])
def test_the_held_out_share_is_about_what_was_asked_for(percent):
    held_out = sum(is_heldout(f"some/name{i}.py", heldout_percent=percent) for i in range(20_000))
    # Four standard deviations of a binomial count.
    expected = 20_000 * percent / 100
    assert abs(held_out - expected) <= 4 * (expected * (1 - percent / 100)) ** 0.5


def test_held_out_documents_stay_held_out_when_more_are(tmp_path):
    names = [f"n{i}" for i in range(1000)]
    few = {n for n in names if is_heldout(n, heldout_percent=2)}
    assert few < {n for n in names if is_heldout(n, heldout_percent=10)}


def test_unreadable_empty_and_copied_files_are_left_out_and_counted(tmp_path, caplog):
    root = write_files(tmp_path, a="text", b=b"\xff\xfe bad", c="", d="text", e="other")
    with caplog.at_level(logging.WARNING):
        corpus = text_files(str(root))
        assert [d.name for d in corpus.documents] == ["a.txt", "e.txt"]
    assert {s.name: s.reason.split(":")[0] for s in corpus.skipped} == {
        "b.txt": "unreadable",
        "c.txt": "empty",
        "d.txt": "same text as a.txt",
    }
    assert "skipped 1 unreadable of 5 files: b.txt" in caplog.text


def test_a_bad_file_is_an_error_where_that_is_asked_for(tmp_path):
    root = write_files(tmp_path, a="text", b=b"\xff\xfe bad")
    with pytest.raises(ValueError, match=r"b\.txt.*cannot be read as UTF-8"):
        _ = text_files(str(root), on_unreadable="error").documents


def test_files_are_found_by_path_folder_and_pattern(tmp_path):
    write_files(tmp_path, one="1", two="2")
    write_files(tmp_path / "deep" / "er", three="3")
    (tmp_path / "no.bin").write_bytes(b"4")

    def names(path):
        return [d.name for d in text_files(str(path)).documents]

    assert names(tmp_path / "one.txt") == ["one.txt"]
    assert names(tmp_path) == ["deep/er/three.txt", "one.txt", "two.txt"]
    assert names(tmp_path / "*.txt") == ["one.txt", "two.txt"]
    assert names(tmp_path / "**" / "*.txt") == ["deep/er/three.txt", "one.txt", "two.txt"]


def test_a_place_without_text_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="no such file, folder or pattern"):
        text_files(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="no files of text here"):
        text_files(str(tmp_path))
    with pytest.raises(ValueError, match="none of the 1 files"):
        _ = text_files(str(write_files(tmp_path, a=""))).documents


@pytest.mark.parametrize("percent", [-1, 100, 150])
def test_a_share_that_is_none_is_refused(percent):
    with pytest.raises(ValueError, match="heldout_percent"):
        TextCorpus(name="x", files={"a": pathlib.Path("a")}, heldout_percent=percent)


def test_the_digest_depends_on_names_contents_and_split_alone(tmp_path):
    texts = {f"d{i}": f"text {i}" for i in range(40)}

    def digest(folder, split=None, **changes):
        root = write_files(tmp_path / folder, **{**texts, **changes})
        return text_files(str(root), heldout_percent=50).fingerprint(split=split)

    assert digest("a") == digest("b")
    assert digest("c", d3="changed") != digest("a")
    assert digest("d", new="text") != digest("a")
    changed = next(n for n in texts if not is_heldout(f"{n}.txt", heldout_percent=50))
    assert digest("e", Split.HELDOUT, **{changed: "changed"}) == digest("a", Split.HELDOUT)
    assert digest("e", Split.TRAIN, **{changed: "changed"}) != digest("a", Split.TRAIN)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    corpus = text_files(str(write_files(tmp_path, a="before")))
    document = corpus.documents[0]
    write_files(tmp_path, a="after")
    with pytest.raises(ValueError, match="has changed while"):
        corpus.read(document)
