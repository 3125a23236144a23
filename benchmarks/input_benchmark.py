"""How many batches a second the input alone makes, and what it costs to start at a far step.

    python benchmarks/input_benchmark.py

The reference in the same run is the made-up input, which only draws random numbers: it bounds from above what
any reading input can do through the same iterator. Results are kept in `input_benchmark.md`.
"""

import argparse
import itertools
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from importlib import metadata

from axlearn.common import input_base, input_fake, input_grain
from axlearn.common.config import config_for_function
from axlearn.common.data_dir import set_data_dir
from axlearn.common.input_grain_lm import PackedTextSource
from axlearn.common.text_corpus import (
    Split,
    open_token_cache,
    python_standard_library,
    trained_sentencepiece,
)
from axlearn.experiments.text.common import DataMixtureComponent
from axlearn.experiments.text.gpt import common

# The tests write TFDS datasets without TensorFlow.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
from tests.tfds_files import write_text_dataset

# Far beyond what the caches of the first epochs can help with.
_FAR_STEP = 1_000_000


def packed_input(args: argparse.Namespace, *, num_read_threads: int) -> input_base.Input:
    """Returns the standard library as packed rows."""
    corpus = config_for_function(python_standard_library)
    source = PackedTextSource.default_config().set(
        corpus=corpus,
        vocab_cfg=config_for_function(trained_sentencepiece).set(vocab_size=args.vocab_size),
        max_sequence_length=args.seq_len,
    )
    cfg = input_grain.Input.default_config().set(
        name="input",
        is_training=True,
        source=source,
        global_batch_size=args.batch_size,
        num_read_threads=num_read_threads,
        num_prefetched_batches=2 * num_read_threads,
    )
    return cfg.instantiate(parent=None)


def prepared_input(args: argparse.Namespace, *, data_dir: str) -> input_base.Input:
    """Returns the same text as recipes on C4 read theirs: from array_record files, tokenised and packed as it comes."""
    write_text_dataset(data_dir, {"train": list(python_standard_library().texts(split=Split.TRAIN))})
    corpus = config_for_function(python_standard_library)
    with set_data_dir(data_dir):
        cfg, _ = common.input_configs(
            vocab_cfg=config_for_function(trained_sentencepiece).set(
                corpus=corpus, vocab_size=args.vocab_size
            ),
            vocab_size=args.vocab_size,
            max_sequence_length=args.seq_len,
            global_batch_size=args.batch_size,
            train_components=[DataMixtureComponent(name="c4/en:3.0.1", weight=1.0, shuffle_buffer_size=8192)],
            eval_splits={},
        )
        return cfg.set(name="input", is_training=True).instantiate(parent=None)


def fake_input(args: argparse.Namespace) -> input_base.Input:
    """Returns rows of random ids."""
    cfg = input_fake.FakeLmInput.default_config().set(
        name="input",
        is_training=True,
        global_batch_size=args.batch_size,
        source_length=args.seq_len,
        vocab_size=args.vocab_size,
    )
    return cfg.instantiate(parent=None)


def batches_per_second(module: input_base.Input, *, num_batches: int) -> float:
    """Returns the median rate of five stretches, after a warm-up of one."""
    iterator = module.batches()
    rates = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in itertools.islice(iterator, num_batches):
            pass
        rates.append(num_batches / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def first_batch_ms(module: input_base.Input, *, step: int) -> float:
    """Returns the median time from setting the position to having the batch there, in milliseconds."""
    times = []
    for attempt in range(5):
        iterator = module.batches()
        iterator.set_state({**iterator.get_state(), "next_step": step + attempt * 10_000})
        start = time.perf_counter()
        next(iterator)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--num_batches", type=int, default=300)
    args = parser.parse_args()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("grain", "sentencepiece", "numpy"))
    print(
        f"{platform.machine()}, Python {platform.python_version()}, {versions}, {time.strftime('%Y-%m-%d')}"
    )

    corpus = python_standard_library()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        vocab = trained_sentencepiece(corpus, vocab_size=args.vocab_size, cache_dir=f"{folder}/tokenizer")
        trained = time.perf_counter()
        cache = open_token_cache(corpus, vocab=vocab, cache_dir=f"{folder}/tokens")
        tokenised = time.perf_counter()
        num_tokens, num_bytes = len(cache.tokens), int(cache.num_bytes.sum())
        del cache
        open_token_cache(corpus, vocab=vocab, cache_dir=f"{folder}/tokens")
        opened = time.perf_counter()
    print(f"{num_bytes} bytes, {num_tokens} tokens: tokenizer {trained - start:.2f} s, ", end="")
    print(f"tokens {tokenised - trained:.2f} s, from the cache {opened - tokenised:.3f} s")

    modules = {"made up": fake_input(args)}
    for threads in (0, 1, 2):
        modules[f"packed text, {threads} read threads"] = packed_input(args, num_read_threads=threads)
    tokens = args.batch_size * args.seq_len
    print(f"{'batches of ' + str(args.batch_size) + ' x ' + str(args.seq_len):32}", end="")
    print(f"{'batches/s':>12}{'tokens/s':>14}{'first batch, ms':>18}{'at step 1e6, ms':>18}")
    for name, module in modules.items():
        rate = batches_per_second(module, num_batches=args.num_batches)
        first, far = first_batch_ms(module, step=0), first_batch_ms(module, step=_FAR_STEP)
        print(f"{name:32}{rate:12.0f}{rate * tokens:14.3g}{first:18.2f}{far:18.2f}")
    with tempfile.TemporaryDirectory() as folder, set_data_dir(folder):
        module = prepared_input(args, data_dir=folder)
        rate = batches_per_second(module, num_batches=args.num_batches)
        start = time.perf_counter()
        next(module.batches())
        first = (time.perf_counter() - start) * 1e3
        # It has no step to jump to: a saved position says where its text goes on.
        print(f"{'prepared text, packed as it comes':32}{rate:12.0f}{rate * tokens:14.3g}{first:18.2f}")


if __name__ == "__main__":
    main()
