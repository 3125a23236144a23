"""The public names: each resolves back to itself, and the list of them is a golden file."""

import importlib
import pkgutil
import types

import axlearn.common
from axlearn.common.config import ConfigBase, public_name


def _public_modules() -> list[types.ModuleType]:
    names = [
        info.name
        for info in pkgutil.walk_packages(axlearn.common.__path__, "axlearn.common.")
        if not any(part.startswith("_") for part in info.name.split("."))
    ]
    return [importlib.import_module(name) for name in sorted(names)]


def _exports(module: types.ModuleType) -> dict[str, object]:
    """What a module offers: a package all that it re-exports, a file what is defined in it."""
    is_package = hasattr(module, "__path__")
    exports = {}
    for name, value in vars(module).items():
        if name.startswith("__") or isinstance(value, types.ModuleType):
            continue
        home = getattr(value, "__module__", None)
        is_ours = isinstance(home, str) and home.startswith(module.__name__)
        if (
            is_ours
            and isinstance(value, (type, types.FunctionType))
            and (is_package or not name.startswith("_"))
        ):
            exports[name] = value
    return exports


def _is_config_class(value: object) -> bool:
    """Whether a value bears a name of the form `config_class(...)`, as the contract wants it for configs."""
    return isinstance(value, type) and issubclass(value, ConfigBase)


def test_every_exported_name_resolves_back_to_itself():
    wrong = {
        f"{module.__name__}.{name}": public_name(value)
        for module in _public_modules()
        for name, value in _exports(module).items()
        if not _is_config_class(value) and public_name(value) != f"{module.__name__}.{name}"
    }
    assert not wrong


def test_the_list_of_public_names_is_known(golden):
    names = [f"{module.__name__}.{name}" for module in _public_modules() for name in _exports(module)]
    assert len(names) > 300
    golden("public_api.txt", "\n".join(sorted(names)) + "\n")
