"""Ends a process when its parent ends, even if the parent was killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def prepare() -> None:
    """Load the C library now, so that a forked child need not."""
    global _libc
    if sys.platform == "linux":
        _libc = ctypes.CDLL(None)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, if the kernel can. If the parent has
    already ended, end now.

    On other systems, the end of its sockets ends this process. `parent`: the process id of the
    parent.
    """
    if _libc is None:
        prepare()
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


_libc: ctypes.CDLL | None = None
