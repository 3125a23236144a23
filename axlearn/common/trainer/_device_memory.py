"""How much memory there is for a run on the devices of this process."""

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import jax

_ROOT = pathlib.Path("/")


class MemoryThere(NamedTuple):
    """Memory that is free for a run.

    Attributes:
        num_bytes: Bytes per device, on the device that has least.
        source: Whose bytes these are, in words.
    """

    num_bytes: int
    source: str


def memory_there(devices: Sequence[jax.Device]) -> Optional[MemoryThere]:
    """Returns the memory that is free on each device of this process; None where nobody can tell.

    An accelerator says itself what its allocator may take and what is in use. The CPU devices of a process share
    what the machine, or the control group that the process lives in, has left.

    Args:
        devices: The devices of a mesh, of any processes.
    """
    local = [device for device in devices if device.process_index == jax.process_index()]
    if not local:
        return None
    if local[0].platform == "cpu":
        return _cpu_memory_there(num_devices=len(local))
    free = []
    for device in local:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        free.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return MemoryThere(max(min(free), 0), f"free on {local[0].device_kind}")


def _cpu_memory_there(*, num_devices: int) -> Optional[MemoryThere]:
    free = free_host_bytes()
    if free is None:
        return None
    shared = "" if num_devices == 1 else f", shared by its {num_devices} devices"
    return MemoryThere(free // num_devices, f"free memory of this machine{shared}")


def free_host_bytes(root: pathlib.Path = _ROOT) -> Optional[int]:
    """Returns the bytes that this process may still take on its machine; None where the system does not say.

    That is what the kernel estimates to be available without swapping, or less where a control group (a
    container, a batch job) has less left. Both count file cache that can be dropped as available.

    Args:
        root: The root of the file system; tests have their own.
    """
    available = _field(root / "proc/meminfo", r"^MemAvailable:\s+(\d+) kB$")
    if available is None:
        return None
    return min([available * 1024, *_free_in_control_groups(root)])


def _free_in_control_groups(root: pathlib.Path) -> Iterator[int]:
    """Yields what is left below each limit that this process stands under."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # A container may see its own group as the root, in which case the path leads nowhere.
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == mount.parent:
                break
            yield from _free_below(folder, *names)


def _free_below(folder: pathlib.Path, limit_name: str, usage_name: str, stat_prefix: str) -> Iterator[int]:
    limit, usage = _field(folder / limit_name, r"^(\d+)$"), _field(folder / usage_name, r"^(\d+)$")
    if limit is not None and usage is not None:
        # What a group has read of files counts as its use, recently read or not, and can be dropped.
        names = (f"{stat_prefix}active_file", f"{stat_prefix}inactive_file")
        cache = sum(_field(folder / "memory.stat", rf"^{name} (\d+)$") or 0 for name in names)
        yield max(limit - usage + cache, 0)


def _field(path: pathlib.Path, pattern: str) -> Optional[int]:
    for line in _lines(path):
        match = re.match(pattern, line)
        if match:
            return int(match.group(1))
    return None


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        # Not Linux, or another version of control groups.
        return []
