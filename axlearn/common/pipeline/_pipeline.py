"""The layer that runs its stages side by side."""

from collections.abc import Callable, Mapping
from typing import Any, Optional

import jax
import jax.numpy as jnp

from axlearn.common.base_layer import BaseLayer, NestedParameterSpec
from axlearn.common.config import REQUIRED, InstantiableConfig, Required, config_class, error_message
from axlearn.common.module import (
    OutputCollection,
    current_context,
    new_output_collection,
    nowrap,
    set_current_context,
)
from axlearn.common.pipeline._gpipe import GPipeSchedule
from axlearn.common.pipeline._outputs import add_outputs
from axlearn.common.pipeline._schedule import PIPELINE_AXIS, BaseSchedule, StageInputs
from axlearn.common.quantized_dot_general import uses_fp8
from axlearn.common.repeat import (
    apply_noise_to_stacked_parameters,
    create_stacked_parameter_specs,
    initialize_stacked_parameters,
)
from axlearn.common.utils import Nested, Tensor, VDict, current_mesh, prune_tree, split_prng_key

# From the carry and what else belongs to the micro-batch, and what the stage holds, to the new carry and what it
# then holds; may call methods of the pipeline's layer.
StageFn = Callable[[Any, Any, Any], tuple[Any, Any]]


class Pipeline(BaseLayer):
    """Runs `num_layers` stages, each on what the stage before returned, for one micro-batch after another.

    Parameters are below `layer`, stacked in a `VDict` whose leading dim is split over the mesh axis "pipeline". The
    stages run at the same time on different micro-batches; see `BaseSchedule`. On a mesh without that axis, or whose
    axis does not divide the number of stages, the same is computed without moving anything.

    Random numbers differ between stages and between micro-batches. Summaries of stage i appear below `layer{i}`,
    accumulated over micro-batches. The bubble leaves nothing behind.
    """

    @config_class
    class Config(BaseLayer.Config):
        """Configures `Pipeline`."""

        # What one stage does.
        layer: Required[BaseLayer.Config] = REQUIRED
        # Number of stages, at least 1.
        num_layers: Required[int] = REQUIRED
        # Number of micro-batches, at least 1. The more, the smaller the bubble.
        num_microbatches: Required[int] = REQUIRED
        # Where micro-batches wait.
        schedule: BaseSchedule.Config = GPipeSchedule.default_config()
        # Makes a function from the path of an output ("module_outputs/...", "summaries/...",
        # "state_updates/...") to whether to drop it; module outputs that stay are stacked, [num_layers,
        # num_microbatches, ...]. None: all module outputs are dropped.
        drop_output: Optional[InstantiableConfig] = None

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        self._add_child("layer", cfg.layer)
        if uses_fp8(cfg.layer):
            raise ValueError(
                error_message(
                    where=f"{self.path()}.layer",
                    what="has products in float8, whose new scales would be added up over micro-batches",
                    expected="layers whose quantized_dot_general is None in a pipeline",
                )
            )
        self._schedule = cfg.schedule.clone(
            num_stages=cfg.num_layers, num_microbatches=cfg.num_microbatches
        ).instantiate()
        self._drop_output = _is_module_output if cfg.drop_output is None else cfg.drop_output.instantiate()

    @nowrap
    def create_parameter_specs_recursively(self) -> NestedParameterSpec:
        """See `BaseLayer.create_parameter_specs_recursively`."""
        specs = create_stacked_parameter_specs(
            self.layer, num_layers=self.config.num_layers, mesh_axis=PIPELINE_AXIS
        )
        return VDict(layer=specs)

    @nowrap
    def initialize_parameters_recursively(
        self, prng_key: Tensor, *, prebuilt: Optional[Mapping[str, Any]] = None
    ) -> dict[str, Any]:
        """See `BaseLayer.initialize_parameters_recursively`."""
        params = initialize_stacked_parameters(
            self.layer,
            prng_key,
            num_layers=self.config.num_layers,
            prebuilt=(prebuilt or {}).get("layer"),
        )
        return VDict(layer=params)

    @nowrap
    def apply_parameter_noise_recursively(
        self, prng_key: Tensor, params: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `BaseLayer.apply_parameter_noise_recursively`."""
        noisy = apply_noise_to_stacked_parameters(
            self.layer, prng_key, params["layer"], num_layers=self.config.num_layers
        )
        return VDict(layer=noisy)

    def forward(self, carry: Nested[Tensor]) -> Nested[Tensor]:
        """Runs all micro-batches through all stages.

        Args:
            carry: The input of the first stage; leaves [num_microbatches, ...].

        Returns:
            The output of the last, alike.
        """
        return self._run(lambda carry_i, _, held: (self.layer(carry_i), held), carry)[0]

    def _to_microbatches(self, tree: Nested[Tensor]) -> Nested[Tensor]:
        """From [batch, ...] to [num_microbatches, batch / num_microbatches, ...]: row r goes to r % num_microbatches.

        A device that holds consecutive rows has a part of every micro-batch, and no row moves.
        """
        num_microbatches = self.config.num_microbatches

        def split(x: Tensor) -> Tensor:
            if x.shape[0] % num_microbatches:
                raise ValueError(
                    error_message(
                        where=f"{self.path()}.num_microbatches",
                        what=f"{num_microbatches} micro-batches do not divide the {x.shape[0]} rows of a batch",
                        expected=f"a divisor of {x.shape[0]}",
                        advice="Change the batch size, the number of micro-batches, or of accumulation steps",
                    )
                )
            return jnp.moveaxis(x.reshape(-1, num_microbatches, *x.shape[1:]), 1, 0)

        return jax.tree.map(split, tree)

    def _from_microbatches(self, tree: Nested[Tensor]) -> Nested[Tensor]:
        """The inverse of `_to_microbatches`."""
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)

    def _run(
        self,
        fn: StageFn,
        carry: Nested[Tensor],
        *,
        side: Optional[Nested[Tensor]] = None,
        held: Optional[Nested[Tensor]] = None,
        schedule: Optional[BaseSchedule] = None,
    ) -> tuple[Nested[Tensor], Nested[Tensor]]:
        """Runs micro-batches through the stages.

        Args:
            fn: What one stage does with one micro-batch; calls methods of `self.layer`, which then run with the
                parameters of that stage.
            carry: What the first stage gets; leaves [num_microbatches, ...].
            side: What belongs to each micro-batch and is the same in all stages; leaves [num_microbatches, ...].
                None: nothing.
            held: What each stage keeps, and may change with each micro-batch; leaves [num_layers, ...]. None:
                nothing.
            schedule: Where micro-batches wait, and how many there are. None: as configured.

        Returns:
            What the last stage returned, leaves [num_microbatches, ...], and what the stages hold at the end.
        """
        schedule = self._schedule if schedule is None else schedule
        outputs = schedule.run(self._stages_fn(fn), carry=carry, side=side, held=held)
        add_outputs(
            outputs.left,
            name="layer",
            num_stages=self.config.num_layers,
            num_microbatches=schedule.config.num_microbatches,
        )
        return outputs.carry, outputs.held

    def _stages_fn(self, fn: StageFn) -> Callable[[StageInputs], tuple[Any, Any, OutputCollection]]:
        """Makes the function that runs all stages at once out of what one does."""
        context = current_context()
        state = (self.state or {}).get("layer", {})
        keys = None
        if self.prng_key is not None:
            keys = split_prng_key(self.prng_key, self.config.num_layers).keys

        def run_stage(state_n: Any, key_n: Any, inputs: StageInputs) -> tuple[Any, Any, OutputCollection]:
            if key_n is not None:
                key_n = jax.random.fold_in(key_n, inputs.microbatch_ids)
            # The outputs are returned by the loop's body; only behind it they may go to the outer context.
            outputs = new_output_collection()
            child = context.add_child(  # type: ignore[union-attr]
                "layer", module=self.layer, state=state_n, prng_key=key_n, output_collection=outputs
            )
            with set_current_context(child):
                carry, held = fn(inputs.carry, inputs.side, inputs.held)
            held = jax.tree.map(lambda new, old: jnp.where(inputs.is_live, new, old), held, inputs.held)
            return carry, held, self._kept(child.output_collection)

        run_stages = jax.vmap(run_stage, spmd_axis_name=self._spmd_axis_name())
        return lambda inputs: run_stages(state, keys, inputs)

    def _kept(self, outputs: OutputCollection) -> OutputCollection:
        """What of a stage's outputs is not dropped."""
        drop = self._drop_output
        return OutputCollection(
            **prune_tree(dict(outputs._asdict()), lambda path, _: "/" in path and drop(path))
        )

    def _spmd_axis_name(self) -> Optional[str]:
        """The mesh axis that vectorized stages are split over, for the constraints inside of them."""
        mesh = current_mesh()
        if mesh is None or PIPELINE_AXIS not in mesh.shape:
            return None
        return PIPELINE_AXIS if self.config.num_layers % mesh.shape[PIPELINE_AXIS] == 0 else None


def _is_module_output(path: str) -> bool:
    return path.startswith("module_outputs/")
