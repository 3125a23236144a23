"""A compiled program in a folder: what is loaded computes the same, and anything else is refused."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axlearn.common import saved_program
from axlearn.common.saved_program import SavedProgramError, is_saved, load_program, save_program

_CONFIG = "model.dim: 4\nlearner.rate: 0.1"


def _lower(factor: float = 2.0) -> jax.stages.Lowered:
    def step(state, batch):
        return {"weight": state["weight"] + factor * batch}, jnp.sum(batch)

    x = jax.ShapeDtypeStruct((4,), jnp.float32)
    return jax.jit(step).lower({"weight": x}, x)


def _devices():
    return jax.devices()[:1]


def save(folder):
    lowered = _lower()
    save_program(lowered.compile(), lowered=lowered, devices=_devices(), config_text=_CONFIG, folder=folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saved by a process without a compilation cache."""
    folder = tmp_path_factory.mktemp("programs") / "step"
    script = "import sys; from tests.common import saved_program_test as x; x.save(sys.argv[1])"
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", script, str(folder)], env=env, check=True)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of what was saved, to be spoiled."""
    copy = tmp_path / "step"
    copy.mkdir(mode=0o700)
    for path in saved.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def _load(folder, *, lowered=None, devices=None, config_text=_CONFIG):
    return load_program(
        lowered or _lower(), devices=devices or _devices(), config_text=config_text, folder=folder
    )


def test_what_is_loaded_computes_what_was_saved(saved):
    state, total = _load(saved)({"weight": jnp.ones(4)}, jnp.arange(4.0))
    np.testing.assert_array_equal(state["weight"], [1, 3, 5, 7])
    assert total == 6
    assert saved.stat().st_mode & 0o777 == 0o700


def test_another_program_is_refused_with_the_lines_that_differ(saved):
    with pytest.raises(SavedProgramError, match=r"saved learner\.rate: 0\.1, here learner\.rate: 0\.2"):
        _load(saved, lowered=_lower(3.0), config_text=_CONFIG.replace("0.1", "0.2"))
    with pytest.raises(SavedProgramError, match="the config is the same, but the code makes another program"):
        _load(saved, lowered=_lower(3.0))
    # What does not change the program may differ.
    _load(saved, config_text="input.seed: 3")


def test_other_devices_are_refused(saved):
    with pytest.raises(SavedProgramError, match="number of devices 1, here 2"):
        _load(saved, devices=jax.devices()[:2])
    with pytest.raises(SavedProgramError, match="the same number of devices, but elsewhere"):
        _load(saved, devices=jax.devices()[1:2])


def test_other_versions_and_flags_are_refused(folder, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    with pytest.raises(SavedProgramError, match=r"XLA_FLAGS '.*', here '--xla_cpu_enable_fast_math=true"):
        _load(folder)
    monkeypatch.undo()
    facts = json.loads((folder / "program.json").read_text())
    facts["versions"]["jax"] = "0.1.0"
    (folder / "program.json").write_text(json.dumps(facts))
    with pytest.raises(SavedProgramError, match=rf"jax '0\.1\.0', here '{jax.__version__}'"):
        _load(folder)


def test_nothing_and_half_of_something_are_refused(folder, tmp_path):
    with pytest.raises(SavedProgramError, match="there is no saved program here"):
        _load(tmp_path / "elsewhere")
    payload = (folder / "program.bin").read_bytes()
    (folder / "program.bin").write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))
    with pytest.raises(SavedProgramError, match=r"program\.bin is not what was saved"):
        _load(folder)
    (folder / "program.json").write_text("{")
    with pytest.raises(SavedProgramError, match=r"program\.json is not what was saved"):
        _load(folder)


@pytest.mark.parametrize("text", ["[]", '{"format": 2}', '{"format": 2, "versions": []}'])
def test_facts_of_another_form_are_refused(folder, text):
    (folder / "program.json").write_text(text)
    with pytest.raises(SavedProgramError, match=r"program\.json is not what was saved"):
        _load(folder)


def test_what_the_runtime_refuses_to_load_is_refused_with_its_reason(folder, monkeypatch):
    """So that a run may fall back to compiling."""

    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such thing")

    monkeypatch.setattr(saved_program.serialize_executable, "deserialize_and_load", refuse)
    with pytest.raises(
        SavedProgramError, match="it cannot be loaded here: JaxRuntimeError: INTERNAL: no such thing"
    ):
        _load(folder)


def test_a_program_for_another_cpu_is_refused(folder, monkeypatch):
    monkeypatch.setattr(saved_program, "_cpu_features", lambda: "fewer")
    with pytest.raises(SavedProgramError, match="a CPU with other features"):
        _load(folder)


def test_whether_a_program_is_saved_is_told_without_loading_it(folder):
    def is_there(lowered):
        return is_saved(lowered, devices=_devices(), config_text=_CONFIG, folder=folder)

    assert is_there(_lower())
    assert not is_there(_lower(3.0))
    (folder / "program.bin").unlink()
    assert not is_there(_lower())


@pytest.mark.parametrize("name", [".", "program.bin", "program.json"])
def test_what_others_can_write_is_never_unpickled(folder, name, monkeypatch):
    monkeypatch.setattr(
        saved_program.serialize_executable, "deserialize_and_load", lambda *_, **__: pytest.fail("unpickled")
    )
    path = folder / name
    path.chmod(path.stat().st_mode | 0o020)
    with pytest.raises(SavedProgramError, match="others may write to it, and what lies there is run"):
        _load(folder)


def test_what_belongs_to_another_user_is_refused(folder, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(SavedProgramError, match="it belongs to another user"):
        _load(folder)


def test_nothing_is_saved_where_others_can_write(tmp_path, monkeypatch):
    monkeypatch.setattr(saved_program, "_check_was_compiled_here", lambda: None)
    tmp_path.chmod(0o777)
    with pytest.raises(SavedProgramError, match="others may write to it"):
        save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_may_come_from_a_compilation_cache_is_not_saved(tmp_path):
    """The tests have such a cache."""
    with pytest.raises(SavedProgramError, match="this process uses a compilation cache"):
        save(tmp_path)
