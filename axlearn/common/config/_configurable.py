"""Configs that build something, and the classes that are built from them."""

import typing
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Optional, TypeVar, Union

from axlearn.common.config._base import ConfigBase, config_class
from axlearn.common.config._dump import join_path
from axlearn.common.config._errors import RequiredFieldMissingError, error_message
from axlearn.common.config._names import public_name
from axlearn.common.config._required import REQUIRED
from axlearn.common.config._types import describe

T = TypeVar("T")

# Begins the notes that say where in the tree a failure happened.
_NOTE = "While instantiating "


@config_class
class InstantiableConfig(ConfigBase, Generic[T]):
    """A config that builds a `T`."""

    if TYPE_CHECKING:
        # What the fields are depends on the class, which is not known where only this one is named.
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def instantiate(self, **kwargs: Any) -> T:
        """Builds what this config describes.

        Args:
            **kwargs: What the config does not know, such as `parent`.

        Returns:
            A new object.

        Raises:
            RequiredFieldMissingError: If required fields of this config have no value, all of them at once.
        """
        raise NotImplementedError(type(self))

    @classmethod
    def _matches_type_args(cls, value: Any, args: tuple[Any, ...]) -> bool:
        """Whether `value`, a config, may build what `InstantiableConfig[args]` promises."""
        built = getattr(value, "klass", None)
        promised = typing.get_origin(args[0]) or args[0]
        if not isinstance(built, type) or not isinstance(promised, type):
            return True
        return not issubclass(promised, Configurable) or issubclass(built, promised)


ConfigOr = Union[T, InstantiableConfig[T]]


class Configurable:
    """Something that is built from a config."""

    @config_class
    class Config(InstantiableConfig[Any]):
        """What a Configurable is built from."""

        if TYPE_CHECKING:
            # The fields of a named class are known, and other names are mistakes.
            __getattr__: ClassVar[None]  # type: ignore[assignment, misc]
            __setattr__: ClassVar[None]  # type: ignore[assignment, misc]

        # The class that this config builds.
        klass: type

        def instantiate(self, **kwargs: Any) -> Any:
            """Builds `klass(cfg, **kwargs)` from a frozen copy, or from this config where it is frozen."""
            cfg = self if self.is_frozen else self.clone().freeze()
            check_required(cfg, what=public_name_or_repr(cfg.klass))
            try:
                return cfg.klass(cfg, **kwargs)
            except Exception as e:
                add_path_note(e, path=cfg._path, what=public_name_or_repr(cfg.klass))
                raise

    @classmethod
    def default_config(cls) -> Any:
        """Returns a config of this class with every field at its default: an instance of `cls.Config`."""
        return cls.Config(klass=cls)

    def __init__(self, cfg: Any) -> None:
        """Stores the config.

        Args:
            cfg: An instance of `Config`. It is kept as it is where it is frozen, as a frozen copy otherwise.
        """
        super().__init__()
        self._config = cfg if cfg.is_frozen else cfg.clone().freeze()

    @property
    def config(self) -> Any:
        """The frozen config that this object was built from; the same object at every access."""
        return self._config


class ConfigModifier(Configurable):
    """Something that changes configs, such as a trainer config for a certain kind of machine."""

    def __call__(self, cfg: Any) -> Any:
        """Returns the changed config.

        Args:
            cfg: A config; it may be changed in place.
        """
        raise NotImplementedError(type(self))


def public_name_or_repr(obj: Any) -> str:
    """Returns the public name of what a config builds, or its repr where that is not a class or function."""
    return public_name(obj) if hasattr(obj, "__name__") and hasattr(obj, "__module__") else repr(obj)


def check_required(cfg: ConfigBase, *, what: str, names: Optional[list[str]] = None) -> None:
    """Raises where fields without a value are needed.

    Args:
        cfg: The config that something is about to be built from.
        what: The name of what would be built.
        names: The fields without a value. None: those that hold REQUIRED.

    Raises:
        RequiredFieldMissingError: With the paths and types of all these fields.
    """
    if names is None:
        names = [name for name, value in cfg.items() if value is REQUIRED]
    if not names:
        return
    fields = [_described(cfg, name) for name in names]
    plural = "fields" if len(names) > 1 else "field"
    raise RequiredFieldMissingError(
        error_message(
            where=f"{cfg._path} ({what})" if cfg._path else what,
            what=f"Missing value for required {plural} {', '.join(fields)}",
            advice=f"Set before instantiating: cfg.set({', '.join(f'{name}=...' for name in names)})",
        ),
        path=cfg._path,
    )


def _described(cfg: ConfigBase, name: str) -> str:
    """Returns the path of a field, with its type where it has one."""
    annotation = cfg._config_fields[name].annotation
    kind = "" if annotation is Any else f" ({describe(annotation)})"
    return join_path(cfg._path, name) + kind


def add_path_note(error: BaseException, *, path: str, what: str) -> None:
    """Notes on an exception where in the tree of configs it happened, unless a note says it more exactly.

    Args:
        error: The exception; its type and traceback stay.
        path: The path of the config that was being instantiated; empty at the root.
        what: The name of what was being built.
    """
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_NOTE)]
    has_path = bool(notes) and notes[-1].endswith(")")
    is_said = isinstance(error, RequiredFieldMissingError) and bool(error.path)
    if is_said or has_path or (notes and not path):
        return
    error.add_note(f"{_NOTE}{path} ({what})" if path else f"{_NOTE}{what}")


def maybe_instantiate(x: Any) -> Any:
    """Returns what a config builds, and anything else as it is."""
    return x.instantiate() if isinstance(x, InstantiableConfig) else x


def maybe_set_config(cfg: Any, **kwargs: Any) -> Any:
    """Sets those of the given fields that the config has.

    Args:
        cfg: A config.
        **kwargs: Values by name of field.

    Returns:
        The same config.
    """
    return cfg.set(**{name: value for name, value in kwargs.items() if name in cfg})
