"""How much memory processes use, from /proc. Without /proc nothing is known, and memory has no
limit.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
ROOM = 32 * 2**20
"""What a child may map beyond its bound, in bytes, because the stacks of its threads are mapped but
hardly used.
"""


def data_of_this_process() -> tuple[int, int]:
    """The bytes of data that this process has mapped (VmData), and those that are in memory
    (RssAnon); 0 if not known.
    """
    try:
        text = (PROC / "self/status").read_text()
    except OSError:
        return 0, 0
    return _field(text, "VmData"), _field(text, "RssAnon")


def bound(memory: int) -> None:
    """Let this process map `memory` bytes more than it has now. Beyond that, Python raises
    MemoryError.
    """
    mapped, _ = data_of_this_process()
    if mapped:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        with suppress(OSError, ValueError):  # a lower hard limit is set, and applies
            resource.setrlimit(resource.RLIMIT_DATA, (mapped + memory + ROOM, hard))


def unbound() -> None:
    """Lift the bound, so that the end of the run can still be reported."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def used_by_groups(leaders: Iterable[int]) -> dict[int, int]:
    """The bytes in memory that the process groups of these leaders use, by the process id of the
    leader.

    Pages of files are left out. It reads each process of the machine, so call it in a thread.
    """
    used = dict.fromkeys(leaders, 0)
    for entry in os.listdir(PROC) if used else ():
        if entry.isdecimal() and (group := _group_of(entry)) in used:
            with suppress(OSError):
                if int(entry) == group:
                    used[group] += _field((PROC / entry / "status").read_text(), "RssAnon")
                else:  # pages shared with the leader count proportionally
                    used[group] += _field((PROC / entry / "smaps_rollup").read_text(), "Pss_Anon")
    return used


def _group_of(process: str) -> int:
    try:
        return int(
            (PROC / process / "stat").read_text(errors="replace").rpartition(")")[2].split()[2]
        )
    except (OSError, IndexError):
        return 0


def _field(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
