"""Values with parts read from text: lists, tuples, dicts, and objects of dataclasses, each part by its own type."""

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from axlearn.common.config._fields import dataclass_fields
from axlearn.common.config._lookup import find_named, may_name
from axlearn.common.config._names import nearest_names, public_name
from axlearn.common.config._parse_scalar import (
    SPEC_NAMES,
    NoValueError,
    ParseError,
    dotted,
    expression,
    parse_partition_spec,
)
from axlearn.common.config._types import element_annotation
from axlearn.common.config._values import named_values


class Place(NamedTuple):
    """What a text is read for.

    Attributes:
        annotation: The resolved annotation; `Any` where there is none.
        current: The value there now.
        import_prefixes: The packages that names may lead into.
        is_inner: Whether the text is a part of a longer one, where strings need quotes.
    """

    annotation: Any
    current: Any
    import_prefixes: tuple[str, ...]
    is_inner: bool = False

    def part(self, annotation: Any, current: Any) -> "Place":
        """The place of a part of the value."""
        return self._replace(annotation=annotation, current=current, is_inner=True)


# Reads the text of a part.
ReadFn = Callable[[str, Place], Any]


def parse_mapping(text: str, annotation: Any, place: Place, *, read: ReadFn) -> dict[Any, Any]:
    """Reads a literal dict."""
    node = expression(text)
    if not isinstance(node, ast.Dict):
        raise NoValueError
    keys = [ast.literal_eval(key) for key in node.keys if key is not None]
    if len(keys) < len(node.keys):
        # `**more` has a value and no key.
        raise NoValueError
    old = place.current if isinstance(place.current, Mapping) else {}
    if len(set(keys)) < len(keys):
        raise ParseError("each key once")
    places = [place.part(element_annotation(annotation, key), old.get(key)) for key in keys]
    values = _read_parts(dict(zip(keys, node.values, strict=True)), text, places, read=read)
    return dict(zip(keys, values, strict=True))


def parse_sequence(text: str, origin: type, annotation: Any, place: Place, *, read: ReadFn) -> Any:
    """Reads a literal list or tuple; it becomes what the annotation asks for, or else what is there now."""
    node = expression(text)
    if not isinstance(node, (ast.List, ast.Tuple)):
        raise NoValueError
    old = place.current if isinstance(place.current, (list, tuple)) else ()
    places = [
        place.part(element_annotation(annotation, i), old[i] if i < len(old) else None)
        for i in range(len(node.elts))
    ]
    items = _read_parts(dict(enumerate(node.elts)), text, places, read=read)
    if origin in (list, tuple):
        return origin(items)
    if type(place.current) in (list, tuple):
        return type(place.current)(items)
    return tuple(items) if isinstance(node, ast.Tuple) else items


def _read_parts(
    nodes: Mapping[Any, ast.expr], text: str, places: Sequence[Place], *, read: ReadFn
) -> list[Any]:
    values = []
    for (key, node), place in zip(nodes.items(), places, strict=True):
        part = ast.get_source_segment(text.strip(), node) or ""
        try:
            values.append(read(part, place))
        except ParseError as e:
            e.part = f"[{key!r}]{e.part}"
            e.part_text = part if e.part_text is None else e.part_text
            raise
    return values


def is_structured(cls: Any) -> bool:
    """Whether a class is a dataclass, an attrs class or a namedtuple."""
    is_tuple = isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")
    return is_tuple or hasattr(cls, "__dataclass_fields__") or hasattr(cls, "__attrs_attrs__")


def parse_object(text: str, place: Place, *, classes: Sequence[Any], read: ReadFn) -> Any:
    """Reads `Name(field=value, ...)` as an object of a dataclass, or as a partition spec.

    Args:
        text: The text.
        place: Where the object goes.
        classes: The classes that its annotation names; that of the value there now is added.
        read: Reads the fields.

    Raises:
        ParseError: If the class does not take the fields.
    """
    node = expression(text)
    if not isinstance(node, ast.Call):
        raise NoValueError
    name = dotted(node.func)
    if not classes and name.rpartition(".")[2] in SPEC_NAMES:
        return parse_partition_spec(text)
    if named_values(place.current) is not None:
        classes = [*classes, type(place.current)]
    cls: Any = next((c for c in classes if name in (c.__name__, c.__qualname__, public_name(c))), None)
    if cls is None and may_name(name, import_prefixes=place.import_prefixes):
        cls = find_named(name, import_prefixes=place.import_prefixes)
    if not is_structured(cls):
        raise NoValueError
    nodes = _arguments(cls, node)
    # The object there now has nothing to say: fields that are not named get their defaults.
    types = dataclass_fields(cls) if hasattr(cls, "__dataclass_fields__") else {}
    places = [place.part(types[f].annotation if f in types else Any, None) for f in nodes]
    values = _read_parts(nodes, text, places, read=read)
    return cls(**dict(zip(nodes, values, strict=True)))


def _arguments(cls: Any, node: ast.Call) -> dict[str, ast.expr]:
    """Returns the arguments of a call by the names of the fields."""
    signature = inspect.signature(cls)
    names = list(signature.parameters)
    keywords = {keyword.arg or "**": keyword.value for keyword in node.keywords}
    try:
        return dict(signature.bind(*node.args, **keywords).arguments)
    except TypeError as e:
        unknown = [name for name in keywords if name not in names]
        raise ParseError(
            usage_of(cls),
            nearest=nearest_names(unknown[0], names) if unknown else [],
            advice=None if unknown else str(e).capitalize(),
        ) from e


def usage_of(cls: Any) -> str:
    """Returns how an object of a dataclass is written."""
    return f"{cls.__name__}({', '.join(f'{name}=...' for name in inspect.signature(cls).parameters)})"
