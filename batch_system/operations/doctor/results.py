"""The results of the doctor."""

from __future__ import annotations

from typing import Literal

from batch_system.operations.asking.results import Result

Health = Literal["good", "warning", "bad"]


class Check(Result):
    """What was found about one part. `part`: such as ledger, disk or channels. `text`: what is so.
    `do`: what to do about it; None if it is good.
    """

    part: str
    health: Health
    text: str
    do: str | None = None


class Diagnosis(Result):
    """All checks, in the order in which to mend what is wrong. `ok`: none is bad."""

    ok: bool
    checks: list[Check]
