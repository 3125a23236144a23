"""Makes the process ready to train: the backend, the random numbers, the compilation cache.

Importing this loads jax; calling `setup` before any array exists is what matters.
"""

import functools
import logging
import os
import re
from typing import Optional

import jax
from absl import logging as absl_logging

import axlearn
from axlearn.common.config import error_message
from axlearn.common.distributed import (
    HEARTBEAT_TIMEOUT_SECONDS,
    INITIALIZATION_TIMEOUT_SECONDS,
    Place,
    hold_roll_call,
)
from axlearn.common.file_system import cache_dir
from axlearn.common.peer_failures import end_with_peers as end_with_peers
from axlearn.common.peer_failures import watch_peers

# What users call a backend, and what the devices of it call their platform.
BACKENDS = ("cpu", "gpu", "tpu")
_ROOT = os.path.join(os.path.dirname(os.path.abspath(axlearn.__file__)), "")


def setup(
    *,
    jax_backend: Optional[str] = None,
    data_dir: Optional[str] = None,
    leave_no_trace: bool = False,
    place: Optional[Place] = None,
    initialization_timeout: int = INITIALIZATION_TIMEOUT_SECONDS,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT_SECONDS,
) -> None:
    """Sets jax up for training; call it once, before any computation.

    Random numbers are partitionable threefry, so that initial parameters do not depend on the mesh. Compiled
    programs are kept in `$AXLEARN_CACHE_DIR/jax` (a folder of this user alone, because such files are
    executable code), unless `$JAX_COMPILATION_CACHE_DIR` names another place. Those for several CPU devices, of one
    process or several, are not kept: XLA's CPU collectives can wait for each other for ever in a program that comes
    from there.

    Args:
        jax_backend: "cpu", "gpu" or "tpu": anything else on this machine is an error. None: what jax finds
            first.
        data_dir: Where data sets and tokenizers lie, for everything that reads `$DATA_DIR`. None: as the
            environment says.
        leave_no_trace: Whether to keep no compiled programs, and to take no memory of a GPU in advance: for a
            process that only looks.
        place: Which process of a run this is, from `distributed.find_place`. None: the only one.
        initialization_timeout: Seconds to wait for the other processes.
        heartbeat_timeout: Seconds without a sign of life of a process after which the others end.

    Raises:
        ValueError: If `jax_backend` is not a backend.
        PeersMissingError: If other processes do not come.
        PermissionError: If others may write to the compilation cache.
        RuntimeError: If the machine does not have the backend.
    """
    if jax_backend is not None and jax_backend not in BACKENDS:
        raise ValueError(
            error_message(
                where="--jax_backend",
                what=f"{jax_backend!r} is not a backend",
                expected=f"one of {', '.join(BACKENDS)}, or to leave it out",
            )
        )
    if data_dir is not None:
        os.environ["DATA_DIR"] = data_dir
    _widen_thread_pool_of_fake_devices()
    jax.config.update("jax_threefry_partitionable", True)
    has_peers = place is not None and not place.is_alone
    if place is not None and has_peers:
        if jax_backend is not None and "JAX_PLATFORMS" not in os.environ:
            jax.config.update("jax_platforms", jax_backend)
        _join(
            place,
            jax_backend=jax_backend,
            initialization_timeout=initialization_timeout,
            heartbeat_timeout=heartbeat_timeout,
        )
        watch_peers()
    if leave_no_trace:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        jax.config.update("jax_enable_compilation_cache", False)
    elif _num_fake_devices() > 1 or (has_peers and jax.default_backend() == "cpu"):
        # What orders collectives is not part of a stored program: with jax 0.10.2, a step with gradient
        # accumulation over 8 devices ran when just compiled, and hung at its second run when loaded (2026-11-21).
        jax.config.update("jax_enable_compilation_cache", False)
    elif "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        _use_compilation_cache(str(cache_dir() / "jax"))
    _check_backend(jax_backend)


def is_first_process() -> bool:
    """Returns whether this process is the one that speaks for all; to be asked after `setup`."""
    return jax.process_index() == 0


def set_up_logging() -> None:
    """Sends what this package logs to standard error, with the time in front as progress lines have it.

    Of other packages only warnings are shown. A process that has set up its logging already keeps it.
    """
    # `Module.vlog` logs through absl, whose default drops what is no warning.
    absl_logging.set_verbosity(absl_logging.INFO)
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.pathname.startswith(_ROOT))
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S", handlers=[handler]
    )


def _join(
    place: Place, *, jax_backend: Optional[str], initialization_timeout: int, heartbeat_timeout: int
) -> None:
    """Starts jax.distributed with the other processes, which are known to be there by then."""
    # It would take SIGTERM for itself, in C++, and Ctrl-C not; the trainer agrees with its peers on when to stop.
    jax.config.update("jax_enable_preemption_service", False)
    initialize = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=initialization_timeout,
        heartbeat_timeout_seconds=heartbeat_timeout,
    )
    if place.is_found_by_jax:
        try:
            initialize()
        except ValueError as e:
            # jax asked all runtimes that it knows, and none says who the others are.
            raise _unusable(jax_backend or "tpu", f"there is no runtime of a TPU: {e}") from e
        return
    hold_roll_call(place, timeout_seconds=initialization_timeout)
    initialize(
        coordinator_address=place.coordinator,
        num_processes=place.num_processes,
        process_id=place.process_id,
        local_device_ids=place.local_device_ids,
        # What the environment says has been read.
        cluster_detection_method="deactivate",
    )
    logging.info("This is %s.", place)


def _widen_thread_pool_of_fake_devices() -> None:
    """Keeps several CPU devices of one process from waiting for each other for ever.

    XLA's CPU collectives block threads of a pool as large as the number of cores or of devices, whichever is more.
    With as many cores as devices, one device can wait in one collective and another in the next (seen with two
    and two, jax 0.10.2). The size is read when the backend starts.
    """
    if _num_fake_devices():
        os.environ.setdefault("NPROC", str(8 * _num_fake_devices()))


def _num_fake_devices() -> int:
    """Returns how many devices the environment asks one process to make of its CPU; 0 if it does not say."""
    match = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(match.group(1)) if match else 0


def _use_compilation_cache(path: str) -> None:
    os.makedirs(path, mode=0o700, exist_ok=True)
    if os.stat(path).st_mode & 0o022:
        raise PermissionError(
            error_message(
                where=f"compilation cache {path}",
                what="others may write to it, and what lies there is run as a program",
                expected="a folder that only its owner can write to",
                advice=f"chmod go-w {path}, or set $AXLEARN_CACHE_DIR to another place.",
            )
        )
    jax.config.update("jax_compilation_cache_dir", path)
    # Every program counts: a start compiles dozens of small ones beside the step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _check_backend(jax_backend: Optional[str]) -> None:
    """Refuses a machine that is not what the user asked for, rather than to train on its CPU for a week."""
    if jax_backend is None:
        return
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", jax_backend)
    try:
        platforms = {device.platform for device in jax.devices()}
    except RuntimeError as e:
        raise _unusable(jax_backend, str(e)) from e
    if platforms != {jax_backend}:
        raise RuntimeError(
            error_message(
                where="--jax_backend",
                what=f"{jax_backend!r}, but the devices here are {', '.join(sorted(platforms))}",
                advice="Leave the flag out to use what this machine has.",
            )
        )


def _unusable(jax_backend: str, why: str) -> RuntimeError:
    return RuntimeError(
        error_message(
            where="--jax_backend",
            what=f"{jax_backend!r} cannot be used here: {why}",
            advice="Leave the flag out to use what this machine has.",
        )
    )
