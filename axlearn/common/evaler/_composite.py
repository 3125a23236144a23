"""Several calculators over one pass through the data."""

import dataclasses
import graphlib
from collections.abc import Sequence
from typing import Any, Optional

from axlearn.common.config import REQUIRED, Required, config_class, error_message, nearest_names
from axlearn.common.evaler._calculators import BaseMetricCalculator, BatchOutputs
from axlearn.common.evaler._fields import maybe_set_fields
from axlearn.common.module import Module, nowrap
from axlearn.common.utils import NestedTensor, Tensor


@dataclasses.dataclass(frozen=True)
class Dependency:
    """Says that a calculator needs what the model returned to another one.

    Attributes:
        src: The calculator whose outputs are needed.
        dst: The calculator that needs them.
        dst_key: Under which name they are in the batch that the model gets from `dst`; None: `src`.
    """

    src: str
    dst: str
    dst_key: Optional[str] = None


class CompositeMetricCalculator(BaseMetricCalculator):
    """Runs several calculators on each batch; the summaries of each go below its name."""

    @config_class
    class Config(BaseMetricCalculator.Config):
        """Configures CompositeMetricCalculator."""

        # The calculators by name. What they leave open of eval_dtype and prefix is this one's eval_dtype and
        # their name.
        metric_calculators: Required[dict[str, BaseMetricCalculator.Config]] = REQUIRED
        # Which ones need what others made of the batch; they run in an order that allows it. None: none do.
        dependencies: Optional[Sequence[Dependency]] = None

    def __init__(self, cfg: Config, *, parent: Optional[Module], model: Module):
        super().__init__(cfg, parent=parent, model=model)
        self._dependencies = tuple(cfg.dependencies or ())
        self._check_names()
        self._order = self._sort()
        for name, calculator in cfg.metric_calculators.items():
            calculator = maybe_set_fields(calculator, eval_dtype=cfg.eval_dtype, prefix=name)
            self._add_child(name, calculator, model=model)

    def _check_names(self) -> None:
        names = list(self.config.metric_calculators)
        for i, dependency in enumerate(self._dependencies):
            for field in ("src", "dst"):
                name = getattr(dependency, field)
                if name not in names:
                    raise ValueError(
                        error_message(
                            where=f"{self.path()}.dependencies[{i}].{field}",
                            what=f"there is no calculator {name!r}",
                            expected=f"one of {', '.join(names)}",
                            nearest=nearest_names(name, names)[:3],
                        )
                    )

    def _sort(self) -> list[str]:
        """Returns the names in an order in which each comes behind those that it depends on."""
        graph: dict[str, list[str]] = {name: [] for name in self.config.metric_calculators}
        for dependency in self._dependencies:
            graph[dependency.dst].append(dependency.src)
        try:
            return list(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError as e:
            raise ValueError(
                error_message(
                    where=f"{self.path()}.dependencies",
                    what=f"they go in a circle: {' -> '.join(e.args[1])}",
                    expected="an order in which each calculator comes behind those that it depends on",
                )
            ) from e

    @nowrap
    def evaluate_batch(
        self,
        input_batch: NestedTensor,
        *,
        model_params: NestedTensor,
        prng_key: Tensor,
        extra_inputs: Optional[dict[str, NestedTensor]] = None,
    ) -> BatchOutputs:
        """See BaseMetricCalculator. All calculators get the same key."""
        results: dict[str, BatchOutputs] = {}
        for name in self._order:
            needed = {d.dst_key or d.src: results[d.src].outputs for d in self._dependencies if d.dst == name}
            results[name] = self.children[name].evaluate_batch(
                input_batch,
                model_params=model_params,
                prng_key=prng_key,
                extra_inputs={**(extra_inputs or {}), **needed} or None,
            )
        return BatchOutputs(
            kept={name: result.kept for name, result in results.items()},
            outputs={name: result.outputs for name, result in results.items()},
        )

    @nowrap
    def summarize(self, kept: Sequence[Any]) -> dict[str, Any]:
        """See BaseMetricCalculator.

        Raises:
            ValueError: If two calculators have a summary of one name.
        """
        joined: dict[str, Any] = {}
        for name in self.config.metric_calculators:
            for key, value in self.children[name].summarize([batch[name] for batch in kept]).items():
                if key in joined:
                    raise ValueError(
                        error_message(
                            where=f"{self.path()}.{name}",
                            what=f"another calculator has summaries below {key!r} too",
                            advice="Give one of them another prefix.",
                        )
                    )
                joined[key] = value
        return self._with_prefix(joined)
