"""Lists, verifies and converts checkpoints: ours and AXLearn's."""

import argparse
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Optional

from axlearn.cli._new_dir import format_bytes
from axlearn.cli._run_files import checkpoints_dir
from axlearn.common.checkpointer import (
    CheckpointReader,
    CorruptCheckpointError,
    Exported,
    checkpoint_paths,
    export_axlearn,
    export_native,
    open_checkpoint,
    parse_step_from_dir,
    verify_checkpoint,
)
from axlearn.common.config import error_message

_PATH_HELP = "the directory of a run, its folder of checkpoints, or that of one checkpoint"


def main(argv: Sequence[str]) -> int:
    """Runs the verb.

    Args:
        argv: The arguments behind the verb.

    Returns:
        The exit status: 1 where `verify` found damage.

    Raises:
        ValueError: If there is no such checkpoint, or nothing to convert.
        OSError: If something cannot be read or written.
        RuntimeError: If a checkpoint is not what was written.
    """
    parser = argparse.ArgumentParser(prog="axlearn ckpt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_list(commands.add_parser("list", help="says what there is, without reading the arrays"))
    _add_verify(commands.add_parser("verify", help="reads everything and says what is damaged"))
    _add_export(commands.add_parser("export", help="writes a checkpoint in AXLearn's layout, or in ours"))
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help=_PATH_HELP)
    parser.add_argument("--arrays", action="store_true", help="list the arrays of the newest one, too")
    parser.set_defaults(run=_list)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help=_PATH_HELP)
    parser.add_argument("--step", type=int, help="only this step (default: all of them)")
    parser.set_defaults(run=_verify)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help=_PATH_HELP)
    parser.add_argument("--format", required=True, choices=sorted(_EXPORTS), help="the layout to write")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the folder of the step goes")
    parser.add_argument("--step", type=int, help="the step (default: the newest)")
    parser.set_defaults(run=_export)


# What the commands do.


def _list(args: argparse.Namespace) -> int:
    ckpt_dirs = _ckpt_dirs(args.path)
    print(f"{'step':>10s}  {'layout':9s} {'arrays':>6s} {'parameters':>15s} {'size':>9s}  beside arrays")
    readers = []
    for ckpt_dir in ckpt_dirs:
        try:
            readers.append(open_checkpoint(ckpt_dir))
            print(_row(readers[-1]))
        except CorruptCheckpointError as e:
            print(f"{parse_step_from_dir(ckpt_dir):10d}  damaged: {e}")
    if args.arrays and readers:
        print()
        for path, entry in readers[-1].arrays.items():
            print(f"{path}  {entry.dtype.name} {entry.shape}")
    return 0


def _row(reader: CheckpointReader) -> str:
    sizes = {path: math.prod(entry.shape) for path, entry in reader.arrays.items()}
    num_params = sum(size for path, size in sizes.items() if path.startswith("model/"))
    num_bytes = sum(sizes[path] * entry.dtype.itemsize for path, entry in reader.arrays.items())
    documents = ", ".join(sorted(reader.documents)) or "-"
    return (
        f"{reader.step:10d}  {reader.writer:9s} {len(sizes):6d} {num_params:15,d} {format_bytes(num_bytes):>9s}"
        f"  {documents}"
    )


def _verify(args: argparse.Namespace) -> int:
    num_damaged = 0
    for ckpt_dir in _ckpt_dirs(args.path, step=args.step):
        try:
            verify_checkpoint(ckpt_dir)
            reader = open_checkpoint(ckpt_dir)
            how = _HOW_VERIFIED[reader.writer]
            print(f"{ckpt_dir}: whole ({how})")
        except CorruptCheckpointError as e:
            num_damaged += 1
            print(f"{ckpt_dir}: damaged: {e}")
    return 1 if num_damaged else 0


_HOW_VERIFIED = {
    "ours": "every byte is what was written",
    "AXLearn's": "every chunk is there and decodes; this layout has no hashes to compare",
}


def _export(args: argparse.Namespace) -> int:
    reader = open_checkpoint(_base_dir(args.path), step=args.step)
    if args.format == "native" and reader.writer == "ours":
        raise ValueError(
            error_message(
                where=str(reader.path),
                what="This checkpoint is in our layout already",
                advice="Copy its folder; nothing else belongs to it",
            )
        )
    exported = _EXPORTS[args.format](reader, output_dir=args.output)
    size = format_bytes(exported.num_bytes)
    print(f"{exported.path}: step {reader.step}, {exported.num_arrays} arrays, {size}")
    for path, kind in exported.left_out.items():
        print(f"Left out: {path} ({kind}), which the other layout cannot hold. {_DATA_NOTES[args.format]}")
    key = reader.arrays.get("prng_key")
    if args.format == "axlearn" and key is not None and key.shape == (2,):
        print(
            "prng_key is one of threefry, of two words: restore it with jax_default_prng_impl=threefry2x32, which is "
            "not AXLearn's default (rbg, of four)."
        )
    return 0


# What becomes of the position in the data.
_DATA_NOTES = {
    "axlearn": "AXLearn begins its data anew.",
    "native": "A run that continues goes on behind the batch of this step.",
}
_EXPORTS: dict[str, Callable[..., Exported]] = {"axlearn": export_axlearn, "native": export_native}


def _base_dir(path: str) -> pathlib.Path:
    """The folder of checkpoints of a run, or what was given."""
    if not os.path.isdir(path):
        raise ValueError(error_message(where=path, what="there is no such folder", expected=_PATH_HELP))
    return checkpoints_dir(path)


def _ckpt_dirs(path: str, *, step: Optional[int] = None) -> list[pathlib.Path]:
    """The folders of the checkpoints at a path, or of one of them."""
    base_dir = pathlib.Path(os.path.abspath(_base_dir(path)))
    if base_dir.name.startswith("step_"):
        parse_step_from_dir(base_dir)
        ckpt_dirs = [base_dir]
    else:
        ckpt_dirs = [pathlib.Path(found) for found in checkpoint_paths(base_dir)]
    found_steps = [parse_step_from_dir(ckpt_dir) for ckpt_dir in ckpt_dirs]
    if step is not None:
        ckpt_dirs = [ckpt_dir for ckpt_dir in ckpt_dirs if parse_step_from_dir(ckpt_dir) == step]
    if not ckpt_dirs:
        raise ValueError(
            error_message(
                where=str(base_dir),
                what="There is no checkpoint here"
                if step is None
                else f"There is no checkpoint of step {step}",
                expected=f"one of {', '.join(map(str, found_steps))}" if found_steps else _PATH_HELP,
            )
        )
    return ckpt_dirs
