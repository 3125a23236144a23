"""The same run on every mesh, which mesh a recipe gets, and what is refused."""

import jax
import numpy as np
import pytest

from axlearn.common.config import REQUIRED, ConfigModifier, config_class
from axlearn.common.trainer import select_mesh_config
from axlearn.common.utils import HybridMeshShape, flatten_items
from tests.common.trainer.tiny_recipe import trainer_config
from tests.parity.runs import take_steps


def _four_steps(mesh_shape, *, num_devices):
    cfg = trainer_config(dir="unused").set(mesh_shape=mesh_shape)
    devices = np.array(jax.devices()[:num_devices]).reshape(mesh_shape)
    trainer = cfg.klass(cfg.clone(), parent=None, devices=devices)
    trainer.init(jax.random.PRNGKey(5))
    initial = {path: np.asarray(x) for path, x in flatten_items(trainer.trainer_state._asdict())}
    losses = []
    with trainer.mesh():
        step_fn = trainer.compile_train_step()
        for state, outputs in take_steps(trainer, step_fn, num_steps=4):
            losses.append(float(outputs["loss"]))
            last = state
    return initial, losses, {path: np.asarray(x) for path, x in flatten_items(last._asdict())}, step_fn


@pytest.fixture(scope="module")
def on_one_device():
    return _four_steps((1, 1), num_devices=1)


@pytest.mark.parametrize("mesh_shape", [(8, 1), (2, 4), (1, 8)])
def test_every_mesh_begins_with_the_same_bits_and_trains_the_same(on_one_device, mesh_shape):
    initial, losses, final, _ = on_one_device
    other_initial, other_losses, other_final, step_fn = _four_steps(mesh_shape, num_devices=8)
    assert initial.keys() == other_initial.keys()
    for path, value in initial.items():
        np.testing.assert_array_equal(value, other_initial[path], err_msg=path)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    for path, value in final.items():
        np.testing.assert_allclose(other_final[path], value, rtol=1e-4, atol=1e-5, err_msg=path)
    # The gradients of a batch that is split must meet; where it is whole on every device they need not.
    assert ("all-reduce" in step_fn.as_text()) or mesh_shape[0] == 1


def test_the_parameters_lie_on_the_mesh_as_their_specs_say():
    cfg = trainer_config(dir="unused").set(mesh_shape=(2, 4))
    trainer = cfg.instantiate(parent=None)
    trainer.init(jax.random.PRNGKey(0))
    state = trainer.trainer_state
    assert {s.data.shape for s in state.model["weight"].addressable_shards} == {(16, 4)}
    shardings = dict(flatten_items(trainer.trainer_state_partition_specs._asdict()))
    for path, x in flatten_items(state._asdict()):
        assert x.sharding.is_equivalent_to(shardings[path], x.ndim), path


def _refusal(**fields):
    cfg = trainer_config(dir="unused").set(**fields)
    with pytest.raises(ValueError) as e:
        cfg.instantiate(parent=None)
    return str(e.value)


def test_what_is_refused_is_said_in_a_few_lines(golden):
    small_batch = trainer_config(dir="unused").input.set(global_batch_size=6)
    cases = {
        "a mesh that does not divide": _refusal(mesh_shape=(3, 1)),
        "a mesh of another product": _refusal(mesh_shape=(4, 3)),
        "two axes to infer": _refusal(mesh_shape=(-1, -1)),
        "a batch that does not divide": _refusal(input=small_batch),
        "an axis that is not there": _refusal(batch_axis_names=("data", "fsdp")),
        "a model without a type": _refusal(model=trainer_config().model.set(dtype=None)),
        "machinery of another version": _refusal(device_monitor=trainer_config().model),
        "an illegal number of steps": _refusal(log_every_n_steps=0),
        "a run that ends before it begins": _refusal(max_step=-1),
        "several at once": _refusal(prune_empty_state_updates=False, log_every_n_steps=-1),
    }
    golden("errors/trainer.txt", "\n".join(f"--- {name}\n{text}" for name, text in cases.items()) + "\n")


class _SetSeed(ConfigModifier):
    @config_class
    class Config(ConfigModifier.Config):
        seed: int = 7

    def __call__(self, cfg):
        cfg.input.seed = self.config.seed
        return cfg


def _with_rules():
    return trainer_config().set(
        mesh_rules=(
            ("tpu-v4-.*", (4, 2)),
            ("tpu-v5p-128", HybridMeshShape(ici_mesh_shape=(-1, 8), dcn_mesh_shape=(1, 1))),
            ("gpu-.*", _SetSeed.default_config()),
            ("tpu-.*", (1, -1)),
        )
    )


def test_the_first_rule_that_matches_the_whole_selector_wins():
    cfg = _with_rules()
    select_mesh_config(cfg, mesh_selector="tpu-v4-8")
    assert tuple(cfg.mesh_shape) == (4, 2)
    select_mesh_config(cfg, mesh_selector="tpu-v5p-128")
    assert cfg.mesh_shape.ici_mesh_shape == (-1, 8)
    select_mesh_config(cfg, mesh_selector="tpu-v5p-1280")
    assert tuple(cfg.mesh_shape) == (1, -1)
    select_mesh_config(cfg, mesh_selector="gpu-a3")
    assert cfg.input.seed == 7
    before = cfg.debug_string()
    select_mesh_config(cfg, mesh_selector=None)
    assert cfg.debug_string() == before


def test_a_selector_that_matches_no_rule_is_an_error_that_lists_them(golden):
    texts = []
    for cfg in (_with_rules(), trainer_config()):
        with pytest.raises(ValueError) as e:
            select_mesh_config(cfg, mesh_selector="my-gpu-a3")
        texts.append(str(e.value))
    golden("errors/mesh_selector.txt", "\n".join(texts) + "\n")


def test_a_trainer_needs_its_input_model_learner_dir_and_mesh():
    cfg = trainer_config()
    assert cfg.dir is REQUIRED
    with pytest.raises(ValueError, match="dir"):
        cfg.instantiate(parent=None)
