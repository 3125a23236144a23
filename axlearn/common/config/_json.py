"""Configs as JSON for programs: everything in the tree, equal when it is read back, and safe to read.

Plain data stands for itself. What JSON does not know is an object with a key that begins with a dollar:

    {"$config": "axlearn.common.layers:Linear.Config", "input_dim": 4, ...}
    {"$function": "axlearn.common.schedule:polynomial", ...}     {"$class": "...", ...}
    {"$ref": "axlearn.common.layers:Linear"}   {"$tuple": [...]}   {"$dict": [[key, value], ...]}
"""

import dataclasses
import enum
import importlib
import json
from collections.abc import Sequence
from typing import Any

from axlearn.common.config._base import ConfigBase
from axlearn.common.config._dump import join_path
from axlearn.common.config._errors import error_message, join_messages
from axlearn.common.config._formatters import is_dtype, is_partition_spec
from axlearn.common.config._function import (
    ClassConfigBase,
    FunctionConfigBase,
    config_for_class,
    config_for_function,
)
from axlearn.common.config._references import BadReferenceError, reference_to, resolve_reference
from axlearn.common.config._required import REQUIRED
from axlearn.common.config._values import is_config, is_named_tuple, named_values

# The first line of a file: what it is, and by which version of the rules above.
_FORMAT = "axlearn.config/1"
_NON_FINITE = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


class ConfigJsonError(ValueError):
    """A config cannot be written as JSON, or a text is not the JSON of a config that may be read."""


class _NotWritableError(Exception):
    """A value has no JSON form; the message says why."""


def config_to_json(cfg: ConfigBase) -> str:
    """Returns a config as JSON.

    Args:
        cfg: A config. Everything in it is written, defaults too, so that what is read back does not depend on
            them.

    Returns:
        The text, indented, which `config_from_json` reads back as an equal config.

    Raises:
        ConfigJsonError: If it holds things that no name leads to, such as lambdas: all of them at once, with
            paths.
    """
    problems: list[str] = []
    body = _encode(cfg, "", problems)
    if problems:
        heading = f"{len(problems)} values cannot be written as JSON:"
        raise ConfigJsonError(join_messages(problems, heading=heading))
    return json.dumps({"format": _FORMAT, "config": body}, indent=2, ensure_ascii=False, allow_nan=False)


def config_from_json(text: str, *, import_prefixes: Sequence[str] = ("axlearn.",)) -> Any:
    """Reads a config that `config_to_json` wrote.

    Args:
        text: The JSON.
        import_prefixes: Packages whose classes and functions the text may name. Beyond them it may name
            dtypes, `jax.nn` functions and `jax.checkpoint_policies`. Nothing is evaluated or unpickled.

    Returns:
        An unfrozen config. Fields that the text lacks have their defaults.

    Raises:
        ConfigJsonError: If the text is no such JSON, names anything else, or does not fit today's config
            classes.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as e:
        # Not JSON, a number with too many digits, or nested too deeply.
        raise ConfigJsonError(error_message(what=f"not JSON ({e})", expected="a config's JSON")) from e
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise ConfigJsonError(
            error_message(what=f"format={found!r} is not a config's JSON", expected=f"format={_FORMAT!r}")
        )
    cfg = _Decoder(tuple(import_prefixes)).decode(document.get("config"), "")
    if not is_config(cfg):
        raise ConfigJsonError(error_message(what="the document's 'config' is not a config"))
    return cfg


def _encode(value: Any, path: str, problems: list[str]) -> Any:
    if is_config(value) or named_values(value) is not None or isinstance(value, dict):
        return _encode_container(value, path, problems)
    if type(value) in (list, tuple):
        return _encode_container(value, path, problems)
    try:
        return _encode_leaf(value)
    except (_NotWritableError, BadReferenceError) as e:
        problems.append(error_message(where=path or "the config", what=str(e)))
        return None


def _encode_leaf(value: Any) -> Any:
    if value is REQUIRED:
        return {"$required": True}
    if isinstance(value, enum.Enum):
        return {"$enum": reference_to(type(value)), "name": value.name}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        is_finite = value - value == 0
        return value if is_finite else {"$float": repr(value)}
    if is_partition_spec(value):
        return {"$partition_spec": _encode_partition_spec(value)}
    if is_dtype(value):
        return {"$dtype": value.name}
    if isinstance(value, range):
        return {"$range": [value.start, value.stop, value.step]}
    if isinstance(value, type) or callable(value):
        return {"$ref": reference_to(value)}
    raise _NotWritableError(
        f"a value of type {type(value).__module__}.{type(value).__qualname__} has no JSON form"
    )


def _encode_partition_spec(spec: Any) -> list[Any]:
    if getattr(spec, "unreduced", None) or getattr(spec, "reduced", None):
        raise _NotWritableError("a PartitionSpec with reduced or unreduced axes has no JSON form")
    axes = tuple(spec)
    if not all(axis is None or isinstance(axis, (str, tuple)) for axis in axes):
        raise _NotWritableError("a PartitionSpec with unconstrained dimensions has no JSON form")
    return [list(axis) if isinstance(axis, tuple) else axis for axis in axes]


def _encode_container(value: Any, path: str, problems: list[str]) -> Any:
    if is_config(value):
        return _encode_config(value, path, problems)
    named = named_values(value)
    if named is not None:
        kind = "$namedtuple" if is_named_tuple(value) else "$dataclass"
        fields = {name: _encode(item, f"{path}[{name!r}]", problems) for name, item in named}
        return {kind: _encode_reference(type(value), path, problems), "fields": fields}
    if isinstance(value, dict):
        items = [(key, _encode(item, f"{path}[{key!r}]", problems)) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$dict": [[_encode(key, f"{path} (a key)", problems), item] for key, item in items]}
    encoded = [_encode(item, f"{path}[{i}]", problems) for i, item in enumerate(value)]
    return encoded if isinstance(value, list) else {"$tuple": encoded}


def _encode_reference(obj: Any, path: str, problems: list[str]) -> Any:
    try:
        return reference_to(obj)
    except BadReferenceError as e:
        problems.append(error_message(where=path or "the config", what=str(e)))
        return None


def _encode_config(cfg: Any, path: str, problems: list[str]) -> dict[str, Any]:
    if isinstance(cfg, FunctionConfigBase):
        head, slot, named = "$function", "fn", cfg.fn
    elif isinstance(cfg, ClassConfigBase):
        head, slot, named = "$class", "klass", cfg.klass
    else:
        head, slot, named = "$config", "", type(cfg)
    result = {head: _encode_reference(named, path, problems)}
    for name, value in cfg.items():
        if name != slot:
            result[name] = _encode(value, join_path(path, name), problems)
    return result


class _Decoder:
    """Turns JSON back into values.

    Attributes:
        import_prefixes: The packages that names may lead into.
    """

    def __init__(self, import_prefixes: tuple[str, ...]) -> None:
        self.import_prefixes = import_prefixes

    def decode(self, node: Any, path: str) -> Any:
        """Returns the value of a node; `path` is where it stands in the config, for messages."""
        if isinstance(node, list):
            return [self.decode(item, f"{path}[{i}]") for i, item in enumerate(node)]
        if not isinstance(node, dict):
            return node
        tags = [key for key in node if key.startswith("$")]
        if not tags:
            return {key: self.decode(item, f"{path}[{key!r}]") for key, item in node.items()}
        tag = tags[0]
        method = getattr(self, "_" + tag[1:], None) if tag in _TAGS else None
        if method is None:
            raise ConfigJsonError(error_message(where=path or "the config", what=f"unknown tag '{tag}'"))
        try:
            return method(node, path)
        except ConfigJsonError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            reason = f"no {e}" if isinstance(e, KeyError) else str(e)
            raise ConfigJsonError(error_message(where=path or "the config", what=reason)) from e

    def _resolve(self, text: Any) -> Any:
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is not a name")
        return resolve_reference(text, import_prefixes=self.import_prefixes)

    def _fields(self, node: dict[str, Any], path: str) -> dict[str, Any]:
        items = ((name, item) for name, item in node.items() if not name.startswith("$"))
        return {name: self.decode(item, join_path(path, name)) for name, item in items}

    def _config(self, node: dict[str, Any], path: str) -> Any:
        cls = self._resolve(node["$config"])
        if not (isinstance(cls, type) and issubclass(cls, ConfigBase)):
            raise ValueError(f"'{node['$config']}' is not a config class")
        return cls(**self._fields(node, path))

    def _function(self, node: dict[str, Any], path: str) -> Any:
        return config_for_function(self._resolve(node["$function"])).set(**self._fields(node, path))

    def _class(self, node: dict[str, Any], path: str) -> Any:
        return config_for_class(self._resolve(node["$class"])).set(**self._fields(node, path))

    def _dataclass(self, node: dict[str, Any], path: str) -> Any:
        cls = self._resolve(node["$dataclass"])
        if not (dataclasses.is_dataclass(cls) or hasattr(cls, "__attrs_attrs__")):
            raise ValueError(f"'{node['$dataclass']}' is not a dataclass")
        values = {name: self.decode(item, f"{path}[{name!r}]") for name, item in node["fields"].items()}
        return cls(**values)

    def _namedtuple(self, node: dict[str, Any], path: str) -> Any:
        cls = self._resolve(node["$namedtuple"])
        if not (isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")):
            raise ValueError(f"'{node['$namedtuple']}' is not a namedtuple")
        values = {name: self.decode(item, f"{path}[{name!r}]") for name, item in node["fields"].items()}
        return cls(**values)

    def _enum(self, node: dict[str, Any], path: str) -> Any:
        cls = self._resolve(node["$enum"])
        if not (isinstance(cls, type) and issubclass(cls, enum.Enum)):
            raise ValueError(f"'{node['$enum']}' is not an enum")
        return cls[node["name"]]

    def _ref(self, node: dict[str, Any], path: str) -> Any:
        return self._resolve(node["$ref"])

    def _tuple(self, node: dict[str, Any], path: str) -> Any:
        return tuple(self.decode(item, f"{path}[{i}]") for i, item in enumerate(node["$tuple"]))

    def _dict(self, node: dict[str, Any], path: str) -> Any:
        pairs = [(self.decode(key, f"{path} (a key)"), item) for key, item in node["$dict"]]
        return {key: self.decode(item, f"{path}[{key!r}]") for key, item in pairs}

    def _range(self, node: dict[str, Any], path: str) -> Any:
        return range(*node["$range"])

    def _float(self, node: dict[str, Any], path: str) -> Any:
        return _NON_FINITE[node["$float"]]

    def _required(self, node: dict[str, Any], path: str) -> Any:
        return REQUIRED

    def _dtype(self, node: dict[str, Any], path: str) -> Any:
        # ml_dtypes teaches numpy the names of the small floating-point types.
        importlib.import_module("ml_dtypes")
        return importlib.import_module("numpy").dtype(node["$dtype"])

    def _partition_spec(self, node: dict[str, Any], path: str) -> Any:
        axes = [tuple(axis) if isinstance(axis, list) else axis for axis in node["$partition_spec"]]
        return importlib.import_module("jax.sharding").PartitionSpec(*axes)


_TAGS = frozenset(
    [
        "$config",
        "$function",
        "$class",
        "$dataclass",
        "$namedtuple",
        "$enum",
        "$ref",
        "$tuple",
        "$dict",
        "$range",
        "$float",
        "$required",
        "$dtype",
        "$partition_spec",
    ]
)
