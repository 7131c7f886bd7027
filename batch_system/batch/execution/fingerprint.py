"""Fingerprints: which failures of a task are the same error, although their messages differ in
numbers, ids and instants.

A fingerprint is a hash of the class of the error, the class of its root cause, the first line of
its message without the text that changes from run to run, and the innermost place in the author's
code (file and function, without the line number).
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sysconfig
from pathlib import Path
from types import CodeType, TracebackType

from batch_system import errors, failures

VERSION = 1
"""Rises when the way of computing fingerprints changes, so that those of two versions are never
equal by chance.
"""

TIMED_OUT, INTERRUPTED, EMPTY, QUARANTINE = "timed out", "interrupted", "empty", "quarantine"
"""Fingerprints of a run without an error in its code: it exceeded its timeout; its service stopped,
and it may not be repeated; its result is not what the task expects; it has put items into
quarantine.
"""

LONGEST_OWN = 200
"""How many characters of an exception's own `fingerprint` count."""
MOST_CAUSES = 50

_CHANGING = re.compile(
    r"\?\S*"  # the query of an address
    r"|\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"
    r"|\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?(?:\.\d+)?(?:Z|[+-]\d\d:?\d\d)?)?"
    r"|\b(?:0x)?[0-9a-f]{8,}\b"
    r"|\d+",
    re.IGNORECASE,
)
_NOT_AUTHORS = tuple(
    f"{folder}/"
    for folder in {
        *(
            str(Path(sysconfig.get_path(name)).resolve())
            for name in ("stdlib", "platstdlib", "purelib", "platlib")
        ),
        str(Path(failures.__file__).resolve().parent),
    }
)


def fingerprint_of(error: BaseException) -> str:
    """The fingerprint of a failure: "1:" (the version) and 12 hexadecimal digits. Never raises.

    An exception may define its own in an attribute `fingerprint`. Failures with equal fingerprints
    are the same error.
    """
    own = inspect.getattr_static(error, "fingerprint", None)
    if isinstance(own, str) and own:
        return _hash_of("own", own[:LONGEST_OWN])
    root = _root_of(error)
    first_line = failures.line_of(error).partition(": ")[2]
    return _hash_of(
        _class_of(error), _class_of(root), without_changing(first_line), _place_of(error)
    )


def without_changing(line: str) -> str:
    """A line without the text that changes from run to run: numbers, ids and instants."""
    return _CHANGING.sub("*", line)


def _hash_of(*parts: str) -> str:
    encoded = "\0".join(parts).encode("utf-8", "surrogatepass")
    return f"{VERSION}:{hashlib.sha256(encoded).hexdigest()[:12]}"


def _class_of(error: BaseException) -> str:
    module = type(error).__module__
    # A fingerprint outlives the names of modules: this was the name of `errors` at first.
    module = "service.errors" if module == errors.__name__ else module
    return f"{module}.{type(error).__qualname__}"


def _root_of(error: BaseException) -> BaseException:
    """The root cause: the error's cause, or the error during whose handling it was raised, and so
    on.
    """
    for _ in range(MOST_CAUSES):
        earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if earlier is None:
            break
        error = earlier
    return error


def _place_of(error: BaseException) -> str:
    """The innermost frame in the author's code, as the name of its file and function. Empty if
    there is none.
    """
    place, frames = "", error.__traceback__
    while frames is not None:
        if _is_authors(code := _code_of(frames)):
            place = f"{Path(code.co_filename).name} {code.co_qualname}"
        frames = frames.tb_next
    return place


def _code_of(frames: TracebackType) -> CodeType:
    return frames.tb_frame.f_code


def _is_authors(code: CodeType) -> bool:
    return not code.co_filename.startswith((*_NOT_AUTHORS, "<frozen"))
