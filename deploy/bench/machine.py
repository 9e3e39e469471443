"""What a benchmark ran on, and how disturbed it was.

A shared machine loses time to its neighbours (`steal` in /proc/stat) and to other processes; a figure without both
beside it means little.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# a path from the root, with its last part; an address's slashes are none
_PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/]+/)*([^\s/]+)")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def command(module: str, words: Sequence[str]) -> str:
    """The command line of a report, with the last part of every path: where things lie here concerns nobody else."""
    return shlex.join(["python", "-m", module, *(_PATH.sub(r"\1", word) for word in words)])


def describe() -> dict[str, object]:
    """Processor, memory, versions, commit and date."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in ("torch", "numpy", "nats-py", "msgspec", "uvicorn", "uvloop")},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class Disturbance:
    """Cores lost while a block ran: `with Disturbance() as lost: ...; lost.steal_cores`."""

    steal_cores = 0.0
    busy_cores = 0.0

    def __enter__(self) -> "Disturbance":
        self._start = (time.perf_counter(), *_stat())
        return self

    def __exit__(self, *exc: object) -> None:
        self.look()

    def look(self) -> None:
        """Take in what was lost up to now."""
        wall_s, busy_s, steal_s = (
            now - then for now, then in zip((time.perf_counter(), *_stat()), self._start, strict=True)
        )
        self.steal_cores = round(steal_s / wall_s, 3)
        self.busy_cores = round(busy_s / wall_s, 3)


def cpu_seconds(pids: list[int]) -> float:
    """User and system time so far of these processes and all their descendants."""
    return sum(_tree(pids).values())


def peak_rss_tree_mib(pid: int) -> float:
    """`peak_rss_mib` of a process and all its descendants, added up: what they share is counted several times."""
    total = 0.0
    for each in _tree([pid]):
        try:
            total += peak_rss_mib(each)
        except OSError:  # it ended meanwhile
            continue
    return total


def peak_rss_mib(pid: int | None = None) -> float:
    """The most memory a process has held (VmHWM); of this process without `pid`."""
    for line in Path(f"/proc/{pid or 'self'}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def _tree(pids: list[int]) -> dict[int, float]:
    """CPU seconds of these processes and all their descendants, those that still run."""
    parents: dict[int, tuple[int, float]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:  # it ended meanwhile
                continue
            parents[int(entry.name)] = (int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS_PER_S)
    wanted = set(pids)
    while more := {pid for pid, (parent, _) in parents.items() if parent in wanted} - wanted:
        wanted |= more
    return {pid: parents[pid][1] for pid in wanted if pid in parents}


def rss_bytes() -> int:
    """What this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _stat() -> tuple[float, float]:
    user, nice, system, _, _, irq, soft, steal, *_ = (
        int(field) for field in Path("/proc/stat").read_text().split()[1:11]
    )
    return (user + nice + system + irq + soft) / TICKS_PER_S, steal / TICKS_PER_S


def usable_cores() -> int:
    """Those this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; where it has none, float32 is faster."""
    return bool({"avx512_bf16", "amx_bf16"} & _flags())


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = _flags()
    wide = [flag for flag in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags]
    return f"{name} ({' '.join(wide)})"


def _flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def commit() -> str:
    """Of the sources that run; "-" outside a repository."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return found.stdout.strip() or "-"
