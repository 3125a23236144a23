"""The inputs of a language model's recipe: a mixture of prepared datasets to train on, others to evaluate on."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

from jax.sharding import PartitionSpec

from axlearn.common.config import InstantiableConfig, config_for_function, config_to_json, maybe_set_config
from axlearn.common.data_dir import FAKE, get_data_dir, set_data_dir
from axlearn.common.input_base import partition_by_path_rank
from axlearn.common.input_dispatch import InputDispatcher
from axlearn.common.input_fake import fake_lm_source
from axlearn.common.input_lm import (
    lm_text_preprocessor,
    packed_row_spec,
    text_to_lm_eval_input,
    text_to_lm_training_input,
)
from axlearn.common.input_tf_data import (
    BuildDatasetFn,
    Dataset,
    DatasetToDatasetFn,
    Input,
    VocabSource,
    identity,
    per_feed_batch,
    sample_from_datasets,
)
from axlearn.common.vocabulary import Vocabulary
from axlearn.experiments.text.common import DataMixtureComponent, tfds_text_source
from axlearn.experiments.text.gpt.common._mesh import BATCH_AXIS_NAMES

# Raise when the same config gives other rows or another order.
_ORDER_VERSION = 1
# Batches of an evaluation on made-up data.
_NUM_FAKE_EVAL_BATCHES = 2


def _vocab_loader(vocab_cfg: InstantiableConfig[Vocabulary]) -> Callable[[], Vocabulary]:
    """Returns a function that loads a tokenizer, by the data directory of now."""
    return functools.partial(_load_vocab, vocab_cfg, get_data_dir())


@functools.lru_cache(maxsize=1)
def _cached_vocabularies() -> dict[tuple[Optional[str], str], Vocabulary]:
    return {}


def _load_vocab(vocab_cfg: InstantiableConfig[Vocabulary], data_dir: Optional[str]) -> Vocabulary:
    # Training and evaluations share one: the larger ones take a second to load.
    loaded, key = _cached_vocabularies(), (data_dir, config_to_json(vocab_cfg))
    if key not in loaded:
        with set_data_dir(data_dir):
            loaded[key] = vocab_cfg.instantiate()
    return loaded[key]


def _rows_of_text(
    text: BuildDatasetFn,
    *,
    vocab_cfg: InstantiableConfig[Vocabulary],
    max_sequence_length: int,
    rows_fn: Callable[[InstantiableConfig[Vocabulary]], DatasetToDatasetFn],
) -> VocabSource:
    """Returns a source of rows.

    Args:
        text: Builds the texts.
        vocab_cfg: The tokenizer, which is loaded when the source is first asked for something that needs it.
        max_sequence_length: Number of positions of a row.
        rows_fn: Makes the function from texts to rows, from the config of the tokenizer.
    """
    source: VocabSource

    def build(_: Vocabulary) -> Dataset:
        return rows(text())

    source = VocabSource(
        build,
        vocab=_vocab_loader(vocab_cfg),
        element_spec=packed_row_spec(max_sequence_length),
        order_version=_ORDER_VERSION,
        fingerprint=getattr(text, "fingerprint", None) or dict,
    )
    # Made now, so that what is wrong with it is said now; it takes the tokenizer that the source has loaded.
    rows = rows_fn(config_for_function(source.vocab))
    return source


def mixture_train_input_source(
    *,
    vocab_cfg: InstantiableConfig[Vocabulary],
    preprocessor: InstantiableConfig[DatasetToDatasetFn],
    data_mixture_components: Sequence[DataMixtureComponent],
    max_sequence_length: int,
    replace_newlines_with: str = "<n>",
    seed: Optional[int] = None,
) -> BuildDatasetFn:
    """Returns a source of packed rows of a mixture of prepared datasets, without an end.

    Args:
        vocab_cfg: The tokenizer.
        preprocessor: Builds the function from texts to rows. Its fields vocab_cfg, max_sequence_length,
            replace_newlines_with and is_training are set here, and its seed where it has none.
        data_mixture_components: The datasets, each epoch after epoch in a drawn order, and their parts of the
            documents.
        max_sequence_length: Number of positions of a row.
        replace_newlines_with: What stands for a newline in the text that the tokenizer sees.
        seed: Chooses the order of documents and of rows; not negative. None: 0.

    Raises:
        ValueError: If a value is out of range.
    """
    components = list(data_mixture_components)
    text = sample_from_datasets(
        sources=[
            tfds_text_source(
                dataset_name=component.name,
                split=component.split,
                is_training=True,
                train_shuffle_buffer_size=component.shuffle_buffer_size,
                seed=(seed or 0, i),
            )
            for i, component in enumerate(components)
        ],
        weights=[component.weight for component in components],
    )

    def rows_fn(loaded: InstantiableConfig[Vocabulary]) -> DatasetToDatasetFn:
        cfg = maybe_set_config(
            preprocessor.clone(),
            vocab_cfg=loaded,
            max_sequence_length=max_sequence_length,
            replace_newlines_with=replace_newlines_with,
            is_training=True,
        )
        if getattr(cfg, "seed", 0) is None:
            cfg.set(seed=seed)
        fn: DatasetToDatasetFn = cfg.instantiate()
        return fn

    return _rows_of_text(text, vocab_cfg=vocab_cfg, max_sequence_length=max_sequence_length, rows_fn=rows_fn)


def tfds_input(
    *,
    is_training: bool,
    dataset_name: str,
    split: str,
    vocab_cfg: InstantiableConfig[Vocabulary],
    max_sequence_length: int,
    train_shuffle_buffer_size: int = 1024 * 16,
    replace_newlines_with: str = "\n",
    seed: Optional[int] = None,
) -> BuildDatasetFn:
    """Returns a source of rows of one prepared dataset.

    Args:
        is_training: True: packed rows without an end (`text_to_lm_training_input`). False: every document once,
            in rows of its own (`text_to_lm_eval_input`).
        dataset_name: The dataset, such as `c4/en:3.0.1`.
        split: The split, or an expression such as `train[:8192]`.
        vocab_cfg: The tokenizer.
        max_sequence_length: Number of positions of a row.
        train_shuffle_buffer_size: For training: number of consecutive documents within which the order is drawn,
            and at most how many rows; 0: nothing is shuffled. For evaluation it makes no difference.
        replace_newlines_with: What stands for a newline in the text that the tokenizer sees.
        seed: For training, chooses the order. None: 0.

    Raises:
        ValueError: If a value is out of range.
    """
    text = tfds_text_source(
        dataset_name=dataset_name,
        split=split,
        is_training=is_training,
        train_shuffle_buffer_size=train_shuffle_buffer_size,
        seed=(seed or 0,),
    )

    def rows_fn(loaded: InstantiableConfig[Vocabulary]) -> DatasetToDatasetFn:
        if not is_training:
            return text_to_lm_eval_input(
                loaded, max_sequence_length, replace_newlines_with=replace_newlines_with
            )
        return text_to_lm_training_input(
            loaded,
            max_sequence_length,
            replace_newlines_with=replace_newlines_with,
            shuffle_buffer_size=train_shuffle_buffer_size,
            seed=seed,
        )

    return _rows_of_text(text, vocab_cfg=vocab_cfg, max_sequence_length=max_sequence_length, rows_fn=rows_fn)


def _input_config(
    source: InstantiableConfig[Any], *, is_training: bool, global_batch_size: int
) -> Input.Config:
    return Input.default_config().set(
        is_training=is_training,
        source=source,
        processor=config_for_function(identity),
        batcher=config_for_function(per_feed_batch),
        input_dispatcher=InputDispatcher.default_config().set(global_logical_batch_size=global_batch_size),
    )


def input_configs(
    *,
    max_sequence_length: int,
    global_batch_size: int,
    vocab_cfg: InstantiableConfig[Vocabulary],
    vocab_size: int,
    train_components: Sequence[DataMixtureComponent],
    eval_splits: Mapping[str, tuple[str, str]],
    eval_replace_newlines_with: str = "\n",
) -> tuple[Input.Config, dict[str, Input.Config]]:
    """Returns the inputs of a recipe: to train on, and by the name of the evaler those to evaluate on.

    With the data directory `FAKE` when this is called, the rows are drawn from the ids of the model, and no
    dataset and no tokenizer is needed; the rest of the configs is the same.

    Args:
        max_sequence_length: Number of positions of a row.
        global_batch_size: Number of rows of a batch, over all processes.
        vocab_cfg: The tokenizer.
        vocab_size: The model's number of ids, for rows that are drawn.
        train_components: The datasets to train on.
        eval_splits: By the name of the evaler: dataset and split.
        eval_replace_newlines_with: What stands for a newline in the text to evaluate on.
    """
    is_fake = get_data_dir() == FAKE
    fake_source = config_for_function(fake_lm_source).set(
        max_sequence_length=max_sequence_length, vocab_size=vocab_size
    )
    train_source: InstantiableConfig[Any] = fake_source.clone(is_training=True)
    if not is_fake:
        train_source = config_for_function(mixture_train_input_source).set(
            vocab_cfg=vocab_cfg,
            preprocessor=config_for_function(lm_text_preprocessor).set(
                window_size=128, max_padding_fraction=0.5, shuffle_buffer_size=8192
            ),
            data_mixture_components=list(train_components),
            max_sequence_length=max_sequence_length,
        )
    train_input = _input_config(train_source, is_training=True, global_batch_size=global_batch_size)
    train_input.input_partitioner = config_for_function(partition_by_path_rank).set(
        path_rank_to_partition={
            (None, 1): PartitionSpec(BATCH_AXIS_NAMES),
            (None, 2): PartitionSpec(BATCH_AXIS_NAMES, "seq"),
        }
    )

    def eval_source(index: int, dataset_name: str, split: str) -> InstantiableConfig[Any]:
        if is_fake:
            return fake_source.clone(
                is_training=False, num_examples=_NUM_FAKE_EVAL_BATCHES * global_batch_size, seed=index
            )
        return config_for_function(tfds_input).set(
            is_training=False,
            dataset_name=dataset_name,
            split=split,
            vocab_cfg=vocab_cfg,
            max_sequence_length=max_sequence_length,
            replace_newlines_with=eval_replace_newlines_with,
        )

    eval_inputs = {
        name: _input_config(
            eval_source(i, dataset_name, split), is_training=False, global_batch_size=global_batch_size
        )
        for i, (name, (dataset_name, split)) in enumerate(eval_splits.items())
    }
    return train_input, eval_inputs
