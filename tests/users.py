"""Two users of one machine. Where the tests run as root both are real; elsewhere one user plays
both.

What only a second user can show, such as a file that is somebody else's, is not shown then: the
tests' ids say which of the two it was. Everything else (links, FIFOs, names that are taken) is the
same for one user.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

ARE_TWO = os.geteuid() == 0
WHO = "as-two-users" if ARE_TWO else "as-one-user"

OWN, OTHER = (1, 65534) if ARE_TWO else (os.geteuid(), os.geteuid())
"""Neither is root, who may do everything."""


@contextmanager
def user(uid: int) -> Iterator[None]:
    """What this process does inside, it does as that user. Its threads do so too, so let none of
    them run meanwhile.
    """
    if not ARE_TWO:
        yield
        return
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder that every user may write to, as /tmp is. That of a test is not: its parents are
    closed to others.
    """
    folder = Path(tempfile.mkdtemp(prefix="batch-tests-", dir="/tmp"))
    folder.chmod(0o1777)
    try:
        yield folder
    finally:
        rmtree(folder)
