"""Packed text through grain: the order, the end, the restart, the split and the bytes."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from axlearn.common import input_grain
from axlearn.common.config import config_for_function
from axlearn.common.input_grain_lm import PackedTextSource
from axlearn.common.text_corpus import Split, text_files, trained_sentencepiece
from axlearn.common.vocabulary import load_vocabulary

NUM_DOCUMENTS = 30
BATCH, LENGTH = 4, 16


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AXLEARN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(NUM_DOCUMENTS):
        text = "".join(f"def name_{i}_{j}(x):\n\treturn x * {j}  # \u00fc\n" for j in range(1 + i % 4))
        (folder / f"doc{i:02}.py").write_text(text, encoding="utf-8")
    return folder


def make_input(corpus_dir, *, is_training=True, source=None, **kwargs):
    corpus = config_for_function(text_files).set(path=str(corpus_dir), heldout_percent=25)
    source_cfg = PackedTextSource.default_config().set(
        corpus=corpus,
        vocab_cfg=config_for_function(trained_sentencepiece).set(vocab_size=300),
        max_sequence_length=LENGTH,
        split="train" if is_training else "heldout",
    )
    cfg = input_grain.Input.default_config().set(
        name="input",
        is_training=is_training,
        source=source_cfg.set(**(source or {})),
        global_batch_size=BATCH,
    )
    return cfg.set(**kwargs).instantiate(parent=None)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def texts_of(batches, vocab):
    """The texts of all pieces of documents in some batches."""
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            segment_ids = batch["input_segment_ids"][row]
            for segment in range(1, segment_ids.max(initial=0) + 1):
                yield vocab.decode(batch["target_labels"][row][segment_ids == segment])


def test_batches_have_the_shapes_and_types_that_were_promised(corpus_dir):
    module = make_input(corpus_dir)
    batch = next(module.batches())
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (tuple(v.shape), v.dtype) for k, v in module.element_spec().items()
    }
    assert batch["input_ids"].shape == (BATCH, LENGTH)
    assert batch["target_num_bytes"].shape == (BATCH,)


def test_the_specs_need_no_data():
    module = make_input("/nowhere")
    assert module.element_spec()["input_ids"].shape == (BATCH, LENGTH)
    with pytest.raises(ValueError, match="/nowhere"):
        module.batches()


@pytest.mark.parametrize("step", [0, 1, 7, 23])
def test_a_restart_at_any_step_equals_the_uninterrupted_run(corpus_dir, step):
    uninterrupted = list(itertools.islice(make_input(corpus_dir).batches(), 30))
    before = make_input(corpus_dir).batches()
    for _ in range(step):
        next(before)
    state = json.loads(json.dumps(before.get_state()))
    after = make_input(corpus_dir).batches()
    after.set_state(state)
    assert all(map(same, itertools.islice(after, 30 - step), uninterrupted[step:]))


def test_the_order_depends_on_neither_threads_nor_prefetch_nor_batch_size(corpus_dir):
    def rows(n, **kwargs):
        batches = make_input(corpus_dir, **kwargs).batches()
        return np.concatenate([next(batches)["input_ids"] for _ in range(n)])

    expected = rows(12)
    assert np.array_equal(expected, rows(12, num_read_threads=0, num_prefetched_batches=0))
    assert np.array_equal(expected, rows(12, num_read_threads=5, num_prefetched_batches=9))
    assert np.array_equal(expected, rows(6, global_batch_size=2 * BATCH))
    assert not np.array_equal(expected, rows(12, source={"seed": 1}))


def test_the_parts_of_all_processes_are_the_global_batch(corpus_dir, monkeypatch):
    module = make_input(corpus_dir)
    whole = list(itertools.islice(module.batches(), 3))
    parts = []
    monkeypatch.setattr("jax.process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        parts.append(list(itertools.islice(make_input(corpus_dir).batches(), 3)))
    for batch, first, second in zip(whole, *parts, strict=True):
        assert same(batch, {k: np.concatenate([first[k], second[k]]) for k in batch})


def test_an_epoch_is_all_of_the_training_text_and_the_next_is_in_another_order(corpus_dir):
    module = make_input(corpus_dir, global_batch_size=1)
    n = module.source.num_examples()
    rows = list(itertools.islice(module.batches(), 2 * n))
    corpus = text_files(str(corpus_dir), heldout_percent=25)
    train_bytes = sum(len(t.encode()) for t in corpus.texts(split=Split.TRAIN))
    for epoch in (rows[:n], rows[n:]):
        assert sum(int(r["target_num_bytes"].sum()) for r in epoch) == train_bytes
    assert not all(map(same, rows[:n], rows[n:]))


def test_evaluation_covers_every_held_out_document_once_and_nothing_else(corpus_dir):
    module = make_input(corpus_dir, is_training=False, source={"max_sequence_length": 4096})
    batches = list(module.batches())
    corpus = text_files(str(corpus_dir), heldout_percent=25)
    held_out = sorted(corpus.texts(split=Split.HELDOUT))
    assert 2 < len(held_out) < NUM_DOCUMENTS / 2
    # One row is long enough for all of them, so every piece is a whole document.
    assert sorted(texts_of(batches, module.source.vocab)) == held_out
    train = list(itertools.islice(make_input(corpus_dir, source={"max_sequence_length": 4096}).batches(), 1))
    assert not set(texts_of(train, module.source.vocab)) & set(held_out)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_evaluation_ends_with_a_filled_up_batch_of_the_same_shape(corpus_dir, batch_size):
    module = make_input(corpus_dir, is_training=False, global_batch_size=batch_size)
    batches = list(module.batches())
    assert len(batches) == -(-module.source.num_examples() // batch_size)
    assert {b["input_ids"].shape for b in batches} == {(batch_size, LENGTH)}
    corpus = text_files(str(corpus_dir), heldout_percent=25)
    held_out_bytes = sum(len(t.encode()) for t in corpus.texts(split=Split.HELDOUT))
    assert sum(int(b["target_num_bytes"].sum()) for b in batches) == held_out_bytes
    num_targets = sum(int((b["target_labels"] >= 0).sum()) for b in batches)
    assert num_targets == sum(len(ids) - 1 for ids in module.source.document_token_ids())
    assert all(map(same, batches, module.batches()))


def test_a_bounded_evaluation_takes_the_first_rows(corpus_dir):
    whole = make_input(corpus_dir, is_training=False, global_batch_size=1).batches()
    some = make_input(corpus_dir, is_training=False, global_batch_size=1, source={"max_examples": 5})
    batches = list(some.batches())
    assert len(batches) == 5
    assert all(map(same, batches, whole))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("seed", {"source": {"seed": 5}}),
        ("max_sequence_length", {"source": {"max_sequence_length": 8}}),
        ("global_batch_size", {"global_batch_size": 2}),
        ("split", {"source": {"split": "heldout"}}),
    ],
)
def test_a_position_of_other_settings_is_refused_naming_the_field(corpus_dir, field, change):
    state = make_input(corpus_dir).batches().get_state()
    with pytest.raises(ValueError, match=f"{field} was"):
        make_input(corpus_dir, **change).batches().set_state(state)


def test_a_position_in_a_changed_corpus_is_refused(corpus_dir, tmp_path):
    state = make_input(corpus_dir).batches().get_state()
    for path in corpus_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    unchanged = make_input(tmp_path).batches()
    unchanged.set_state(state)
    (tmp_path / "doc01.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="corpus was"):
        make_input(tmp_path).batches().set_state(state)


def test_what_goes_wrong_while_reading_is_raised_where_the_batch_is_taken(corpus_dir, monkeypatch):
    iterator = make_input(corpus_dir).batches()

    def fail(*_, **__):
        raise RuntimeError("bad row")

    monkeypatch.setattr(PackedTextSource, "example", fail)
    with pytest.raises(RuntimeError, match="bad row"):
        next(iterator)


def test_illegal_settings_are_reported_together(corpus_dir):
    with pytest.raises(ValueError, match="split") as e:
        make_input(corpus_dir, source={"split": "test", "seed": -1, "max_sequence_length": 0})
    assert len(str(e.value).split("cannot be used")) == 4
    with pytest.raises(ValueError, match="global_batch_size"):
        make_input(corpus_dir, global_batch_size=0).batches()


def test_a_split_without_documents_is_an_error(tmp_path):
    (tmp_path / "only.txt").write_text("some text " * 200)
    # Ask for the split that the one document is not in.
    is_training = text_files(str(tmp_path), heldout_percent=25).split_of("only.txt") is Split.HELDOUT
    with pytest.raises(ValueError, match=r"no document of .* is in the split"):
        make_input(tmp_path, is_training=is_training).batches()


def test_the_assets_are_the_tokenizer(corpus_dir, tmp_path):
    module = make_input(corpus_dir)
    module.write_assets(tmp_path / "tokenizer")
    assert load_vocabulary(tmp_path / "tokenizer").fingerprint == module.source.vocab.fingerprint


def test_a_vocabulary_gets_the_sources_corpus_unless_it_has_its_own(corpus_dir, tmp_path):
    (tmp_path / "own.txt").write_text("other words of another text\n" * 50)
    own = config_for_function(text_files).set(path=str(tmp_path), heldout_percent=0)
    vocab_cfg = config_for_function(trained_sentencepiece).set(corpus=own, vocab_size=290)
    of_corpus = make_input(corpus_dir).source.vocab.encode("name")
    of_its_own = make_input(corpus_dir, source={"vocab_cfg": vocab_cfg}).source.vocab.encode("name")
    assert len(of_corpus) < len(of_its_own)


def test_grain_loads_only_when_batches_are_read(corpus_dir):
    program = (
        "import sys, axlearn.common.input_grain, axlearn.common.input_grain_lm\n"
        "loaded = {'grain', 'sentencepiece'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
