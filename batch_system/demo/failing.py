"""Makes the exceptions of the story as the runs of its tasks would raise them: with a place in the
task's file.
"""

from __future__ import annotations

import json
import smtplib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import httpx
import jinja2

from batch_system import failures
from batch_system.batch.execution.fingerprint import TIMED_OUT, fingerprint_of
from batch_system.batch.ledger.run_logs import LogLine
from batch_system.demo.cast import PARTS
from batch_system.errors import RetryAfter

TIMED_OUT_AFTER = "timed out after "
_NAMES = {
    "httpx": httpx,
    "jinja2": jinja2,
    "json": json,
    "smtplib": smtplib,
    "RetryAfter": RetryAfter,
}

_ERRORS = (OSError, ValueError, KeyError, RetryAfter, httpx.HTTPError, jinja2.TemplateError)


@dataclass(frozen=True)
class Failure:
    """How an attempt of a task has failed: what the service writes of it."""

    task: str
    error: BaseException

    @property
    def reason(self) -> str:
        return str(self.error) if self.is_timeout else failures.line_of(self.error)

    @property
    def is_timeout(self) -> bool:
        return isinstance(self.error, TimeoutError) and str(self.error).startswith(TIMED_OUT_AFTER)

    @property
    def outcome(self) -> str:
        return "timed out" if self.is_timeout else "failed"

    @property
    def fingerprint(self) -> str:
        return TIMED_OUT if self.is_timeout else fingerprint_of(self.error)

    @property
    def facts(self) -> dict[str, str]:
        return failures.facts_of(self.error)

    def line(self, at: datetime, follows: str = "") -> LogLine:
        """The last line of the attempt's log, which the service writes."""
        text = f"{self.task} failed: {self.reason}{follows}\n{failures.traceback_of(self.error)}"
        return LogLine(stamp(at), "error", "batch_system.batch", text)


def failure_of(task: str, expression: str) -> Failure:
    """The failure of a task whose code raises this expression. Call it in the folder of the
    demonstration.
    """
    file = Path(f"tasks/{task}.py").resolve()
    lines = file.read_text().split("\n")
    number = next((n for n, line in enumerate(lines) if f"raise {expression}" in line), None)
    if number is None:
        number = next(n for n, line in enumerate(lines) if "asyncio.sleep" in line)
    code = f"class {PARTS[task].class_name}:\n async def _work(self): raise {expression}"
    place = "\n" * (number - 1) + code
    namespace = dict(_NAMES)
    exec(compile(place, str(file), "exec"), namespace)
    work = namespace[PARTS[task].class_name]()._work()  # type: ignore[operator]
    try:
        work.send(None)
    except _ERRORS as error:
        frames = error.__traceback__
        return Failure(task, error.with_traceback(frames.tb_next if frames is not None else None))
    raise AssertionError(f"{expression} did not raise")


def stamp(at: datetime) -> str:
    """An instant as the lines of a log have it."""
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
