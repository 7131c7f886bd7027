"""Imports of files of tasks that take long are logged, since nothing else would show that one
hangs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from service import clock
from service.logs import get_logger

logger = get_logger("service.batch.tasks.discovery")

SLOW_SECONDS = 5.0
"""An import that takes longer is logged."""


class SlowImports:
    """Watches imports, one at a time, from one thread: a thread for each file takes longer than
    many an import.
    """

    def __init__(self) -> None:
        self._import: tuple[Path, float] | None = None
        self._ended = threading.Event()

    def __enter__(self) -> SlowImports:
        self._thread = threading.Thread(target=self._look, name="batch-imports", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    @contextmanager
    def watched(self, path: Path) -> Iterator[None]:
        """Log it if the block, which imports this file, takes longer than SLOW_SECONDS."""
        self._import = path, clock.monotonic()
        try:
            yield
        finally:
            self._import = None

    def _look(self) -> None:
        logged = None
        while not self._ended.wait(SLOW_SECONDS / 5):
            going_on = self._import
            if (
                going_on is None
                or going_on is logged
                or clock.monotonic() < going_on[1] + SLOW_SECONDS
            ):
                continue
            logged = going_on
            logger.warning(
                f"{going_on[0]}: its import has not ended after {SLOW_SECONDS:g} s; no other "
                "file is loaded before that"
            )
