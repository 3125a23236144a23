"""Configs: typed trees that say what to build, print as text, and are compared, overridden and kept.

A config class lists typed fields; `Configurable.Config` adds the class that it builds, `config_for_function`
the function that it calls. Nothing here imports jax or numpy; see README.md in this folder.
"""

from axlearn.common.config._base import ConfigBase as ConfigBase
from axlearn.common.config._base import config_class as config_class
from axlearn.common.config._class_fields import validate_config_field_name as validate_config_field_name
from axlearn.common.config._configurable import ConfigModifier as ConfigModifier
from axlearn.common.config._configurable import ConfigOr as ConfigOr
from axlearn.common.config._configurable import Configurable as Configurable
from axlearn.common.config._configurable import InstantiableConfig as InstantiableConfig
from axlearn.common.config._configurable import maybe_instantiate as maybe_instantiate
from axlearn.common.config._configurable import maybe_set_config as maybe_set_config
from axlearn.common.config._errors import FrozenConfigError as FrozenConfigError
from axlearn.common.config._errors import InvalidConfigClassError as InvalidConfigClassError
from axlearn.common.config._errors import InvalidConfigNameError as InvalidConfigNameError
from axlearn.common.config._errors import InvalidConfigValueError as InvalidConfigValueError
from axlearn.common.config._errors import MissingConfigClassDecoratorError as MissingConfigClassDecoratorError
from axlearn.common.config._errors import NonConfigFieldError as NonConfigFieldError
from axlearn.common.config._errors import RequiredFieldMissingError as RequiredFieldMissingError
from axlearn.common.config._errors import UnknownFieldError as UnknownFieldError
from axlearn.common.config._errors import error_message as error_message
from axlearn.common.config._errors import join_messages as join_messages
from axlearn.common.config._formatters import register_formatter as register_formatter
from axlearn.common.config._function import ClassConfigBase as ClassConfigBase
from axlearn.common.config._function import FunctionConfigBase as FunctionConfigBase
from axlearn.common.config._function import config_for_class as config_for_class
from axlearn.common.config._function import config_for_function as config_for_function
from axlearn.common.config._json import ConfigJsonError as ConfigJsonError
from axlearn.common.config._json import config_from_json as config_from_json
from axlearn.common.config._json import config_to_json as config_to_json
from axlearn.common.config._named import TrainerConfigFn as TrainerConfigFn
from axlearn.common.config._named import UnknownConfigNameError as UnknownConfigNameError
from axlearn.common.config._named import get_named_trainer_config as get_named_trainer_config
from axlearn.common.config._named import with_overrides as with_overrides
from axlearn.common.config._names import nearest_names as nearest_names
from axlearn.common.config._names import public_name as public_name
from axlearn.common.config._names import public_qualname as public_qualname
from axlearn.common.config._names import similar_names as similar_names
from axlearn.common.config._overrides import InvalidOverrideError as InvalidOverrideError
from axlearn.common.config._overrides import Override as Override
from axlearn.common.config._overrides import apply_overrides as apply_overrides
from axlearn.common.config._paths import PathError as PathError
from axlearn.common.config._paths import value_at as value_at
from axlearn.common.config._provenance import SourceLocation as SourceLocation
from axlearn.common.config._required import REQUIRED as REQUIRED
from axlearn.common.config._required import Required as Required
from axlearn.common.config._required import RequiredFieldValue as RequiredFieldValue
from axlearn.common.config._text import ConfigTextError as ConfigTextError
from axlearn.common.config._text import config_from_text as config_from_text
from axlearn.common.config._values import is_attrs as is_attrs
from axlearn.common.config._values import is_named_tuple as is_named_tuple
from axlearn.common.config._values import register_validator as register_validator
from axlearn.common.config._values import validate_config_field_value as validate_config_field_value
