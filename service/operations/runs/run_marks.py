"""What the ledger has on a run about incidents, and on a task about the people who deal with them."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel


class TaskContact(BaseModel):
    """`owner`: whose a task is. `runbook`: the address of what to do. `muted_until`: until then nothing is sent."""

    owner: str | None
    runbook: str | None
    muted_until: datetime | None


class RunMarks(BaseModel):
    """`fingerprint`: what is wrong with the run, as a class of errors. `noticed_at`: when the watch has seen its end.

    `acknowledged`: the incident with which a person has acknowledged it. `made_good_by`: the run whose success made it
    good, which may be the run itself.
    """

    fingerprint: str | None
    noticed_at: datetime | None
    acknowledged: str | None
    made_good_at: datetime | None
    made_good_by: str | None
