"""Dry runs: what they say of a trainer is what its arrays and its compiled step turn out to be."""

import contextlib
import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from axlearn.common import optimizers
from axlearn.common.attention import StackedTransformerLayer
from axlearn.common.config import config_for_function
from axlearn.common.dry_run import ArrayRow, _recipes, dry_run, dry_run_text, largest_recipe_text
from axlearn.common.launch_trainer import LaunchOptions, get_trainer_config
from axlearn.common.trainer import DoesNotFitError, MemoryThere, SpmdTrainer, _programs, compiled_memory
from tests.common.trainer.tiny_recipe import trainer_config

GIB = 2**30
THERE = MemoryThere(8 * GIB, "memory of a test")
SMALL = (
    "model.decoder.dim=64",
    "model.decoder.vocab_size=512",
    "input.vocab_size=512",
    "model.decoder.transformer.num_layers=3",
    "input.source_length=64",
    "input.global_batch_size=16",
)


def _fuji(*overrides: str, **options) -> SpmdTrainer:
    launch = get_trainer_config(
        LaunchOptions(config="fuji-tiny", data_dir="FAKE", overrides=[*SMALL, *overrides], **options)
    )
    return launch.trainer_config.instantiate(parent=None)


def _on(**axes: int) -> str:
    names = ("pipeline", "data", "expert", "fsdp", "seq", "model")
    return f"mesh_shape={tuple(axes.get(name, 1) for name in names)}"


@functools.cache
def _compiled_report(overrides: tuple[str, ...], grad_acc_steps: int | None):
    trainer = _fuji(*overrides, grad_acc_steps=grad_acc_steps)
    outputs = trainer.programs.trace_train_step().out_info[1]
    # What a step returns besides the new state: the loss and its summaries, whole on every device.
    num_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(outputs))
    return dry_run(trainer, there=THERE, compile_step=True), num_bytes


@pytest.mark.parametrize(
    ("overrides", "grad_acc_steps"),
    [
        pytest.param((_on(data=2, fsdp=2, model=2),), None, marks=pytest.mark.scale),
        ((_on(fsdp=8), "train_dtype=bfloat16", "learner.ema.decay=0.9"), None),
        ((_on(fsdp=4, seq=2),), 2),
    ],
    ids=["data x fsdp x model", "fsdp, bfloat16, averages", "fsdp x seq, accumulation"],
)
def test_the_compiler_confirms_what_a_dry_run_says(overrides, grad_acc_steps):
    report, num_output_bytes = _compiled_report(overrides, grad_acc_steps)
    needs, compiled = report.needs, report.compiled
    state_and_batch = sum(needs.state.values()) + needs.batch
    # Exact: the state and the batch.
    assert compiled.arguments == state_and_batch
    assert compiled.aliased == sum(needs.state.values())
    # What is new: the loss and its summaries, and a table of where each output lies.
    assert num_output_bytes <= compiled.outputs - compiled.aliased <= num_output_bytes + 2048
    # At the least: the gradients too.
    assert needs.total - needs.activations <= compiled.total
    # About right: all of it. Over 29 pairs of a model and a mesh it was 0.8 to 1.1 (docs/dry_run.md).
    assert 0.6 <= needs.total / compiled.total <= 1.7
    assert 0.5 <= (needs.gradients + needs.activations) / compiled.temporary <= 2


@pytest.mark.parametrize("is_clipped", [False, True])
def test_the_compiler_holds_all_gradients_only_where_the_check_says_so(is_clipped, monkeypatch):
    cfg = get_trainer_config(
        LaunchOptions(
            config="fuji-tiny",
            data_dir="FAKE",
            # Wide layers and few tokens: what the step holds is weights.
            overrides=[
                *("model.decoder.vocab_size=32", "input.vocab_size=32"),
                *("input.source_length=4", "input.global_batch_size=1", "mesh_shape=(1,1,1,1,1,1)"),
            ],
        )
    ).trainer_config
    # Layers that are not scanned: a scan hands over all gradients at once.
    layer = cfg.model.decoder.transformer.layer
    cfg.model.decoder.transformer = StackedTransformerLayer.default_config().set(num_layers=4, layer=layer)
    if not is_clipped:
        cfg.learner.optimizer = config_for_function(optimizers.adamw_optimizer).set(
            learning_rate=0.1, b1=0.9, b2=0.95, eps=1e-8
        )
    trainer = cfg.instantiate(parent=None, devices=np.asarray(jax.devices()[:1]))
    needs, compiled = trainer.programs.memory_needs(), compiled_memory(trainer.compile_train_step())
    assert (needs.total <= compiled.total) == is_clipped
    # The check before a run agrees with the compiler: what it had, less one byte, is refused only with clipping.
    monkeypatch.setattr(_programs, "memory_there", lambda devices: MemoryThere(needs.total - 1, "a test"))
    with pytest.raises(DoesNotFitError) if is_clipped else contextlib.nullcontext():
        trainer.programs.check_fits(where="trainer")


def test_accumulation_shrinks_the_activations_and_splitting_shrinks_the_state():
    batch = "input.global_batch_size=64"
    whole = dry_run(_fuji(_on(data=8), batch), there=THERE).needs
    accumulated = dry_run(_fuji(_on(data=8), batch, grad_acc_steps=4), there=THERE).needs
    split = dry_run(_fuji(_on(fsdp=8)), there=THERE).needs
    assert accumulated.activations < 0.5 * whole.activations
    assert accumulated.state == whole.state
    assert split.state["parameters"] < 0.4 * whole.state["parameters"]
    assert split.state["optimizer"] < 0.4 * whole.state["optimizer"]


def test_bytes_are_those_of_the_arrays_that_a_trainer_makes():
    cfg = trainer_config(dir="unused").set(mesh_shape=(2, 4))
    cfg.learner.ema.decay = 0.9
    trainer = cfg.instantiate(parent=None)
    report = dry_run(trainer, there=THERE)
    trainer.init(jax.random.PRNGKey(0))

    def on_one_device(tree) -> int:
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    state = trainer.trainer_state
    assert report.needs.state == {
        "parameters": on_one_device(state.model),
        "optimizer": on_one_device(state.learner["optimizer"]),
        "ema": on_one_device(state.learner["ema"]),
        "prng_key": on_one_device(state.prng_key),
    }
    for row, value in zip(report.parameters, jax.tree.leaves(state.model), strict=True):
        assert (row.shape, row.dtype) == (value.shape, value.dtype.name)
        assert row.bytes_per_device == value.addressable_shards[0].data.nbytes
    assert report.num_parameters == sum(x.size for x in jax.tree.leaves(state.model))


def test_a_dry_run_makes_no_array_and_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {id(x) for x in jax.live_arrays()}
    report = dry_run(_fuji(_on(data=8)), there=THERE)
    assert report.fits
    assert {id(x) for x in jax.live_arrays()} <= before
    assert not list(tmp_path.iterdir())


def test_flops_are_those_of_the_model_for_the_tokens_of_a_batch():
    trainer = _fuji(_on(data=8))
    report = dry_run(trainer, there=None)
    assert report.flops_per_token == trainer.model.flops_per_token(64)
    assert report.tokens_per_step == 16 * 64
    assert report.fits is None
    assert "is not known" in dry_run_text(report)


def test_the_text_about_fuji_tiny_stays_as_it_is(golden):
    launch = get_trainer_config(LaunchOptions(config="fuji-tiny", overrides=[_on(data=2, fsdp=1, model=4)]))
    report = dry_run(launch.trainer_config.instantiate(parent=None), there=THERE)
    # An estimate may change with the version of jax.
    needs = dataclasses.replace(report.needs, activations=50 * 2**20)
    golden("dry_run/fuji_tiny.txt", dry_run_text(dataclasses.replace(report, needs=needs)) + "\n")


def test_axes_that_do_not_divide_are_shown():
    report = dry_run(_fuji(_on(model=8)), there=THERE)
    # Four heads over eight devices.
    (row,) = [row for row in report.parameters if row.path.endswith("o_proj/weight")]
    assert row.dropped == ("model",)
    assert not any(row.axes)
    assert "(not model)" in dry_run_text(report)


def test_the_same_array_of_many_layers_is_one_line():
    report = dry_run(_fuji(_on(data=8)), there=THERE)
    rows = [
        ArrayRow(f"stack/layer{i}/weight", (4, 8), "float32", ((), ("model",)), (), 64) for i in range(80)
    ]
    other = ArrayRow("stack/layer80/weight", (4, 4), "float32", ((), ()), (), 64)
    text = dry_run_text(dataclasses.replace(report, parameters=(*rows, other)))
    (line,) = [line.split() for line in text.splitlines() if "80 of them" in line]
    assert " ".join(line) == "stack/layer*/weight (80 of them) 4 x 8 float32 - x model 5.0 KiB"
    assert "2,576 parameters in all, 10.1 KiB; per device 5.1 KiB." in text


def test_what_does_not_fit_is_said_so():
    report = dry_run(_fuji(_on(data=8)), there=MemoryThere(2**20, "memory of a test"))
    assert report.fits is False
    assert dry_run_text(report).splitlines()[-1].startswith("It does not fit: ")


# The hint below a refusal.


def _tiny(vocab_size: int) -> SpmdTrainer.Config:
    cfg = trainer_config(dir="unused")
    cfg.model.vocab_size = vocab_size
    return cfg


def test_the_largest_recipe_that_fits_is_named():
    built = []

    def build(vocab_size: int) -> SpmdTrainer.Config:
        built.append(vocab_size)
        return _tiny(vocab_size)

    def broken() -> SpmdTrainer.Config:
        raise ValueError("a mesh for other machines")

    candidates = {
        "broken": broken,
        "tiny": functools.partial(build, 16),
        "middle": functools.partial(build, 256),
        # On eight devices 16 bytes a parameter are 1.5 GB each.
        "large-0.8B": functools.partial(build, 2048),
        "larger-7B": broken,
    }
    # Parameters, two moments and gradients of 2048 x 2048 are 64 MiB, of 256 x 256 one.
    there = MemoryThere(8 * 2**20, "memory of a test")
    text = largest_recipe_text(candidates, there=there, timeout_seconds=60)
    assert text.startswith("The largest listed recipe that fits here is middle, which needs 1.")
    # The others are too large by their names, and something fits.
    assert built == [16, 256]
    built.clear()
    largest_recipe_text(candidates, there=MemoryThere(2 * GIB, "memory of a test"), timeout_seconds=60)
    # First, because all devices together may have room for it.
    assert built == [2048, 16, 256]
    nothing = MemoryThere(1024, "memory of a test")
    assert largest_recipe_text(candidates, there=nothing, timeout_seconds=60) == (
        "None of the listed recipes fits here."
    )


def test_the_largest_recipe_is_the_one_with_most_parameters_however_they_are_split():
    def build(vocab_size: int, mesh_shape: tuple[int, int]) -> SpmdTrainer.Config:
        return _tiny(vocab_size).set(mesh_shape=mesh_shape)

    # Half as many rows and columns, but whole on each device: twice the bytes there.
    candidates = {
        "split": functools.partial(build, 512, (1, 8)),
        "whole": functools.partial(build, 256, (8, 1)),
    }
    there = MemoryThere(64 * 2**20, "memory of a test")
    text = largest_recipe_text(candidates, there=there, timeout_seconds=60)
    assert text.startswith("The largest listed recipe that fits here is split, ")


def test_of_variants_with_as_many_parameters_one_is_traced(monkeypatch):
    traced = []

    def needs(trainer: SpmdTrainer):
        traced.append(trainer.config.model.vocab_size)
        return dataclasses.replace(trainer.programs.memory_needs(), activations=2 * THERE.num_bytes)

    monkeypatch.setattr(_recipes, "estimated_needs", needs)
    candidates = {
        name: functools.partial(_tiny, 16 if "tiny" in name else 256) for name in ("tiny", "a", "b", "c")
    }
    assert largest_recipe_text(candidates, there=THERE, timeout_seconds=60) == (
        "None of the listed recipes fits here."
    )
    assert traced == [256, 16]


def test_of_variants_that_need_less_the_one_that_fits_is_named(monkeypatch):
    def needs(trainer: SpmdTrainer):
        activations = trainer.config.input.global_batch_size * THERE.num_bytes // 16
        return dataclasses.replace(trainer.programs.memory_needs(), activations=activations)

    def with_batch(global_batch_size: int) -> SpmdTrainer.Config:
        cfg = _tiny(256)
        cfg.input.global_batch_size = global_batch_size
        return cfg

    monkeypatch.setattr(_recipes, "estimated_needs", needs)
    candidates = {
        "plain": functools.partial(with_batch, 16),
        "single-host": functools.partial(with_batch, 8),
        "tiny": functools.partial(_tiny, 16),
    }
    text = largest_recipe_text(candidates, there=THERE, timeout_seconds=60)
    assert text.startswith("The largest listed recipe that fits here is single-host, which needs 4.0")


def test_where_large_recipes_take_all_the_time_a_small_one_is_found_still(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(_recipes.time, "process_time", lambda: clock[0])

    def slow() -> SpmdTrainer.Config:
        clock[0] += 1.5
        return _tiny(2048).set(mesh_shape=(16, 1))

    candidates = {
        **{f"large-{i}M": slow for i in range(1, 6)},
        "tiny": functools.partial(_tiny, 16),
    }
    text = largest_recipe_text(candidates, there=THERE, timeout_seconds=2)
    assert text.startswith("The largest of 3 out of 6 listed recipes that fits here is tiny, which needs ")
    # Enough time for all changes what is said.
    text = largest_recipe_text(candidates, there=THERE, timeout_seconds=60)
    assert text.startswith("The largest listed recipe that fits here is tiny, which needs ")


def test_the_search_for_a_recipe_ends_in_time():
    candidates = {f"recipe-{i}": functools.partial(_tiny, 16) for i in range(100)}
    text = largest_recipe_text(candidates, there=THERE, timeout_seconds=-1)
    assert text == "No listed recipe was found to fit here, in the little time that there is for the search."
