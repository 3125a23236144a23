"""The base class of everything that has children and runs in a context."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Optional, Union

import jax
from absl import logging

from axlearn.common.config import REQUIRED, Configurable, Required, config_class, nearest_names
from axlearn.common.module._context import (
    InvocationContext,
    SharedModuleInfo,
    child_context,
    current_context,
)
from axlearn.common.module._outputs import NAME_PATTERN
from axlearn.common.module._wrap import wrap_methods
from axlearn.common.utils import Tensor


class ChildNameConflictError(ValueError):
    """Two children of a module have the same name."""


class InvalidDescendantError(ValueError):
    """A module is not below another one, although it must be."""


class Module(Configurable):
    """A configured object with a parent and children.

    A module keeps no state of its own: while a method runs, `self.state`, `self.prng_key` and
    `self.is_training` are those of the thread's current context. A public method of a subclass, called on a
    child (or on any descendant, or on a shared module), runs in a context made for that child; called on the
    module that runs already, in the same context. Private methods, and those marked `@nowrap`, run in the
    context of their caller. Where there is no context, methods run without one: good for what needs neither
    state nor random numbers.
    """

    @config_class
    class Config(Configurable.Config):
        """Configures Module."""

        # The name of the module, unique among its siblings; the parent sets it.
        name: Required[str] = REQUIRED
        # The highest level of `vlog` and `vprint` that is heard. None: what the parent has; at the root,
        # none.
        vlog: Optional[int] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        wrap_methods(cls, root=Module)

    def __init__(self, cfg: "Module.Config", *, parent: Optional["Module"]):
        super().__init__(cfg)
        self._name: str = cfg.name
        self._parent = parent
        self._children: dict[str, Module] = {}
        self._shared_modules: dict[str, Module] = {}
        self._vlog_level: Optional[int] = (
            cfg.vlog if parent is None or cfg.vlog is not None else parent._vlog_level
        )

    # The tree.

    @property
    def name(self) -> str:
        """The name of this module."""
        return self._name

    @property
    def parent(self) -> Optional["Module"]:
        """The module that added this one; None at the root."""
        return self._parent

    @property
    def children(self) -> Mapping[str, "Module"]:
        """The children by name, in the order in which they were added."""
        return MappingProxyType(self._children)

    @property
    def shared_modules(self) -> Mapping[str, "Module"]:
        """What this module shares with its descendants, by the name under which it does."""
        return MappingProxyType(self._shared_modules)

    def path(self) -> str:
        """The dotted path from the root."""
        return self._name if self._parent is None else f"{self._parent.path()}.{self._name}"

    def child(self, name: str) -> "Module":
        """The child called `name`.

        Raises:
            ValueError: If there is none.
        """
        if name in self._children:
            return self._children[name]
        nearest = nearest_names(name, self._children)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"{self.path()}: no child is called {name!r}.{hint} Children: "
            f"{', '.join(self._children) or 'none'}."
        )

    def __getattr__(self, name: str) -> Any:
        # Called only for names that are not found otherwise. `_children` is missing before __init__ has run.
        children = self.__dict__.get("_children", {})
        if name in children:
            return children[name]
        nearest = nearest_names(name, [*children, *dir(type(self))]) if not name.startswith("__") else []
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise AttributeError(f"{type(self).__qualname__!r} object has no attribute {name!r}.{hint}")

    def _add_child(self, name: str, child_config: "Module.Config", **kwargs: Any) -> Any:
        """Builds a child.

        Args:
            name: The name of the child; afterwards it is `self.<name>`.
            child_config: Its config, which stays unchanged.
            kwargs: Go to the child's constructor.

        Returns:
            The child.

        Raises:
            ValueError: If the name is not legal, or the config has another one.
            ChildNameConflictError: If there is a child of this name.
            TypeError: If the config is not one of a Module.
        """
        where = f"{self.path()}.{name}"
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(
                f"{where}: {name!r} is not a legal name. Expected to match {NAME_PATTERN.pattern}."
            )
        if name in self._children:
            raise ChildNameConflictError(f"{where}: there is already a child of this name.")
        if not isinstance(child_config, Module.Config):
            raise TypeError(
                f"{where}: cannot make a child of {child_config!r}. Expected a config of a Module, such as "
                "`Linear.default_config()`."
            )
        if child_config.name is not REQUIRED and child_config.name != name:
            raise ValueError(
                f"{where}: the config of the child has another name, {child_config.name!r}. Expected none, "
                f"or {name!r}."
            )
        try:
            child = child_config.clone(name=name).instantiate(parent=self, **kwargs)
        except Exception as e:
            _note_build_failure(e, where, child_config)
            raise
        self._children[name] = child
        return child

    def path_to_descendant_module(self, module: "Module") -> list[str]:
        """The names that lead from this module down to `module`; empty for itself.

        Raises:
            InvalidDescendantError: If `module` is not below this one.
        """
        names: list[str] = []
        node: Optional[Module] = module
        while node is not None:
            if node is self:
                return names[::-1]
            names.append(node.name)
            node = node.parent
        raise InvalidDescendantError(f"{module.path()} is not a descendant of {self.path()}.")

    # Sharing.

    def _share_with_descendants(self, module: "Module", *, shared_module_name: str) -> None:
        """Lets all descendants of this module call `module`, and look it up by name.

        Args:
            module: A descendant of this module.
            shared_module_name: The name to share it under.

        Raises:
            InvalidDescendantError: If `module` is not below this module.
            ValueError: If the name is not legal, or taken.
        """
        self.path_to_descendant_module(module)
        if not NAME_PATTERN.fullmatch(shared_module_name):
            raise ValueError(
                f"{self.path()}: {shared_module_name!r} is not a legal name. Expected to match "
                f"{NAME_PATTERN.pattern}."
            )
        if shared_module_name in self._shared_modules:
            raise ValueError(f"{self.path()}: a module is already shared as {shared_module_name!r}.")
        self._shared_modules[shared_module_name] = module

    def get_shared_module(self, shared_module: Union[str, "Module"]) -> SharedModuleInfo:
        """Looks up a module that an ancestor in the current context shares; the nearest one wins.

        Args:
            shared_module: The name under which it is shared, or the module.

        Returns:
            Its name, the module, and its state.

        Raises:
            ValueError: If nobody shares it.
        """
        return self.get_invocation_context().get_shared_module(shared_module)

    # The context.

    def get_invocation_context(self) -> InvocationContext:
        """The current context.

        Raises:
            RuntimeError: If there is none, or it belongs to another module: a private method was called from
                outside.
        """
        context = current_context()
        if context is None:
            raise RuntimeError(
                f"{self.path()}: there is no context. Expected to run in `functional`, which gives a module "
                "its state."
            )
        if context.module is not self:
            raise RuntimeError(
                f"{self.path()}: the current context belongs to {context.module.path()}. Expected to be "
                "called by a public method, which makes a context; private ones can only be called on `self`."
            )
        return context

    @property
    def is_training(self) -> bool:
        """Whether the current context is one of training."""
        return self.get_invocation_context().is_training

    @property
    def prng_key(self) -> Optional[Tensor]:
        """The PRNG key of the current context."""
        return self.get_invocation_context().prng_key

    @property
    def state(self) -> Any:
        """The state of this module in the current context."""
        return self.get_invocation_context().state

    def add_summary(self, name: str, value: Any) -> None:
        """Adds a value to log; see `InvocationContext.add_summary`."""
        self.get_invocation_context().add_summary(name, value)

    def add_state_update(self, name: str, value: Any) -> None:
        """Adds the new value of a part of the state; see `InvocationContext.add_state_update`."""
        self.get_invocation_context().add_state_update(name, value)

    def add_module_output(self, name: str, value: Any) -> None:
        """Adds an intermediate value; see `InvocationContext.add_module_output`."""
        self.get_invocation_context().add_module_output(name, value)

    def get_module_outputs(self) -> dict[str, Any]:
        """The intermediate values of this module and its children, so far."""
        return self.get_invocation_context().get_module_outputs()

    @contextlib.contextmanager
    def _enter_from(self, context: InvocationContext) -> Iterator[None]:
        """Enters the context of this module from that of an ancestor, or of one that it is shared with."""
        with contextlib.ExitStack() as stack:
            try:
                names = context.module.path_to_descendant_module(self)
            except InvalidDescendantError:
                shared = _find_shared(context, self)
                stack.enter_context(child_context(shared.name, module=shared.module, state=shared.state))
            else:
                for name in names:
                    stack.enter_context(child_context(name))
            yield

    def _invoke(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a public method in the context made for it; a subclass may put something around it."""
        return fn(self, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same as `forward`."""
        return self.forward(*args, **kwargs)

    # Logging.

    def vlog_is_on(self, level: int) -> bool:
        """Whether `vlog(level, ...)` is heard."""
        return self._vlog_level is not None and level <= self._vlog_level

    def vlog(self, level: int, msg: str, *args: Any) -> None:
        """Logs `msg % args` where the module's level is at least `level`; inside jit, once per trace."""
        if self.vlog_is_on(level):
            logging.info("%s: %s", self.path(), msg % args if args else msg, stacklevel=2)

    def vprint(self, level: int, fmt: str, *args: Any, **kwargs: Any) -> None:
        """Prints the values of arrays at run time, inside jit too.

        Args:
            level: The module's level from which on this is heard.
            fmt: As in `jax.debug.print`; the file and the line of the caller are printed before it.
            args: The values.
            kwargs: The named values.
        """
        if self.vlog_is_on(level):
            caller = sys._getframe(1)
            where = f"{os.path.basename(caller.f_code.co_filename)}:{caller.f_lineno}"
            jax.debug.print(f"{where}] {fmt}", *args, **kwargs)


def _find_shared(context: InvocationContext, module: Module) -> SharedModuleInfo:
    try:
        return context.get_shared_module(module)
    except ValueError:
        raise RuntimeError(
            f"{module.path()} was called from the context of {context.module.path()}, of which it is no "
            "descendant. Expected a descendant, or a module that an ancestor shares "
            "(`_share_with_descendants`)."
        ) from None


def _note_build_failure(e: Exception, where: str, child_config: Any) -> None:
    """Adds where in the tree of modules a constructor failed, once: the innermost place."""
    prefix = "Failed to build module "
    if not any(note.startswith(prefix) for note in getattr(e, "__notes__", ())):
        e.add_note(f"{prefix}{where} ({getattr(child_config.klass, '__qualname__', child_config.klass)})")
