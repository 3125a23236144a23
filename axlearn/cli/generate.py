"""Continues a prompt with a trained model: samples from a checkpoint of a run."""

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np

from axlearn.cli._run_files import context_len, read_config, read_hf_file
from axlearn.common import launch
from axlearn.common.causal_lm import Model
from axlearn.common.checkpointer import load_checkpoint
from axlearn.common.config import ConfigBase, InstantiableConfig, error_message
from axlearn.common.decoding import (
    CompositeDecodingCondition,
    SampleOutputs,
    StopOnMaxLength,
    StopOnSubsequence,
)
from axlearn.common.logit_modifiers import LogitsToLogitsFn, chain, scale_by, top_p_logits
from axlearn.common.module import functional
from axlearn.common.utils import NestedTensor, Tensor, build_mesh, use_mesh
from axlearn.common.vocabulary import Vocabulary, load_vocabulary

# Prompts and rows are padded to multiples of this, so that one compiled program serves many lengths.
_LEN_MULTIPLE = 64


def main(argv: Sequence[str]) -> int:
    """Prints a prompt with its continuation.

    Args:
        argv: The arguments behind the verb.

    Returns:
        The exit status.

    Raises:
        ValueError: If there is no run, no checkpoint, no tokenizer, or the prompt does not fit.
        RuntimeError: If no checkpoint is what was written.
    """
    args = _parse(argv)
    cfg = read_config(args.run)
    modifier = chain(scale_by(args.temperature), top_p_logits(args.top_p))
    launch.setup()
    vocab = load_vocabulary(os.path.join(args.run, "tokenizer"))
    model = cfg.model.clone(name="model").instantiate(parent=None)
    _check_vocabulary(vocab, model=model, run=args.run)
    prompt_ids = vocab.encode_prompt(args.prompt)
    model_len = _model_len(args.run, cfg.input)
    max_len = _max_len(prompt_ids, max_tokens=args.max_tokens, context_len=model_len)
    step, params = _load_params(args, cfg=cfg, model=model)
    started = time.monotonic()
    samples = _sample(
        model,
        params,
        prompt_ids=prompt_ids,
        max_len=max_len,
        num_samples=args.num_samples,
        seed=args.seed,
        logits_modifier=modifier,
        eos_ids=_eos_ids(args.run, model),
    )
    seconds = time.monotonic() - started
    _print_samples([vocab.decode(ids) for ids in samples])
    notes = [f"step {step}" + (", moving average" if args.ema else "")]
    notes.append(f"{sum(len(ids) - len(prompt_ids) for ids in samples)} tokens in {seconds:.1f} s")
    if any(len(ids) == model_len for ids in samples):
        notes.append(f"stopped at the {model_len} tokens that the model was trained on")
    print(f"[{'; '.join(notes)}]", file=sys.stderr)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="axlearn generate", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="the run directory, such as runs/fuji-tiny")
    parser.add_argument("--prompt", required=True, help="the text to continue; may be empty")
    parser.add_argument("--max_tokens", type=int, default=128, help="tokens to add at most (default: 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: the likeliest token; 1: as learned (default: 0.8)"
    )
    parser.add_argument(
        "--top_p", type=float, default=0.95, help="keep the likeliest tokens up to this mass (default: 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the samples (default: 0)")
    parser.add_argument("--num_samples", type=int, default=1, help="continuations (default: 1)")
    parser.add_argument("--step", type=int, help="the checkpoint's step (default: the newest that verifies)")
    parser.add_argument("--ema", action="store_true", help="use the moving average of the parameters")
    args = parser.parse_args(argv)
    try:
        args.prompt.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(
            error_message(where="--prompt", what=f"{args.prompt!r} holds what is no text", expected="UTF-8")
        ) from e
    for name in ("max_tokens", "num_samples"):
        if getattr(args, name) < 1:
            raise ValueError(
                error_message(
                    where=f"--{name}", what=f"{getattr(args, name)} asks for nothing", expected="at least 1"
                )
            )
    return args


def _check_vocabulary(vocab: Vocabulary, *, model: Model, run: str) -> None:
    vocab_size = model.config.decoder.vocab_size
    if vocab.vocab_size > vocab_size:
        raise ValueError(
            error_message(
                where=os.path.join(run, "tokenizer"),
                what=f"the tokenizer has {vocab.vocab_size} ids, the model {vocab_size}",
                expected="the tokenizer that the run was trained with",
            )
        )


def _model_len(run: str, input_cfg: ConfigBase) -> Optional[int]:
    """The most tokens that the model was trained on, here or before it was imported; None if that is not known."""
    lengths = [context_len(input_cfg), read_hf_file(run, "config.json").get("max_position_embeddings")]
    return max((length for length in lengths if isinstance(length, int)), default=None)


def _eos_ids(run: str, model: Model) -> list[int]:
    """The ids that end a text. Imported models may have several, such as the ends of a text and of a turn."""
    settings = {**read_hf_file(run, "config.json"), **read_hf_file(run, "generation_config.json")}
    imported = settings.get("eos_token_id")
    several = imported if isinstance(imported, list) else [imported]
    return sorted({model.config.decoder.eos_token_id, *(i for i in several if isinstance(i, int))})


def _max_len(prompt_ids: Sequence[int], *, max_tokens: int, context_len: Optional[int]) -> int:
    """The length at which sampling stops, the prompt included; at most what the model was trained on."""
    num_ids = len(prompt_ids)
    if context_len is None:
        return num_ids + max_tokens
    if num_ids >= context_len:
        raise ValueError(
            error_message(
                where="--prompt",
                what=f"{num_ids} tokens leave no room for more",
                expected=f"fewer than the {context_len} tokens of the rows that the model was trained on",
                advice="Shorten the prompt, from the front.",
            )
        )
    return min(num_ids + max_tokens, context_len)


def _load_params(
    args: argparse.Namespace, *, cfg: InstantiableConfig, model: Model
) -> tuple[int, NestedTensor]:
    """Reads the parameters, and nothing else of the checkpoint, onto one device."""
    specs = model.create_parameter_specs_recursively()
    if args.ema and cfg.learner.ema.decay is None:
        raise ValueError(
            error_message(
                where="--ema",
                what="the run keeps no moving average of its parameters",
                advice="Leave the flag out.",
            )
        )
    state = {"learner": {"ema": {"ema": specs}}} if args.ema else {"model": specs}
    axis_names = tuple(cfg.mesh_axis_names)
    mesh = build_mesh(
        mesh_shape=(1,) * len(axis_names), mesh_axis_names=axis_names, devices=jax.devices()[:1]
    )
    with use_mesh(mesh):
        restored = load_checkpoint(os.path.join(args.run, "checkpoints"), state=state, step=args.step)
    assert restored.step is not None
    found: Any = restored.state
    return restored.step, found["learner"]["ema"]["ema"] if args.ema else found["model"]


def _sample(
    model: Model,
    params: NestedTensor,
    *,
    prompt_ids: Sequence[int],
    max_len: int,
    num_samples: int,
    seed: int,
    logits_modifier: LogitsToLogitsFn,
    eos_ids: Sequence[int],
) -> list[list[int]]:
    """Samples continuations: of each the ids of prompt and continuation, without the end-of-document id."""
    prefix_len = _round_up(len(prompt_ids))
    prefix = np.zeros([1, prefix_len], dtype=np.int32)
    prefix[0, : len(prompt_ids)] = prompt_ids

    @functools.partial(jax.jit, static_argnames="row_len")
    def sample(
        params: NestedTensor, prng_key: Tensor, input_batch: dict[str, Any], limit: Tensor, *, row_len: int
    ) -> SampleOutputs:
        stop = CompositeDecodingCondition([StopOnSubsequence([[i] for i in eos_ids]), StopOnMaxLength(limit)])
        outputs, _ = functional(
            model,
            prng_key=prng_key,
            state=params,
            inputs={
                "input_batch": input_batch,
                "max_len": row_len,
                "num_decodes": num_samples,
                "logits_modifier": logits_modifier,
                "stop_decoding_condition": stop,
            },
            method="sample_decode",
            is_training=False,
        )
        return outputs

    outputs = sample(
        params,
        jax.random.PRNGKey(seed),
        {"prefix": prefix, "prefix_lens": np.asarray([len(prompt_ids)], dtype=np.int32)},
        jnp.int32(max_len),
        row_len=max(_round_up(max_len), prefix_len),
    )
    rows = zip(np.asarray(outputs.sequences[0]), np.asarray(outputs.lengths[0]), strict=True)
    samples = [row[:length].tolist() for row, length in rows]
    return [ids[:-1] if len(ids) > len(prompt_ids) and ids[-1] in eos_ids else ids for ids in samples]


def _round_up(length: int) -> int:
    return math.ceil(length / _LEN_MULTIPLE) * _LEN_MULTIPLE


def _print_samples(texts: Sequence[str]) -> None:
    for i, text in enumerate(texts, start=1):
        if len(texts) > 1:
            print(f"--- sample {i} of {len(texts)} ---")
        print(text)
