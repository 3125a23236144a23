"""The mesh rules of the fuji family: what each is to do, and the same rule on a model and a mesh that fit a test."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, Optional

import jax
import numpy as np
import pytest

from axlearn.common.config import apply_overrides
from axlearn.common.machines import machine_of
from axlearn.common.trainer import SpmdTrainer, select_mesh_config
from axlearn.common.utils import infer_mesh_shape
from axlearn.experiments.text.gpt import fuji
from axlearn.experiments.text.gpt.common import mesh_shape_from_axes
from tests.parity.runs import Run, check_gradients_are_the_same, recipe, run

NUM_DEVICES = 8
LAYER = "model.decoder.transformer.layer"

# What remat policies print, and the names that they keep, in the words of the rules.
NAMED = "axlearn.common.utils.save_and_offload_only_these_names_regex"
OFFLOAD_DOTS = {"policy": "axlearn.experiments.text.gpt.fuji.offload_dots_saveable_policy"}
OFFLOAD_ATTENTION = {"policy": "axlearn.experiments.text.gpt.fuji.offload_attention_proj_policy"}
SAVE_DOTS = {"policy": "jax._src.ad_checkpoint.dots_saveable"}
SAVE_FLASH_AND_DOTS = {
    "policy.fn": "axlearn.common.utils.combine_remat_policies",
    "policy.combine_fn": "axlearn.common.utils.combine_fn",
    "policy.policy_1": "axlearn.common.flash_attention.remat.policy",
    "policy.policy_2": "jax._src.ad_checkpoint.dots_saveable",
}
# What the recipes keep where a rule says nothing of it.
SAVE_ATTENTION = {
    "policy.fn": "axlearn.common.attention._save_and_offload_only_these_names_regex",
    "policy.names_which_can_be_saved": ".*([qkvo]_proj|context)",
}
SAVE_NOTHING = {"policy.fn": NAMED, "policy.names_which_can_be_saved": "None"}


def save(names: str) -> dict[str, str]:
    """What a policy prints that saves values by name."""
    return {"policy.fn": NAMED, "policy.names_which_can_be_saved": names}


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """A mesh rule of a recipe, and what is known of it.

    Attributes:
        recipe: One of the recipes that have the rule.
        selector: Machines that it is for.
        axes: The mesh over these machines: the axes longer than 1.
        remat: What `remat_spec` of a layer then prints, as far as it matters.
        micro_batches: In how many steps a batch is worked through.
        blocks: Block sizes of flash attention on TPU and GPU.
        fp8: Whether dense layers multiply in fp8.
        trainium: Whether the model is laid out for Trainium.
        qkv: The projection to queries, keys and values.
    """

    recipe: str
    selector: str
    axes: dict[str, int]
    remat: dict[str, str] = dataclasses.field(default_factory=lambda: SAVE_ATTENTION)
    micro_batches: int = 1
    blocks: tuple[int, Optional[int]] = (512, None)
    fp8: bool = False
    trainium: bool = False
    qkv: Optional[str] = None

    @property
    def size(self) -> str:
        """The size of the recipe, such as "7B"."""
        return self.recipe.split("-")[1]

    @property
    def is_sample(self) -> bool:
        """Whether it trains in every run of the tests; the others do in `make test-scale`."""
        return (self.recipe, self.selector) in _SAMPLES

    def __str__(self) -> str:
        return f"{self.recipe} on {self.selector}"


_A4_BLOCKS = (512, 64)
_V6E_BLOCKS = (1024, None)
_7B, _8B, _70B, _405B = (f"fuji-{v}-flash" for v in ("7B-v2", "8B-v3-tiktoken", "70B-v3", "405B-v3"))
_TRN2 = {"trainium": True, "selector": "neuron-trn2.48xlarge-64", "axes": {"fsdp": 16, "model": 4}}

RULES = [
    Rule(_7B, "tpu-v4-1024", {"data": 32, "fsdp": 16}),
    Rule(_7B, "tpu-v5litepod-256", {"fsdp": 256}, OFFLOAD_DOTS, micro_batches=4),
    Rule(_7B, "tpu-v5litepod-256-2", {"data": 2, "fsdp": 256}, OFFLOAD_DOTS),
    Rule(_7B, "tpu-v5litepod-256-4", {"data": 4, "fsdp": 256}, SAVE_DOTS),
    Rule(_7B, "tpu-v6e-256-4", {"data": 4, "fsdp": 256}, OFFLOAD_ATTENTION, blocks=_V6E_BLOCKS),
    Rule(_7B, "tpu-v5p-512", {"data": 4, "fsdp": 64}, SAVE_FLASH_AND_DOTS),
    Rule(_7B, "gpu-p5.48xlarge-256", {"data": 32, "fsdp": 8}),
    Rule(_7B, "gpu-a3-highgpu-8g-256", {"data": 32, "fsdp": 8}),
    Rule(_7B, "gpu-a4-highgpu-8g-256", {"data": 32, "fsdp": 8}, blocks=_A4_BLOCKS),
    Rule("fuji-7B-v1-flash-fp8", "gpu-a3-highgpu-8g-256", {"data": 32, "fsdp": 8}, fp8=True),
    Rule("fuji-7B-v3-flash-fp8", "gpu-a4-highgpu-8g-256", {"data": 32, "fsdp": 8}, blocks=_A4_BLOCKS, fp8=True),
    Rule(recipe="fuji-7B-v1-flash", qkv="FusedQKVLinear", **_TRN2),
    Rule(recipe="fuji-7B-v3-flash", qkv="GroupedQKVLinear", **_TRN2),
    Rule(_8B, "tpu-v4-1024", {"data": 32, "fsdp": 16}),
    Rule(_8B, "tpu-v5litepod-256", {"fsdp": 256}, OFFLOAD_DOTS, micro_batches=4),
    Rule(_8B, "tpu-v5litepod-256-2", {"data": 2, "fsdp": 256}, OFFLOAD_DOTS),
    Rule(_8B, "tpu-v5litepod-256-4", {"data": 4, "fsdp": 256}, SAVE_DOTS),
    Rule(_8B, "tpu-v5p-512", {"data": 32, "fsdp": 8}),
    Rule(_8B, "gpu-a4-highgpu-8g-256", {"data": 32, "fsdp": 8}),
    Rule(recipe=_8B, qkv="FusedGroupedQKVLinear", **_TRN2),
    Rule(_70B, "tpu-v5litepod-256-4", {"data": 4, "fsdp": 256}, OFFLOAD_DOTS),
    Rule(_70B, "tpu-v5p-1024", {"fsdp": 512}, save(".*flash_residuals|.*[kqv]_proj|.*o_proj|.*linear1_0")),
    Rule(_70B, "tpu-v6e-256-4", {"data": 4, "fsdp": 256}, OFFLOAD_ATTENTION, blocks=_V6E_BLOCKS),
    Rule(_70B, "tpu-v6e-256", {"fsdp": 256}, OFFLOAD_ATTENTION, micro_batches=4, blocks=_V6E_BLOCKS),
    Rule(_70B, "gpu-p5.48xlarge-512", {"data": 4, "fsdp": 128}),
    Rule(_70B, "gpu-a3-megagpu-8g-256", {"data": 4, "fsdp": 64}),
    Rule(_70B, "gpu-a4-highgpu-8g-256", {"data": 16, "fsdp": 16}, blocks=_A4_BLOCKS),
    Rule(f"{_70B}-fp8", "gpu-a3-megagpu-8g-256", {"data": 4, "fsdp": 64}, fp8=True),
    Rule(f"{_70B}-fp8", "gpu-a4-highgpu-8g-256", {"data": 16, "fsdp": 16}, blocks=_A4_BLOCKS, fp8=True),
    Rule(recipe="fuji-70B-v1-flash", remat=save(".*[kqv]_proj|.*linear1_[01]"), qkv="FusedQKVLinear", **_TRN2),
    Rule(recipe=_70B, remat=save(".*[kqv]_proj|.*linear1_[01]"), qkv="GroupedQKVLinear", **_TRN2),
    Rule(_405B, "tpu-v5p-2048", {"fsdp": 1024}, SAVE_NOTHING),
]  # fmt: skip

# Each kind of modifier is among them but for fp8's, of which tests/common/trainer/fp8_test.py trains on a mesh.
_SAMPLES = {
    (_7B, "tpu-v5litepod-256"),
    ("fuji-7B-v3-flash", "neuron-trn2.48xlarge-64"),
    (_405B, "tpu-v5p-2048"),
}


def to_train(rules: Iterable[Rule]) -> list[Any]:
    """Rules as parameters of a test that trains by them."""
    return [
        pytest.param(rule, id=str(rule), marks=() if rule.is_sample else pytest.mark.scale) for rule in rules
    ]


def distinct_rules() -> set[tuple[str, str, str]]:
    """Size, pattern and text of every rule of the family that differs from all others; `fuji-test` has none."""
    return {
        (variant.size, pattern, rule_text(rule))
        for variant in fuji.variants()
        if variant.size in ("7B", "8B", "70B", "405B")
        for pattern, rule in fuji.trainer_config(variant).mesh_rules
    }


def rule_text(rule: Any) -> str:
    """A rule as text: a modifier's dump, or a mesh shape."""
    return rule.debug_string() if hasattr(rule, "debug_string") else str(tuple(rule))


@functools.cache
def selected(rule: Rule) -> SpmdTrainer.Config:
    """The recipe after its rule has been applied; not to be changed."""
    cfg = recipe(rule.recipe)
    # Sizes differ in it, and are to share what they can of the runs below.
    cfg.learner.optimizer.args[1].learning_rate = 3e-4
    select_mesh_config(cfg, mesh_selector=rule.selector)
    return cfg


def small(rule: Rule) -> SpmdTrainer.Config:
    """The recipe after its rule, with two layers of width 64 and a mesh of eight devices."""
    cfg = selected(rule).clone(mesh_rules=None)
    qkv_path = f"{LAYER}.self_attention.attention.input_linear.input_linear"
    is_grouped = any(line.startswith(f"{qkv_path}.num_kv_heads") for line in cfg.debug_string().splitlines())
    apply_overrides(
        cfg,
        [
            "model.decoder.dim=64",
            "model.decoder.vocab_size=64",
            "model.decoder.pad_token_id=0",
            "model.decoder.eos_token_id=1",
            "model.decoder.transformer.num_layers=2",
            f"{LAYER}.self_attention.attention.num_heads=8",
            f"{LAYER}.feed_forward.hidden_dim=128",
            *([f"{qkv_path}.num_kv_heads=4"] if is_grouped else ()),
            f"mesh_shape={divided(mesh_of(rule))}",
            "input.input_dispatcher.global_logical_batch_size=32",
            "input.source.max_sequence_length=16",
            "input.source.vocab_size=64",
        ],
    )
    return cfg


def mesh_of(rule: Rule) -> tuple[int, ...]:
    """The mesh shape that the rule gives on the machines that it is for."""
    return infer_mesh_shape(selected(rule).mesh_shape, num_devices=machine_of(rule.selector).num_devices)


def divided(mesh_shape: tuple[int, ...]) -> tuple[int, ...]:
    """A mesh shape for eight devices: its longest axis is halved for as long as there are more."""
    sizes = list(mesh_shape)
    while math.prod(sizes) > NUM_DEVICES:
        sizes[sizes.index(max(sizes))] //= 2
    return tuple(sizes)


def plain(cfg: SpmdTrainer.Config) -> SpmdTrainer.Config:
    """The same model on a single device, which keeps everything and takes a batch whole."""
    cfg = cfg.clone(mesh_shape=mesh_shape_from_axes())
    cfg.model.decoder.transformer.layer.remat_spec = None
    cfg.learner.forward_fn_transformation = None
    # No number depends on them; so rules that differ in them alone share a run.
    cfg.model.decoder.transformer.layer.self_attention.attention.set(tpu_block_size=512, gpu_block_size=None)
    return cfg


_RUNS: dict[tuple[str, int], Run] = {}


def run_once(cfg: SpmdTrainer.Config, *, num_devices: int, num_steps: int = 5) -> Run:
    """Like `runs.run`, once for recipes that print the same."""
    key = (cfg.debug_string(), num_devices)
    if key not in _RUNS:
        _RUNS[key] = run(cfg, num_devices=num_devices, num_steps=num_steps, seed=3)
    return _RUNS[key]


def check_trains(rule: Rule) -> None:
    """Trains five steps by a rule; what comes out is what the same model does on one device."""
    cfg = small(rule)
    ours, expected = run_once(cfg, num_devices=NUM_DEVICES), run_once(plain(cfg), num_devices=1)
    assert len(ours.losses) == 5
    # In fp8 a sum in another order may round to the next number, of which there are few: 2 or 3 bits of mantissa.
    rtol = 1e-3 if rule.fp8 else 1e-5
    np.testing.assert_allclose(ours.losses, expected.losses, rtol=rtol)
    check_gradients_are_the_same(ours, expected, tolerance=rtol)
    # Ids are drawn at random; what can be learnt of them is that all are equally frequent.
    assert np.log(64) < ours.losses[-1] < ours.losses[0] - 0.3


def lowered_for_tpu(rule: Rule) -> str:
    """The step of the small recipe as a TPU's compiler would get it."""
    cfg = small(rule)
    trainer = cfg.klass(cfg, parent=None, devices=np.array(jax.devices()[:NUM_DEVICES]))
    return trainer.programs.trace_train_step().lower(lowering_platforms=("tpu",)).as_text()
