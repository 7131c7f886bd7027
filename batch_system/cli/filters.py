"""The options that select runs, for `batch runs`, `batch cancel`, `batch retry` and `batch ack`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batch_system.cli.options import pairs
from batch_system.errors import InvalidParameters

if TYPE_CHECKING:
    from batch_system.operations.asking.filter import RunFilter

FILTER = {"created_since": "--since", "created_until": "--until"}
"""The names of options that differ from the name of the field."""


def refuse_slow(wanted: RunFilter) -> None:
    """Raises InvalidParameters for a search in parameters, texts or errors that would read all
    runs, and for a parameter that is given twice.
    """
    pairs(wanted.param)
    has_begin = wanted.created_since is not None or wanted.ended_since is not None
    if (wanted.param or wanted.text is not None) and (wanted.task is None or not has_begin):
        raise InvalidParameters("--param and --text need --task, and --since or --ended-since")
    if wanted.fingerprint is not None and wanted.task is None:
        raise InvalidParameters("--fingerprint needs --task")
