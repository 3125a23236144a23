"""A language model and an evaluation set whose rows are known one by one."""

import functools

import jax
import numpy as np

from axlearn.common.causal_lm import Model
from axlearn.common.config import Configurable, config_class
from axlearn.common.evaler import BaseMetricCalculator, SpmdEvaler
from axlearn.common.input_base import lm_element_spec
from axlearn.common.input_grain import Input
from axlearn.common.module import functional
from axlearn.common.utils import build_mesh, use_mesh
from tests.fixtures_reference import fuji_model_config, numpy_params

VOCAB_SIZE, SEQ_LEN, BATCH_SIZE, NUM_ROWS = 32, 8, 8, 21


def rows() -> dict[str, np.ndarray]:
    """All rows: their numbers of live targets differ, and so do the bytes that these stand for."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB_SIZE, size=(NUM_ROWS, SEQ_LEN + 1)).astype(np.int32)
    labels = ids[:, 1:].copy()
    labels[np.arange(SEQ_LEN) >= rng.integers(0, SEQ_LEN + 1, size=NUM_ROWS)[:, None]] = -1
    labels[:BATCH_SIZE][rng.random((BATCH_SIZE, SEQ_LEN)) < 0.8] = -1
    return {
        "input_ids": ids[:, :-1],
        "target_labels": labels,
        "target_num_bytes": ((labels >= 0).sum(-1) * rng.integers(1, 6, size=NUM_ROWS)).astype(np.int32),
        "input_segment_ids": np.ones((NUM_ROWS, SEQ_LEN), np.int32),
        "input_positions": np.broadcast_to(np.arange(SEQ_LEN, dtype=np.int32), (NUM_ROWS, SEQ_LEN)),
    }


class _RowSource(Configurable):
    """`rows()` as a source of examples."""

    @config_class
    class Config(Configurable.Config):
        pass

    def num_examples(self):
        return NUM_ROWS

    def example(self, *, epoch, index):
        del epoch
        return {key: value[index] for key, value in rows().items()}

    def dead_example(self):
        row = {key: np.zeros_like(value[0]) for key, value in rows().items()}
        return {**row, "target_labels": np.full([SEQ_LEN], -1, np.int32)}

    def element_spec(self):
        return lm_element_spec((SEQ_LEN,))

    def fingerprint(self):
        return {}

    def write_assets(self, directory):
        del directory


@functools.cache
def model_and_params() -> tuple[Model, dict]:
    """A model whose losses differ from token to token."""
    cfg = fuji_model_config(
        vocab_size=VOCAB_SIZE, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, feed_forward_dim=24
    )
    model = cfg.instantiate(parent=None)
    return model, numpy_params(model, scale=4.0)


@functools.cache
def live_log_probs_and_hits() -> tuple[np.ndarray, np.ndarray]:
    """Of every live target of all rows its log probability, in float64, and whether it is the likeliest id."""
    model, params = model_and_params()
    logits = jax.jit(
        lambda params, batch: functional(
            model, None, params, {"input_batch": batch}, method="extract_logits", is_training=False
        )[0]
    )(params, rows())
    x = np.asarray(logits, np.float64)
    log_probs = (
        x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
    )
    labels = rows()["target_labels"]
    picked = np.take_along_axis(log_probs, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return picked[labels >= 0], (x.argmax(-1) == labels)[labels >= 0]


def evaluate(calculator: BaseMetricCalculator.Config, *, dir: str) -> dict:
    """Returns the summaries of an evaluation of all rows, in batches over eight devices, the last one partial."""
    model, params = model_and_params()
    data = Input.default_config().set(source=_RowSource.default_config(), global_batch_size=BATCH_SIZE)
    cfg = SpmdEvaler.default_config().set(name="evaler", input=data, metric_calculator=calculator)
    cfg.summary_writer.dir = dir
    with use_mesh(build_mesh(mesh_shape=(8,), mesh_axis_names=("data",))):
        evaler = cfg.instantiate(parent=None, model=model)
        return evaler.eval_step(1, prng_key=jax.random.PRNGKey(0), model_params=params)[1]
