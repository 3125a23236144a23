"""What recipes for decoder-only language models share: mesh axes, layer stack, learner, the trainer's frame.

Each function returns a general config that holds what it was told and nothing about a model family; the facts of
a family stand in its own module, such as `fuji`.
"""

import math
from collections.abc import Sequence
from typing import Optional, Union

import jax.numpy as jnp

from axlearn.common.attention import (
    FusedGroupedQKVLinear,
    GroupedQueryAttention,
    RepeatedTransformerLayer,
    RoFormerQKVLinear,
    TransformerLayer,
    build_remat_spec,
    set_double_shard_weights_config,
)
from axlearn.common.causal_lm import Model
from axlearn.common.checkpointer import Checkpointer, every_n_steps_and_last_policy
from axlearn.common.config import InstantiableConfig, config_for_function
from axlearn.common.decoder import Decoder
from axlearn.common.embedding import TransformerTextEmbeddings
from axlearn.common.evaler import SpmdEvaler, every_n_steps_policy
from axlearn.common.kv_cache.kv_cache import KVCache
from axlearn.common.layers import RMSNorm, set_bias_recursively, set_norm_recursively
from axlearn.common.learner import Learner
from axlearn.common.optimizers import adamw_decoupled_optimizer, chain, clip_by_global_norm
from axlearn.common.param_init import PARAM_REGEXP_WEIGHT, DefaultInitializer, WeightInitializer
from axlearn.common.schedule import cosine_with_linear_warmup
from axlearn.common.summary_writer import SummaryWriter
from axlearn.common.trainer import SpmdTrainer

# Outermost first: an axis further right holds devices that are closer together.
MESH_AXIS_NAMES = ("pipeline", "data", "expert", "fsdp", "seq", "model")
# The axes that divide a batch between devices, and those that divide each weight.
BATCH_AXIS_NAMES = ("data", "expert", "fsdp")
WEIGHT_AXIS_NAMES = ("expert", "fsdp", "seq")


def mesh_shape_from_axes(
    *, pipeline: int = 1, data: int = 1, expert: int = 1, fsdp: int = 1, seq: int = 1, model: int = 1
) -> tuple[int, ...]:
    """Returns a mesh shape in the order of `MESH_AXIS_NAMES`; at most one size may be -1, to be inferred."""
    return (pipeline, data, expert, fsdp, seq, model)


def scale_fn(input_dim: int, *, scale: float, round_up_to_multiples_of: int) -> int:
    """Returns `input_dim * scale`, rounded up to a multiple of `round_up_to_multiples_of`."""
    return math.ceil(input_dim * scale / round_up_to_multiples_of) * round_up_to_multiples_of


def scaled_hidden_dim(*, scale: float, round_up_to_multiples_of: int) -> InstantiableConfig[int]:
    """Returns the config of a feed-forward width that follows the model's width."""
    return config_for_function(scale_fn).set(scale=scale, round_up_to_multiples_of=round_up_to_multiples_of)


def weight_init(*, fan: str, scale: float = 1.0) -> DefaultInitializer.Config:
    """Returns an initializer that draws weights from N(0, scale / fan) and leaves norms and biases at their defaults.

    Args:
        fan: "fan_in" or "fan_out": what the variance is divided by.
        scale: The variance before the division.
    """
    return DefaultInitializer.default_config().set(
        init_by_param_name={
            PARAM_REGEXP_WEIGHT: WeightInitializer.default_config().set(
                fan=fan, distribution="normal", scale=scale
            )
        }
    )


def attention_config(
    *, num_heads: int, num_kv_heads: int, rope_theta: float, kv_cache_dtype: Optional[type] = jnp.bfloat16
) -> GroupedQueryAttention.Config:
    """Returns causal grouped-query attention with a fused projection and rotary positions."""
    attention = GroupedQueryAttention.default_config().set(
        num_heads=num_heads,
        causal=True,
        kv_cache=KVCache.default_config().set(cache_dtype=kv_cache_dtype),
        input_linear=RoFormerQKVLinear.default_config().set(
            input_linear=FusedGroupedQKVLinear.default_config().set(num_kv_heads=num_kv_heads),
            rotary_value=False,
        ),
    )
    attention.input_linear.rope_pos_emb_layer.set(theta=rope_theta)
    return attention


def layer_config(
    *,
    attention: GroupedQueryAttention.Config,
    feed_forward_dim: Union[int, InstantiableConfig[int]],
    norm: RMSNorm.Config,
) -> TransformerLayer.Config:
    """Returns a pre-norm transformer layer with a SwiGLU feed-forward (https://arxiv.org/abs/2002.05202)."""
    layer = TransformerLayer.default_config()
    layer.self_attention.set(attention=attention, structure="prenorm")
    layer.feed_forward.set(
        hidden_dim=feed_forward_dim,
        activation=("nn.silu", "linear"),
        structure="prenorm",
        residual_weight=1.0,
    )
    set_double_shard_weights_config(
        layer,
        batch_axis_names=BATCH_AXIS_NAMES,
        fsdp_axis_names=WEIGHT_AXIS_NAMES,
        tp_axis_names="model",
        seq_axis_names="seq",
    )
    set_bias_recursively(layer, bias=False)
    set_norm_recursively(layer, norm)
    return layer


def model_config(
    *,
    vocab_size: int,
    dim: int,
    num_layers: int,
    layer: TransformerLayer.Config,
    norm: RMSNorm.Config,
    pad_token_id: int = 0,
    eos_token_id: int = 1,
    remat: bool = True,
) -> Model.Config:
    """Returns a causal language model: a scanned stack of one layer between a token embedding and its tied head.

    Args:
        vocab_size: Rows of the embedding.
        dim: The model's width.
        num_layers: Layers in the stack.
        layer: The config of one layer.
        norm: The norm between the last layer and the head.
        pad_token_id: The id that fills a row behind its last token.
        eos_token_id: The id behind the last token of a document.
        remat: Whether the backward pass keeps of each layer only the projections and the attention's context,
            and recomputes the rest.
    """
    stack = RepeatedTransformerLayer.default_config().set(num_layers=num_layers, layer=layer)
    if remat:
        stack.layer.set(remat_spec=build_remat_spec(stack))
    emb = TransformerTextEmbeddings.default_config()
    emb.token_emb.set(param_partition_spec=(None, "model"), param_init=weight_init(fan="fan_out"))
    decoder = Decoder.default_config().set(
        attention_mask=None,
        vocab_size=vocab_size,
        dim=dim,
        dropout_rate=0.0,
        emb=emb,
        transformer=stack,
        output_norm=norm,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        logits_partition_spec=(BATCH_AXIS_NAMES, "seq", "model"),
    )
    return Model.default_config().set(
        decoder=decoder,
        batch_axis_names=None,
        dtype=jnp.float32,
        param_init=weight_init(fan="fan_in"),
    )


def rms_norm_config(*, eps: float = 1e-5) -> RMSNorm.Config:
    """Returns an RMSNorm that computes in the type of its input."""
    return RMSNorm.default_config().set(eps=eps, forward_dtype=None)


def learner_config(
    *,
    peak_lr: float,
    max_step: int,
    warmup_steps: int = 2000,
    weight_decay: float,
    alpha: float = 0.1,
    b2: float = 0.95,
) -> Learner.Config:
    """Returns decoupled AdamW behind a clip of the global gradient norm at 1.

    The schedule runs from 0 over `warmup_steps` to 1 and by a cosine to `alpha` at `max_step`; it scales the
    learning rate and the weight decay alike (https://arxiv.org/abs/1711.05101).
    """
    return Learner.default_config().set(
        optimizer=config_for_function(chain).set(
            args=[
                config_for_function(clip_by_global_norm).set(max_norm=1),
                config_for_function(adamw_decoupled_optimizer).set(
                    b1=0.9,
                    b2=b2,
                    eps=1e-8,
                    learning_rate=peak_lr,
                    update_schedule=config_for_function(cosine_with_linear_warmup).set(
                        peak_lr=1.0,
                        max_step=max_step,
                        warmup_steps=warmup_steps,
                        begin_value=0.0,
                        alpha=alpha,
                    ),
                    weight_decay=weight_decay,
                ),
            ]
        )
    )


def evaler_config(
    *, input_config: InstantiableConfig, every_n_steps: int, max_step: int, eval_dtype: Optional[type]
) -> SpmdEvaler.Config:
    """Returns an evaluation of the whole of `input_config` every `every_n_steps` steps and at the last one."""
    return SpmdEvaler.default_config().set(
        input=input_config,
        eval_dtype=eval_dtype,
        eval_policy=config_for_function(every_n_steps_policy).set(
            n=every_n_steps, min_step=1, max_step=max_step
        ),
    )


def trainer_config(
    *,
    model: Model.Config,
    learner: Learner.Config,
    max_step: int,
    save_every_n_steps: int,
    mesh_shape: Sequence[int],
    train_dtype: Optional[type],
    keep_every_n_steps: Optional[int] = 50_000,
    keep_last_n: int = 3,
    write_summary_every_n_steps: int = 100,
) -> SpmdTrainer.Config:
    """Returns a trainer config that lacks only its data: `input`, `evalers` and `dir`."""
    return SpmdTrainer.default_config().set(
        name="gpt_trainer",
        model=model,
        learner=learner,
        max_step=max_step,
        train_dtype=train_dtype,
        mesh_axis_names=MESH_AXIS_NAMES,
        mesh_shape=mesh_shape,
        batch_axis_names=(*BATCH_AXIS_NAMES, "seq"),
        checkpointer=Checkpointer.default_config().set(
            save_policy=config_for_function(every_n_steps_and_last_policy).set(
                n=save_every_n_steps, min_step=1, max_step=max_step
            ),
            keep_every_n_steps=keep_every_n_steps,
            keep_last_n=keep_last_n,
        ),
        summary_writer=SummaryWriter.default_config().set(
            write_every_n_steps=write_summary_every_n_steps, max_queue=1000
        ),
    )
