"""What configs come to as text, against the parameters they make and against the reference's own files."""

import jax
import pytest

from axlearn.common.config import ConfigTextError, config_for_function, config_from_text
from axlearn.common.data_dir import get_data_dir
from axlearn.common.golden_config import config_text, init_text, regularizer_text, with_golden_data_dir
from axlearn.common.optimizers import per_param_scale_by_path
from axlearn.common.utils import flatten_items
from axlearn.experiments.text.gpt import fuji_tiny


def test_there_is_a_line_for_each_parameter_in_the_order_of_the_modules():
    cfg = fuji_tiny.trainer_config()
    lines = init_text(cfg).split("\n")
    params = cfg.model.set(name="model").instantiate(parent=None).create_parameter_specs_recursively()
    assert {line.split(": ")[0] for line in lines} == {path for path, _ in flatten_items(params)}
    assert lines[0].startswith("decoder/emb/token_emb/weight: normal(0, 1.0 / fan_out), shape=[2048, 192]")
    # One layer of those that are scanned.
    assert "decoder/transformer/repeat/layer/feed_forward/linear2/weight: " in init_text(cfg)
    assert lines[-1] == "decoder/output_norm/scale: constant(1.0)"


def test_the_scale_of_each_parameters_decay_is_written_sorted():
    cfg = fuji_tiny.trainer_config()
    cfg.learner.optimizer.args[1].weight_decay_per_param_scale = config_for_function(
        per_param_scale_by_path
    ).set(description="by_path", scale_by_path=[(".*norm.*", 0)])
    text = regularizer_text(cfg)
    header, *lines = text.split("\n")
    assert header == "====================weight_decay_scale root.optimizer===================="
    assert lines == sorted(lines)
    assert [line.endswith(": 0") for line in lines] == ["norm" in line for line in lines]


def test_no_array_is_made(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("an array was made")

    monkeypatch.setattr(jax.random, "normal", fail)
    with jax.transfer_guard("disallow"):
        assert init_text(fuji_tiny.trainer_config())
        assert regularizer_text(fuji_tiny.trainer_config())


def test_the_config_is_left_as_it_was():
    cfg = fuji_tiny.trainer_config()
    before = config_text(cfg)
    init_text(cfg.freeze())
    regularizer_text(cfg)
    assert config_text(cfg) == before == cfg.debug_string()


def test_recipes_see_the_data_directory_of_golden_files():
    def recipe():
        return fuji_tiny.trainer_config().set(dir=get_data_dir())

    assert with_golden_data_dir(recipe).dir == "$DATA_DIR"


def test_models_and_learners_of_the_references_dumps_have_the_references_parameters(shared_dir):
    """Model and learner of every dump whose classes exist here, also of recipes that are not ours."""
    if shared_dir is None:
        pytest.skip("../shared is not here")
    num_read = 0
    for path in sorted(shared_dir.glob("golden/*/*_init.txt")):
        text = path.with_name(path.name.replace("_init", "")).read_text(encoding="utf-8")
        cfg = fuji_tiny.trainer_config()
        try:
            cfg.set(
                model=config_from_text(text, path="model"), learner=config_from_text(text, path="learner")
            )
        except ConfigTextError:
            continue
        assert init_text(cfg) == path.read_text(encoding="utf-8").rstrip("\n")
        regularizer = path.with_name(path.name.replace("_init", "_regularizer"))
        assert regularizer_text(cfg) == regularizer.read_text(encoding="utf-8").rstrip("\n")
        num_read += 1
    assert num_read >= 17
