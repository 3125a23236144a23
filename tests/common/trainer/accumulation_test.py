"""Gradient accumulation in a trainer together with everything else that touches a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common.attention import build_remat_spec
from axlearn.common.config import config_for_function
from axlearn.common.input_fake import FakeLmInput
from axlearn.common.jax_compat import scan_operand_counts
from axlearn.common.metrics import WeightedSummary
from axlearn.common.module import OutputCollection
from axlearn.common.optimizers import param_ema, skip_and_clip_by_global_norm
from axlearn.common.schedule import decay_bias_correction
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.trainer._step import _loss_weight
from axlearn.common.trainer_config_modifier import GradientAccumulationModifier
from axlearn.common.utils import flatten_items
from axlearn.experiments.text.gpt import common, fuji_tiny

_VOCAB_SIZE, _SEQ_LEN, _BATCH_SIZE = 32, 16, 8


def _config(*, grad_acc_steps: int) -> SpmdTrainer.Config:
    cfg = fuji_tiny.trainer_config()
    cfg.set(dir="unused", evalers={}, mesh_shape=common.mesh_shape_from_axes())
    cfg.model.decoder.set(dim=16, vocab_size=_VOCAB_SIZE)
    cfg.model.decoder.transformer.num_layers = 2
    cfg.learner = common.learner_config(peak_lr=3e-3, max_step=100, warmup_steps=1, weight_decay=1e-4)
    cfg.input = FakeLmInput.default_config().set(
        global_batch_size=_BATCH_SIZE, source_length=_SEQ_LEN, vocab_size=_VOCAB_SIZE
    )
    GradientAccumulationModifier.default_config().set(grad_acc_steps=grad_acc_steps).instantiate()(cfg)
    return cfg


def _with_everything(cfg: SpmdTrainer.Config) -> SpmdTrainer.Config:
    """The same with logits in chunks, rematerialization, averaged weights, and steps that may be left out."""
    cfg.model.scan_chunk = 8
    stack = cfg.model.decoder.transformer
    stack.layer.remat_spec = build_remat_spec(stack)
    cfg.learner.ema = config_for_function(param_ema).set(
        decay=config_for_function(decay_bias_correction).set(decay=0.9)
    )
    cfg.learner.optimizer = config_for_function(skip_and_clip_by_global_norm).set(
        inner=cfg.learner.optimizer.args[1], max_norm=1.0, drop_norm=100.0
    )
    return cfg


def _trainer(cfg: SpmdTrainer.Config) -> SpmdTrainer:
    return cfg.klass(cfg.clone(), parent=None, devices=np.array(jax.devices()[:1]).reshape(cfg.mesh_shape))


def _batch(num_live: list[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(_VOCAB_SIZE, size=(_BATCH_SIZE, _SEQ_LEN + 1)).astype(np.int32)
    is_live = np.arange(_SEQ_LEN) < np.array(num_live)[:, None]
    return {
        "input_ids": ids[:, :-1],
        "target_labels": np.where(is_live, ids[:, 1:], -1).astype(np.int32),
        "input_segment_ids": np.ones((_BATCH_SIZE, _SEQ_LEN), np.int32),
        "input_positions": np.tile(np.arange(_SEQ_LEN, dtype=np.int32), (_BATCH_SIZE, 1)),
        "target_num_bytes": np.array(num_live, np.int32),
    }


def _steps(cfg: SpmdTrainer.Config, batches) -> list[dict[str, np.ndarray]]:
    """The numbers after each step, from the same state."""
    trainer = _trainer(cfg)
    trainer.init(jax.random.PRNGKey(3))
    found = []
    with trainer.mesh():
        step_fn, state = trainer.compile_train_step(), trainer.trainer_state
        for batch in batches:
            state, outputs = step_fn(state, batch)
            numbers = {"state": state._asdict(), "loss": outputs["loss"], "summaries": outputs["summaries"]}
            found.append({path: np.asarray(x) for path, x in flatten_items(numbers)})
    return found


def test_chunks_remat_averages_and_clipping_give_the_numbers_of_the_whole_batch():
    batches = [
        _batch([16, 3, 0, 9, 1, 0, 16, 2]),
        # Rows 1 and 5 are one micro-batch, without a target; then nothing has one.
        _batch([5, 0, 7, 2, 3, 0, 4, 1]),
        _batch([0] * 8),
    ]
    whole, parts = (_steps(_with_everything(_config(grad_acc_steps=steps)), batches) for steps in (1, 4))
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours.keys() == theirs.keys()
        for path, expected in theirs.items():
            scale = np.abs(expected).max(initial=1e-6)
            # Adam divides small gradients by their own size, rounding included.
            tolerance = 1e-4 if path.startswith("state/") else 1e-5
            np.testing.assert_allclose(ours[path], expected, rtol=0, atol=tolerance * scale, err_msg=path)
    assert parts[2]["loss"] == 0
    assert "summaries/learner/optimizer/gradient_norm" in parts[0]


def test_in_bfloat16_the_gradients_are_accumulated_in_float32():
    cfg = _config(grad_acc_steps=4).set(train_dtype=jnp.bfloat16)
    trainer = _trainer(cfg)
    with trainer.mesh():
        specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trainer.trainer_state_specs)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _batch([1] * 8))
        jaxpr = trainer._programs.jit_train_step().trace(specs, batch).jaxpr
    carries = []
    for eqn in _equations(jaxpr):
        if eqn.primitive.name == "scan" and eqn.params["length"] == 4:
            num_consts, num_carry = scan_operand_counts(eqn.params)
            carries.append([v.aval for v in eqn.invars[num_consts:][:num_carry]])
    shapes = sorted(tuple(spec.shape) for _, spec in flatten_items(trainer.trainer_state_specs.model))
    (gradients,) = [carry for carry in carries if sorted(aval.shape for aval in carry) == shapes]
    assert {aval.dtype for aval in gradients} == {jnp.dtype("float32")}


def _equations(jaxpr):
    """All equations, those of inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


@pytest.mark.parametrize(
    ("summaries", "weight"),
    [
        ({"loss": WeightedSummary(1.0, 7.0)}, 7.0),
        ({"loss": 1.0}, None),
        ({"other": WeightedSummary(1.0, 7.0)}, None),
    ],
)
def test_a_model_says_by_its_summary_what_its_loss_is_a_mean_over(summaries, weight):
    found = _loss_weight(OutputCollection(summaries=summaries, state_updates={}, module_outputs={}))
    assert (None if found is None else float(found)) == weight
