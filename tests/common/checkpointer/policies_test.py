"""When to save, and what the config prints."""

import pytest

from axlearn.common.checkpointer import (
    Checkpointer,
    every_n_steps_and_last_policy,
    every_n_steps_policy,
)
from axlearn.common.config import config_for_function
from tests.common.checkpointer.harness import make_state, opened


def _steps(policy, *, until: int = 12) -> list[int]:
    return [step for step in range(until + 1) if policy(step=step, evaler_summaries={})]


def test_policies_save_at_multiples_from_the_first_step_on_and_at_the_last():
    assert _steps(every_n_steps_policy()) == list(range(1, 13))
    assert _steps(every_n_steps_policy(n=5, min_step=0)) == [0, 5, 10]
    assert _steps(every_n_steps_policy(n=5, min_step=6)) == [10]
    assert _steps(every_n_steps_and_last_policy(n=5, max_step=12)) == [5, 10, 12]
    assert _steps(every_n_steps_and_last_policy(n=4, max_step=12)) == [4, 8, 12]
    assert _steps(every_n_steps_and_last_policy(n=4, max_step=3, min_step=8)) == [3, 8, 12]


@pytest.mark.parametrize("policy", [every_n_steps_policy, every_n_steps_and_last_policy])
def test_a_policy_that_never_saves_is_refused(policy):
    kwargs = {"max_step": 3} if policy is every_n_steps_and_last_policy else {}
    with pytest.raises(
        ValueError, match=f"{policy.__name__}: n=0 is not a number of steps. Expected at least 1"
    ):
        policy(n=0, **kwargs)


def test_save_asks_the_policy_unless_forced(tmp_path):
    policy = config_for_function(every_n_steps_policy).set(n=4)
    with opened(tmp_path, save_policy=policy, keep_last_n=9) as checkpointer:
        assert [step for step in range(9) if checkpointer.is_due(step=step)] == [4, 8]
        for step in range(1, 7):
            checkpointer.save(step=step, state=make_state(step), force=step == 3)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000003", "step_00000004"]


def test_a_policy_sees_the_summaries_of_the_evalers(tmp_path):
    def improves(threshold: float):
        return lambda *, step, evaler_summaries: evaler_summaries.get("val", {}).get("loss", 9.0) < threshold

    with opened(tmp_path, save_policy=config_for_function(improves).set(threshold=1.0)) as checkpointer:
        assert not checkpointer.is_due(step=1)
        assert not checkpointer.is_due(step=2, evaler_summaries={"val": {"loss": 1.5}})
        checkpointer.save(step=3, state=make_state(3), evaler_summaries={"val": {"loss": 0.5}})
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000003"]


def test_the_config_prints_the_lines_of_the_reference(shared_dir):
    cfg = Checkpointer.default_config().set(
        save_policy=config_for_function(every_n_steps_and_last_policy).set(n=500, min_step=1, max_step=3000),
        keep_every_n_steps=3000,
        keep_last_n=3,
    )
    lines = [f"checkpointer.{line}" for line in cfg.debug_string().splitlines()]
    assert lines == [
        "checkpointer.gc_loop_interval_seconds: 60",
        "checkpointer.keep_every_n_steps: 3000",
        "checkpointer.keep_last_n: 3",
        "checkpointer.klass: 'axlearn.common.checkpointer.Checkpointer'",
        "checkpointer.save_policy.fn: 'axlearn.common.checkpointer.every_n_steps_and_last_policy'",
        "checkpointer.save_policy.max_step: 3000",
        "checkpointer.save_policy.min_step: 1",
        "checkpointer.save_policy.n: 500",
        "checkpointer.storage.klass: 'axlearn.common.checkpointer.TensorStoreStateStorage'",
        "checkpointer.storage.timeout_secs: 3600",
    ]
    if shared_dir is not None:
        dump = shared_dir / "golden/axlearn.experiments.text.gpt.c4_trainer/fuji-test-v1.txt"
        assert lines == [x for x in dump.read_text().splitlines() if x.startswith("checkpointer.")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_last_n": 1}, "checkpointer.keep_last_n: 1 is too few.\n  Expected at least 2, because"),
        ({"keep_every_n_steps": 0}, "checkpointer.keep_every_n_steps: 0.\n  Expected more than 0"),
        ({"gc_loop_interval_seconds": 0}, "checkpointer.gc_loop_interval_seconds: 0.\n  Expected more"),
    ],
)
def test_fields_that_would_lose_runs_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message), opened(tmp_path, **fields):
        pass
