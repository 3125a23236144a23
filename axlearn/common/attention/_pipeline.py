"""A stack of equal stages of transformer layers, which run on different devices at the same time."""

from typing import Any, Optional

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from axlearn.common.attention._layer import CrossData, TransformerOutput
from axlearn.common.attention._multihead import LogitBiases
from axlearn.common.attention._stack import BaseStackedTransformerLayer, StackedTransformerLayer
from axlearn.common.attention_bias import BaseAttentionBias
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, Required, config_class, error_message
from axlearn.common.pipeline import GPipeSchedule, Pipeline
from axlearn.common.utils import VDict

# Stands for the rows of a batch where a bias is asked how its arrays would be split.
_ROWS = "rows"


class _TransformerPipeline(Pipeline):
    """A `Pipeline` with the methods of a transformer layer."""

    @config_class
    class Config(Pipeline.Config):
        """Configures `_TransformerPipeline`."""

    def forward(  # type: ignore[override]
        self,
        data: Float[Array, "batch seq input_dim"],
        *,
        attention_logit_biases: Optional[LogitBiases] = None,
        segment_ids: Optional[Int[Array, "batch seq"]] = None,
        positions: Optional[Int[Array, "#batch seq"]] = None,
        cross_attention_data: Optional[CrossData] = None,
        cross_attention_logit_biases: Optional[LogitBiases] = None,
    ) -> TransformerOutput:
        """See `BaseTransformerLayer.forward`.

        Raises:
            ValueError: If the micro-batches do not divide the batch.
        """
        kwargs = {
            "attention_logit_biases": attention_logit_biases,
            "segment_ids": segment_ids,
            "positions": positions,
            "cross_attention_data": cross_attention_data,
            "cross_attention_logit_biases": cross_attention_logit_biases,
        }
        leaves, treedef = jax.tree.flatten(kwargs)
        rows = [i for i, has_rows in enumerate(_have_rows(kwargs, data.shape[0])) if has_rows]

        def run_stage(data_i: Array, own: list[Array], held: Any) -> tuple[Array, Any]:
            of_rows = dict(zip(rows, own, strict=True))
            own_kwargs = jax.tree.unflatten(treedef, [of_rows.get(i, leaf) for i, leaf in enumerate(leaves)])
            return self.layer(data_i, **own_kwargs).data, held

        outputs: Any = self._run(
            run_stage,
            self._to_microbatches(data),
            side=self._to_microbatches([leaves[i] for i in rows]),
        )[0]
        whole: Any = self._from_microbatches(outputs)
        return TransformerOutput(data=whole)

    def init_states(self, *, batch_size: int, max_len: int) -> dict[str, Any]:
        """See `BaseTransformerLayer.init_states`; the states of all stages are stacked."""
        num_stages = self.config.num_layers
        states = self.layer.init_states(batch_size=batch_size, max_len=max_len)
        return VDict(layer=jax.tree.map(lambda x: jnp.broadcast_to(x[None], (num_stages, *x.shape)), states))

    def extend_step(
        self,
        cached_states: dict[str, Any],
        data: Float[Array, "batch step input_dim"],
        *,
        live_step_len: Optional[Int[Array, "batch"]] = None,
        cross_attention_data: Optional[CrossData] = None,
        cross_attention_logit_biases: Optional[LogitBiases] = None,
    ) -> tuple[dict[str, Any], TransformerOutput]:
        """See `BaseTransformerLayer.extend_step`. The batch passes the stages as one: there is nothing to overlap."""

        def run_stage(data_i: Array, _: Any, states_i: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
            new_states, output = self.layer.extend_step(
                states_i,
                data_i,
                live_step_len=live_step_len,
                cross_attention_data=cross_attention_data,
                cross_attention_logit_biases=cross_attention_logit_biases,
            )
            return output.data, new_states

        one_microbatch = GPipeSchedule.default_config().set(
            num_stages=self.config.num_layers, num_microbatches=1
        )
        outputs: Any
        outputs, new_states = self._run(
            run_stage, data[None], held=cached_states["layer"], schedule=one_microbatch.instantiate()
        )
        return VDict(layer=new_states), TransformerOutput(data=outputs[0])


def _have_rows(kwargs: dict[str, Any], batch_size: int) -> list[bool]:
    """Which leaves of a transformer layer's arguments have an entry for each row of the batch, in their order."""

    def has_rows(argument: Any) -> Any:
        if isinstance(argument, BaseAttentionBias):
            specs = argument.partition_spec({"bnts": PartitionSpec(_ROWS, None, None, None)})
            return jax.tree.map(
                lambda spec: _ROWS in spec[:1], specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
            )
        return argument.shape[0] == batch_size and batch_size > 1

    def of_argument(name: str, argument: Any) -> Any:
        # An array of logit biases without a dim for the batch is [target, source].
        if name.endswith("biases") and isinstance(argument, jax.Array) and argument.ndim < 3:
            return False
        return has_rows(argument)

    flags = {name: of_argument(name, x) for name, x in kwargs.items() if x is not None}
    return jax.tree.leaves({name: flags.get(name) for name in kwargs})


class PipelinedTransformerLayer(BaseStackedTransformerLayer):
    """Equal stages of `num_layers / num_stages` layers each, the first with the first layers; see `Pipeline`.

    The parameters of all stages are stacked below `pipeline/layer`; with stages of the default kind, those of the
    k-th layers of the stages below `pipeline/layer/layer<k>`.
    """

    @config_class
    class Config(BaseStackedTransformerLayer.Config):
        """Configures `PipelinedTransformerLayer`."""

        # Number of stages, a divisor of num_layers. The size of the mesh axis "pipeline", or a multiple of it.
        num_stages: Required[int] = REQUIRED
        # Number of micro-batches that a batch is cut into, a divisor of the rows of a batch.
        num_microbatches: Required[int] = REQUIRED
        # One stage; gets its layers from here.
        stage: BaseLayer.Config = StackedTransformerLayer.default_config().set(layer=None)
        # Runs the stages.
        pipeline: BaseLayer.Config = _TransformerPipeline.default_config()

    def __init__(self, cfg: Config, *, parent: Optional[BaseLayer]):
        super().__init__(cfg, parent=parent)
        self._check()
        stage = cfg.stage.clone(
            input_dim=cfg.input_dim, layer=cfg.layer, num_layers=cfg.num_layers // cfg.num_stages
        )
        self._add_child(
            "pipeline",
            cfg.pipeline.clone(layer=stage, num_layers=cfg.num_stages, num_microbatches=cfg.num_microbatches),
        )

    def _check(self) -> None:
        cfg: PipelinedTransformerLayer.Config = self.config
        if not isinstance(cfg.layer, BaseLayer.Config):
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"layer is a {type(cfg.layer).__name__}",
                    expected="one config, for equal layers",
                    advice="to alternate between layers, let the layer be a StackedTransformerLayer",
                )
            )
        if cfg.peak_stochastic_depth_rate:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"peak_stochastic_depth_rate={cfg.peak_stochastic_depth_rate}",
                    expected="None: the stages of a pipeline have one config, so one rate for all",
                    advice="use StackedTransformerLayer, or set stochastic_depth.rate in the layer",
                )
            )
        if cfg.num_stages < 1 or cfg.num_layers % cfg.num_stages:
            divisors = [x for x in range(1, cfg.num_layers + 1) if cfg.num_layers % x == 0]
            raise ValueError(
                error_message(
                    where=f"{self.path()}.num_stages",
                    what=f"{cfg.num_stages} stages for {cfg.num_layers} layers",
                    expected="a divisor of the number of layers: stages are equal",
                    nearest=min(divisors, key=lambda x: abs(x - cfg.num_stages)),
                )
            )

    def forward(
        self,
        data: Float[Array, "batch seq input_dim"],
        *,
        attention_logit_biases: Optional[LogitBiases] = None,
        segment_ids: Optional[Int[Array, "batch seq"]] = None,
        positions: Optional[Int[Array, "#batch seq"]] = None,
        cross_attention_data: Optional[CrossData] = None,
        cross_attention_logit_biases: Optional[LogitBiases] = None,
    ) -> TransformerOutput:
        """See `BaseTransformerLayer.forward`."""
        return self.pipeline(
            data,
            attention_logit_biases=attention_logit_biases,
            segment_ids=segment_ids,
            positions=positions,
            cross_attention_data=cross_attention_data,
            cross_attention_logit_biases=cross_attention_logit_biases,
        )

    def init_states(self, *, batch_size: int, max_len: int) -> dict[str, Any]:
        """See `BaseTransformerLayer.init_states`."""
        return {"pipeline": self.pipeline.init_states(batch_size=batch_size, max_len=max_len)}

    def extend_step(
        self,
        cached_states: dict[str, Any],
        data: Float[Array, "batch step input_dim"],
        *,
        live_step_len: Optional[Int[Array, "batch"]] = None,
        cross_attention_data: Optional[CrossData] = None,
        cross_attention_logit_biases: Optional[LogitBiases] = None,
    ) -> tuple[dict[str, Any], TransformerOutput]:
        """See `BaseTransformerLayer.extend_step`."""
        states, output = self.pipeline.extend_step(
            cached_states["pipeline"],
            data,
            live_step_len=live_step_len,
            cross_attention_data=cross_attention_data,
            cross_attention_logit_biases=cross_attention_logit_biases,
        )
        return {"pipeline": states}, output
