"""Writing to Weights & Biases besides, in one line of a recipe."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Optional

from axlearn.common.config import REQUIRED, ConfigModifier, config_class, error_message
from axlearn.common.summary_writer._base import BaseWriter, CompositeWriter, NoOpWriter
from axlearn.common.summary_writer._periodic import PeriodicWriter
from axlearn.common.summary_writer._wandb import WandBWriter


class WandBModifier(ConfigModifier):
    """Lets a trainer and its evalers write to Weights & Biases, besides where they write already."""

    @config_class
    class Config(ConfigModifier.Config):
        """Configures WandBModifier. Its fields are those of WandBWriter; None leaves each to the environment."""

        project: Optional[str] = None
        entity: Optional[str] = None
        group: Optional[str] = None
        run_name: Optional[str] = None
        tags: Optional[Sequence[str]] = None
        mode: Optional[Literal["online", "offline", "disabled"]] = None

    def __call__(self, cfg: Any) -> Any:
        """Returns the changed config.

        Args:
            cfg: The config of a trainer; it is changed in place.

        Raises:
            ValueError: If there is a W&B writer already.
        """
        cfg.summary_writer = self._with_wandb(cfg.summary_writer, where=f"{cfg.name}.summary_writer")
        for name, evaler in cfg.evalers.items():
            evaler.summary_writer = self._with_wandb(
                evaler.summary_writer, where=f"{cfg.name}.evalers[{name!r}].summary_writer"
            )
        return cfg

    def _with_wandb(self, writer: BaseWriter.Config, *, where: str) -> BaseWriter.Config:
        if any(isinstance(part, WandBWriter.Config) for part in _parts(writer)):
            raise ValueError(
                error_message(
                    where=where,
                    what="there is a W&B writer already",
                    advice="Set its fields, or leave the modifier out",
                )
            )
        fields = {name: value for name, value in self.config.items() if name != "klass" and value is not None}
        wandb = WandBWriter.default_config().set(**fields)
        if isinstance(writer, PeriodicWriter.Config):
            wandb.set(
                write_every_n_steps=writer.write_every_n_steps,
                write_every_n_steps_map=writer.write_every_n_steps_map,
            )
        if isinstance(writer, CompositeWriter.Config):
            return writer.clone(writers={**writer.writers, "wandb": wandb})
        if writer.klass is NoOpWriter:
            return wandb.set(dir=writer.dir)
        composite = CompositeWriter.default_config().set(writers={"tensorboard": writer, "wandb": wandb})
        return composite if writer.dir is REQUIRED else composite.set(dir=writer.dir)


def _parts(writer: BaseWriter.Config) -> Iterator[BaseWriter.Config]:
    yield writer
    if isinstance(writer, CompositeWriter.Config):
        for part in writer.writers.values():
            yield from _parts(part)
