"""What this process may use of the machine: cores and memory, container limits included.

The loader asks, to choose the number of threads and the size of the KV cache, and telemetry does.
`root` is where the kernel's files are found; tests plant their own.
"""

import functools
import os
from pathlib import Path

_ROOT = Path("/")
_NO_LIMIT_BYTES = 1 << 60  # version 1 of control groups has a number for it
_CPU_FOLDER = Path("/sys/devices/system/cpu")


def physical_cores() -> int:
    """Physical cores that the process's affinity and its CPU quota leave it; at least 1."""
    cpus = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in cpus}
    quota = cpu_quota()
    return max(1, len(cores) if quota is None else min(len(cores), int(quota[0])))


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Bytes that can be allocated without swapping or meeting a container's limit."""
    available = [_meminfo_bytes("MemAvailable", root)]
    for folder in cgroup_folders("memory", root):
        limit = _read_integer(folder / "memory.max", folder / "memory.limit_in_bytes")
        if limit is None or limit >= _NO_LIMIT_BYTES:
            continue
        used = _read_integer(folder / "memory.current", folder / "memory.usage_in_bytes")
        if used is not None:
            # The page cache counts as used there, but it makes room.
            available.append(limit - used + _page_cache_bytes(folder))
    return max(0, min(available))


def total_memory_bytes(root: Path = _ROOT) -> int:
    """Bytes of memory, or the tightest of the control groups' limits."""
    limits = [_meminfo_bytes("MemTotal", root)]
    for folder in cgroup_folders("memory", root):
        limit = _read_integer(folder / "memory.max", folder / "memory.limit_in_bytes")
        if limit is not None:
            limits.append(limit)
    return min(limits)


def _siblings(cpu: int) -> str:
    path = _CPU_FOLDER / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    try:
        return path.read_text()
    except OSError:
        return str(cpu)


def cpu_quota(root: Path = _ROOT) -> tuple[float, Path] | None:
    """The tightest CPU quota on the way up, in cores, and its control group; None without one."""
    quotas = []
    for folder in cgroup_folders("cpu", root):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            quota = str(_read_integer(folder / "cpu.cfs_quota_us") or "max")
            period = str(_read_integer(folder / "cpu.cfs_period_us") or 0)
        if quota not in ("max", "-1") and int(period) > 0:
            quotas.append((int(quota) / int(period), folder))
    return min(quotas, default=None)


@functools.cache  # telemetry asks twice a second
def cgroup_folders(controller: str, root: Path = _ROOT) -> tuple[Path, ...]:
    """The process's control groups with this controller, the innermost first, up to the top."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ()
    folders: list[Path] = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / name.lstrip("/")
        folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return tuple(folders)


def _meminfo_bytes(field: str, root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    pages = "SC_PHYS_PAGES" if field == "MemTotal" else "SC_AVPHYS_PAGES"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)


def _page_cache_bytes(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(maxsplit=1) for line in lines if " " in line)
    # The groups below count: by themselves in version 2, under names of their own in version 1.
    names = ("inactive_file", "active_file")
    return sum(int(fields.get(f"total_{name}", fields.get(name, 0))) for name in names)


def _read_integer(*paths: Path) -> int | None:
    """The number in the first of the files that holds one; "max" is none."""
    for path in paths:
        try:
            return int(path.read_text())
        except (OSError, ValueError):
            continue
    return None
