"""What a recipe changes on a kind of machine, as one row of a table."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Optional, Union

from axlearn.common.base_layer import RematSpec
from axlearn.common.config import ConfigModifier, InstantiableConfig, config_for_function
from axlearn.common.trainer_config_modifier import (
    ChainConfigModifier,
    FP8ConfigModifier,
    GradientAccumulationModifier,
    MeshShapeModifier,
    RematSpecModifier,
)
from axlearn.common.utils import HybridMeshShape, MeshShape, save_and_offload_only_these_names_regex

# Where the layer of a scanned stack is in a trainer's config; every layer of the model is a copy of it.
LAYER_PATH = "model.decoder.transformer.layer"
# Steps that fp8 scales look back; AXLearn's number.
_FP8_HISTORY_LENGTH = 128


@dataclasses.dataclass(frozen=True)
class MeshRule:
    """The machines a rule is for, and what it does to a recipe there.

    Attributes:
        instance_types: A regular expression that all of a `--mesh_selector` must match.
        mesh_shape: The mesh over these machines' devices.
        remat: What a layer keeps for the backward pass. None: what the recipe says.
        modifiers: What else changes, after mesh and rematerialisation, in this order.
        fp8: Whether an fp8 variant of the recipe multiplies in fp8 on these machines.
        trainium: Whether these are Trainium machines, which take a model laid out in their own way.
    """

    instance_types: str
    mesh_shape: Union[MeshShape, HybridMeshShape]
    remat: Optional[RematSpec] = None
    modifiers: Sequence[ConfigModifier.Config] = ()
    fp8: bool = False
    trainium: bool = False


def mesh_rule_config(
    rule: MeshRule, *, trainium_layout: Sequence[ConfigModifier.Config] = (), fp8: bool = False
) -> tuple[str, Any]:
    """Returns a rule as `SpmdTrainer.Config.mesh_rules` takes it.

    Args:
        rule: The row.
        trainium_layout: How the model is laid out if the row is for Trainium.
        fp8: Whether the recipe is an fp8 variant.

    Returns:
        The regular expression, and the mesh shape if that is all that changes, else a chain of modifiers: mesh,
        rematerialisation, layout, the row's own, fp8. A row with fp8 is a chain in the plain variants too.
    """
    changes: list[ConfigModifier.Config] = []
    if rule.remat is not None:
        changes.append(RematSpecModifier.default_config().set(remat_policies={LAYER_PATH: rule.remat}))
    if rule.trainium:
        changes += trainium_layout
    changes += rule.modifiers
    if rule.fp8 and fp8:
        changes.append(FP8ConfigModifier.default_config().set(fp8_amax_history_length=_FP8_HISTORY_LENGTH))
    if not changes and not rule.fp8:
        return rule.instance_types, rule.mesh_shape
    mesh = MeshShapeModifier.default_config().set(mesh_shape=rule.mesh_shape)
    return rule.instance_types, ChainConfigModifier.default_config().set(config_modifiers=[mesh, *changes])


def accumulate(steps: int) -> GradientAccumulationModifier.Config:
    """Returns a modifier that works through each batch in so many micro-batches."""
    return GradientAccumulationModifier.default_config().set(grad_acc_steps=steps)


def keep(policy: Any) -> RematSpec:
    """Returns what a scanned layer keeps for the backward pass, by a policy: it needs no `prevent_cse`."""
    return RematSpec(prevent_cse=False, policy=policy)


def save_names(names: Optional[str], **kwargs: Any) -> InstantiableConfig:
    """Returns the config of a policy that keeps values by name and recomputes all others.

    Args:
        names: A regular expression that all of a name must match. None: nothing is kept.
        **kwargs: Other arguments of `save_and_offload_only_these_names_regex`.
    """
    return config_for_function(save_and_offload_only_these_names_regex).set(
        names_which_can_be_saved=names, names_which_can_be_offloaded=None, **kwargs
    )
