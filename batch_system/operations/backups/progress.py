"""The listeners for the progress of a backup, a check or a copy. Imports none of the code that
makes backups.
"""

from __future__ import annotations

from collections.abc import Callable

from batch_system.batch.context.current_run import current_run_if_any

OnProgress = Callable[[int, int, str], None]
"""Called with the bytes that are done, the bytes in all (0: not known), and the stage. Any thread
may call it.
"""

MEGABYTE = 1_000_000


def ignore_progress(done: int, total: int, stage: str) -> None:
    """For callers that don't show progress."""


def report_to_run() -> OnProgress:
    """A function that reports progress to the current run, in megabytes. Without a current run it
    does nothing.
    """
    run = current_run_if_any()

    def report(done: int, total: int, stage: str) -> None:
        if run:
            run.progress(done // MEGABYTE, max(total, done) // MEGABYTE or None, f"{stage} (MB)")

    return report
