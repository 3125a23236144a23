"""Converts models and runs from and to other formats: Hugging Face's and AXLearn's.

    axlearn convert hf import HF_DIR --output RUN
    axlearn convert hf export RUN --output HF_DIR
    axlearn convert axlearn import AXLEARN_RUN --output RUN --tokenizer TOKENIZER

An import makes a run directory that trains and generates; an export makes a folder that transformers loads. Checkpoints
for AXLearn are written by `axlearn ckpt export --format=axlearn`.
"""

import argparse
import re
from collections.abc import Sequence
from fractions import Fraction

from axlearn.cli import _axlearn_import, _hf_export, _hf_import
from axlearn.common.config import error_message

# Types that a model trains in; float16 overflows.
_DTYPES = ("bfloat16", "float32")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: Sequence[str]) -> int:
    """Converts.

    Args:
        argv: The arguments behind the verb.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If what is to be converted cannot be; nothing is written.
        OSError: If a file cannot be read or written; nothing is left.
        RuntimeError: If a checkpoint is not what was written; nothing is left.
    """
    args = _parser().parse_args(argv)
    print(args.run_verb(args))
    return 0


def _import_hf(args: argparse.Namespace) -> str:
    options = _hf_import.ImportOptions(
        source=args.source,
        output=args.output,
        recipe=args.recipe,
        data_dir=args.data_dir,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        overrides=args.set,
    )
    return _hf_import.report(options, _hf_import.import_run(options))


def _export_hf(args: argparse.Namespace) -> str:
    options = _hf_export.ExportOptions(
        run=args.run,
        output=args.output,
        step=args.step,
        dtype=args.dtype,
        ema=args.ema,
        max_shard_bytes=parse_size(args.max_shard_size, flag="--max_shard_size"),
    )
    return _hf_export.report(options, _hf_export.export_run(options))


def _import_axlearn(args: argparse.Namespace) -> str:
    options = _axlearn_import.ImportOptions(
        source=args.source,
        output=args.output,
        trainer_config=args.trainer_config,
        recipe=args.recipe,
        data_dir=args.data_dir,
        tokenizer=args.tokenizer,
        step=args.step,
        overrides=args.set,
    )
    return _axlearn_import.report(options, _axlearn_import.import_run(options))


def _parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="axlearn convert", description=lines[0], allow_abbrev=False)
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)
    hf = formats.add_parser("hf", help="the files of Hugging Face's transformers", allow_abbrev=False)
    directions = hf.add_subparsers(dest="direction", metavar="import|export", required=True)
    _add_import(directions.add_parser("import", help="make a run directory from a model", allow_abbrev=False))
    _add_export(directions.add_parser("export", help="make a model from a run", allow_abbrev=False))
    axlearn = formats.add_parser("axlearn", help="the runs of Apple's AXLearn", allow_abbrev=False)
    directions = axlearn.add_subparsers(dest="direction", metavar="import", required=True)
    _add_axlearn(
        directions.add_parser("import", help="make a run directory that goes on with one", allow_abbrev=False)
    )
    return parser


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.description = "Makes a run directory whose step 0 is a Hugging Face model."
    parser.set_defaults(run_verb=_import_hf)
    parser.add_argument("source", metavar="HF_DIR", help="config.json, *.safetensors and tokenizer files")
    parser.add_argument(
        "--dtype", default="float32", choices=_DTYPES, help="of the parameters (default: float32)"
    )
    parser.add_argument(
        "--tokenizer", help="folder of the tokenizer, or SentencePiece model (default: HF_DIR), or none"
    )
    _add_run_arguments(parser, from_recipe="learner, data and mesh")


def _add_axlearn(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes a run directory that goes on with a run of AXLearn: its model, learner and state."
    )
    parser.set_defaults(run_verb=_import_axlearn)
    parser.add_argument("source", metavar="AXLEARN_RUN", help="its directory, with checkpoints/ in it")
    parser.add_argument("--trainer_config", help="its config as text (default: AXLEARN_RUN/trainer_config)")
    parser.add_argument(
        "--tokenizer", required=True, help="SentencePiece model, or folder of the tokenizer, or none"
    )
    parser.add_argument("--step", type=int, help="the checkpoint's step (default: the newest)")
    _add_run_arguments(parser, from_recipe="data and mesh")


def _add_run_arguments(parser: argparse.ArgumentParser, *, from_recipe: str) -> None:
    parser.add_argument("--output", required=True, metavar="RUN", help="the run directory to make")
    parser.add_argument(
        "--recipe", default="fuji-tiny", help=f"the recipe that gives {from_recipe} (default: fuji-tiny)"
    )
    parser.add_argument("--data_dir", help="given to the recipe: where its text is, or FAKE")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="path=value",
        help="change a field of the run's config; repeatable",
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.description = "Makes a folder that transformers loads from a checkpoint of a run."
    parser.set_defaults(run_verb=_export_hf)
    parser.add_argument("run", metavar="RUN", help="the run directory")
    parser.add_argument("--output", required=True, metavar="HF_DIR", help="the folder to make")
    parser.add_argument("--step", type=int, help="the checkpoint's step (default: the newest)")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the tensors (default: that of the parameters)")
    parser.add_argument("--ema", action="store_true", help="take the moving average of the parameters")
    parser.add_argument(
        "--max_shard_size", default="5GB", help="the most tensors of one file, such as 500MB (default: 5GB)"
    )


def parse_size(text: str, *, flag: str) -> int:
    """Returns the number of bytes that a text such as "5GB" says.

    Args:
        text: A number with a unit: B, KB, MB, GB (powers of 1000), KiB, MiB, GiB (powers of 1024), or none.
        flag: Where it stands, for errors.

    Raises:
        ValueError: If it says no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = int(Fraction(match[1]) * _UNITS[match[2].upper()]) if match and match[2].upper() in _UNITS else 0
    if size < 1:
        raise ValueError(
            error_message(where=flag, what=f"{text!r} is no size", expected="a size such as 5GB or 500MB")
        )
    return size
