"""`MANIFEST.json`, the sizes and hashes of all files of a checkpoint, and checking files against it.

It is the last file that is written and the first that is read. The text has one form only, so that a single
flipped bit anywhere in it, white space included, is seen.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import axlearn
from axlearn.common.checkpointer._errors import CorruptCheckpointError
from axlearn.common.checkpointer._file_ops import FileEntry
from axlearn.common.checkpointer._layout import INDEX_NAME, MANIFEST_NAME
from axlearn.common.checkpointer._read_files import call_in_threads, open_regular, unreadable

_FORMAT = "axlearn-checkpoint-1"
# No JSON of ours comes near: an entry of the manifest takes about 130 bytes, and 400 000 files are 50 MiB.
MAX_JSON_BYTES = 64 * 2**20
_SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")


class Manifest(NamedTuple):
    """What a checkpoint consists of.

    Attributes:
        step: The step.
        files: By path in the folder, with slashes.
    """

    step: int
    files: Mapping[str, FileEntry]


def encode_manifest(manifest: Manifest, *, writer: Any = axlearn.__version__) -> bytes:
    """The text of `MANIFEST.json`.

    Args:
        manifest: What it says; the manifest itself is not among the files.
        writer: The version of the program that wrote the checkpoint.

    Returns:
        JSON whose last field, `sha256`, is the hash of the JSON without it.
    """
    files = {name: entry._asdict() for name, entry in sorted(manifest.files.items())}
    content = {"format": _FORMAT, "writer": writer, "step": manifest.step, "files": files}
    digest = hashlib.sha256(json.dumps(content).encode("utf-8")).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1).encode("utf-8")


def read_manifest(ckpt_dir: pathlib.Path, *, step: int) -> Manifest:
    """Reads and checks the manifest of a checkpoint.

    Args:
        ckpt_dir: The folder.
        step: The step that it should be of.

    Returns:
        The manifest; its paths stay inside the folder.

    Raises:
        CorruptCheckpointError: If it is missing, or is not what was written, or belongs to another step.
    """
    with open_regular(ckpt_dir, MANIFEST_NAME) as f:
        size = os.fstat(f.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise _bad_manifest(ckpt_dir, f"is {size} bytes long. Expected at most {MAX_JSON_BYTES}.")
        data = f.read(MAX_JSON_BYTES)
    try:
        content = json.loads(data)
        manifest = _decode(content)
        expected = encode_manifest(manifest, writer=content["writer"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise _bad_manifest(ckpt_dir, f"is not a manifest ({type(e).__name__}: {e}).") from e
    if data != expected:
        raise _bad_manifest(ckpt_dir, "is not what was written: its own hash does not fit.")
    for name in manifest.files:
        _check_name(ckpt_dir, name)
    if manifest.step != step:
        raise _bad_manifest(ckpt_dir, f"is the manifest of step {manifest.step}.")
    if INDEX_NAME not in manifest.files:
        raise _bad_manifest(ckpt_dir, f"does not list {INDEX_NAME!r}.")
    return manifest


def _decode(content: Any) -> Manifest:
    if content["format"] != _FORMAT:
        raise ValueError(f"format {content['format']!r} is not {_FORMAT!r}")
    files = {}
    for name, fields in content["files"].items():
        entry = FileEntry(**fields)
        if type(entry.size) is not int or entry.size < 0 or not _SHA256_PATTERN.fullmatch(entry.sha256):
            raise ValueError(f"bad entry of {name!r}")
        files[name] = entry
    if type(content["step"]) is not int:
        raise ValueError("the step is not a number")
    return Manifest(step=content["step"], files=files)


def _bad_manifest(ckpt_dir: pathlib.Path, detail: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(ckpt_dir=ckpt_dir, file=MANIFEST_NAME, reason="bad-manifest", detail=detail)


def _check_name(ckpt_dir: pathlib.Path, name: str) -> None:
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name:
        raise _bad_manifest(ckpt_dir, f"lists {name!r}, which is not a path inside the checkpoint.")


def _checked_size(ckpt_dir: pathlib.Path, name: str, *, f: BinaryIO, entry: FileEntry) -> None:
    size = os.fstat(f.fileno()).st_size
    if size != entry.size:
        raise CorruptCheckpointError(
            ckpt_dir=ckpt_dir,
            file=name,
            reason="size-mismatch",
            detail=f"has {size} bytes. Expected {entry.size}, as its manifest says.",
        )


def _checked_hash(ckpt_dir: pathlib.Path, name: str, *, sha256: str, entry: FileEntry) -> None:
    if sha256 != entry.sha256:
        raise CorruptCheckpointError(
            ckpt_dir=ckpt_dir,
            file=name,
            reason="hash-mismatch",
            detail="does not hold what was written: its SHA-256 is not the one in the manifest.",
        )


def check_sizes(ckpt_dir: pathlib.Path, manifest: Manifest, *, names: Iterable[str]) -> None:
    """Like `verify_files`, but compares the sizes only, without reading the files."""
    for name in names:
        with open_regular(ckpt_dir, name) as f:
            _checked_size(ckpt_dir, name, f=f, entry=manifest.files[name])


def verify_files(ckpt_dir: pathlib.Path, manifest: Manifest, *, names: Iterable[str]) -> None:
    """Reads files and compares their sizes and hashes with the manifest.

    Args:
        ckpt_dir: The folder.
        manifest: Its manifest.
        names: Which files.

    Raises:
        CorruptCheckpointError: For the first file, in order of `names`, that is not as the manifest says.
    """

    def verify(name: str) -> None:
        entry = manifest.files[name]
        with open_regular(ckpt_dir, name) as f:
            _checked_size(ckpt_dir, name, f=f, entry=entry)
            try:
                sha256 = hashlib.file_digest(f, "sha256").hexdigest()  # type: ignore[arg-type]
            except OSError as e:
                raise unreadable(e, ckpt_dir, name) from e
            _checked_hash(ckpt_dir, name, sha256=sha256, entry=entry)

    call_in_threads(verify, list(names))


def read_verified(ckpt_dir: pathlib.Path, manifest: Manifest, *, name: str) -> bytes:
    """The contents of a small file; what is returned is what was checked.

    Raises:
        CorruptCheckpointError: If the file is not as the manifest says, or not small.
    """
    if name not in manifest.files:
        raise _bad_manifest(ckpt_dir, f"does not list {name!r}.")
    entry = manifest.files[name]
    if entry.size > MAX_JSON_BYTES:
        raise _bad_manifest(
            ckpt_dir, f"says {name} has {entry.size} bytes. Expected at most {MAX_JSON_BYTES}."
        )
    with open_regular(ckpt_dir, name) as f:
        _checked_size(ckpt_dir, name, f=f, entry=entry)
        try:
            data = f.read(entry.size)
        except OSError as e:
            raise unreadable(e, ckpt_dir, name) from e
    _checked_hash(ckpt_dir, name, sha256=hashlib.sha256(data).hexdigest(), entry=entry)
    return data
