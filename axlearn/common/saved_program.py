"""Compiled programs that are kept in a folder and loaded by another process, in the place of compiling again.

What lies in such a folder is run: jax loads it with pickle, and it is machine code besides. So a folder is used only
where nobody but its owner can write to it, and its owner is who runs the process; a sum beside the program tells a
damaged file, not a forged one. Never load what somebody else has sent.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any, Union

import jax
from jax.experimental import serialize_executable

from axlearn.common.config import error_message
from axlearn.common.file_system import make_private_dir, write_bytes_durably, write_text_durably

_PROGRAM_FILE = "program.bin"
_FACTS_FILE = "program.json"
# Raised where the files of older versions can no longer be read.
_FORMAT = 2
# Flags of compilers in the environment.
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Flags that say how many devices a process has, which the list of devices says better.
_FLAGS_OF_DEVICES = ("--xla_force_host_platform_device_count",)
# Lines of a config that differ, in a message.
_MAX_LINES = 3
_Path = Union[str, os.PathLike]


class SavedProgramError(ValueError):
    """A program that was saved cannot be used here."""


def save_program(
    compiled: jax.stages.Compiled,
    *,
    lowered: jax.stages.Lowered,
    devices: Sequence[Any],
    config_text: str,
    folder: _Path,
) -> None:
    """Keeps a compiled program, with all that it depends on.

    Args:
        compiled: The program.
        lowered: What it was compiled from.
        devices: For which devices, in the order of the mesh; they need not be there.
        config_text: The lines of the config that it comes from: they tell later what has changed.
        folder: Where; it is made with mode 0700. What an earlier call kept there is replaced.

    Raises:
        SavedProgramError: If others can write to the folder, or the program may be from jax's compilation cache.
    """
    _check_was_compiled_here()
    folder = prepare_folder(folder)
    payload, _, _ = serialize_executable.serialize(compiled)
    facts = {
        **_identity(lowered, devices=devices, config_text=config_text),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    # The facts last: without them there is no program here.
    (folder / _FACTS_FILE).unlink(missing_ok=True)
    write_bytes_durably(folder / _PROGRAM_FILE, payload)
    write_text_durably(folder / _FACTS_FILE, json.dumps(facts, indent=2) + "\n")


def prepare_folder(folder: _Path) -> pathlib.Path:
    """Makes a folder for `save_program`, or refuses it; so that nothing is compiled in vain.

    Args:
        folder: Where a program will be saved.

    Returns:
        Its path.

    Raises:
        SavedProgramError: If others can write to it.
    """
    path = make_private_dir(os.path.abspath(folder))
    _check_is_private(path)
    return path


def is_saved(lowered: jax.stages.Lowered, *, devices: Sequence[Any], config_text: str, folder: _Path) -> bool:
    """Returns whether a folder holds the program that `load_program` would look for there; loads nothing.

    Args:
        lowered: As for `load_program`.
        devices: Likewise.
        config_text: Likewise.
        folder: Where it may lie.
    """
    here = _identity(lowered, devices=devices, config_text=config_text)
    try:
        _read_payload(pathlib.Path(folder), here=here)
    except SavedProgramError:
        return False
    return True


def _check_was_compiled_here() -> None:
    """Refuses what may be from jax's cache: XLA for CPUs loses functions where it writes such a program again.

    Only running it tells (NOT_FOUND: Function multiply_add_fusion not found; jax 0.10.2).
    """
    settings: Any = jax.config
    if settings.jax_enable_compilation_cache and settings.jax_compilation_cache_dir:
        raise SavedProgramError(
            error_message(
                where="save_program",
                what="this process uses a compilation cache, and what comes from there may not be saved again whole",
                expected="a process without one",
                advice="Set JAX_ENABLE_COMPILATION_CACHE=false, or use `axlearn plan --save_executable`",
            )
        )


def load_program(
    lowered: jax.stages.Lowered, *, devices: Sequence[Any], config_text: str, folder: _Path
) -> jax.stages.Compiled:
    """Returns the program that was saved for what was lowered here; compiles nothing.

    Args:
        lowered: What would be compiled otherwise.
        devices: The devices, in the order of the mesh.
        config_text: As for `save_program`.
        folder: Where it was saved.

    Returns:
        The program; its arguments and results are those of `lowered`.

    Raises:
        SavedProgramError: If there is none, if it is damaged, if it was made of anything else or for other devices or
            by other versions, or if others could have written it.
    """
    folder = pathlib.Path(folder)
    here = _identity(lowered, devices=devices, config_text=config_text)
    payload = _read_payload(folder, here=here)
    try:
        compiled: jax.stages.Compiled = serialize_executable.deserialize_and_load(
            payload,
            lowered.in_tree,
            lowered.out_tree,
            backend=devices[0].client,
            execution_devices=list(devices),
        )
    except Exception as e:
        # pickle, jax and the runtime each have errors of their own.
        raise _error(folder, what=f"it cannot be loaded here: {type(e).__name__}: {e}") from e
    return compiled


def _read_payload(folder: pathlib.Path, *, here: Mapping[str, Any]) -> bytes:
    """Returns the program of a folder if it is that of `here`, an `_identity`, and whole."""
    facts = _read_facts(folder)
    try:
        differences, sha256 = _differences(facts, here), facts["sha256"]
    except (AttributeError, KeyError, TypeError) as e:
        raise _error(folder, what=f"{_FACTS_FILE} is not what was saved: {type(e).__name__}: {e}") from e
    if differences:
        raise _error(folder, what=f"this program was saved for something else: {'; '.join(differences)}")
    try:
        payload = (folder / _PROGRAM_FILE).read_bytes()
    except OSError as e:
        raise _error(folder, what=f"{_PROGRAM_FILE} cannot be read: {e}") from e
    if hashlib.sha256(payload).hexdigest() != sha256:
        raise _error(folder, what=f"{_PROGRAM_FILE} is not what was saved: its sum differs")
    return payload


def _read_facts(folder: pathlib.Path) -> dict[str, Any]:
    paths = [folder / _FACTS_FILE, folder / _PROGRAM_FILE]
    if not all(path.is_file() for path in paths):
        raise _error(folder, what="there is no saved program here")
    for path in (folder, *paths):
        _check_is_private(path)
    try:
        facts = json.loads(paths[0].read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise _error(folder, what=f"{_FACTS_FILE} is not what was saved: {e}") from e
    if not isinstance(facts, dict):
        raise _error(folder, what=f"{_FACTS_FILE} is not what was saved: a {type(facts).__name__}")
    if facts.get("format") != _FORMAT:
        raise _error(folder, what=f"this program is of format {facts.get('format')}, not {_FORMAT}")
    return facts


def _check_is_private(path: pathlib.Path) -> None:
    """Refuses a file or folder that somebody else could have written: it is run."""
    status = os.stat(path)
    if status.st_uid != os.geteuid():
        raise _error(path, what="it belongs to another user, and what lies there is run as a program")
    if status.st_mode & 0o022:
        raise SavedProgramError(
            error_message(
                where=os.fspath(path),
                what="others may write to it, and what lies there is run as a program",
                expected="a folder and files that only their owner can write to",
                advice=f"chmod go-w {path}, if you know what lies there; else save the program again",
            )
        )


def _identity(lowered: jax.stages.Lowered, *, devices: Sequence[Any], config_text: str) -> dict[str, Any]:
    """All that has to be the same where a program is loaded."""
    return {
        "format": _FORMAT,
        "program": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "libtpu")},
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        # A program for CPUs uses all that the one where it was compiled can do.
        "cpu": _cpu_features() if devices[0].platform == "cpu" else "",
        "devices": hashlib.sha256(repr([_place(device) for device in devices]).encode()).hexdigest(),
        "flags": {name: _flags(os.environ.get(name, "")) for name in _FLAGS},
        "config": config_text.splitlines(),
    }


def _cpu_features() -> str:
    """What this machine's CPU can do, as a hash; where the system does not list it, its name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    # As x86 and as ARM call them; the same for all cores.
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _place(device: Any) -> tuple[Any, ...]:
    return (device.id, *(getattr(device, name, None) for name in ("coords", "core_on_chip", "slice_index")))


def _flags(text: str) -> str:
    return " ".join(sorted(flag for flag in text.split() if not flag.startswith(_FLAGS_OF_DEVICES)))


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What is not the same here, a phrase each."""
    found = []
    for kind in ("versions", "flags"):
        # A program for CPUs does not depend on what TPUs would need.
        names = [
            x for x in here[kind] if x not in ("libtpu", "LIBTPU_INIT_ARGS") or "TPU" in here["device_kind"]
        ]
        found += [
            f"{name} {saved[kind][name]!r}, here {here[kind][name]!r}"
            for name in names
            if saved[kind][name] != here[kind][name]
        ]
    for kind, name in (("device_kind", "devices of kind"), ("num_devices", "number of devices")):
        if saved[kind] != here[kind]:
            found.append(f"{name} {saved[kind]!r}, here {here[kind]!r}")
    if not found and saved["cpu"] != here["cpu"]:
        found.append("a CPU with other features")
    if not found and saved["devices"] != here["devices"]:
        found.append("the same number of devices, but elsewhere in the network")
    if not found and saved["program"] != here["program"]:
        found.append(_config_differences(saved["config"], here["config"]))
    return found


def _config_differences(saved: Sequence[str], here: Sequence[str]) -> str:
    before, after = set(saved), set(here)
    lines = [
        *(f"saved {line}" for line in saved if line not in after),
        *(f"here {line}" for line in here if line not in before),
    ]
    if not lines:
        return "the config is the same, but the code makes another program of it"
    more = f" and {len(lines) - _MAX_LINES} more lines" if len(lines) > _MAX_LINES else ""
    return ", ".join(lines[:_MAX_LINES]) + more


def _error(path: pathlib.Path, *, what: str) -> SavedProgramError:
    return SavedProgramError(
        error_message(
            where=os.fspath(path),
            what=what,
            expected="what `axlearn plan --save_executable` keeps of the same config, code, versions and devices",
            advice="Save it again, or set executable_fallback=True to compile where it cannot be used",
        )
    )
