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
    records = read_metrics(path_of(run, _METRICS))
    evaluation = last_held_out_eval(records, cfg=cfg)
    baselines = compute_baselines(cfg, evaler=evaluation.name)
    summaries = os.path.join(run, "summaries")
    lines = [
        f"Held-out text ({evaluation.name}, after step {evaluation.step}):",
        *_table(evaluation, baselines),
        "",
        *_evaluations(records, cfg=cfg),
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
        cfg: The trainer config. Of several evalers at one step its first one counts.

    Raises:
        ValueError: If there is none.
    """
    names = [name for name, evaler in cfg.evalers.items() if not _is_of_training_split(evaler)]
    found: dict[str, HeldOutEval] = {}
    for record in reversed(records):
        evaluation = _held_out_eval(record) if record.get("evaler") in names else None
        if evaluation is None:
            continue
        if found and evaluation.step != next(iter(found.values())).step:
            break
        found.setdefault(evaluation.name, evaluation)
    if found:
        return min(found.values(), key=lambda evaluation: names.index(evaluation.name))
    raise ValueError(
        error_message(
            where=_METRICS,
            what="the run has not been evaluated on held-out text",
            expected=f"a record of an evaler among {names}" if names else "an evaler in its config",
            advice="Let the run reach its first evaluation, or its last step.",
        )
    )


def _held_out_eval(record: dict[str, Any]) -> Optional[HeldOutEval]:
    """Returns what a record of an evaluation says; None if it has no loss."""
    nats_per_token = _find(record["summaries"], "cross_entropy_loss", "loss")
    nats_per_byte = _find(record["summaries"], "nats_per_byte")
    if nats_per_token is None:
        return None
    return HeldOutEval(
        name=record["evaler"],
        step=record["step"],
        # metrics.jsonl has the numbers that JSON lacks as strings.
        nats_per_token=float(nats_per_token),
        nats_per_byte=None if nats_per_byte is None else float(nats_per_byte),
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


def _evaluations(records: Sequence[dict[str, Any]], *, cfg: InstantiableConfig) -> Iterator[str]:
    """The numbers of every evaluation set at every step at which it was evaluated."""
    heads = ("cross entropy", "perplexity", "bits/byte", "accuracy")
    yield f"{'Evaluations':24s}" + "".join(f" {head:>13s}" for head in heads)
    # Of several records of a step the last one counts.
    by_set: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in cfg.evalers}
    for record in records:
        if "evaler" in record:
            by_set.setdefault(record["evaler"], {})[record["step"]] = record
    for name, by_step in by_set.items():
        notes = ["not evaluated yet"] if not by_step else []
        if name in cfg.evalers and _is_of_training_split(cfg.evalers[name]):
            notes.append("of the training text")
        of_ema = [record.get("weights") == "ema" for record in by_step.values()]
        if of_ema and all(of_ema):
            notes.append("averaged weights")
        yield f"  {name}" + (f" ({', '.join(notes)})" if notes else "")
        for step, record in sorted(by_step.items()):
            values = (
                _text_of(_find(record["summaries"], "cross_entropy_loss", "loss"), "{:.4f}"),
                _text_of(_find(record["summaries"], "perplexity"), "{:.2f}"),
                _text_of(_find(record["summaries"], "bits_per_byte"), "{:.4f}"),
                _text_of(_find(record["summaries"], "accuracy"), "{:.1%}"),
            )
            # An evaluation of step 0 is of the parameters, and a run may change in between.
            note = "  (averaged weights)" if record.get("weights") == "ema" and not all(of_ema) else ""
            yield f"    step {step:<15d}" + "".join(f" {value:>13s}" for value in values) + note


def _text_of(value: Any, template: str) -> str:
    return "-" if value is None else template.format(float(value))


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
