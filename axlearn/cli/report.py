"""Says what a run has learned, beside models that only count, and where its files are."""

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

from axlearn.cli._run_files import path_of, read_config
from axlearn.common.checkpointer import checkpoint_steps
from axlearn.common.config import InstantiableConfig, error_message
from axlearn.common.ngram_baseline import NgramBaselines, unigram_bigram_baselines
from axlearn.common.trainer import read_metrics

_METRICS = "metrics.jsonl"


class HeldOutEval(NamedTuple):
    """The last evaluation of a run on text that it was not trained on.

    Attributes:
        name: The evaler.
        step: The step after which it ran.
        nats_per_token: The mean loss of a target.
        nats_per_byte: The loss over the bytes of text that the targets stand for; None if unknown.
    """

    name: str
    step: int
    nats_per_token: float
    nats_per_byte: Optional[float]


def main(argv: Sequence[str]) -> int:
    """Prints the report of a run.

    Args:
        argv: The arguments behind the verb.

    Returns:
        The exit status.

    Raises:
        ValueError: If there is no run, or it has not been evaluated yet.
    """
    parser = argparse.ArgumentParser(prog="axlearn report", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="the run directory, such as runs/fuji-tiny")
    run = parser.parse_args(argv).run
    cfg = read_config(run)
    print(report(run, cfg=cfg))
    return 0


def report(run: str, *, cfg: InstantiableConfig) -> str:
    """Returns the report of a run.

    Args:
        run: The run directory.
        cfg: Its trainer config.
    """
    evaluation = last_held_out_eval(read_metrics(path_of(run, _METRICS)), cfg=cfg)
    baselines = compute_baselines(cfg, evaler=evaluation.name)
    summaries = os.path.join(run, "summaries")
    lines = [
        f"Held-out text ({evaluation.name}, after step {evaluation.step}):",
        *_table(evaluation, baselines),
        "",
        f"Run          {os.path.abspath(run)}",
        f"Summaries    {summaries}    (tensorboard --logdir {summaries})",
        f"Checkpoints  {_checkpoints_text(os.path.join(run, 'checkpoints'))}",
    ]
    return "\n".join(lines)


def last_held_out_eval(records: Sequence[dict[str, Any]], *, cfg: InstantiableConfig) -> HeldOutEval:
    """Returns the last evaluation on text that the run was not trained on.

    Args:
        records: The records of metrics.jsonl.
        cfg: The trainer config.

    Raises:
        ValueError: If there is none.
    """
    names = [name for name, evaler in cfg.evalers.items() if not _is_of_training_split(evaler)]
    for record in reversed(records):
        if record.get("evaler") in names:
            return HeldOutEval(
                name=record["evaler"],
                step=record["step"],
                nats_per_token=_find(record["summaries"], "cross_entropy_loss", "loss"),
                nats_per_byte=_find(record["summaries"], "nats_per_byte"),
            )
    raise ValueError(
        error_message(
            where=_METRICS,
            what="the run has not been evaluated on held-out text",
            expected=f"a record of an evaler among {names}" if names else "an evaler in its config",
            advice="Let the run reach its first evaluation, or its last step.",
        )
    )


def compute_baselines(cfg: InstantiableConfig, *, evaler: str) -> Optional[NgramBaselines]:
    """Counts the run's training text and measures unigrams and bigrams on the targets of one of its evalers.

    Args:
        cfg: The trainer config.
        evaler: The evaler's name.

    Returns:
        The losses; None if the run's data is not text, such as made-up ids.
    """
    train = cfg.input.clone(name="input").instantiate(parent=None)
    source: Any = getattr(train, "source", None)
    if not hasattr(source, "document_token_ids"):
        return None
    heldout = cfg.evalers[evaler].input.clone(name="input").instantiate(parent=None)
    return unigram_bigram_baselines(
        source.document_token_ids(), heldout.batches(), vocab_size=source.vocab.vocab_size
    )


def _table(evaluation: HeldOutEval, baselines: Optional[NgramBaselines]) -> Iterator[str]:
    yield f"  {'':22s} {'nats/token':>10s} {'nats/byte':>10s}"
    yield _row("this model", evaluation.nats_per_token, evaluation.nats_per_byte)
    if baselines is None:
        yield "  There are no baselines: the run's data is not text."
        return
    yield _row("unigram", baselines.unigram_nats_per_token, baselines.unigram_nats_per_byte)
    yield _row("bigram, add one", baselines.bigram_nats_per_token, baselines.bigram_nats_per_byte)
    if evaluation.nats_per_byte is None:
        return
    yield ""
    for name, other in (
        ("the unigram model", baselines.unigram_nats_per_byte),
        ("the add-one bigram model", baselines.bigram_nats_per_byte),
    ):
        difference = 1 - evaluation.nats_per_byte / other
        yield f"  {abs(difference):.1%} {'below' if difference >= 0 else 'above'} {name} in nats per byte"


def _row(name: str, nats_per_token: float, nats_per_byte: Optional[float]) -> str:
    per_byte = "-" if nats_per_byte is None else f"{nats_per_byte:.4f}"
    return f"  {name:22s} {nats_per_token:>10.4f} {per_byte:>10s}"


def _is_of_training_split(evaler: InstantiableConfig) -> bool:
    source = getattr(evaler.input, "source", None)
    return getattr(source, "split", None) == "train"


def _find(summaries: dict[str, Any], *names: str) -> Any:
    """Returns the value of the first name that ends a path; None if there is none."""
    for name in names:
        for path, value in summaries.items():
            if path.rpartition("/")[2] == name:
                return value
    return None


def _checkpoints_text(folder: str) -> str:
    steps = checkpoint_steps(folder) if os.path.isdir(folder) else []
    if not steps:
        return f"{folder}    (none yet)"
    return f"{folder}    (steps {', '.join(str(step) for step in sorted(steps))})"
