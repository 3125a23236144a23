"""What a type checker knows about configs."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]

PROGRAM = """\
from axlearn.common.config import REQUIRED, Configurable, ConfigOr, InstantiableConfig, Required, config_class

class Layer(Configurable):
    @config_class
    class Config(Configurable.Config):
        dim: Required[int] = REQUIRED
        bias: bool = True

class Model(Configurable):
    @config_class
    class Config(Layer.Config):
        layer: InstantiableConfig[Layer] = Layer.default_config()
        scale: ConfigOr[int] = 3

cfg: Layer.Config = Layer.default_config()
cfg.dim = 4
doubled: int = 2 * cfg.dim
cfg.dim = "four"
cfg.dimm = 4
cfg.bais
made = Model.Config(klass=Model, dim=3)
Model.Config(klass=Model, dimm=3)
Model.Config(klass=Model, bias="x")
reveal_type(made.layer.instantiate())
reveal_type(made.clone(dim=3).scale)
made.layer.dim = 5
"""

EXPECTED = {
    18: 'Incompatible types in assignment (expression has type "str", variable has type "int")',
    19: '"Config" has no attribute "dimm"; maybe "dim"?',
    20: '"Config" has no attribute "bais"',
    22: 'Unexpected keyword argument "dimm" for "Config"; did you mean "dim"?',
    23: 'Argument "bias" to "Config" has incompatible type "str"; expected "bool"',
    24: 'Revealed type is "program.Layer"',
    25: 'Revealed type is "int | axlearn.common.config._configurable.InstantiableConfig[int]"',
}


def test_a_type_checker_finds_unknown_fields_and_wrong_types(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--config-file=", "--no-error-summary", "--hide-error-codes"]
    cache = ["--cache-dir", str(ROOT / ".cache" / "mypy-tests"), "--explicit-package-bases"]
    done = subprocess.run(
        [*command, *cache, str(tmp_path / "program.py")],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    found = {}
    for line in done.stdout.splitlines():
        place, _, text = line.partition(": ")
        found[int(place.rpartition(":")[2])] = text.partition(": ")[2]
    assert found == EXPECTED, done.stdout + done.stderr
