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
from axlearn.common.config._fields import Field, dataclass_fields, find_bad_dataclass_field
from axlearn.common.config._function import config_for_class, config_for_function
from axlearn.common.config._names import nearest_names
from axlearn.common.config._parse_scalar import ParseError
from axlearn.common.config._parse_value import parse_value
from axlearn.common.config._paths import PathError, PrintedKey, Step, parse_path, unquoted
from axlearn.common.config._references import DTYPE_MODULES, DTYPE_NAMES, BadReferenceError, resolve_reference
from axlearn.common.config._required import REQUIRED
from axlearn.common.config._types import describe_value, element_annotation, enum_keys, union_members
from axlearn.common.config._values import is_config

_SEPARATOR = ": "
_SPECIAL_FLOATS = ("inf", "-inf", "nan")
# How much of a text is quoted in a message: enough to find it again.
_MAX_QUOTED = 80
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
        text: Lines of `path: value`, as `debug_string` writes them. A field without a line has its default where
            that is None or REQUIRED. Where it is another, the dump is of a version without the field, or the field
            holds an empty container: then it is empty, or None where the field may be, or else its default.
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
    decoder = _Decoder(tuple(import_prefixes))
    try:
        root = _parse_lines(text, path)
        cfg = decoder.decode(root, _Place(path, Any, None))
    except (MemoryError, RecursionError) as e:
        # What Python's own parser raises of a thousand brackets.
        raise ConfigTextError(error_message(where=path or "the dump", what="it is nested too deeply")) from e
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
            if steps[: len(prefix)] == prefix:
                _insert(root, steps[len(prefix) :], right, path=left)
        except PathError as e:
            raise ConfigTextError(error_message(where=f"line {number}", what=str(e))) from e
    if root.leaf is None and not root.parts:
        raise ConfigTextError(
            error_message(
                where=path or "the dump", what="no line begins with this path", expected="path: value"
            )
        )
    return root


def _split_line(line: str) -> tuple[str, str]:
    """Splits `path: value` at the first separator that is in neither brackets nor quotes."""
    for i, _, depth in unquoted(line):
        if depth == 0 and line.startswith(_SEPARATOR, i):
            return line[:i], line[i + len(_SEPARATOR) :]
    raise PathError(error_message(what=f"{_short(line)} is no line of a dump", expected="path: value"))


def _insert(root: _Node, steps: Sequence[Step], text: str, *, path: str) -> None:
    nodes = [root]
    try:
        for step in steps:
            nodes.append(nodes[-1].parts.setdefault(step, _Node()))
    except TypeError as e:
        # A key that no dict can have, such as [[1]].
        raise PathError(error_message(what=f"{_short(path)} is not a path ({e})")) from e
    if nodes[-1].parts or any(node.leaf is not None for node in nodes):
        what = f"{_short(path)} contradicts a line before it"
        raise PathError(error_message(what=what, expected="each path once, with a value or with parts"))
    nodes[-1].leaf = text


def _short(text: str) -> str:
    """Returns a text as it is quoted in messages."""
    return repr(text) if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]!r}..."


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
        if any(step.is_name for step in node.parts):
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
        slot_place = _Place(join_path(place.path, slot), str, None)
        num_problems = len(self.problems)
        value = self._leaf(name, slot_place)
        if len(self.problems) > num_problems:
            return None
        try:
            if not isinstance(value, str):
                raise BadReferenceError(f"{_short(name)} is not the name of a class or function")
            cfg = _default_config(self._resolve(value), slot=slot)
        except (BadReferenceError, InvalidConfigValueError) as e:
            return self._problem(slot_place, str(e))
        return self._with_fields(cfg, node, place, slot=slot)

    def _with_fields(self, cfg: Any, node: _Node, place: _Place, *, slot: str) -> Any:
        texts = {
            step.key if step.is_name else f"[{step.key!r}]": part
            for step, part in node.parts.items()
            if step != Step(slot, is_name=True)
        }
        for name in [name for name in texts if name not in cfg]:
            near = nearest_names(name, cfg.keys())
            self._problem(place, f"there is no field '{name}'", nearest=near or None)
            del texts[name]
        for name, field in cfg._config_fields.items():
            field_path = join_path(place.path, name)
            if name == slot:
                continue
            current, num_problems = getattr(cfg, name), len(self.problems)
            if name in texts:
                value = self.decode(texts[name], _Place(field_path, field.annotation, current))
            else:
                value = _unprinted_value(current, field=field, path=field_path)
            # What could not be read is a problem already.
            if len(self.problems) == num_problems:
                self._set(cfg, field, value, path=field_path)
        return cfg

    def _set(self, cfg: ConfigBase, field: Field, value: Any, *, path: str) -> None:
        mismatch = field.check(value) or find_bad_dataclass_field(value)
        if mismatch is not None:
            what = f"{describe_value(mismatch.value)} has the wrong type"
            self.problems.append(
                error_message(where=path + mismatch.path, what=what, expected=mismatch.expected)
            )
            return
        try:
            setattr(cfg, field.name, value)
        except InvalidConfigValueError:
            what = f"{describe_value(value)} is nothing that a config can hold"
            self.problems.append(error_message(where=path, what=what))

    # Containers.

    def _container(self, node: _Node, place: _Place) -> Any:
        keys = [self._key(step.key, place) for step in node.parts]
        cls = _dataclass_of(place.annotation, keys)
        if cls is not None:
            return self._dataclass(cls, node, place)
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

    def _key(self, key: Any, place: _Place) -> Any:
        """Returns the key of a dict or a list."""
        if not isinstance(key, PrintedKey):
            return key
        for member in enum_keys(place.annotation):
            if repr(member) == key:
                return member
        return self._problem(place, f"{_short(key)} is no key that can be read back")

    def _dataclass(self, cls: Any, node: _Node, place: _Place) -> Any:
        fields, num_problems = dataclass_fields(cls), len(self.problems)
        values = {
            step.key: self.decode(
                part, _Place(f"{place.path}[{step.key!r}]", fields[step.key].annotation, None)
            )
            for step, part in node.parts.items()
        }
        if len(self.problems) > num_problems:
            return None
        try:
            return cls(**values)
        except (TypeError, ValueError) as e:
            # A field is missing, or the class refuses a value.
            return self._problem(place, str(e))

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
        except (SyntaxError, TypeError, ValueError):
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
        return self._problem(place, f"{_short(text)} is no value that can be read back")

    def _string(self, text: str, place: _Place) -> Any:
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return self._problem(place, f"{_short(text)} is not a string as Python writes it")
        if str in union_members(place.annotation):
            return value
        module, _, name = value.rpartition(".")
        is_foreign = (module in DTYPE_MODULES and name in DTYPE_NAMES) or module == _PRINTED_POLICIES
        is_ours = any(value.startswith(prefix) for prefix in self.import_prefixes)
        if not (is_foreign or is_ours):
            return value
        try:
            return self._resolve(value)
        except BadReferenceError as e:
            return self._problem(place, str(e))


def _default_config(found: Any, *, slot: str) -> Any:
    """Returns the config, as yet without values, of what a name leads to."""
    if slot == "fn":
        return config_for_function(found)
    if isinstance(found, type) and issubclass(found, Configurable):
        return found.default_config()
    return config_for_class(found)


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
    if isinstance(current, (list, tuple)) and isinstance(key, int) and 0 <= key < len(current):
        return current[key]
    return None


def _sequence(items: list[Any], place: _Place) -> Any:
    """A list where the annotation or the default asks for one; else a tuple, which nobody can change."""
    kinds = {getattr(member, "__origin__", member) for member in union_members(place.annotation)}
    if tuple in kinds:
        return tuple(items)
    return items if list in kinds or isinstance(place.current, list) else tuple(items)
