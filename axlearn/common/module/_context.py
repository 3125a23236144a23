"""The invocation context: what methods of modules read and write while they run; each thread has a stack."""

import contextlib
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import jax

from axlearn.common.module._outputs import OutputCollection, OutputConflictError, new_output_collection
from axlearn.common.utils import NestedTensor, Tensor

if TYPE_CHECKING:
    from axlearn.common.module._module import Module

# A context of this name runs the current module once more, inside of jax.checkpoint: it is no level of the
# tree.
REMAT_NAME = "remat"


class SharedModuleInfo(NamedTuple):
    """A module that an ancestor shares with its descendants.

    Attributes:
        name: The name under which it is shared.
        module: The module.
        state: Its state, found by way of the ancestor's context.
    """

    name: str
    module: "Module"
    state: NestedTensor


@functools.lru_cache(maxsize=4096)
def _name_hash(name: str) -> int:
    """What distinguishes the PRNG key of a child from its siblings'; fixed, so that runs can be repeated."""
    digest = hashlib.md5(name.encode("utf-8"), usedforsecurity=False).digest()
    return int.from_bytes(digest, "big") % (2**31 - 1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["parent", "state", "prng_key", "output_collection"],
    meta_fields=["name", "module", "is_training"],
)
@dataclasses.dataclass(eq=False)
class InvocationContext:
    """What the methods of one module see while they run.

    Attributes:
        name: The name of the context: mostly that of the module.
        parent: The context of the caller; None for the first one.
        module: The module that runs.
        state: Its state: for a layer, its parameters and those of its children by name.
        is_training: Whether this is training, as opposed to evaluation or inference.
        prng_key: Its PRNG key; None where it may not draw random numbers.
        output_collection: Where its outputs go.
    """

    name: str
    parent: Optional["InvocationContext"]
    module: "Module"
    state: NestedTensor
    is_training: bool
    prng_key: Optional[Tensor]
    output_collection: OutputCollection

    def path(self) -> str:
        """The names of this context and those around it, joined by dots."""
        return self.name if self.parent is None else f"{self.parent.path()}.{self.name}"

    def add_child(self, name: str, **overrides: Any) -> "InvocationContext":
        """Makes the context of a child; `set_current_context` enters it.

        Args:
            name: The name of the context, below which its outputs appear.
            overrides: Values of fields. By default the module is the child called `name`; the state is the
                module's part of this state; the PRNG key is this key folded with a hash of the name.

        Returns:
            The context.

        Raises:
            ValueError: If `parent` is among the overrides, or the state of the module cannot be found.
            OutputConflictError: If a context of this name was opened before in this one.
        """
        if "parent" in overrides:
            raise ValueError(f"{self.path()}: the parent of a child context cannot be overridden.")
        fields: dict[str, Any] = {"is_training": self.is_training, **overrides}
        if "module" not in fields:
            fields["module"] = self.module.child(name)
        if "state" not in fields:
            fields["state"] = self.state_of(fields["module"])
        if "prng_key" not in fields:
            key = self.prng_key
            fields["prng_key"] = None if key is None else jax.random.fold_in(key, _name_hash(name))
        if "output_collection" not in fields:
            fields["output_collection"] = self.output_collection.add_child(name)
        return InvocationContext(name=name, parent=self, **fields)

    def state_of(self, module: "Module") -> NestedTensor:
        """The part of this state that belongs to `module`, which is this context's own or a descendant."""
        state = self.state
        for name in self.module.path_to_descendant_module(module):
            if state is None:
                return None
            # A child without parameters or other state need not appear.
            state = state.get(name, {}) if isinstance(state, Mapping) else getattr(state, name)
        return state

    def _add_output(self, kind: str, name: str, value: Any) -> None:
        outputs = getattr(self.output_collection, kind)
        if name in outputs:
            raise OutputConflictError(f"{self.path()}: {kind} already has a value called {name!r}.")
        outputs[name] = value

    def add_summary(self, name: str, value: Any) -> None:
        """Adds a value to log.

        Raises:
            OutputConflictError: If there is one of this name.
        """
        self._add_output("summaries", name, value)

    def add_state_update(self, name: str, value: Any) -> None:
        """Adds the new value of a part of the state.

        Raises:
            OutputConflictError: If there is one of this name.
        """
        self._add_output("state_updates", name, value)

    def add_module_output(self, name: str, value: Any) -> None:
        """Adds an intermediate value.

        Raises:
            OutputConflictError: If there is one of this name.
        """
        self._add_output("module_outputs", name, value)

    def set_state_update(self, value: Any) -> None:
        """Replaces all state updates of this context, for states that are not dicts."""
        self.output_collection = self.output_collection._replace(state_updates=value)
        if self.parent is not None:
            self.parent.output_collection.state_updates[self.name] = value

    def get_module_outputs(self) -> dict[str, Any]:
        """The intermediate values added so far, those of children included."""
        return self.output_collection.module_outputs

    def get_shared_module(self, shared_module: "str | Module") -> SharedModuleInfo:
        """Looks a shared module up, by name or by itself; the nearest ancestor that shares it wins.

        Raises:
            ValueError: If no ancestor shares it.
        """
        context: Optional[InvocationContext] = self
        known: list[str] = []
        while context is not None:
            for name, module in context.module.shared_modules.items():
                if shared_module in (name, module):
                    return SharedModuleInfo(name=name, module=module, state=context.state_of(module))
                known.append(name)
            context = context.parent
        label = shared_module if isinstance(shared_module, str) else shared_module.path()
        raise ValueError(
            f"{self.path()}: no ancestor shares {label!r}. Shared here: {', '.join(known) or 'nothing'}."
        )

    def functional(self, method_fn: Callable[..., Any]) -> Callable[..., tuple[Any, OutputCollection]]:
        """Turns a function that runs in this context into a pure one.

        Args:
            method_fn: The function; it may call methods of this context's module.

        Returns:
            A function of the same arguments that returns (output, OutputCollection). It writes nothing into
            this context.
        """

        def pure_fn(*args: Any, **kwargs: Any) -> tuple[Any, OutputCollection]:
            context = dataclasses.replace(self, output_collection=new_output_collection())
            # Updates must not reach the parent either; its state and sharing are still looked up.
            if self.parent is not None:
                context.parent = dataclasses.replace(self.parent, output_collection=new_output_collection())
            with set_current_context(context, require_parent=False):
                output = method_fn(*args, **kwargs)
            return output, context.output_collection

        return pure_fn


class ContextStack(NamedTuple):
    """A copy of a thread's context stack.

    Attributes:
        thread_id: The thread it was copied from.
        contexts: The contexts, the outermost first.
    """

    thread_id: int
    contexts: tuple[InvocationContext, ...]


class _ThreadLocalStack(threading.local):
    def __init__(self) -> None:
        self.contexts: list[InvocationContext] = []


_stack = _ThreadLocalStack()


def current_context() -> Optional[InvocationContext]:
    """The innermost context of this thread, or None."""
    return _stack.contexts[-1] if _stack.contexts else None


def clone_context_stack() -> ContextStack:
    """Copies this thread's stack, to be installed in a new thread."""
    return ContextStack(thread_id=threading.get_ident(), contexts=tuple(_stack.contexts))


def install_context_stack(stack: ContextStack) -> None:
    """Makes a copy of another thread's stack that of this thread. A new thread starts without any context.

    Args:
        stack: What `clone_context_stack` returned in the other thread.

    Raises:
        RuntimeError: If it was this very thread.
    """
    if stack.thread_id == threading.get_ident():
        raise RuntimeError(
            "This context stack is a copy of the same thread's. Expected to be in a new thread."
        )
    _stack.contexts = list(stack.contexts)


@contextlib.contextmanager
def set_current_context(
    context: InvocationContext, *, require_parent: bool = True
) -> Iterator[InvocationContext]:
    """Makes `context` the current one inside the `with` block.

    Operations inside carry `name[ClassName]` in the compiled program and in profiles.

    Args:
        context: The context.
        require_parent: Whether its parent must be the current context, as opposed to any.

    Raises:
        RuntimeError: If it must be but is not.
    """
    current = current_context()
    if require_parent and context.parent is not current:
        raise RuntimeError(
            f"{context.path()}: its parent is not the current context, which is "
            f"{current.path() if current is not None else None}."
        )
    _stack.contexts.append(context)
    try:
        if context.name == REMAT_NAME:
            yield context
        else:
            with jax.named_scope(f"{context.name}[{type(context.module).__qualname__}]"):
                yield context
    finally:
        popped = _stack.contexts.pop()
        assert popped is context, "The context stack was changed by someone else."


@contextlib.contextmanager
def child_context(name: str, **overrides: Any) -> Iterator[InvocationContext]:
    """Runs the `with` block in a child of the current context; see `InvocationContext.add_child`.

    Args:
        name: The name of the child context.
        overrides: Values of its fields.

    Raises:
        RuntimeError: If there is no current context.
    """
    context = current_context()
    if context is None:
        raise RuntimeError(
            f"There is no context that {name!r} could be a child of. Expected to run in `functional`."
        )
    with set_current_context(context.add_child(name, **overrides)) as child:
        yield child
