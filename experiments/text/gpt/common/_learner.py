"""The learner of the recipes: how gradients become updates."""

from axlearn.common.config import config_for_function
from axlearn.common.learner import Learner
from axlearn.common.optimizers import adamw_decoupled_optimizer, chain, clip_by_global_norm
from axlearn.common.schedule import cosine_with_linear_warmup


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
