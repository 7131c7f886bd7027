"""The versions of this package, of the libraries that it needs, and of the application that the
service runs in. The first and the last show that a new version was deployed.
"""

from __future__ import annotations

import hashlib
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from batch_system.errors import BatchError

COMMIT = re.compile(r"[0-9a-f]{40,64}")
LARGEST_FILE = 10_000_000
DISTRIBUTION = "batch-system-core"
"""The distribution that has the code of this package. `batch-system` installs it with all that a
service needs.
"""


def package_version() -> str:
    """The version of the installed package; "unknown" if it is not installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


def refuse_old_libraries() -> None:
    """Raises BatchError if a library that this package always needs is missing, or older than it
    has to be.

    Package managers install what is needed, but a later installation of something else may replace
    a library. The process would fail anywhere. It reads files, so call it in a thread.
    """
    from packaging.requirements import Requirement

    for line in _requirements():
        library = Requirement(line)
        if library.marker is not None and not library.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(library.name)
        except PackageNotFoundError:
            installed = "not installed"
        if installed == "not installed" or not library.specifier.contains(installed, True):
            raise BatchError(
                f"{library.name} is {installed}, and batch-system needs "
                f"{library.name}{library.specifier}: "
                f"pip install --upgrade '{library.name}{library.specifier}'"
            )


def _requirements() -> list[str]:
    try:
        return requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # the code is used without an installation
        return []


def missing(what: str, error: ImportError) -> BatchError:
    """The error that `what` can't be done, because a library of `batch-system` is not installed,
    such as with `batch-system-core` alone.
    """
    return BatchError(f"{what} needs {error.name}, which is missing: pip install batch-system")


def application_version(given: str | None, folder: Path, here: Path) -> str:
    """`given`; otherwise the commit of the git repository that `here` is in; otherwise a hash of
    the task files in `folder`.

    It reads files, so call it in a thread.
    """
    return given or _commit(here) or _hash_of(folder)


def _commit(here: Path) -> str | None:
    """The first 12 digits of the commit that is checked out; None without a repository, or if it
    can't be read.
    """
    for parent in (here, *here.parents):
        if (parent / ".git").is_dir():
            try:
                return _head(parent / ".git")
            except (OSError, UnicodeError):
                return None
    return None


def _head(git: Path) -> str | None:
    head = (git / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref: "):
        return head[:12] if COMMIT.fullmatch(head) else None
    ref = head.removeprefix("ref: ")
    if ".." in ref or not ref.startswith("refs/"):
        return None
    file = git / ref
    if file.is_file():
        commit = file.read_text(encoding="utf-8").strip()
        return commit[:12] if COMMIT.fullmatch(commit) else None
    packed = (git / "packed-refs").read_text(encoding="utf-8")
    commits = (line.split(" ") for line in packed.splitlines() if line.endswith(f" {ref}"))
    return next((commit[:12] for commit, *_ in commits if COMMIT.fullmatch(commit)), None)


def _hash_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        try:
            if file.stat().st_size <= LARGEST_FILE:
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
        except OSError:  # a file that can't be read is reported when it is loaded
            continue
    return f"tasks {digest.hexdigest()[:12]}"
