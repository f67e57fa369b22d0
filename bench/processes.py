"""What processes use, from /proc: CPU time, memory, descriptors."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Usage:
    """Sums over some processes. `pss_bytes` divides shared pages among those who share them."""

    processes: int
    cpu_s: float
    rss_bytes: int
    pss_bytes: int
    descriptors: int
    threads: int


def usage(pids: Sequence[int]) -> Usage:
    """What these processes use together at this moment; those that have ended count nothing."""
    processes = cpu_ticks = rss_pages = pss_bytes = descriptors = threads = 0
    for pid in pids:
        fields = _stat(pid)
        if not fields:
            continue
        processes += 1
        cpu_ticks += int(fields[11]) + int(fields[12])
        threads += int(fields[17])
        rss_pages += int(fields[21])
        with contextlib.suppress(OSError):
            pss_bytes += _pss_bytes(pid)
            descriptors += sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return Usage(processes, cpu_ticks / _TICKS_PER_S, rss_pages * _PAGE_BYTES, pss_bytes, descriptors, threads)


def command_line(pid: int) -> str:
    """How the process was started, for people."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def cpu_s_by_process() -> dict[int, float]:
    """CPU time that each living process and kernel thread has used.

    /proc/stat would be simpler, but it samples at ticks, with which periodic load falls in step.
    """
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    ticks = {pid: int(fields[11]) + int(fields[12]) for pid in pids if (fields := _stat(pid))}
    return {pid: count / _TICKS_PER_S for pid, count in ticks.items()}


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on; none when the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _pss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
