"""What goes around model and learner: evaluation, checkpoints, summaries, the mesh."""

from typing import Optional, Union

from axlearn.common.causal_lm import Model
from axlearn.common.checkpointer import Checkpointer, every_n_steps_and_last_policy
from axlearn.common.config import InstantiableConfig, config_for_function
from axlearn.common.evaler import SpmdEvaler, every_n_steps_policy
from axlearn.common.learner import Learner
from axlearn.common.summary_writer import SummaryWriter
from axlearn.common.trainer import SpmdTrainer
from axlearn.common.utils import HybridMeshShape, MeshShape
from axlearn.experiments.text.gpt.common._mesh import BATCH_AXIS_NAMES, MESH_AXIS_NAMES


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
    mesh_shape: Union[MeshShape, HybridMeshShape],
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
