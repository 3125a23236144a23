"""What a recipe's name promises is checked against the config that is about to run."""

import pytest

from axlearn.common.config import apply_overrides, config_to_json
from axlearn.common.launch_trainer import LaunchOptions, get_trainer_config
from axlearn.common.promises import FP8_PROMISE, broken_promises, check_promises, promises_of, with_promises
from axlearn.common.quantized_dot_general import uses_fp8
from axlearn.common.trainer import select_mesh_config
from axlearn.common.trainer_config_modifier import FP8ConfigModifier, MeshShapeModifier, PartitionSpecModifier
from axlearn.experiments.text.gpt import fuji_tiny

C4 = "text.gpt.c4_trainer"
_FP8 = FP8ConfigModifier.default_config().set(fp8_amax_history_length=16)


def _recipe(data_dir=None, *, rules=None):
    cfg = fuji_tiny.trainer_config(data_dir=data_dir)
    broken = PartitionSpecModifier.default_config().set(partition_specs={"model.nothing": {"a": None}})
    cfg.mesh_rules = (
        [
            ("tpu-.*", MeshShapeModifier.default_config().set(mesh_shape=(1,) * 6)),
            ("gpu-(p5.48xlarge|a3)-(8|16)", _FP8),
            ("broken", broken),
            ("other-gpu-.*", _FP8),
        ]
        if rules is None
        else rules
    )
    return cfg


def _selected(selector):
    cfg = _recipe()
    select_mesh_config(cfg, mesh_selector=selector)
    return cfg


def test_a_rule_that_keeps_the_promise_is_accepted():
    fn = with_promises(lambda data_dir=None: _recipe(data_dir), [FP8_PROMISE])
    assert promises_of(fn) == (FP8_PROMISE,)
    cfg = _selected("gpu-a3-8")
    assert uses_fp8(cfg.model)
    assert broken_promises(fn, cfg, mesh_selector="gpu-a3-8") == []
    check_promises(fn, cfg, mesh_selector="gpu-a3-8")


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [(None, "without a mesh selector"), ("tpu-v5p-8", "with the mesh selector 'tpu-v5p-8'")],
)
def test_a_run_without_it_is_refused_with_the_rules_that_have_it_and_the_flag(selector, chosen):
    fn = with_promises(lambda data_dir=None: _recipe(data_dir), [FP8_PROMISE])
    cfg = _selected(selector)
    with pytest.raises(ValueError, match="--mesh_selector: the recipe's name promises fp8") as e:
        check_promises(fn, cfg, mesh_selector=selector)
    assert chosen in str(e.value)
    assert "'gpu-(p5.48xlarge|a3)-(8|16)', 'other-gpu-.*'" in str(e.value)
    assert "--allow_without=fp8" in str(e.value)
    check_promises(fn, cfg, mesh_selector=selector, allow_without=["fp8"])


def test_a_recipe_none_of_whose_rules_has_it_says_so():
    def fn(data_dir=None):
        return _recipe(data_dir, rules=[])

    (broken,) = broken_promises(with_promises(fn, [FP8_PROMISE]), fn())
    assert broken.name == "fp8"
    assert "none of this one's does" in broken.message


def test_an_override_can_keep_the_promise():
    fn = with_promises(lambda data_dir=None: _recipe(data_dir), [FP8_PROMISE])
    cfg = _selected("tpu-v5p-8")
    _FP8.instantiate()(cfg)
    check_promises(fn, cfg, mesh_selector="tpu-v5p-8")


def test_an_override_that_breaks_the_promise_is_what_the_message_is_about():
    fn = with_promises(lambda data_dir=None: _recipe(data_dir), [FP8_PROMISE])
    cfg = _selected("gpu-a3-8")
    apply_overrides(cfg, ["model.**.quantized_dot_general=None"])
    (broken,) = broken_promises(fn, cfg, mesh_selector="gpu-a3-8")
    assert broken.message == (
        "--mesh_selector: the recipe's name promises fp8, and with the mesh selector 'gpu-a3-8' its mesh rule has it, "
        "but behind --set the run has no matrix products in float8.\n"
        "  Expected no --set that takes it away from what the rule for 'gpu-a3-8' makes. Run it as it is with "
        "--allow_without=fp8, or apply FP8ConfigModifier in a recipe of your own."
    )


def test_names_without_promises_need_nothing_and_unknown_promises_are_refused():
    check_promises(_recipe, _selected(None))
    with pytest.raises(ValueError, match="--allow_without: the recipe's name does not promise 'fp8'"):
        check_promises(_recipe, _selected(None), allow_without=["fp8"])


def test_recipes_in_fp8_are_refused_where_they_would_be_something_else(golden):
    cases = {
        "a machine whose rule has none": ("fuji-7B-v2-flash-fp8", "tpu-v5p-128"),
        "no machine": ("fuji-8B-v3-tiktoken-flash-fp8", None),
        "a recipe that has none at all": ("fuji-1B-v3-fp8", None),
    }
    texts = []
    for case, (name, selector) in cases.items():
        options = LaunchOptions(config=name, module=C4, mesh_selector=selector)
        with pytest.raises(ValueError, match="promises fp8") as e:
            get_trainer_config(options)
        texts.append(f"--- {case}: {name}, {selector}\n{e.value}\n")
    golden("errors/promises.txt", "".join(texts))


def test_the_flag_accepts_a_run_without_and_a_machine_with_it_needs_none(tmp_path):
    options = LaunchOptions(config="fuji-7B-v2-flash-fp8", module=C4, allow_without=["fp8"])
    assert not uses_fp8(get_trainer_config(options).trainer_config.model)
    on_gpu = LaunchOptions(
        config="fuji-7B-v2-flash-fp8",
        module=C4,
        mesh_selector="gpu-a3-highgpu-8g-256",
        trainer_dir=str(tmp_path),
    )
    launched = get_trainer_config(on_gpu)
    assert uses_fp8(launched.trainer_config.model)
    # A run continues from what it wrote down, whatever the name.
    (tmp_path / "trainer_config.json").write_text(config_to_json(launched.trainer_config))
    continued = get_trainer_config(LaunchOptions(config=None, trainer_dir=str(tmp_path))).trainer_config
    assert str(continued) == str(launched.trainer_config)
    plain = get_trainer_config(options).trainer_config
    (tmp_path / "trainer_config.json").write_text(config_to_json(plain))
    get_trainer_config(LaunchOptions(config=None, trainer_dir=str(tmp_path)))
