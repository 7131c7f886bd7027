"""Why a child has ended before its run, in words."""

from __future__ import annotations

import signal
from pathlib import Path

from batch_system.errors import MemoryExceeded, ProcessDied

_VMSTAT = Path("/proc/vmstat")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def exit_error(code: int, has_kernel_killed: bool) -> ProcessDied:
    """The error of a run whose process has ended with this code, which is negative after a signal.

    `has_kernel_killed`: whether the kernel has just killed a process because the machine ran out of
    memory.
    """
    if code >= 0:
        return ProcessDied(f"exited with status {code} before run() had ended")
    if code == -signal.SIGKILL and has_kernel_killed:
        return ProcessDied("killed by the kernel, because the machine ran out of memory")
    try:
        name = f" ({signal.Signals(-code).name})"
    except ValueError:
        name = ""
    return ProcessDied(f"killed by signal {-code}{name}")


def memory_error(memory: int) -> MemoryExceeded:
    """The error of a run that has used more than its `memory` in bytes."""
    size, unit = float(memory), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return MemoryExceeded(f"used more than {size:.4g} {_UNITS[unit]}")


def kernel_kills() -> int:
    """How many processes the kernel has killed since its start because the machine ran out of
    memory; 0 if not known.
    """
    try:
        lines = _VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
