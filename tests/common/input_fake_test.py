"""Made-up batches: of legal ids, a function of seed and step."""

import itertools

import numpy as np
import pytest

from axlearn.common.input_fake import EmptyInput, FakeLmInput, fake_lm_source


def fake(**kwargs):
    cfg = FakeLmInput.default_config().set(
        name="input", is_training=True, global_batch_size=4, source_length=7, vocab_size=11
    )
    return cfg.set(**kwargs).instantiate(parent=None)


def test_ids_are_legal_and_labels_are_the_next_ids():
    for batch in itertools.islice(fake().batches(), 20):
        for key in ("input_ids", "target_labels"):
            assert batch[key].dtype == np.int32
            assert batch[key].min() >= 0
            assert batch[key].max() < 11
        np.testing.assert_array_equal(batch["input_ids"][:, 1:], batch["target_labels"][:, :-1])


def test_a_batch_is_a_function_of_seed_and_step():
    batches = list(itertools.islice(fake().batches(), 6))
    iterator = fake().batches()
    iterator.set_state({**iterator.get_state(), "next_step": 4})
    for key, value in next(iterator).items():
        np.testing.assert_array_equal(value, batches[4][key])
    assert not np.array_equal(batches[0]["input_ids"], batches[1]["input_ids"])
    for other in (fake(seed=1), fake(is_training=False)):
        assert not np.array_equal(next(other.batches())["input_ids"], batches[0]["input_ids"])


def test_ids_are_spread_evenly_over_the_vocabulary():
    ids = np.concatenate([b["input_ids"].ravel() for b in itertools.islice(fake().batches(), 200)])
    counts = np.bincount(ids, minlength=11)
    # Five standard deviations of a binomial count.
    assert np.abs(counts - len(ids) / 11).max() < 5 * np.sqrt(len(ids) / 11)


@pytest.mark.parametrize("process", range(2))
def test_processes_share_one_global_batch(monkeypatch, process):
    whole = next(fake().batches())
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: process)
    for key, value in next(fake().batches()).items():
        np.testing.assert_array_equal(value, whole[key][2 * process : 2 * process + 2])


def test_the_specs_are_those_of_the_batches_and_the_end_comes_when_asked():
    module = fake(total_num_batches=3)
    batches = list(module.batches())
    assert len(batches) == 3
    assert {k: (v.shape, v.dtype) for k, v in batches[0].items()} == {
        k: (tuple(v.shape), v.dtype) for k, v in module.element_spec().items()
    }


def test_the_empty_input_has_batches_without_arrays():
    module = EmptyInput.default_config().set(name="input", total_num_batches=2).instantiate(parent=None)
    assert list(module.batches()) == [{}, {}]
    assert module.element_spec() == {}


def test_made_up_rows_are_a_function_of_seed_place_and_purpose():
    def rows(n=6, **kwargs):
        source = fake_lm_source(**{"is_training": True, "max_sequence_length": 5, "vocab_size": 7, **kwargs})
        dataset = source()
        return [dataset[i] for i in range(n)]

    first = rows()
    for row, again in zip(first, rows(), strict=True):
        assert row.keys() == {"input_ids", "target_labels", "target_num_bytes"}
        np.testing.assert_array_equal(row["input_ids"][1:], row["target_labels"][:-1])
        np.testing.assert_array_equal(row["target_labels"], again["target_labels"])
        assert 0 <= row["input_ids"].min() <= row["input_ids"].max() < 7
        assert row["target_num_bytes"] == 5
    others = [rows(seed=1), rows(is_training=False, num_examples=6)]
    different = {row["input_ids"].tobytes() for part in (first, *others) for row in part}
    assert len(different) == 18


def test_made_up_rows_end_where_they_are_for_evaluation():
    source = fake_lm_source(is_training=False, max_sequence_length=5, vocab_size=7, num_examples=3)
    assert len(source()) == 3
    assert source.vocab_size() == 7
    with pytest.raises(ValueError, match="num_examples: None cannot be used"):
        fake_lm_source(is_training=False, max_sequence_length=5, vocab_size=7)
    with pytest.raises(ValueError, match="vocab_size: 0 cannot be used"):
        fake_lm_source(is_training=True, max_sequence_length=5, vocab_size=0)
