"""The inputs of the recipes on prepared data: order, position, bytes, and made-up data in their place."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from axlearn.common.config import config_for_function
from axlearn.common.data_dir import FAKE, set_data_dir
from axlearn.common.vocabulary import load_vocabulary, train_sentencepiece
from axlearn.experiments.text.common import DataMixtureComponent, vocab
from axlearn.experiments.text.gpt import common
from tests.tfds_files import write_text_dataset

LENGTH, BATCH = 16, 4
C4, WIKI = "c4/en:3.0.1", "wiki/de:1.0.0"
TRAIN = [f"document {i}\nof C4, größer " + "word " * (i % 7) for i in range(60)]
OTHER = [f"Artikel {i} von Wikipedia" for i in range(40)]
HELDOUT = [f"held out {i}\nvalue" * (1 + i % 3) for i in range(9)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_text_dataset(root, {"train": TRAIN, "validation": HELDOUT})
    write_text_dataset(root, {"train": OTHER}, builder="wiki", config="de", version="1.0.0")
    folder = root / "tokenizers" / "sentencepiece"
    folder.mkdir(parents=True)
    lines = [line for text in TRAIN + OTHER for line in text.split("\n")]
    (folder / "small.model").write_bytes(train_sentencepiece(lines, vocab_size=320))
    return root


def configs(*, components=None, **kwargs):
    return common.input_configs(
        **{
            "max_sequence_length": LENGTH,
            "global_batch_size": BATCH,
            "vocab_cfg": config_for_function(vocab).set(sentencepiece_model_name="small.model"),
            "vocab_size": 320,
            "train_components": components or [DataMixtureComponent(name=C4, weight=1.0)],
            "eval_splits": {"train": (C4, "train[:5]"), "validation": (C4, "validation")},
            **kwargs,
        }
    )


def train_input(data_dir, change=None, **kwargs):
    with set_data_dir(str(data_dir)):
        cfg, _ = configs(**kwargs)
        cfg.set(name="input")
        if change is not None:
            change(cfg)
        return cfg.instantiate(parent=None)


def eval_input(data_dir, name, **kwargs):
    with set_data_dir(str(data_dir)):
        return configs(**kwargs)[1][name].set(name="input").instantiate(parent=None)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_evaluation_sees_every_byte_of_every_document_once(data_dir):
    module = eval_input(data_dir, "validation")
    batches = list(module.batches())
    assert sum(int(batch["target_num_bytes"].sum()) for batch in batches) == sum(
        len(text.encode()) for text in HELDOUT
    )
    tokenizer = module.source.vocab()
    ids = np.concatenate([batch["target_labels"][batch["target_labels"] >= 0] for batch in batches])
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    seen = [tokenizer.decode(part.tolist()) for part in np.split(ids, ends + 1)[:-1]]
    assert sorted(seen) == sorted(HELDOUT)
    assert all(batch["input_ids"].shape == (BATCH, LENGTH) for batch in batches)
    # Batches of whole rows at the end too.
    assert len(batches) == -(
        -sum(int(np.any(b["target_labels"] >= 0, axis=1).sum()) for b in batches) // BATCH
    )
    assert len(list(eval_input(data_dir, "train").batches())) > 0


def no_loss(cfg):
    cfg.source.preprocessor.set(max_padding_fraction=1.0, shuffle_buffer_size=0, window_size=20)


def test_an_epoch_of_training_has_every_document_once(data_dir):
    module = train_input(data_dir, no_loss)
    tokenizer = module.source.vocab()
    num_tokens = sum(len(tokenizer.encode(text.replace("\n", "<n>"))) + 1 for text in TRAIN)
    ids = np.zeros([0], np.int32)
    for batch in module.batches():
        ids = np.concatenate([ids, batch["target_labels"][batch["target_labels"] >= 0]])
        if len(ids) >= 2 * num_tokens:
            break
    for epoch in range(2):
        part = ids[epoch * num_tokens : (epoch + 1) * num_tokens]
        texts = [
            tokenizer.decode(piece.tolist())
            for piece in np.split(part, np.flatnonzero(part == tokenizer.eos_id) + 1)[:-1]
        ]
        assert sorted(texts) == sorted(text.replace("\n", "<n>") for text in TRAIN)


def test_no_more_is_lost_than_what_would_be_mostly_padding(data_dir):
    """Of 60 documents in windows of 20, each of three last rows loses less than half of a row."""
    module = train_input(
        data_dir, lambda cfg: cfg.source.preprocessor.set(shuffle_buffer_size=0, window_size=20)
    )
    tokenizer = module.source.vocab()
    num_tokens = sum(len(tokenizer.encode(text.replace("\n", "<n>"))) + 1 for text in TRAIN)
    rows = itertools.chain.from_iterable(batch["target_labels"] for batch in module.batches())
    num_seen = sum(int(np.sum(row >= 0)) for row in itertools.islice(rows, num_tokens // LENGTH))
    assert num_tokens - 4 * LENGTH / 2 - LENGTH < num_seen <= num_tokens


def test_labels_are_the_next_ids_and_padding_is_no_target(data_dir):
    for batch in itertools.islice(train_input(data_dir).batches(), 20):
        ids, labels = batch["input_ids"], batch["target_labels"]
        live = labels >= 0
        np.testing.assert_array_equal(ids[:, 1:][live[:, 1:]], labels[:, :-1][live[:, 1:]])
        # At most half of a row is padding.
        assert live.sum(axis=1).min() >= LENGTH / 2


def test_a_mixture_draws_from_its_datasets_by_their_weights(data_dir):
    components = [
        DataMixtureComponent(name=C4, weight=3.0, shuffle_buffer_size=16, info="three parts"),
        DataMixtureComponent(name=WIKI, weight=1.0, split="train[:50%]"),
    ]
    module = train_input(data_dir, no_loss, components=components)
    tokenizer = module.source.vocab()
    ids = np.concatenate(
        [b["target_labels"][b["target_labels"] >= 0] for b in itertools.islice(module.batches(), 60)]
    )
    text = tokenizer.decode(ids.tolist())
    assert text.count("Wikipedia") == pytest.approx(text.count("C4") / 3, abs=1.5)
    assert len({n for n in range(40) if f"Artikel {n} " in text}) == 20


def test_a_run_continues_where_it_stood_on_any_number_of_processes(data_dir):
    iterator = train_input(data_dir).batches()
    batches = [next(iterator) for _ in range(12)]
    state = json.loads(json.dumps(iterator.get_state()))
    batches += [next(iterator) for _ in range(4)]
    other = train_input(data_dir).batches()
    other.set_state(state)
    assert all(same(a, b) for a, b in zip(itertools.islice(other, 4), batches[12:], strict=True))
    for feed in range(2):
        part = train_input(
            data_dir,
            lambda cfg, feed=feed: cfg.input_dispatcher.set(num_physical_feeds=2, physical_feed_index=feed),
        ).batches()
        part.set_state(state)
        for batch, whole in zip(itertools.islice(part, 4), batches[12:], strict=True):
            assert same(batch, {k: v[2 * feed : 2 * feed + 2] for k, v in whole.items()})


def test_a_position_is_not_taken_to_other_data(data_dir):
    state = train_input(data_dir).batches().get_state()
    with pytest.raises(ValueError, match=r"number of documents in wiki/de:1\.0\.0 train was None, is 40"):
        train_input(data_dir, components=[DataMixtureComponent(name=WIKI, weight=1.0)]).batches().set_state(
            state
        )
    with pytest.raises(ValueError, match=r"source\.seed was None, is '1'"):
        train_input(data_dir, lambda cfg: cfg.source.set(seed=1)).batches().set_state(state)


@pytest.mark.parametrize("shuffle_buffer_size", [0, 64])
def test_a_seed_chooses_the_order_of_documents_and_of_rows(data_dir, shuffle_buffer_size):
    def first(seed):
        def change(cfg):
            cfg.source.seed = seed
            cfg.source.preprocessor.shuffle_buffer_size = shuffle_buffer_size

        return next(train_input(data_dir, change).batches())

    assert same(first(None), first(0))
    assert not same(first(0), first(1))


def test_one_dataset_can_be_trained_on_without_a_mixture(data_dir):
    with set_data_dir(str(data_dir)):
        cfg, _ = configs()
        cfg.source = config_for_function(common.tfds_input).set(
            dataset_name=C4, split="train", vocab_cfg=cfg.source.vocab_cfg, max_sequence_length=LENGTH,
            is_training=True,
        )  # fmt: skip
        module = cfg.set(name="input").instantiate(parent=None)
    batch = next(module.batches())
    assert {k: (tuple(v.shape), v.dtype) for k, v in module.element_spec().items()} == {
        k: (v.shape, v.dtype) for k, v in batch.items()
    }


def test_nothing_is_read_before_batches_are_asked_for():
    module = train_input("/nowhere")
    assert module.element_spec()["input_ids"].shape == (BATCH, LENGTH)
    with pytest.raises(ValueError, match=r"/nowhere/tokenizers/sentencepiece/small\.model"):
        module.batches()


def test_a_missing_dataset_is_said_before_the_first_batch(data_dir):
    component = DataMixtureComponent(name="c4/fr:1.0.0", weight=1.0)
    with pytest.raises(ValueError, match=r"no dataset 'c4/fr:1\.0\.0'"):
        train_input(data_dir, components=[component]).batches()


def test_values_out_of_range_are_refused_when_the_input_is_made(data_dir):
    with pytest.raises(ValueError, match="one positive number per source"):
        train_input(data_dir, components=[DataMixtureComponent(name=C4, weight=0.0)])
    with pytest.raises(ValueError, match="window_size: 0 cannot be used"):
        train_input(data_dir, lambda cfg: cfg.source.preprocessor.set(window_size=0))


def test_the_tokenizer_is_kept_with_the_run(data_dir, tmp_path):
    module = train_input(data_dir)
    module.write_assets(tmp_path / "tokenizer")
    assert load_vocabulary(tmp_path / "tokenizer").fingerprint == module.source.vocab().fingerprint
    assert module.vocab_size == 320


def test_made_up_data_have_the_shapes_of_real_ones_and_legal_ids(data_dir):
    real, fake = train_input(data_dir), train_input(FAKE, vocab_size=32)
    assert fake.element_spec() == real.element_spec()
    assert fake.vocab_size == 32
    batches = list(itertools.islice(fake.batches(), 5))
    assert not same(batches[0], batches[1])
    assert all(x.min() >= 0 and x.max() < 32 for b in batches for x in (b["input_ids"], b["target_labels"]))
    np.testing.assert_array_equal(batches[0]["input_ids"][:, 1:], batches[0]["target_labels"][:, :-1])
    at_step = train_input(FAKE, vocab_size=32).batches()
    at_step.set_step(4)
    assert same(next(at_step), batches[4])
    evals = {name: list(eval_input(FAKE, name).batches()) for name in ("train", "validation")}
    assert {name: len(b) for name, b in evals.items()} == {"train": 2, "validation": 2}
    assert not same(evals["train"][0], evals["validation"][0])


def test_only_the_sources_of_made_up_data_differ():
    def lines(data_dir):
        with set_data_dir(data_dir):
            train, evals = configs()
        return {
            f"{i}.{line}"
            for i, cfg in enumerate([train, *evals.values()])
            for line in cfg.debug_string().split("\n")
        }

    differing = lines(FAKE) ^ lines("/data")
    assert differing
    assert all(line[2:].startswith("source.") for line in differing)


def test_made_up_data_load_no_tensorflow():
    code = (
        "import sys\n"
        "import tests.experiments.text.gpt.sources_test as t\n"
        "assert 'grain' not in sys.modules and 'tensorflow_datasets' not in sys.modules\n"
        "next(t.train_input(t.FAKE).batches())\n"
        "print([m for m in ('tensorflow', 'tensorflow_datasets') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
