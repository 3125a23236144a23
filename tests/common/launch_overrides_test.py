"""What a command line changes in a config: overrides, mesh rules, modifiers; what is refused; the record of it."""

import json
import logging

import jax
import pytest

from axlearn.common.attention import StackedTransformerLayer
from axlearn.common.base_layer import RematSpec
from axlearn.common.config import ConfigModifier, config_class, config_for_function
from axlearn.common.flash_attention.layer import FlashAttention, FlashBlockSizeModifier
from axlearn.common.launch_trainer import LaunchOptions, get_trainer_config, write_run_files
from axlearn.common.layers import LayerNorm, RMSNorm
from axlearn.common.run_record import RECORD_FILE, append_start
from axlearn.common.summary_writer import WandBModifier, WandBWriter
from axlearn.common.trainer import select_mesh_config
from axlearn.common.trainer_config_modifier import (
    ChainConfigModifier,
    FP8ConfigModifier,
    GradientAccumulationModifier,
    MeshShapeModifier,
    ModuleConfigModifier,
    PartitionSpecModifier,
    RematSpecModifier,
    ReplaceLayerConfigModifier,
)
from axlearn.common.user_errors import error_text
from axlearn.experiments.text.gpt import fuji_tiny
from axlearn.experiments.trainer_config_utils import V6eFlashConfigModifier

_LAYER = "model.decoder.transformer.layer"
_NO_MESH = (1, 1, 1, 1, 1, 1)


class _Forgetful(ConfigModifier):
    """A modifier of somebody else that forgets to return the config."""

    def __call__(self, cfg):
        cfg.name = "changed"


class _Copying(ConfigModifier):
    """A modifier of somebody else that changes a copy."""

    def __call__(self, cfg):
        return cfg.clone(name="changed")


class _Careless(ConfigModifier):
    """A modifier of somebody else that asks for a field that is not there."""

    @config_class
    class Config(ConfigModifier.Config):
        """Configures _Careless."""

        field: str = "model.decoder.dimm"

    def __call__(self, cfg):
        cfg.set_recursively(self.config.field.split("."), value=3)
        return cfg


def _identity():
    return lambda fn: fn


def with_key(api_key: str = ""):
    """Builds nothing: what it is told is what counts."""


def _chain(*modifiers):
    return ChainConfigModifier.default_config().set(config_modifiers=[_mesh(_NO_MESH), *modifiers])


def _mesh(shape):
    return MeshShapeModifier.default_config().set(mesh_shape=shape)


def _broken_modifiers():
    """Of every modifier one whose target matches nothing, or that would change nothing."""
    remat = RematSpecModifier.default_config()
    partition = PartitionSpecModifier.default_config()
    module = ModuleConfigModifier.default_config().set(modification=StackedTransformerLayer.default_config())
    return {
        "remat": remat.set(remat_policies={"model.decoder.transfomer.layer": RematSpec()}),
        "remat-nothing": remat.clone(remat_policies={}),
        "remat-no-layer": remat.clone(remat_policies={"learner.optimizer": RematSpec()}),
        "partition": partition.set(partition_specs={f"{_LAYER}.feed_forwad": {"x": None}}),
        "partition-field": partition.clone(
            partition_specs={f"{_LAYER}.feed_forward.linear2": {"output_partition_specs": None}}
        ),
        "partition-nothing": partition.clone(partition_specs={}),
        "module": module.set(target_config="model.decoder.transformr"),
        "module-type": module.clone(
            target_config="checkpointer.storage", modification=RMSNorm.default_config()
        ),
        "replace": ReplaceLayerConfigModifier.default_config().set(
            target_cls=LayerNorm, source_config=RMSNorm.default_config()
        ),
        "mesh": _mesh((4, 2)),
        "mesh-nothing": _mesh(None),
        "accumulation": GradientAccumulationModifier.default_config().set(grad_acc_steps=0),
        "wandb": ChainConfigModifier.default_config().set(
            config_modifiers=[WandBModifier.default_config(), WandBModifier.default_config()]
        ),
        "nested": ChainConfigModifier.default_config().set(
            config_modifiers=[
                _mesh(_NO_MESH),
                ChainConfigModifier.default_config().set(
                    config_modifiers=[remat.clone(remat_policies={"model.x": None})]
                ),
            ]
        ),
        "forgetful": _Forgetful.default_config(),
        "careless": _Careless.default_config(),
    }


def _with_rules():
    cfg = fuji_tiny.trainer_config(data_dir="FAKE")
    cfg.mesh_rules = [
        *((f"broken-{name}", _chain(modifier)) for name, modifier in _broken_modifiers().items()),
        ("no-modifier", LayerNorm.default_config()),
        ("copying", _Copying.default_config()),
        ("forgetful", _Forgetful.default_config()),
        ("tpu-v5litepod-256-4", _chain(FlashBlockSizeModifier.default_config())),
        ("tpu-v5litepod-256", _mesh((1, -1, 1, 1, 1, 1))),
        ("tpu-v6e-.*", _chain(V6eFlashConfigModifier.default_config())),
        ("tpu-.*", (1, 1, 1, -1, 1, 1)),
    ]
    return cfg


def named_trainer_configs():
    def bad_pattern(data_dir=None):
        return _with_rules().set(mesh_rules=[("tpu-v4-8", None), ("tpu-(v5p", None)])

    return {"ruled": lambda data_dir=None: _with_rules(), "bad-pattern": bad_pattern}


def _get(*overrides, config="ruled", module=__name__, **options):
    return get_trainer_config(
        LaunchOptions(config=config, module=module, data_dir="FAKE", overrides=overrides, **options)
    )


def _error(*overrides, **options) -> str:
    with pytest.raises((ValueError, TypeError, AttributeError)) as e:
        _get(*overrides, **options)
    return error_text(e.value)


def test_what_cannot_be_changed_is_refused_with_what_could(golden):
    layer = "model.decoder.transformer.layer"
    attention = f"{layer}.self_attention.attention"
    cases = {
        "paths": [
            "model.decoder.dimm=3",
            "model.decodr.dim=3",
            "learning_rate=3",
            "learner.optimizer.args.learning_rate=3",
            "learner.optimizer.args[7].learning_rate=3",
            "evalers['validaton'].input=3",
            "model.decoder.dim.x=3",
            "model.decoder.dim",
        ],
        "values": [
            "max_step=many",
            "mesh_shape=(4, 'x')",
            "mesh_shape=HybridMeshShape(ici_mesh_shape=(1, 8))",
            "prune_empty_state_updates=1",
            "model.dtype=float31",
            "start_trace_process_indices=everyone",
            f"{layer}.feed_forward.activation=(nn.silu, linear)",
            "name='a",
        ],
        "classes": [
            f"{attention}=axlearn.common.flash_atention.layer.FlashAttention",
            f"{attention}=axlearn.common.flash_attention.layer.FlashAttentoin",
            f"{attention}=GroupedQueryAttention",
            f"{attention}=numpy.ndarray",
            f"{attention}=axlearn.common.schedule.cosine_with_linear_warmup",
            "evalers['heldout'].input.klass=axlearn.common.schedule.polynomial",
            "learner.optimizer.args[1].update_schedule.fn=axlearn.common.layers.Linear",
            "klass=axlearn.common.layers.Linear",
        ],
        "places": [
            "**.epps=1e-6",
            "model.**.norm.eps=small",
            "mesh_rules[0][0]='tpu'",
            "mesh_rules.**.klass=x",
        ],
    }
    texts = [f"--- {title}\n{_error(*overrides)}\n" for title, overrides in cases.items()]
    golden("errors/overrides.txt", "".join(texts))


def test_a_modifier_that_matches_nothing_names_itself_its_rule_and_the_nearest(golden):
    names = [f"broken-{name}" for name in _broken_modifiers()]
    names += ["forgetful", "no-modifier", "my-tpu-v5litepod-256", "cpu-8", "copyin"]
    texts = [f"--- {name}\n{_error(mesh_selector=name)}\n" for name in names]
    texts.append(f"--- no mesh\n{_error(mesh_selector='tpu-v4-8', config='bad-pattern')}\n")
    texts.append(f"--- a bad pattern\n{_error(mesh_selector='tpu-v5p-8', config='bad-pattern')}\n")
    golden("errors/mesh_rules.txt", "".join(texts))


def test_fp8_and_another_transformation_are_refused_where_there_is_nothing_for_them():
    cfg = fuji_tiny.trainer_config(data_dir="FAKE")
    fp8 = FP8ConfigModifier.default_config().set(fp8_amax_history_length=4).instantiate()
    with pytest.raises(ValueError, match="FP8ConfigModifier: model: there is no dense layer"):
        fp8(cfg.clone(model=RMSNorm.default_config()))
    cfg.learner.forward_fn_transformation = config_for_function(_identity)
    accumulation = GradientAccumulationModifier.default_config().set(grad_acc_steps=2).instantiate()
    with pytest.raises(ValueError, match=r"GradientAccumulationModifier: learner\.forward"):
        accumulation(cfg)


def test_a_rule_that_fails_changes_nothing():
    cfg = _with_rules()
    before = cfg.clone()
    with pytest.raises(ValueError):
        select_mesh_config(cfg, mesh_selector="broken-remat")
    assert cfg == before
    assert cfg.where_set("mesh_shape") == before.where_set("mesh_shape")


def test_a_modifier_may_return_another_config():
    cfg = _with_rules()
    select_mesh_config(cfg, mesh_selector="copying")
    assert cfg.name == "changed"


def test_of_rules_that_overlap_the_first_that_matches_all_of_the_selector_wins():
    shapes = {}
    for selector in ("tpu-v5litepod-256-4", "tpu-v5litepod-256", "tpu-v5litepod-256-8"):
        cfg = _with_rules()
        select_mesh_config(cfg, mesh_selector=selector)
        shapes[selector] = tuple(cfg.mesh_shape)
    assert list(shapes.values()) == [_NO_MESH, (1, -1, 1, 1, 1, 1), (1, 1, 1, -1, 1, 1)]


def test_fields_remember_which_rule_modifier_or_override_set_them():
    cfg = _with_rules()
    select_mesh_config(cfg, mesh_selector="tpu-v6e-8")
    rule = next(i for i, (pattern, _) in enumerate(cfg.mesh_rules) if pattern == "tpu-v6e-.*")
    assert str(cfg.where_set("mesh_shape")) == (
        f"mesh_rules[{rule}] ('tpu-v6e-.*'), config_modifiers[0] (MeshShapeModifier)"
    )
    assert "mesh_rules" not in str(cfg.where_set("max_step"))
    assert "override" in str(_get("max_step=3").trainer_config.where_set("max_step"))


def test_block_sizes_of_a_recipe_without_flash_attention_are_nothing_to_refuse():
    for selector in ("tpu-v5litepod-256-4", "tpu-v6e-8"):
        cfg = _with_rules()
        select_mesh_config(cfg, mesh_selector=selector)
        assert tuple(cfg.mesh_shape) == _NO_MESH


def test_another_attention_trains_from_the_command_line():
    path = "model.decoder.transformer.layer.self_attention.attention"
    launched = _get(
        f"{path}=axlearn.common.flash_attention.layer.FlashAttention", f"{path}.tpu_block_size=256"
    )
    attention = launched.trainer_config.model.decoder.transformer.layer.self_attention.attention
    assert isinstance(attention, FlashAttention.Config)
    plain = _get().trainer_config.model.decoder.transformer.layer.self_attention.attention
    assert (attention.num_heads, attention.input_linear) == (plain.num_heads, plain.input_linear)
    assert attention.tpu_block_size == 256
    assert launched.overrides[0] == {
        "path": path,
        "old": f"a config of {plain.klass.__module__.partition('._')[0]}.{plain.klass.__name__}",
        "new": "a config of axlearn.common.flash_attention.layer.FlashAttention",
        "text": f"{path}=axlearn.common.flash_attention.layer.FlashAttention",
        "dropped": [],
    }


def test_classes_of_the_package_of_the_module_may_be_named_and_no_others():
    text = f"summary_writer={WandBWriter.__module__.partition('._')[0]}.WandBWriter"
    assert isinstance(_get(text).trainer_config.summary_writer, WandBWriter.Config)
    recorder = f"recorder={__name__}._Careless"
    assert isinstance(_get(recorder).trainer_config.recorder, _Careless.Config)
    with pytest.raises(ValueError, match="outside of what may be named here"):
        _get(recorder, config="fuji-tiny", module=None)


def test_what_an_override_does_besides_what_it_says_is_logged(caplog):
    schedule = "learner.optimizer.args[1].update_schedule"
    with caplog.at_level(logging.INFO):
        _get("max_step=3")
        assert not caplog.messages
        _get("model.**.norm.eps=1e-6", f"{schedule}=axlearn.common.schedule.constant_with_linear_warmup")
    assert caplog.messages[0] == "override 'model.**.norm.eps=1e-6' sets 2 values:"
    assert any(line.startswith("  dropped,") and "max_step" in line for line in caplog.messages)


def test_secrets_are_neither_recorded_nor_logged_also_where_they_were_dropped(tmp_path, caplog):
    run = str(tmp_path / "run")
    path = "learner.optimizer.args[1]"
    with caplog.at_level(logging.INFO):
        launched = _get(
            f"{path}.fn={__name__}.with_key",
            f"{path}.api_key=hunter2",
            "**.api_key=hunter22",
            f"{path}.fn=axlearn.common.optimizers.adamw_optimizer",
            trainer_dir=run,
        )
    write_run_files(launched, flags={}, write_assets=lambda folder: None)
    record = (tmp_path / "run" / RECORD_FILE).read_text()
    assert f"{path}.api_key: <redacted>" in record
    assert f"{path}.api_key: <redacted>" in caplog.text
    assert "override '**.api_key=<redacted>' sets 1 value:" in caplog.text
    assert "hunter2" not in record + caplog.text


def test_each_start_of_a_run_is_added_to_its_record(tmp_path):
    run = str(tmp_path / "run")
    first = _get("max_step=3", "name=x", trainer_dir=run)
    write_run_files(first, flags={}, write_assets=lambda folder: None)
    second = _get("max_step=5", trainer_dir=run, mesh_selector="tpu-v5litepod-256")
    write_run_files(second, flags={}, write_assets=lambda folder: None)
    starts = json.loads((tmp_path / "run" / RECORD_FILE).read_text())
    assert [list(start) for start in starts] == [
        ["time", "config", "mesh_rule", "num_devices", "overrides"]
    ] * 2
    assert [[(o["path"], o["old"], o["new"]) for o in start["overrides"]] for start in starts] == [
        [("max_step", 500, 3), ("name", "gpt_trainer", "x")],
        [("max_step", 500, 5)],
    ]
    assert [start["config"] for start in starts] == ["ruled", "ruled"]
    assert starts[0]["mesh_rule"] is None
    assert starts[1]["mesh_rule"].endswith("('tpu-v5litepod-256')")
    assert starts[0]["num_devices"] == jax.device_count()
    assert starts[0]["time"] <= starts[1]["time"]
    assert "max_step: 5" in (tmp_path / "run" / "trainer_config").read_text().splitlines()


def test_a_run_that_is_continued_with_the_same_machine_named_stays_as_it_is(tmp_path):
    run = str(tmp_path / "run")

    def start(*overrides, config=None, **options):
        launched = get_trainer_config(
            LaunchOptions(config=config, module=__name__, trainer_dir=run, overrides=overrides, **options)
        )
        write_run_files(launched, flags={}, write_assets=lambda folder: None)
        return launched.trainer_config

    fsdp = (1, 1, 1, 8, 1, 1)
    first = start(f"mesh_shape={fsdp}", config="ruled", data_dir="FAKE", mesh_selector="tpu-v5litepod-256")
    # Neither is the rule applied on top of what was set, nor is it forgotten by starts that name no machine.
    assert start(mesh_selector="tpu-v5litepod-256") == first
    assert start() == first
    assert start(mesh_selector="tpu-v5litepod-256") == first
    with pytest.raises(ValueError) as e:
        start(mesh_selector="tpu-v6e-8")
    assert str(e.value).splitlines()[0] == (
        "--mesh_selector: 'tpu-v6e-8' chooses mesh_rules[21] ('tpu-v6e-.*'), and the config of this run has been "
        "changed by mesh_rules[20] ('tpu-v5litepod-256')."
    )
    # The recipe is asked again: first with the other rule, then with none.
    other = start(config="ruled", data_dir="FAKE", mesh_selector="copying")
    assert other.name == "changed"
    plain = start(config="ruled", data_dir="FAKE")
    assert plain.name != "changed"
    assert start(mesh_selector="copying").name == "changed"


def test_a_record_of_an_older_version_is_kept_and_one_that_cannot_be_read_set_aside(tmp_path, caplog):
    path = tmp_path / RECORD_FILE
    old = [{"path": "max_step", "old": 1, "new": 2, "text": "max_step=2"}]
    path.write_text(json.dumps(old))
    start = {"config": None, "mesh_rule": None, "num_devices": 1, "overrides": []}
    append_start(str(tmp_path), **start)
    starts = json.loads(path.read_text())
    assert starts[0] == {"time": None, "overrides": old}
    assert {name: starts[1][name] for name in start} == start
    for text in ("{", "{}", "[" * 10_000):
        path.write_text(text)
        append_start(str(tmp_path), **start)
        assert len(json.loads(path.read_text())) == 1
        assert (tmp_path / f"{RECORD_FILE}.unreadable").read_text() == text
    assert "cannot be read" in caplog.text


def test_a_run_goes_on_on_another_number_of_devices_where_it_is_told_how(tmp_path):
    run = str(tmp_path / "run")
    first = _get("mesh_shape=(1, 1, 1, 8, 1, 1)", trainer_dir=run)
    write_run_files(first, flags={}, write_assets=lambda folder: None)
    config = tmp_path / "run" / "trainer_config.json"
    tree = json.loads(config.read_text())
    config.write_text(_with_16_devices(config.read_text()))
    again = {"config": None, "trainer_dir": run}
    with pytest.raises(ValueError) as e:
        get_trainer_config(LaunchOptions(module=__name__, **again))
    assert str(e.value) == (
        "mesh_shape: (1, 1, 1, 16, 1, 1), on which this run ran before, is for 16 devices, and here are 8.\n"
        "  Continue it with --set 'mesh_shape=(1, 1, 1, -1, 1, 1)', or another shape for these devices."
    )
    advised = str(e.value).partition("--set '")[2].partition("'")[0]
    launched = get_trainer_config(LaunchOptions(module=__name__, overrides=[advised], **again))
    assert tuple(launched.trainer_config.mesh_shape) == (1, 1, 1, 8, 1, 1)
    # Where no axis stands out, the one for data takes what there is.
    config.write_text(json.dumps({**tree, "config": {**tree["config"], "mesh_shape": list(_NO_MESH)}}))
    with pytest.raises(
        ValueError, match=r"is for 1 device, and here are 8\.\n.*mesh_shape=\(1, -1, 1, 1, 1, 1\)"
    ):
        get_trainer_config(LaunchOptions(module=__name__, **again))


def _with_16_devices(text: str) -> str:
    tree = json.loads(text)
    tree["config"]["mesh_shape"] = json.loads(json.dumps(tree["config"]["mesh_shape"]).replace("8", "16"))
    return json.dumps(tree)
