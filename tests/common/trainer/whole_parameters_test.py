"""Parameters that are whole on every device although the mesh splits others: what is found, and what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from axlearn.common.attention import (
    FusedQKVLinear,
    PipelinedTransformerLayer,
    RepeatedTransformerLayer,
    StackedTransformerLayer,
    TransformerLayer,
)
from axlearn.common.config import apply_overrides
from axlearn.common.config_check import Severity, check_config
from axlearn.common.dry_run import dry_run, dry_run_text
from axlearn.common.trainer import WholeParameters, find_whole_parameters, select_mesh_config
from axlearn.common.trainer._state import TrainerState
from axlearn.common.utils import TensorSpec, VDict, build_mesh, use_mesh
from axlearn.experiments.registry import find_trainer_config
from axlearn.experiments.text.gpt import common, fuji_tiny

_AXES = ("data", "fsdp", "model")


def _spec(*shape: int, axes=(), memory_kind=None) -> TensorSpec:
    return TensorSpec(shape=shape, dtype=jnp.float32, mesh_axes=P(*axes), memory_kind=memory_kind)


def _find(parameters: dict[str, TensorSpec], *, sizes=(2, 2, 2), learner=None) -> WholeParameters:
    """What is found among parameters beside one that is split over fsdp and model."""
    model = {"split": _spec(2048, 2048, axes=("fsdp", "model")), **parameters}
    mesh = build_mesh(
        mesh_shape=sizes, mesh_axis_names=_AXES, devices=np.array(jax.devices()[: np.prod(sizes)])
    )
    state = TrainerState(prng_key=_spec(4), model=model, learner={} if learner is None else learner)
    with use_mesh(mesh):
        return find_whole_parameters(state, mesh=mesh)


def test_a_table_that_only_model_splits_is_found_with_what_it_costs():
    table = _spec(4096, 512, axes=(None, "model"))
    moments = {"mu": {"table": table}, "nu": {"table": table}, "count": _spec()}
    (found,) = _find({"table": table}, learner={"optimizer": moments}).large
    # 4096 x 512 floats over model; fsdp would halve them.
    assert (found.path, dict(found.axes)) == ("table", {"fsdp": 2})
    assert (found.num_bytes, found.state_bytes, found.saved_bytes) == (2**22, 2**23, 3 * 2**21)
    assert found.better_spec == (None, ("model", "fsdp"))
    assert found.sentence(where="trainer.model") == (
        "trainer.model/table: 4096 x 512 float32 with spec (None, 'model') is whole along 'fsdp' (2): "
        "4.0 MiB and 8.0 MiB of optimizer state on each device, 6.0 MiB more than if split there. "
        "Set param_partition_spec=(None, ('model', 'fsdp')) in the config of its layer."
    )


def test_replication_over_data_is_what_data_is_for():
    assert _find({}) == WholeParameters(large=(), num_small=0, small_bytes=0)
    assert not _find({"table": _spec(4096, 512, axes=("fsdp", "model"))}).large
    # Where nothing is split over an axis, that axis splits no parameters.
    assert not _find({"table": _spec(4096, 512)}, sizes=(8, 1, 1)).large


def test_small_ones_are_counted_and_not_listed():
    found = _find({"norm": _spec(512), "bias": _spec(16)})
    assert (found.large, found.num_small, found.small_bytes) == ((), 2, 4 * 528)


def test_what_does_not_divide_is_said_elsewhere():
    # Asked for and dropped: `dropped_axes` tells. Odd in all dims: no axis would divide it.
    assert not _find({"dropped": _spec(4097, 513, axes=("fsdp", "model"))}).large
    odd = _find({"odd": _spec(1025, 1025)})
    assert (odd.large, odd.num_small) == ((), 0)


def test_moments_of_another_shape_or_on_the_host_are_not_counted_twice():
    table = _spec(4096, 512, axes=(None, "model"))
    learner = {"row": {"table": _spec(4096)}, "mu": {"table": table}}
    (found,) = _find({"table": table}, learner=learner).large
    assert found.state_bytes == 2**22


def test_the_larger_saving_comes_first():
    found = _find({"a": _spec(1024, 512), "b": _spec(4096, 512)}, sizes=(1, 4, 2)).large
    assert [x.path for x in found] == ["b", "a"]
    assert [dict(x.axes) for x in found] == [{"fsdp": 4, "model": 2}] * 2


def test_the_dim_that_stacks_layers_is_none_that_a_layer_can_split():
    # Of 4 layers of 1025 x 1026 floats only the layers divide over four devices.
    layers = {"repeat": VDict(layer={"weight": _spec(4, 1025, 1026, axes=(None, None, "model"))})}
    assert not _find(layers, sizes=(1, 4, 2)).large
    stacked = {"repeat": VDict(layer={"weight": _spec(4, 1024, 1026, axes=(None, None, "model"))})}
    (found,) = _find(stacked, sizes=(1, 4, 2)).large
    assert (found.path, dict(found.axes), found.better_spec) == (
        "repeat/layer/weight",
        {"fsdp": 4},
        ("fsdp", "model"),
    )
    assert "Set param_partition_spec=('fsdp', 'model') in" in found.sentence(where="model")
    # Three projections in one, in layers: two dims stack.
    fused = {"repeat": VDict(layer={"qkv_proj": VDict(weight=_spec(4, 4, 256, 512))})}
    (found,) = _find(fused, sizes=(1, 4, 2)).large
    assert found.better_spec == (None, ("fsdp", "model"))


def _stack_config(name: str):
    cfg = fuji_tiny.trainer_config(data_dir="FAKE").set(dir="unused", evalers={})
    cfg.mesh_shape = common.mesh_shape_from_axes(fsdp=4, model=2)
    cfg.model.decoder.set(dim=1024)
    cfg.model.decoder.emb.token_emb.param_partition_spec = ("fsdp", "model")
    old = cfg.model.decoder.transformer
    layer = old.layer
    if name == "blocks":
        layer = StackedTransformerLayer.default_config().set(num_layers=2, layer=[layer, layer.clone()])
    if name == "fused":
        layer.self_attention.attention.input_linear.input_linear = FusedQKVLinear.default_config()
    kinds = {"pipeline": PipelinedTransformerLayer, "stacked": StackedTransformerLayer}
    stack = kinds.get(name, RepeatedTransformerLayer).default_config().set(num_layers=4, layer=layer)
    if name == "pipeline":
        stack.set(num_stages=2, num_microbatches=2)
    cfg.model.decoder.transformer = stack
    return cfg


def _set_whole(cfg: TransformerLayer.Config) -> None:
    cfg.feed_forward.linear1.param_partition_spec = (None, "model")
    cfg.feed_forward.linear2.param_partition_spec = (None, None)
    attention = cfg.self_attention.attention
    attention.output_linear.param_partition_spec = (None, "model", None)
    attention.input_linear.input_linear.layer.param_partition_spec = [None, None, None]


@pytest.mark.parametrize("name", ["repeated", "fused", "stacked", "blocks", "pipeline"])
def test_the_advice_for_layers_of_a_stack_is_taken_and_helps(name):
    cfg = _stack_config(name)
    layer = cfg.model.decoder.transformer.layer
    for each in layer.layer if name == "blocks" else [layer]:
        _set_whole(each)
    found = cfg.clone().instantiate(parent=None).programs.whole_parameters().large
    kinds = {x.path.split("/")[-2] for x in found}
    assert {"linear1_0", "linear1_1", "linear2", "o_proj"} < kinds
    assert "qkv_proj" in kinds
    overrides = {x.advice().removeprefix('--set "').removesuffix('" splits it') for x in found}
    assert all(x.startswith("model.decoder.transformer.layer") for x in overrides)
    apply_overrides(cfg, sorted(overrides))
    assert not cfg.instantiate(parent=None).programs.whole_parameters().large


def test_the_tables_of_fuji_70b_are_found_on_its_own_mesh():
    cfg = find_trainer_config("fuji-70B-v3-tiktoken")(data_dir="FAKE")
    select_mesh_config(cfg, mesh_selector="tpu-v5litepod-256-4")
    report = check_config(cfg, name="70B", mesh_selector="tpu-v5litepod-256-4", trace_step=False)
    warnings = {f.path: f.message for f in report.of(Severity.WARNING) if "is whole along" in f.message}
    assert set(warnings) == {"model/decoder/emb/token_emb/weight", "model/decoder/lm_head/weight"}
    assert warnings["model/decoder/lm_head/weight"] == (
        "128256 x 8192 float32 with spec (None, 'model') is whole along 'fsdp' (256): 3.9 GiB and 7.8 GiB of optimizer "
        "state on each device, 11.7 GiB more than if split there. "
        "--set \"model.decoder.lm_head.param_partition_spec=(None, ('model', 'fsdp'))\" splits it"
    )


@pytest.mark.parametrize("follow", [False, True])
def test_a_start_and_a_dry_run_say_so_until_the_advice_is_followed(follow, caplog):
    cfg = fuji_tiny.trainer_config(data_dir="FAKE").set(dir="unused", evalers={})
    cfg.mesh_shape = common.mesh_shape_from_axes(fsdp=8)
    if follow:
        apply_overrides(cfg, ["model.decoder.emb.token_emb.param_partition_spec=(None, ('model', 'fsdp'))"])
    trainer = cfg.instantiate(parent=None)
    said = [r.getMessage() for r in caplog.records if "is whole along" in r.getMessage()]
    text = dry_run_text(dry_run(trainer, there=None))
    assert ("Whole where it could be split" in text) is not follow
    if follow:
        assert not said
        return
    (line,) = said
    assert line.startswith("gpt_trainer.model/decoder/emb/token_emb/weight: 2048 x 192 float32")
    assert '--set "model.decoder.emb.token_emb.param_partition_spec=' in line
    assert "Besides 3 small ones" in text
