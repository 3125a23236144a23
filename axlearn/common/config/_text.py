"""Reads a config back from the text that it prints as, whoever printed it.

A dump says less than JSON: a list looks like a tuple, a class like a string with its name, and a field that holds its
default prints nothing where that default is None or REQUIRED. What the text leaves open, today's config classes
decide: the annotation of each field, and its default.
"""

import ast
import dataclasses
import enum
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

from axlearn.common.config._base import ConfigBase
from axlearn.common.config._configurable import Configurable
from axlearn.common.config._dump import flatten, join_path
from axlearn.common.config._errors import InvalidConfigValueError, error_message, join_messages
from axlearn.common.config._fields import Field, dataclass_fields
from axlearn.common.config._function import config_for_class, config_for_function
from axlearn.common.config._names import nearest_names
from axlearn.common.config._parse_value import ParseError, parse_value
from axlearn.common.config._paths import PathError, Step, parse_path
from axlearn.common.config._references import DTYPE_NAMES, BadReferenceError, resolve_reference
from axlearn.common.config._required import REQUIRED
from axlearn.common.config._types import element_annotation, union_members
from axlearn.common.config._values import is_config

_SEPARATOR = ": "
_SPECIAL_FLOATS = ("inf", "-inf", "nan")
# Where jax keeps the remat policies that dumps name by the file they are defined in.
_PRINTED_POLICIES = "jax._src.ad_checkpoint"
_POLICIES = "jax.checkpoint_policies"


class ConfigTextError(ValueError):
    """A text is not the dump of a config that can be built here; the message has a line for each reason."""


@dataclasses.dataclass
class _Node:
    """What the lines below one path say: a leaf's text, or parts by their step."""

    leaf: Optional[str] = None
    parts: dict[Step, "_Node"] = dataclasses.field(default_factory=dict)

    def named(self, name: str) -> Optional["_Node"]:
        """The part behind a dot."""
        return self.parts.get(Step(name, is_name=True))


class _Place(NamedTuple):
    """Where a value goes: its path, what may stand there, and what stands there by default."""

    path: str
    annotation: Any
    current: Any


def config_from_text(text: str, *, path: str = "", import_prefixes: Sequence[str] = ("axlearn.",)) -> Any:
    """Builds the config that a dump shows, such as the `trainer_config` file of a run of ours or of AXLearn's.

    Args:
        text: Lines of `path: value`, as `debug_string` writes them.
        path: The part of the dump to build, such as "model"; empty for all of it. Lines outside of the part may
            name anything.
        import_prefixes: Packages whose classes and functions the text may name; besides them dtypes and remat
            policies. Nothing is evaluated.

    Returns:
        An unfrozen config that prints as these lines do.

    Raises:
        ConfigTextError: If a line is none, names what is not there, or holds what its field does not take: all
            such lines at once.
    """
    root = _parse_lines(text, path)
    decoder = _Decoder(tuple(import_prefixes))
    cfg = decoder.decode(root, _Place(path, Any, None))
    if not decoder.problems and not is_config(cfg):
        decoder.problems.append(
            error_message(
                where=path or "the dump", what="it has neither a klass nor a fn", expected="a config"
            )
        )
    if decoder.problems:
        heading = f"{len(decoder.problems)} lines cannot be read as a config:"
        raise ConfigTextError(join_messages(decoder.problems, heading=heading))
    return cfg


def _parse_lines(text: str, path: str) -> _Node:
    root = _Node()
    try:
        prefix = parse_path(path) if path else []
    except PathError as e:
        raise ConfigTextError(str(e)) from e
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            left, right = _split_line(line)
            steps = parse_path(left)
        except PathError as e:
            raise ConfigTextError(error_message(where=f"line {number}", what=str(e))) from e
        if steps[: len(prefix)] == prefix:
            _insert(root, steps[len(prefix) :], right)
    if root.leaf is None and not root.parts:
        raise ConfigTextError(
            error_message(
                where=path or "the dump", what="no line begins with this path", expected="path: value"
            )
        )
    return root


def _split_line(line: str) -> tuple[str, str]:
    """Splits `path: value` at the first separator that is in neither brackets nor quotes."""
    depth, quote = 0, ""
    for i, char in enumerate(line):
        if quote:
            quote = "" if char == quote else quote
        elif depth and char in "'\"":
            quote = char
        elif char in "[]":
            depth += 1 if char == "[" else -1
        elif depth == 0 and line.startswith(_SEPARATOR, i):
            return line[:i], line[i + len(_SEPARATOR) :]
    raise PathError(error_message(what=f"{line!r} is no line of a dump", expected="path: value"))


def _insert(root: _Node, steps: Sequence[Step], text: str) -> None:
    node = root
    for step in steps:
        node = node.parts.setdefault(step, _Node())
    node.leaf = text


class _Decoder:
    """Turns nodes into values.

    Attributes:
        import_prefixes: The packages that names may lead into.
        problems: What could not be read, one message each.
    """

    def __init__(self, import_prefixes: tuple[str, ...]) -> None:
        self.import_prefixes = import_prefixes
        self.problems: list[str] = []

    def decode(self, node: _Node, place: _Place) -> Any:
        """Returns the value of a node."""
        if not node.parts:
            return self._leaf(node.leaf or "", place)
        for slot in ("klass", "fn"):
            named = node.named(slot)
            if named is not None and named.leaf is not None:
                return self._config(node, place, slot=slot, name=named.leaf)
        if all(step.is_name for step in node.parts):
            if is_config(place.current):
                return self._with_fields(place.current.clone(), node, place, slot="")
            return self._problem(place, "this has fields, but neither a klass nor a fn")
        return self._container(node, place)

    def _problem(self, place: _Place, what: str, **kwargs: Any) -> None:
        self.problems.append(error_message(where=place.path or "the dump", what=what, **kwargs))

    def _resolve(self, name: str) -> Any:
        """The class or function that prints as `module.name`."""
        module, _, qualname = name.rpartition(".")
        if module == _PRINTED_POLICIES:
            module = _POLICIES
        return resolve_reference(f"{module}:{qualname}", import_prefixes=self.import_prefixes)

    # Configs.

    def _config(self, node: _Node, place: _Place, *, slot: str, name: str) -> Any:
        try:
            found = self._resolve(str(ast.literal_eval(name)))
        except (BadReferenceError, SyntaxError, ValueError) as e:
            return self._problem(place._replace(path=join_path(place.path, slot)), str(e))
        if slot == "fn":
            cfg: Any = config_for_function(found)
        elif isinstance(found, type) and issubclass(found, Configurable):
            cfg = found.default_config()
        else:
            cfg = config_for_class(found)
        return self._with_fields(cfg, node, place, slot=slot)

    def _with_fields(self, cfg: Any, node: _Node, place: _Place, *, slot: str) -> Any:
        texts = {step.key: part for step, part in node.parts.items() if step.key != slot}
        for name in [name for name in texts if name not in cfg]:
            near = nearest_names(name, cfg.keys())
            self._problem(place, f"there is no field '{name}'", nearest=near or None)
            del texts[name]
        for name, field in cfg._config_fields.items():
            field_path = join_path(place.path, name)
            if name == slot:
                continue
            current = getattr(cfg, name)
            if name in texts:
                value = self.decode(texts[name], _Place(field_path, field.annotation, current))
            else:
                value = _unprinted_value(current, field=field, path=field_path)
            self._set(cfg, name, value, path=field_path)
        return cfg

    def _set(self, cfg: ConfigBase, name: str, value: Any, *, path: str) -> None:
        try:
            setattr(cfg, name, value)
        except InvalidConfigValueError as e:
            # What could not be read is a problem already.
            if value is not None:
                self.problems.append(error_message(where=path, what=str(e)))

    # Containers.

    def _container(self, node: _Node, place: _Place) -> Any:
        keys = [step.key for step in node.parts]
        cls = _dataclass_of(place.annotation, keys)
        if cls is not None:
            fields = dataclass_fields(cls)
            values = {
                step.key: self.decode(
                    part, _Place(f"{place.path}[{step.key!r}]", fields[step.key].annotation, None)
                )
                for step, part in node.parts.items()
            }
            return cls(**values)
        values = {
            key: self.decode(
                part,
                _Place(
                    f"{place.path}[{key!r}]", element_annotation(place.annotation, key), _item(place, key)
                ),
            )
            for key, part in zip(keys, node.parts.values(), strict=True)
        }
        is_mapping = isinstance(place.current, Mapping) or any(
            isinstance(getattr(m, "__origin__", m), type) and issubclass(getattr(m, "__origin__", m), Mapping)
            for m in union_members(place.annotation)
        )
        if is_mapping or keys != list(range(len(keys))):
            return values
        return _sequence(list(values.values()), place)

    # Leaves.

    def _leaf(self, text: str, place: _Place) -> Any:
        if text == "REQUIRED":
            return REQUIRED
        if text in _SPECIAL_FLOATS:
            return float(text)
        if text[:1] in ("'", '"'):
            return self._string(text, place)
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError):
            pass
        kinds = [
            m for m in union_members(place.annotation) if isinstance(m, type) and issubclass(m, enum.Enum)
        ]
        if text.startswith("PartitionSpec"):
            kinds = [importlib.import_module("jax.sharding").PartitionSpec]
        elif text.startswith("dtype("):
            kinds = [importlib.import_module("numpy").dtype]
        for kind in kinds:
            try:
                return parse_value(text, annotation=kind, current=None)
            except ParseError:
                continue
        return self._problem(place, f"{text} has no value that can be read back")

    def _string(self, text: str, place: _Place) -> Any:
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return self._problem(place, f"{text} is not a string as Python writes it")
        if str in union_members(place.annotation):
            return value
        module, _, name = value.rpartition(".")
        is_foreign = (module == "jax.numpy" and name in DTYPE_NAMES) or module == _PRINTED_POLICIES
        is_ours = any(value.startswith(prefix) for prefix in self.import_prefixes)
        if not (is_foreign or is_ours):
            return value
        try:
            return self._resolve(value)
        except BadReferenceError as e:
            return self._problem(place, str(e))


def _unprinted_value(current: Any, *, field: Field, path: str) -> Any:
    """The value of a field of which the dump has no line."""
    if field.default is None or field.default is REQUIRED:
        return field.default
    if not any(True for _ in flatten(current, path=path, omitted=(None, REQUIRED))):
        return current
    # The default would print. So the field is empty, or whoever wrote the dump does not have it.
    if isinstance(current, (list, tuple, dict)):
        return type(current)()
    return None if any(m is None or m is type(None) for m in union_members(field.annotation)) else current


def _dataclass_of(annotation: Any, keys: Sequence[Any]) -> Any:
    """The dataclass among the alternatives of an annotation that has these fields."""
    for member in union_members(annotation):
        if dataclasses.is_dataclass(member) and isinstance(member, type):
            names = {field.name for field in dataclasses.fields(member)}
            if all(isinstance(key, str) and key in names for key in keys):
                return member
    return None


def _item(place: _Place, key: Any) -> Any:
    """What stands at a key of the default."""
    current = place.current
    if isinstance(current, Mapping):
        return current.get(key)
    if isinstance(current, (list, tuple)) and isinstance(key, int) and key < len(current):
        return current[key]
    return None


def _sequence(items: list[Any], place: _Place) -> Any:
    """A list where the annotation or the default asks for one; else a tuple, which nobody can change."""
    kinds = {getattr(member, "__origin__", member) for member in union_members(place.annotation)}
    if tuple in kinds:
        return tuple(items)
    return items if list in kinds or isinstance(place.current, list) else tuple(items)
